"""The registry of one state folder: rows in the database it is handed, files as blobs, folders to serve from.

A version is published by copying its files, then naming them in one transaction: it exists whole or not at all. Each
change is journalled in its own transaction. Any number of processes may work at once; what one commits, the next view
of another one sees.
"""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from router.registry.base import (
    CHALLENGER,
    CHAMPION,
    PREVIOUS,
    TRIGGERED,
    Alias,
    AliasConflict,
    Changes,
    Damaged,
    Database,
    Fetched,
    Journal,
    NotInRegistry,
    PublishRefused,
    Version,
    VersionRetired,
    check_alias,
    check_model,
    check_version,
    parse_reference,
    shown,
)
from router.registry.blobs import MAX_FILE_BYTES, TEMP_GRACE_S, BlobStore, Staged
from router.registry.cache import ServingCache
from router.registry.manifest import Description, FileEntry, Manifest, ManifestError, make, parse
from router.registry.sources import Source, each_file, roles_of

_VERSION: Final = """
    SELECT version, digest, created, manifest,
        EXISTS (SELECT 1 FROM registry_retired r WHERE r.model = v.model AND r.version = v.version)
    FROM registry_version v WHERE model = ?
"""
#: version, digest, created, manifest, retired
_Row = tuple[int, str, str, str, int]


@dataclass(slots=True, frozen=True)
class Published:
    """The outcome of publishing. ``created`` is False when these files with this description were there already."""

    model: str
    version: int
    digest: str
    created: bool


