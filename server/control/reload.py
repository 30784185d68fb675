"""The configuration in force and its change: checked, planned, loaded and warm, recorded, then swapped in at once.

Implements ``server.transport.admin.Reconfigure``. One writer at a time; any failure before the swap leaves what is in
force untouched. Sections other than models are read at the start only, and a plan says so when they differ.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager, aclosing, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import structlog

from server.config.compile import compile_reload
from server.config.load import parse_config, unloadable
from server.config.model import Config
from server.config.plan import plan_reload
from server.config.problems import InvalidConfig, UnloadableConfig
from server.config.rollouts import RolloutTemplate, compile_rollouts
from server.config.routing import RoutingSpec, compile_routing
from server.control.models import ModelControl
from server.control.sources import ModelSource
from server.errors import ConfigError, FailedPrecondition, ModelLoadError, TidegateError
from server.history import ConfigHistory, LastGood, Stale
from server.watching import ConfigWatcher, read_config

log = structlog.get_logger("config")

Json = dict[str, Any]


class Rollouts(Protocol):
    """Who climbs the steps of rollouts; hears of every change of the configuration before it is in force."""

    async def start(self, templates: Mapping[str, RolloutTemplate], actor: str) -> bool: ...
    def claimed(self, templates: Mapping[str, RolloutTemplate]) -> AbstractAsyncContextManager[None]: ...
    def check(self, templates: Mapping[str, RolloutTemplate]) -> list[str]: ...
    def follow(self, templates: Mapping[str, RolloutTemplate], actor: str) -> None: ...
    def planned(self, templates: Mapping[str, RolloutTemplate]) -> dict[str, list[Json]]: ...


class ConfigControl:
    """One configuration file and its generations. On the loop only; everything that blocks is done off it.

    ``history`` gives the generations in the store, of which that many keep their text. ``rollouts`` None: sections with
    steps stand still. ``applied`` is told of every configuration right before it is in force.
    """

    def __init__(
        self,
        *,
        control: ModelControl,
        history: Callable[[int], ConfigHistory],
        last_good: LastGood,
        source: Callable[[Config], ModelSource],
        path: Path,
        text: bytes,
        config: Config,
        repository: Path | None,
        rollouts: Rollouts | None = None,
        applied: Callable[[Config], None] = lambda _: None,
    ) -> None:
        self._control = control
        self._applied = applied
        self._rollouts = rollouts
        self._history_of = history
        self._rules = compile_reload(config)
        self._history = history(self._rules.history)
        self._last_good = last_good
        self._source = source
        self._path = path
        self._text = text
        self._config = config
        self._repository = repository
        self._number = 0
        self._lock = asyncio.Lock()

    def generation(self) -> int:
        """The number of the configuration in force; 0 before the first."""
        return self._number

    def text(self) -> bytes:
        """The text in force."""
        return self._text

    async def start(self) -> None:
        """Put the routing of the first text in force, under its number: a known one if the text is unchanged."""
        async with self._lock:
            moved = await self._start()
        if moved:
            await self._control.refresh()

    async def _start(self) -> bool:
        """Whether aliases are not where they were when models were last looked at."""
        async with self._control.turn:
            moved = False
            latest = await asyncio.to_thread(self._history.latest)
            if latest is not None and latest.text == self._text:
                number = latest.number
            else:
                number = await self._record(self._text, self._control.digests_now(), "tidegate", "start", None)
            self._control.obey(self._rules)
            if self._rollouts is not None:
                actor = latest.actor if latest else "tidegate"
                moved = await self._rollouts.start(self._templates(self._config), actor)
            self._control.commit(self._control.as_it_is(), self._specs(self._config), number)
            self._number = number
            await self._keep(self._text)
        return moved

    async def plan(self, text: bytes) -> Json:
        """What applying ``text`` would do. Raises ConfigError."""
        config = await self._parse(text)
        return self._planned(config)[0]

    async def apply(self, text: bytes, *, expected: int | None, actor: str, reason: str) -> Json:
        """Apply ``text`` as the next generation; the text in force stays the generation that it is.

        Raises Stale, ConfigError or ModelLoadError; then nothing changed.
        """
        async with self._lock:
            return await self._apply(text, expected, actor, reason, None)

    async def rollback(self, to: int, *, actor: str, reason: str) -> Json:
        """Apply the text of generation ``to`` as a new one, also when that moves keys that are otherwise kept.

        Raises NotFound, and what ``apply`` raises.
        """
        async with self._lock:
            old = await asyncio.to_thread(self._history.get, to)
            if old.text is None:
                raise FailedPrecondition(f"generation {to} is too old: its text is no longer kept")
            return await self._apply(old.text, None, actor, reason, to, old.models)

    def history(self, limit: int) -> list[Json]:
        """The last generations, newest first. Blocking."""
        return [dict(generation.as_dict()) for generation in self._history.list(limit)]

    async def reload(self, reason: str = "SIGHUP") -> None:
        """Read the file again and apply it if it changed. What goes wrong is logged and audited, and nothing else."""
        try:
            text = await asyncio.to_thread(read_config, self._path)
            if text != self._text:
                await self.apply(text, expected=None, actor="tidegate", reason=reason)
        except (TidegateError, OSError) as error:
            log.error("reload_refused", reason=reason, error=str(error), generation=self._number)
        except Exception:  # the boundary of one reload: the file is followed whatever one text of it met
            log.exception("reload_refused", reason=reason, generation=self._number)

    async def watch(self) -> None:
        """Follow the file until cancelled, as was said at the start. Returns at once when it is not to be followed."""
        rules = self._rules
        if not rules.watch:
            return
        async with aclosing(ConfigWatcher(self._path, rules.debounce_s, seen=self._text).changes()) as changes:
            async for _ in changes:
                await self.reload("file changed")

    # -- inside -------------------------------------------------------------------------------------------------

    async def _apply(
        self,
        text: bytes,
        expected: int | None,
        actor: str,
        reason: str,
        restores: int | None,
        digests: Mapping[str, str] | None = None,
    ) -> Json:
        if expected is not None and expected != self._number:
            raise Stale(expected, self._number)
        try:
            config = await self._parse(text)
            async with self._claimed(config):
                plan, refusals = self._planned(config)
                if text == self._text:
                    return {"generation": self._number, "plan": plan}
                # Whoever rolls back asks for what was, whichever keys move by it.
                if refusals and restores is None:
                    raise ConfigError("; ".join(refusals))
                if wrong := [] if self._rollouts is None else self._rollouts.check(self._templates(config)):
                    raise FailedPrecondition("; ".join(wrong))
                async with self._control.turn:
                    number = await self._swap(text, config, actor, reason, restores, digests)
        except ModelLoadError as error:
            placed = await asyncio.to_thread(unloadable, error, text.decode(), path=self._path.name)
            await self._rejected(text, placed, actor, reason)
            raise placed from error
        except (ConfigError, FailedPrecondition) as error:
            await self._rejected(text, error, actor, reason)
            raise
        log.info("config_applied", generation=number, actor=actor, reason=reason)
        await self._keep(text)
        return {"generation": number, "plan": plan}

    async def _swap(
        self,
        text: bytes,
        config: Config,
        actor: str,
        reason: str,
        restores: int | None,
        digests: Mapping[str, str] | None,
    ) -> int:
        specs = self._specs(config)
        prepared = await self._control.prepare(self._source(config))
        try:
            found = self._control.digests(prepared)
            _require_same(digests, found)
            rules = compile_reload(config)
            self._history = self._history_of(rules.history)
            number = await self._record(text, found, actor, reason, restores)
        except BaseException:
            await self._control.discard(prepared)
            raise
        self._rules = rules
        self._control.obey(rules)
        self._applied(config)
        if self._rollouts is not None:
            self._rollouts.follow(self._templates(config), actor)
        self._control.commit(prepared, specs, number)
        self._number, self._text, self._config = number, text, config
        return number

    async def _parse(self, text: bytes) -> Config:
        try:
            decoded = text.decode()
        except UnicodeDecodeError as error:
            raise ConfigError(f"the configuration is not UTF-8 at byte {error.start}") from error
        return await asyncio.to_thread(
            parse_config,
            decoded,
            path=self._path.name,
            folder=self._path.parent,
            repository_given=self._repository is not None,
        )

    def _planned(self, config: Config) -> tuple[Json, list[str]]:
        plan = plan_reload(self._config, config, repository=self._repository)
        found = plan.as_dict()
        if self._rollouts is not None:
            templates = self._templates(config)
            wrong = [{"model": text.partition(":")[0], "reason": text} for text in self._rollouts.check(templates)]
            found["refusals"] += wrong
            found["allowed"] = not found["refusals"]
            found["rollouts"] = self._rollouts.planned(templates)
        return found, [str(refusal) for refusal in plan.refusals]

    def _claimed(self, config: Config) -> AbstractAsyncContextManager[None]:
        return nullcontext() if self._rollouts is None else self._rollouts.claimed(self._templates(config))

    def _templates(self, config: Config) -> dict[str, RolloutTemplate]:
        return compile_rollouts(config, repository_given=self._repository is not None)

    def _specs(self, config: Config) -> Mapping[str, RoutingSpec]:
        return compile_routing(config, repository_given=self._repository is not None)

    async def _record(
        self, text: bytes, models: Mapping[str, str], actor: str, reason: str, restores: int | None
    ) -> int:
        made = await asyncio.to_thread(
            lambda: self._history.append(text, models=models, actor=actor, reason=reason, restores=restores)
        )
        return made.number

    async def _keep(self, text: bytes) -> None:
        """The last good text is for the next start; a disk that refuses it takes nothing back."""
        try:
            await asyncio.to_thread(self._last_good.write, text)
        except (TidegateError, OSError) as error:
            log.error("last_good_not_written", error=str(error))

    async def _rejected(self, text: bytes, error: TidegateError, actor: str, reason: str) -> None:
        known = error.problems if isinstance(error, InvalidConfig | UnloadableConfig) else []
        problems = [asdict(problem) for problem in known]
        try:
            await asyncio.to_thread(
                lambda: self._history.reject(text, problems or [{"message": error.message}], actor=actor, reason=reason)
            )
        except TidegateError as unwritten:
            log.error("rejection_not_audited", error=unwritten.message)


def _require_same(wanted: Mapping[str, str] | None, found: Mapping[str, str]) -> None:
    """A rollback serves what that generation served, or nothing changes."""
    for version, digest in (wanted or {}).items():
        if version in found and found[version] != digest:
            raise ModelLoadError(f"{version} is not what it was in that generation: its bytes have changed since")
