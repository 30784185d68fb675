"""A foreign registry made safe to serve from: its intent is followed, its bytes are pinned.

``poll`` asks the origin where aliases point. ``settle`` takes the versions that served aliases point at: the first time
their bytes are hashed, kept and pinned; every later time an alias is moved there, the origin's bytes are compared with
the pin. An alias is followed when that went well, and otherwise stays where it was followed to last. So bytes that
change under a version are never served, and neither they nor an outage take from service what is served.

Everything else answers from what was followed last, which is kept in the database: no reading method but ``versions``
and the first look at a version that no alias names asks the origin, and none waits for one that is silent.
"""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, TypeAlias

from router.registry.base import (
    CHALLENGER,
    CHAMPION,
    PREVIOUS,
    SHADOW,
    Changes,
    Damaged,
    Database,
    Fetched,
    Journal,
    NotInRegistry,
    RegistryError,
    StorageFailed,
    Version,
    check_version,
    parse_reference,
    shown,
)
from router.registry.blobs import TEMP_GRACE_S, BlobStore, Staged
from router.registry.cache import ServingCache
from router.registry.manifest import MODEL, FileEntry, ManifestError, make
from router.registry.origin import BytesChanged, Intent, Offer, Origin, Unreachable, Unusable
from router.registry.pins import Pin, Pins
from router.registry.taking import Ends, Limits, compare_bytes, compare_offer, named, taken

#: model, version
_Key: TypeAlias = tuple[str, int]

#: Waits before what failed is tried again, in seconds: the first, doubled up to the last.
_RETRY_PASSING_S: Final = (2.0, 120.0)
_RETRY_REFUSED_S: Final = (30.0, 3600.0)
#: So long after somebody asked for the triggers of a model's versions, polls go on asking.
_TRIGGERED_FOR_S: Final = 60.0
_ACTOR: Final = "tidegate"


@dataclass(slots=True, frozen=True)
class Standing:
    """How things are with the origin. Times in seconds since the epoch, 0: never.

    ``error``: why the last poll failed, "" when it did not. ``refused``: (model, version) -> why it is not followed.
    """

    origin: str
    error: str
    polled: float
    refused: Mapping[_Key, str]

    @property
    def reachable(self) -> bool:
        """Whether the last poll went well."""
        return not self.error and self.polled > 0

    def as_dict(self) -> dict[str, object]:
        """The same as plain JSON values."""
        refused = [
            {"model": of, "version": number, "reason": text} for (of, number), text in sorted(self.refused.items())
        ]
        return {
            "origin": self.origin,
            "reachable": self.reachable,
            "error": self.error,
            "polled": self.polled,
            "refused": refused,
        }


@dataclass(slots=True, frozen=True)
class Settled:
    """What came of one version: ``error`` is None when it may be followed."""

    model: str
    version: int
    error: RegistryError | None = None


@dataclass(slots=True, frozen=True)
class _Fault:
    """Why a version could not be taken, how often, and when (monotonic) it is tried again."""

    error: RegistryError
    tries: int
    retry_at: float