class EmbeddedRegistry:
    """Implements ``router.registry.base.RegistryBackend``, and publishing, aliases and retiring.

    ``cache_root`` is where folders to serve from are made; by default ``models`` beside the blobs.
    """

    def __init__(
        self,
        database: Database,
        blobs_root: Path,
        journal: Journal,
        *,
        cache_root: Path | None = None,
        max_file_bytes: int = MAX_FILE_BYTES,
    ) -> None:
        self.database = database
        self.journal = journal
        self.blobs = BlobStore(blobs_root, max_file_bytes=max_file_bytes)
        self.cache = ServingCache(cache_root or blobs_root.parent / "models", self.blobs)
        #: model -> generation, and what ``triggered`` answered then.
        self._triggered: dict[str, tuple[int, Mapping[str, int]]] = {}

    # -- reading --------------------------------------------------------------------------------------------------

    def models(self) -> tuple[str, ...]:
        with self.database.reading() as connection:
            return tuple(name for (name,) in connection.execute("SELECT name FROM registry_model ORDER BY name"))

    def versions(self, model: str) -> tuple[Version, ...]:
        with self.database.reading() as connection:
            _require_model(connection, model)
            rows = connection.execute(_VERSION + " ORDER BY version", (model,))
            return tuple(Version(model, row[0], row[1], row[2], bool(row[4])) for row in rows)

    def version(self, model: str, version: int) -> Version:
        """Raises NotInRegistry, or Damaged when the row is not what was published."""
        with self.database.reading() as connection:
            return _version(connection, model, version)

    def aliases(self, model: str) -> Mapping[str, int]:
        with self.database.reading() as connection:
            _require_model(connection, model)
            query = "SELECT alias, version FROM registry_alias WHERE model = ? AND version NOT NULL ORDER BY alias"
            return dict(connection.execute(query, (model,)).fetchall())

    def alias(self, model: str, alias: str) -> Alias:
        """Where an alias stands, also one that was emptied or never set: its generation is what to compare with."""
        check_alias(alias)
        with self.database.reading() as connection:
            _require_model(connection, model)
            return _alias(connection, model, alias)

    def resolve(self, model: str, reference: str) -> Version:
        alias, version = parse_reference(reference)
        with self.database.reading() as connection:
            _require_model(connection, model)
            if alias:
                found = _alias(connection, model, alias).version
                if found is None:
                    raise NotInRegistry(f"model {shown(model)} has no alias {shown(alias)}")
                version = found
            return _version(connection, model, version)

    def triggered(self, model: str) -> Mapping[str, int]:
        """Read anew only when something changed, as it is asked often. Raises NotInRegistry or Damaged."""
        with self.database.reading() as connection:
            _require_model(connection, model)
            generation = _generation(connection)
            known = self._triggered.get(model)
            if known is None or known[0] != generation:
                known = self._triggered[model] = generation, _named_triggers(connection, model)
            return known[1]

    def generation(self) -> int:
        with self.database.reading() as connection:
            return _generation(connection)

    def changes(self, since: int) -> Changes:
        with self.database.reading() as connection:
            rows = connection.execute("SELECT name FROM registry_model WHERE generation > ?", (since,))
            return Changes(_generation(connection), frozenset(name for (name,) in rows))

    def fetch(self, model: str, version: int, into: Path | None = None) -> Fetched:
        """The version's files in the serving cache, or copied to the new folder ``into``.

        Raises NotInRegistry, VersionRetired, Damaged (a blob is missing or changed) or StorageFailed.
        """
        found = self._servable(model, version)
        try:
            return self._fetch(found, into)
        except Damaged:
            # Retired meanwhile, it has lost its files by right.
            self._servable(model, version)
            raise

    def _servable(self, model: str, version: int) -> Version:
        with self.database.reading() as connection:
            return _require_servable(connection, model, version)

    def _fetch(self, found: Version, into: Path | None) -> Fetched:
        files = _manifest(found).files
        if into is None:
            folder, healed = self.cache.get(found.model, found.digest, files)
            return Fetched(found.model, found.version, found.digest, folder, files, healed)
        self.cache.write(files, into)
        return Fetched(found.model, found.version, found.digest, into, files)

    def verify(self, model: str, version: int) -> Version:
        """Hash every blob of a version again. Raises Damaged naming the first file that is not what was published."""
        found = self.version(model, version)
        for entry in _manifest(found).files:
            try:
                self.blobs.verify(entry.sha256)
            except Damaged as damage:
                raise Damaged(f"{model}:{version}: {entry.path}: {damage}") from damage
        return found

    def close(self) -> None:
        """Nothing to do: the database belongs to whoever handed it in."""

    # -- publishing -----------------------------------------------------------------------------------------------

    def publish(
        self,
        model: str,
        source: Source,
        description: Description | None = None,
        *,
        roles: Mapping[str, str] | None = None,
        alias: str | None = None,
        actor: str,
    ) -> Published:
        """Publish the files of ``source``: a folder, one model file, or path in the version -> file on disk.

        The same files with the same description are the same version, and publishing them again mends its blobs and
        takes it out of retirement. ``roles`` names what files are for where their names do not tell. With ``alias``
        the version gets it in the same transaction; ``champion`` is set as by ``promote``.

        Raises InvalidName, PublishRefused or StorageFailed; then nothing was published.
        """
        check_model(model)
        if alias is not None:
            check_alias(alias)
        with self.blobs.staging() as folder:
            staged: dict[str, Staged] = {}

            def take(path: str, file: int) -> None:
                staged[path] = self.blobs.stage(file, path, folder)

            each_file(source, take)
            manifest = _described(staged, roles or {}, description)
            with self.database.transaction() as connection:
                return self._publish(connection, model, manifest, staged, alias, actor)

    def _publish(
        self,
        connection: sqlite3.Connection,
        model: str,
        manifest: Manifest,
        staged: Mapping[str, Staged],
        alias: str | None,
        actor: str,
    ) -> Published:
        # Files of equal bytes are staged twice and kept once.
        self.blobs.keep({file.sha256: file for file in staged.values()}.values())
        digest, version = manifest.digest(), _known(connection, model, manifest.digest())
        created = version is None
        if version is None:
            version = self._insert(connection, model, digest, manifest)
            size = sum(entry.size for entry in manifest.files)
            detail = {"digest": digest, "files": len(manifest.files), "bytes": size}
            self.journal(connection, "registry.publish", f"{model}:{version}", detail, actor)
        elif _is_retired(connection, model, version):
            connection.execute("DELETE FROM registry_retired WHERE model = ? AND version = ?", (model, version))
            _touch(connection, model)
            self.journal(connection, "registry.reinstate", f"{model}:{version}", {}, actor)
        if alias == CHAMPION:
            self._promote(connection, model, version, actor)
        elif alias is not None and _alias(connection, model, alias).version != version:
            self._set_alias(connection, model, alias, version, actor)
        return Published(model, version, digest, created)

    def _insert(self, connection: sqlite3.Connection, model: str, digest: str, manifest: Manifest) -> int:
        _touch(connection, model)
        query = "SELECT 1 + ifnull(max(version), 0) FROM registry_version WHERE model = ?"
        version = int(connection.execute(query, (model,)).fetchone()[0])
        row = (model, version, digest, manifest.canonical().decode(), _now())
        connection.execute("INSERT INTO registry_version VALUES (?, ?, ?, ?, ?)", row)
        return version

    # -- aliases --------------------------------------------------------------------------------------------------

    def set_alias(self, model: str, alias: str, version: int, *, expected: int | None = None, actor: str) -> Alias:
        """Point an alias at a version. ``expected``: the generation it must have (0: never set), None: whichever.

        Moves this alias only: to make a version champion and keep the way back, use ``promote``. Raises AliasConflict,
        NotInRegistry or VersionRetired. Without ``expected``, setting what is set already changes nothing.
        """
        check_alias(alias)
        with self.database.transaction() as connection:
            _require_servable(connection, model, version)
            before = _alias(connection, model, alias)
            _compare(model, before, expected)
            if expected is None and before.version == version:
                return before
            return self._set_alias(connection, model, alias, version, actor)

    def drop_alias(self, model: str, alias: str, *, expected: int | None = None, actor: str) -> Alias:
        """Make an alias point nowhere. Its generation goes on. Raises AliasConflict or NotInRegistry."""
        check_alias(alias)
        with self.database.transaction() as connection:
            _require_model(connection, model)
            before = _alias(connection, model, alias)
            _compare(model, before, expected)
            if before.version is None:
                return before
            return self._set_alias(connection, model, alias, None, actor)

    def promote(
        self,
        model: str,
        version: int,
        *,
        expected_champion: int | None = None,
        expected: int | None = None,
        actor: str,
    ) -> Version:
        """Make a version champion, the old champion previous, and drop challenger if it was this one: all or nothing.

        ``expected_champion``: the version that must be champion now (0: none), None: whichever. ``expected``: the
        generation that the alias champion must have. Raises AliasConflict, NotInRegistry or VersionRetired. Promoting
        the champion changes nothing.
        """
        with self.database.transaction() as connection:
            _require_servable(connection, model, version)
            champion = _alias(connection, model, CHAMPION)
            _compare(model, champion, expected)
            if expected_champion is not None and (champion.version or 0) != expected_champion:
                wanted, got = _named(expected_champion), _named(champion.version)
                raise AliasConflict(f"champion of {model} was expected to be {wanted} and is {got}")
            self._promote(connection, model, version, actor)
            return _version(connection, model, version)

    def _promote(self, connection: sqlite3.Connection, model: str, version: int, actor: str) -> None:
        champion = _alias(connection, model, CHAMPION).version
        moves: dict[str, int | None] = {}
        if champion != version:
            moves = {CHAMPION: version} if champion is None else {CHAMPION: version, PREVIOUS: champion}
        if _alias(connection, model, CHALLENGER).version == version:
            moves[CHALLENGER] = None
        if moves:
            detail = {alias: _move(connection, model, alias, to) for alias, to in moves.items()}
            self.journal(connection, "registry.promote", f"{model}:{version}", detail, actor)

    def _set_alias(
        self, connection: sqlite3.Connection, model: str, alias: str, version: int | None, actor: str
    ) -> Alias:
        detail = _move(connection, model, alias, version)
        self.journal(connection, "registry.alias", f"{model}@{alias}", detail, actor)
        return _alias(connection, model, alias)

    # -- upkeep ---------------------------------------------------------------------------------------------------

    def retire(self, model: str, version: int, *, actor: str) -> None:
        """Give a version's files up to garbage collection. Its row stays. One that has an alias is refused."""
        with self.database.transaction() as connection:
            if _version(connection, model, version).retired:
                return
            query = "SELECT alias FROM registry_alias WHERE model = ? AND version = ? ORDER BY alias"
            aliases = [name for (name,) in connection.execute(query, (model, version))]
            if aliases:
                raise AliasConflict(
                    f"{model}:{version} is {', '.join(aliases)}; a version with an alias is not retired"
                )
            connection.execute("INSERT INTO registry_retired VALUES (?, ?, ?)", (model, version, _now()))
            _touch(connection, model)
            self.journal(connection, "registry.retire", f"{model}:{version}", {}, actor)

    def sweep(self, older_than_s: float = TEMP_GRACE_S) -> int:
        """Remove what dead publishers and builders left behind: for the start. Returns how many folders."""
        return self.blobs.sweep(older_than_s) + self.cache.sweep(older_than_s)


def manifests(connection: sqlite3.Connection) -> list[Version]:
    """Every version of every model with its manifest. Raises Damaged."""
    models = [name for (name,) in connection.execute("SELECT name FROM registry_model")]
    return [_parsed(model, row) for model in models for row in connection.execute(_VERSION, (model,))]


def _named_triggers(connection: sqlite3.Connection, model: str) -> Mapping[str, int]:
    rows = connection.execute(_VERSION + " ORDER BY version DESC LIMIT ?", (model, TRIGGERED)).fetchall()
    newest = [_manifest(_parsed(model, row)).description.lineage.trigger_id for row in rows]
    return {trigger_id: row[0] for trigger_id, row in zip(reversed(newest), reversed(rows), strict=True) if trigger_id}


def _described(staged: Mapping[str, Staged], roles: Mapping[str, str], description: Description | None) -> Manifest:
    """The manifest of files just staged. Raises PublishRefused."""
    found = roles_of(list(staged), roles)
    try:
        return make(
            (FileEntry(path, file.sha256, file.size, found[path]) for path, file in staged.items()), description
        )
    except ManifestError as error:
        raise PublishRefused(str(error)) from error


def _version(connection: sqlite3.Connection, model: str, version: int) -> Version:
    check_version(version)
    _require_model(connection, model)
    row = connection.execute(_VERSION + " AND version = ?", (model, version)).fetchone()
    if row is None:
        raise NotInRegistry(f"model {shown(model)} has no version {version}")
    return _parsed(model, row)