class PinnedRegistry:
    """Implements ``router.registry.base.RegistryBackend`` on an origin. Thread-safe.

    ``root``: a folder of its own, for bytes and the folders to serve from. ``check_every_s``: how often the origin's
    bytes of what is served are compared with the pins although no alias moved. ``ends`` reads what the tensors of a
    graph are called, for signatures that leave that out.
    """

    def __init__(
        self,
        origin: Origin,
        database: Database,
        root: Path,
        journal: Journal,
        *,
        served: tuple[str, ...] = (CHAMPION, CHALLENGER, PREVIOUS, SHADOW),
        limits: Limits | None = None,
        check_every_s: float = 86_400.0,
        ends: Ends | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.origin = origin
        self._ends = ends
        self._database = database
        self._journal = journal
        self._served = served
        self._limits = limits or Limits()
        self._check_every_s = check_every_s
        self._clock = clock
        self._pins = Pins(origin.name)
        self._blobs = BlobStore(root / "blobs", max_file_bytes=self._limits.file_bytes)
        self._cache = ServingCache(root / "models", self._blobs)
        self._turn = threading.RLock()
        self._error, self._polled = "", 0.0
        self._generation = 1
        #: model, also one that went -> generation of its last change
        self._changed: dict[str, int] = {}
        #: When (monotonic) the bytes of what aliases name were last found to be the pinned ones.
        self._checked: dict[_Key, float] = {}
        self._faults: dict[_Key, _Fault] = {}
        #: Versions that somebody asked for by number.
        self._asked: set[_Key] = set()
        #: model -> when (monotonic) its triggers were last asked for, and what the last poll said of them.
        self._triggers_wanted: dict[str, float] = {}
        self._triggers: dict[str, Mapping[str, int]] = {}
        with database.reading() as connection:
            self._followed = self._pins.followed(connection)
            self._broken = self._pins.broken(connection)
        #: What the origin wants; before the first poll what it wanted last.
        self._intents = {model: Intent(aliases) for model, aliases in self._followed.items()}
        for model in self._followed:
            self._touch(model)
            now = clock()
            self._checked |= dict.fromkeys(((model, version) for version in self._followed[model].values()), now)

    # -- reading --------------------------------------------------------------------------------------------------

    def models(self) -> tuple[str, ...]:
        with self._turn:
            return tuple(sorted(self._intents))

    def versions(self, model: str) -> tuple[Version, ...]:
        """Asks the origin; those that are pinned, while it cannot be reached."""
        self._require_model(model)
        with self._database.reading() as connection:
            pinned = self._pins.numbers(connection, model)
        try:
            numbers = self.origin.versions(model)
        except Unreachable:
            numbers = tuple(sorted(pinned))
        return tuple(Version(model, number, pinned.get(number, "")) for number in numbers)

    def version(self, model: str, version: int) -> Version:
        """A version that was never taken is taken now, which may last."""
        return self._known(model, version).version

    def aliases(self, model: str) -> Mapping[str, int]:
        """As followed: an alias whose version cannot be served stays where it was."""
        with self._turn:
            self._require_model(model)
            return dict(sorted(self._followed.get(model, {}).items()))

    def intended(self, model: str) -> Mapping[str, int]:
        """Where the origin wants the aliases, as of the last poll."""
        with self._turn:
            self._require_model(model)
            return dict(sorted(self._intents[model].aliases.items()))

    def refused(self, model: str) -> Mapping[int, str]:
        """Versions of a model that are not followed or were found changed, and why."""
        return {version: reason for (of, version), reason in self.standing().refused.items() if of == model}

    def standing(self) -> Standing:
        """How things are with the origin."""
        with self._turn:
            refused = {key: str(fault.error) for key, fault in self._faults.items()} | self._broken
            return Standing(self.origin.name, self._error, self._polled, refused)

    def resolve(self, model: str, reference: str) -> Version:
        alias, version = parse_reference(reference)
        if alias:
            found = self.aliases(model).get(alias)
            if found is None:
                raise NotInRegistry(f"model {shown(model)} has no alias {shown(alias)}")
            version = found
        return self.version(model, version)

    def fetch(self, model: str, version: int, into: Path | None = None) -> Fetched:
        """The pinned files in the serving cache, or copied to the new folder ``into``.

        What was lost here is taken from the origin again if it still has the same bytes.
        """
        pin = self._known(model, version)
        try:
            folder, healed = self._laid_out(pin, into)
        except Damaged:
            self._compare(pin, mend=True)
            folder, healed = self._laid_out(pin, into)
        return Fetched(model, version, pin.version.digest, folder, pin.manifest.files, healed)

    def _laid_out(self, pin: Pin, into: Path | None) -> tuple[Path, tuple[str, ...]]:
        if into is None:
            return self._cache.get(pin.version.model, pin.version.digest, pin.manifest.files)
        self._cache.write(pin.manifest.files, into)
        return into, ()

    def verify(self, model: str, version: int) -> Version:
        """Hash every pinned file of a version again. Raises Damaged naming the first one that is not what was taken.

        The origin is not asked; of a version that was never taken there is nothing to verify.
        """
        pin = self._pinned(model, version)
        for entry in () if pin is None else pin.manifest.files:
            try:
                self._blobs.verify(entry.sha256)
            except Damaged as damage:
                raise Damaged(f"{model}:{version}: {entry.path}: {damage}") from damage
        return Version(model, version) if pin is None else pin.version

    def triggered(self, model: str) -> Mapping[str, int]:
        """As of the last poll: the first answer comes with the poll after the first question."""
        with self._turn:
            self._require_model(model)
            self._triggers_wanted[model] = self._clock()
            return self._triggers.get(model, {})

    def generation(self) -> int:
        with self._turn:
            return self._generation

    def changes(self, since: int) -> Changes:
        with self._turn:
            names = (name for name, generation in self._changed.items() if generation > since)
            return Changes(self._generation, frozenset(names))

    def close(self) -> None:
        """Nothing is held: the database belongs to whoever handed it in."""

    # -- following ------------------------------------------------------------------------------------------------

    def poll(self) -> None:
        """Ask the origin what it wants. Raises RegistryError, and then nothing has changed but ``standing``."""
        try:
            intents = dict(self.origin.intents())
        except RegistryError as error:
            with self._turn:
                self._error = str(error)
            raise
        with self._turn:
            self._error, self._polled = "", time.time()
            before, self._intents = self._intents, intents
            changed = [name for name in before.keys() | intents.keys() if before.get(name) != intents.get(name)]
            for model in changed:
                self._moved(model, before.get(model, Intent()), intents.get(model, Intent()))
                self._touch(model)
            self._forget_unnamed()
            for model in intents.keys() | self._followed.keys():
                self._follow(model)
        self._ask_triggers()

    def _ask_triggers(self) -> None:
        """A version is told of by a tag, which may come after it: what its generation says is not enough."""
        with self._turn:
            oldest = self._clock() - _TRIGGERED_FOR_S
            self._triggers_wanted = {model: at for model, at in self._triggers_wanted.items() if at >= oldest}
            self._triggers = {model: self._triggers.get(model, {}) for model in self._triggers_wanted}
            wanted = [model for model in self._triggers_wanted if model in self._intents]
        for model in wanted:
            with suppress(RegistryError):  # what was told last stands
                found = self.origin.triggered(model)
                with self._turn:
                    self._triggers[model] = found

    def ask(self) -> None:
        """Ask the origin what it wants without following it: for reading beside whoever follows. Raises RegistryError.

        Aliases of models that were never followed are, in this object, where they are wanted.
        """
        intents = dict(self.origin.intents())
        with self._turn:
            self._intents = intents
            self._followed = {model: dict(intent.aliases) for model, intent in intents.items()} | self._followed

    def settle(self) -> Iterator[Settled]:
        """Take or compare what served aliases point at and nobody has looked at yet: one version for each step.

        A step lasts as long as a download does. Raises StoreError or its like when the database refuses.
        """
        return (self._settle(*key) for key in self._due())

    def _settle(self, model: str, version: int) -> Settled:
        try:
            pin = self._pinned(model, version)
            if pin is None:
                self._take(model, version)
            else:
                self._compare_if_possible(pin)
        except RegistryError as error:
            self._fail((model, version), error)
            return Settled(model, version, error)
        self._succeed((model, version))
        with self._turn:
            self._follow(model)
        return Settled(model, version)

    def _due(self) -> list[_Key]:
        with self._turn:
            now = self._clock()
            keys = sorted(self._named())
            return [key for key in keys if self._is_stale(key, now) and self._may_try(key, now)]

    def _is_stale(self, key: _Key, now: float) -> bool:
        checked = self._checked.get(key)
        return checked is None or now - checked >= self._check_every_s

    def _may_try(self, key: _Key, now: float) -> bool:
        fault = self._faults.get(key)
        return fault is None or now >= fault.retry_at

    def _named(self) -> set[_Key]:
        """What served aliases name, as wanted and as followed."""
        wanted = ((model, intent.aliases) for model, intent in self._intents.items())
        return {
            (model, aliases[alias])
            for model, aliases in (*wanted, *self._followed.items())
            for alias in self._served
            if alias in aliases and model in self._intents
        }

    def _moved(self, model: str, before: Intent, after: Intent) -> None:
        """Whoever moved an alias wants a look at its version now, whatever came of the last one."""
        for alias, version in after.aliases.items():
            if before.aliases.get(alias) != version:
                self._checked.pop((model, version), None)
                self._faults.pop((model, version), None)

    def _forget_unnamed(self) -> None:
        named, now = self._named(), self._clock()
        self._checked = {key: at for key, at in self._checked.items() if key in named}
        self._faults = {key: fault for key, fault in self._faults.items() if key in named or now < fault.retry_at}

    def _follow(self, model: str) -> None:
        """Move the aliases of a model to where they are wanted, as far as that can be served."""
        intent, before = self._intents.get(model), self._followed.get(model)
        after = None if intent is None else self._led(model, intent, before or {})
        if after == before:
            return
        with self._database.transaction() as connection:
            self._pins.follow(connection, model, after)
            for alias in sorted((before or {}).keys() | (after or {}).keys()):
                was, now = (before or {}).get(alias), (after or {}).get(alias)
                if was != now:
                    detail = {"from": was, "to": now, "origin": self.origin.name}
                    self._journal(connection, "registry.follow", f"{model}@{alias}", detail, _ACTOR)
        if after is None:
            del self._followed[model]
        else:
            self._followed[model] = after
        self._touch(model)

    def _led(self, model: str, intent: Intent, before: Mapping[str, int]) -> dict[str, int]:
        led = {}
        for alias, version in intent.aliases.items():
            if alias not in self._served or (model, version) in self._checked:
                led[alias] = version
            elif alias in before:
                led[alias] = before[alias]
        return led

    def _succeed(self, key: _Key) -> None:
        with self._turn:
            self._checked[key] = self._clock()
            known = self._faults.pop(key, None) is not None
            if key in self._broken:
                with self._database.transaction() as connection:
                    self._pins.mark_whole(connection, *key)
                    self._record(connection, "registry.bytes_restored", key, {})
                del self._broken[key]
                known = True
            if known:
                self._touch(key[0])

    def _fail(self, key: _Key, error: RegistryError) -> None:
        """Remember why, and when to try again. What was found changed is told to the audit, once."""
        with self._turn:
            fault = self._faults.get(key)
            tries = 0 if fault is None else fault.tries + 1
            # Nothing speaks against the version: the origin is silent, or this disk is full.
            passing = isinstance(error, Unreachable | StorageFailed)
            first, last = _RETRY_PASSING_S if passing else _RETRY_REFUSED_S
            wait_s = min(last, first * 2.0 ** min(tries, 32))
            self._faults[key] = _Fault(error, tries, self._clock() + wait_s)
            self._touch(key[0])
            if passing:
                return
            # An alias that stands there already stays: the bytes that serve are the pinned ones.
            self._checked.pop(key, None)
            told = self._broken.get(key) if isinstance(error, BytesChanged) else fault and str(fault.error)
            if told == str(error):
                return
            with self._database.transaction() as connection:
                if isinstance(error, BytesChanged):
                    self._pins.mark_broken(connection, *key, str(error))
                    self._broken[key] = str(error)
                action = "registry.bytes_changed" if isinstance(error, BytesChanged) else "registry.refused"
                self._record(connection, action, key, {"reason": str(error)})

    # -- taking ---------------------------------------------------------------------------------------------------

    def _known(self, model: str, version: int) -> Pin:
        """The pin of a version, which is taken if it never was. Raises RegistryError, also what it was before."""
        check_version(version)
        key = (model, version)
        with self._turn:
            self._require_model(model)
            self._asked.add(key)
        pin = self._pinned(model, version)
        if pin is not None:
            return pin
        with self._turn:
            fault = self._faults.get(key)
            if fault is not None and self._clock() < fault.retry_at:
                raise type(fault.error)(str(fault.error))
        try:
            return self._take(model, version)
        except NotInRegistry:
            with self._turn:
                self._asked.discard(key)
            raise
        except RegistryError as error:
            self._fail(key, error)
            raise

    def _pinned(self, model: str, version: int) -> Pin | None:
        with self._database.reading() as connection:
            return self._pins.get(connection, model, version)

    def _take(self, model: str, version: int) -> Pin:
        """Take a version for the first time: what its bytes are now is what they are for good."""
        offer = self.origin.offer(model, version)
        with taken(self.origin, offer, self._blobs, self._limits) as staged:
            pin = _pin(model, version, _named(offer, staged, self._ends), staged)
            with self._database.transaction() as connection:
                known = self._pins.get(connection, model, version)
                if known is not None:  # another process was first
                    compare_bytes(known, staged)
                    return known
                self._blobs.keep({file.sha256: file for file in staged.values()}.values())
                self._pins.add(connection, pin)
                size = sum(entry.size for entry in pin.manifest.files)
                detail = {"digest": pin.version.digest, "files": len(pin.manifest.files), "bytes": size}
                self._record(connection, "registry.pin", (model, version), detail)
        return pin

    def _compare_if_possible(self, pin: Pin) -> None:
        """An origin that is silent speaks against nothing, as long as the pinned bytes are here."""
        try:
            self._compare(pin)
        except Unreachable:
            if not all(self._blobs.has(entry.sha256, entry.size) for entry in pin.manifest.files):
                raise

    def _compare(self, pin: Pin, *, mend: bool = False) -> None:
        """Take a pinned version again and compare. Raises BytesChanged. ``mend``: keep the bytes for lost ones."""
        of = pin.version
        offer = self.origin.offer(of.model, of.version)
        compare_offer(pin, offer)
        with taken(self.origin, offer, self._blobs, self._limits) as staged:
            compare_bytes(pin, staged)
            if mend:
                with self._database.transaction():
                    self._blobs.keep({file.sha256: file for file in staged.values()}.values())

    # -- upkeep ---------------------------------------------------------------------------------------------------

    def forget(self, model: str, version: int, *, actor: str) -> None:
        """Give up the pin of a version, so that its bytes are taken anew as they are: an operator's decision.

        Raises NotInRegistry when there is none.
        """
        check_version(version)
        with self._turn, self._database.transaction() as connection:
            if not self._pins.forget(connection, model, version):
                raise NotInRegistry(f"no bytes of {model}:{version} are pinned")
            self._journal(connection, "registry.forget", f"{model}:{version}", {"origin": self.origin.name}, actor)
            for known in (self._checked, self._faults, self._broken):
                known.pop((model, version), None)
            self._touch(model)

    def sweep(self, older_than_s: float = TEMP_GRACE_S) -> int:
        """Remove what dead processes left of downloads: for the start. Returns how many folders."""
        return self._blobs.sweep(older_than_s) + self._cache.sweep(older_than_s)

    def prune(self, older_than_s: float) -> int:
        """Delete the bytes of versions that no alias names, nobody asked for, and that were not used for so long.

        Their pins stay. Returns how many files were deleted. Raises Damaged or StorageFailed.
        """
        oldest = time.time() - older_than_s
        with self._turn:
            keys = self._named() | self._asked
        with self._blobs.staging() as trash, self._database.transaction() as connection:
            pins = [pin for key in keys if (pin := self._pins.get(connection, *key)) is not None]
            needed = {entry.sha256 for pin in pins for entry in pin.manifest.files}
            surplus = [b for b in self._blobs.infos() if b.sha256 not in needed and b.modified <= oldest]
            for blob in surplus:
                self._blobs.take_out(blob.sha256, trash)
        serving = {(pin.version.model, pin.version.digest) for pin in pins}
        for folder in list(self._cache.folders()):
            if (folder.model, folder.digest) not in serving and folder.used <= oldest:
                self._cache.remove(folder)
        return len(surplus)

    # -- inside ---------------------------------------------------------------------------------------------------

    def _require_model(self, model: str) -> None:
        with self._turn:
            if model not in self._intents:
                raise NotInRegistry(f"the registry has no model {shown(model)}")

    def _touch(self, model: str) -> None:
        self._generation += 1
        self._changed[model] = self._generation

    def _record(self, connection: sqlite3.Connection, action: str, key: _Key, detail: Mapping[str, object]) -> None:
        model, version = key
        self._journal(connection, action, f"{model}:{version}", {**detail, "origin": self.origin.name}, _ACTOR)


def _named(offer: Offer, staged: Mapping[str, Staged], ends: Ends | None) -> Offer:
    """The offer with a signature that names every tensor, or none."""
    graph = next((staged[file.path].path for file in offer.files if file.role == MODEL), Path())
    told = offer.description
    return replace(offer, description=replace(told, signature=named(told.signature, graph, ends)))


def _pin(model: str, version: int, offer: Offer, staged: Mapping[str, Staged]) -> Pin:
    """The pin of a version as it was just taken. Raises Unusable."""
    files = (FileEntry(file.path, staged[file.path].sha256, staged[file.path].size, file.role) for file in offer.files)
    try:
        manifest = make(files, offer.description)
    except ManifestError as error:
        raise Unusable(f"{model}:{version} cannot be taken: {error}") from error
    found = Version(model, version, manifest.digest(), offer.created, manifest=manifest)
    return Pin(found, manifest, offer.identity)