def _parsed(model: str, row: _Row) -> Version:
    version, digest, created, text, retired = row
    try:
        manifest = parse(text)
        found = hashlib.sha256(text.encode()).hexdigest()
    except (ManifestError, AttributeError, TypeError) as error:
        raise Damaged(f"the manifest of {model}:{version} was changed: {error}") from error
    if found != digest:
        raise Damaged(f"the manifest of {model}:{version} was changed: its SHA-256 is {found}, the version's {digest}")
    return Version(model, version, digest, created, bool(retired), manifest)


def _manifest(version: Version) -> Manifest:
    if version.manifest is None:
        raise Damaged(f"{version.model}:{version.version} has no manifest")
    return version.manifest


def _known(connection: sqlite3.Connection, model: str, digest: str) -> int | None:
    query = "SELECT version FROM registry_version WHERE model = ? AND digest = ?"
    row = connection.execute(query, (model, digest)).fetchone()
    return None if row is None else int(row[0])


def _is_retired(connection: sqlite3.Connection, model: str, version: int) -> bool:
    query = "SELECT 1 FROM registry_retired WHERE model = ? AND version = ?"
    return connection.execute(query, (model, version)).fetchone() is not None


def _alias(connection: sqlite3.Connection, model: str, alias: str) -> Alias:
    query = "SELECT version, generation FROM registry_alias WHERE model = ? AND alias = ?"
    row = connection.execute(query, (model, alias)).fetchone()
    return Alias(alias, None, 0) if row is None else Alias(alias, row[0], row[1])


def _move(connection: sqlite3.Connection, model: str, alias: str, version: int | None) -> dict[str, object]:
    """Point an alias elsewhere, under its next generation; returns what happened, for the journal."""
    before = _alias(connection, model, alias)
    _touch(connection, model)
    if before.generation == 0:
        connection.execute("INSERT INTO registry_alias VALUES (?, ?, ?, 1)", (model, alias, version))
    else:
        query = "UPDATE registry_alias SET version = ?, generation = generation + 1 WHERE model = ? AND alias = ?"
        connection.execute(query, (version, model, alias))
    return {"from": before.version, "to": version, "generation": before.generation + 1}


def _touch(connection: sqlite3.Connection, model: str) -> None:
    """Note that a model changed, or came to be: under the registry's next generation."""
    connection.execute("UPDATE registry_state SET generation = generation + 1")
    query = "INSERT INTO registry_model VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET generation = excluded.generation"
    connection.execute(query, (model, _generation(connection)))


def _generation(connection: sqlite3.Connection) -> int:
    return int(connection.execute("SELECT generation FROM registry_state").fetchone()[0])


def _require_model(connection: sqlite3.Connection, model: str) -> None:
    check_model(model)
    if connection.execute("SELECT 1 FROM registry_model WHERE name = ?", (model,)).fetchone() is None:
        raise NotInRegistry(f"the registry has no model {shown(model)}")


def _require_servable(connection: sqlite3.Connection, model: str, version: int) -> Version:
    found = _version(connection, model, version)
    if found.retired:
        raise VersionRetired(f"{model}:{version} was retired; publish its files again to use it")
    return found


def _compare(model: str, alias: Alias, expected: int | None) -> None:
    if expected is not None and alias.generation != expected:
        raise AliasConflict(
            f"alias {alias.alias} of {model} was expected at generation {expected} and is at generation "
            f"{alias.generation}, {_named(alias.version)}"
        )


def _named(version: int | None) -> str:
    return f"version {version}" if version else "no version"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
