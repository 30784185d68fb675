"""A rollout while the configuration, or what aliases name, is changed under it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from router.registry.origin import Unreachable
from server.config.load import parse_config
from server.config.rollouts import RolloutTemplate, compile_rollouts
from server.config.routing import compile_routing
from server.control.publishing import Loaded
from server.control.rollouts.control import RolloutControl
from server.control.rollouts.tenure import Tenure
from server.store.base import StoreError
from tests.unit.control_rollouts.test_actions import TEXT, Rig


def templates(folder: Path) -> Mapping[str, RolloutTemplate]:
    return compile_rollouts(parse_config(TEXT, path="f", folder=folder))


@pytest.mark.parametrize("stays", [True, False])
def test_a_reload_while_a_rollout_is_written_down(tmp_path: Path, stays: bool) -> None:
    """The same section again goes on with it. Without its section it has ended, on disk too, and is let go of."""

    async def body() -> None:
        rig = Rig(tmp_path, busy_timeout_s=10, working=False)
        control = RolloutControl(rig.hands, Tenure(tmp_path))
        await control.start(templates(tmp_path), "ada")
        with rig.disk_taken():
            begun = asyncio.ensure_future(control._look_at("m"))  # as the next look would
            await asyncio.sleep(0)
            control.follow(templates(tmp_path) if stays else {}, "bob")
        await begun
        looking = asyncio.ensure_future(control.run())
        wanted = ["begun", "gated", "loading", "step"] if stays else ["begun", "aborted"]
        await rig.until(lambda: [row.event.action for row in rig.audit.tail(9)] == [f"rollout.{one}" for one in wanted])
        await rig.until(lambda: [(row.state, row.open) for row in rig.hands.store.all()] == [(wanted[-1], stays)])
        looking.cancel()
        await asyncio.gather(looking, return_exceptions=True)
        await control.close()
        await rig.close()

    asyncio.run(asyncio.wait_for(body(), 30))


def test_a_section_that_is_back_before_its_rollout_has_ended_has_one_end(tmp_path: Path) -> None:
    """Stable is not loaded, so the way back takes its time. Nobody else begins to work on it meanwhile."""

    async def body() -> None:
        rig = Rig(tmp_path, working=False)
        control = RolloutControl(rig.hands, Tenure(tmp_path))
        await control.start(templates(tmp_path), "ada")
        looking = asyncio.ensure_future(control.run())
        await rig.until(lambda: rig.share == 0.5)
        rig.publisher.update("m", Loaded({"2": rig.versions["2"]}, "2"))
        control.follow({}, "bob")
        control.follow(templates(tmp_path), "cleo")
        assert [one["state"] for one in control.all()] == ["rolling_back"]
        rig.publisher.update("m", Loaded(rig.versions, "1"))
        await rig.until(lambda: [one["state"] for one in control.all()] == ["aborted"])
        await rig.until(lambda: [(row.state, row.open) for row in rig.hands.store.all()] == [("aborted", False)])
        looking.cancel()
        await asyncio.gather(looking, return_exceptions=True)
        await control.close()
        assert rig.deferred.flush(10)
        told = [row.event.action for row in rig.audit.tail(20)]
        assert (told.count("rollout.rolling_back"), told.count("rollout.aborted")) == (1, 1)
        await rig.close()

    asyncio.run(asyncio.wait_for(body(), 30))


FOLLOWING = """apiVersion: tidegate/v1
registry: {embedded: true}
models:
  m:
    rollout:
      id: r1
      candidate: "@challenger"
      steps: [{weight: 50%, approve: true}]
      gates: {errors: {event: error, max_rate: 5%}}
"""


@pytest.mark.parametrize(("alias", "state"), [("challenger", "aborted"), ("champion", "aborted")])
def test_who_moves_an_alias_to_a_version_that_is_not_ready_has_decided(tmp_path: Path, alias: str, state: str) -> None:
    """The alias leads to the version before until then. Its rollout ends all the same, and none begins with it."""

    async def body() -> None:
        rig = Rig(tmp_path, working=False)
        aliases = {"champion": "1", "challenger": "2"}
        config = parse_config(FOLLOWING, path="f", folder=tmp_path)
        loaded = Loaded(rig.versions, "1", aliases, {alias: "3"})
        rig.publisher.replace(compile_routing(config), {"m": loaded}, 2)
        control = RolloutControl(rig.hands, Tenure(tmp_path))
        await control.start(compile_rollouts(config), "ada")
        await control._look_at("m")  # as the next look would
        assert [(one["state"], one["reason"]) for one in control.all()] == [("waiting", f"m@{alias} is not loaded")]
        rig.publisher.update("m", Loaded(rig.versions, "1", aliases))
        looking = asyncio.ensure_future(control.run())
        await rig.until(lambda: rig.share == 0.5)
        rig.publisher.update("m", loaded)
        await rig.until(lambda: state in [one["state"] for one in control.all()])
        assert (rig.share, rig.gateway.routes("m").stable) == (0, "1")
        looking.cancel()
        await asyncio.gather(looking, return_exceptions=True)
        await control.close()
        await rig.close()

    asyncio.run(asyncio.wait_for(body(), 30))


class Stuck:
    """A registry that can be written to only once it is ``free``."""

    def __init__(self) -> None:
        self.free = False
        self.moves: list[str] = []

    def move(self, entry: str, alias: str, was: str, to: str) -> str:
        if not self.free:
            raise StoreError("the disk is full")
        self.moves.append(to)
        return ""


def test_a_section_that_is_back_brings_no_traffic_back(tmp_path: Path) -> None:
    """Without its section a way back has no table to publish; with the section again it has."""

    async def body() -> None:
        rig = Rig(tmp_path, working=False)
        rig.hands.mover = mover = Stuck()
        aliases = {"champion": "1", "challenger": "2"}
        config = parse_config(FOLLOWING, path="f", folder=tmp_path)
        rig.publisher.replace(compile_routing(config), {"m": Loaded(rig.versions, "1", aliases)}, 2)
        control = RolloutControl(rig.hands, Tenure(tmp_path))
        await control.start(compile_rollouts(config), "ada")
        looking = asyncio.ensure_future(control.run())
        await rig.until(lambda: rig.share == 0.5)
        ordered = asyncio.ensure_future(control.order("r1-2", "promote", actor="bob", reason=""))
        await rig.until(lambda: rig.share == 1)
        looking.cancel()
        await asyncio.gather(looking, return_exceptions=True)
        (run,) = control._runs.values()
        rig.publisher.update("m", Loaded({"2": rig.versions["2"]}, "2", aliases))
        control.follow({}, "cleo")
        await rig.until(lambda: len(run.queue) == 1)  # all but the alias is done
        rig.publisher.update("m", Loaded(rig.versions, "1", aliases))
        control.follow(compile_rollouts(config), "cleo")
        assert (rig.share, rig.gateway.routes("m").stable) == (0, "1")
        mover.free = True
        await rig.until(lambda: [one["state"] for one in control.all()] == ["aborted"])
        await control._look_at("m")
        await ordered
        assert (rig.share, rig.gateway.routes("m").stable, mover.moves[-1]) == (0, "1", "1")
        await control.close()
        await rig.close()

    asyncio.run(asyncio.wait_for(body(), 30))


class Elsewhere:
    """A registry that is followed: what it last said is what counts here until it is heard again."""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        self.reachable = True
        self.champion = "1"
        self.asked = 0

    def move(self, entry: str, alias: str, was: str, to: str) -> str:
        self.asked += 1
        if not self.reachable:
            raise Unreachable("MLflow cannot be reached")
        assert self.champion in {was, to}
        self.champion = to
        return ""

    def heard(self) -> None:
        """As the next look at it makes it known."""
        aliases = {"champion": self.champion, "challenger": "2"}
        self.rig.publisher.update("m", Loaded(self.rig.versions, self.champion, aliases))

    def serves(self) -> tuple[float, str]:
        return self.rig.share, self.rig.gateway.routes("m").stable


@asynccontextmanager
async def at_work(rig: Rig, folder: Path) -> AsyncIterator[RolloutControl]:
    """A control that follows ``FOLLOWING``, as a process of its own would."""
    control = RolloutControl(rig.hands, Tenure(folder))
    await control.start(compile_rollouts(parse_config(FOLLOWING, path="f", folder=folder)), "ada")
    looking = asyncio.ensure_future(control.run())
    yield control
    looking.cancel()
    await asyncio.gather(looking, return_exceptions=True)
    await control.close()


@asynccontextmanager
async def promoted(folder: Path) -> AsyncIterator[tuple[Rig, Elsewhere, RolloutControl]]:
    """A rollout whose candidate became champion, in a registry that cannot be reached since."""
    rig = Rig(folder, working=False)
    rig.hands.mover = registry = Elsewhere(rig)
    config = parse_config(FOLLOWING, path="f", folder=folder)
    aliases = {"champion": "1", "challenger": "2"}
    rig.publisher.replace(compile_routing(config), {"m": Loaded(rig.versions, "1", aliases)}, 2)
    async with at_work(rig, folder) as control:
        await rig.until(lambda: rig.share == 0.5)
        await control.order("r1-2", "promote", actor="bob", reason="")
        await rig.until(lambda: control.status("r1-2")["state"] == "promoted")
        registry.heard()
        await rig.until(lambda: registry.serves() == (0, "2"))
        registry.reachable = False
        yield rig, registry, control
    await rig.close()


@pytest.mark.parametrize("restarted", [False, True])
def test_an_alias_that_cannot_be_moved_back_is_waited_for(tmp_path: Path, restarted: bool) -> None:
    """Its rollout stays on its way back, on disk too, and the registry's last word brings no candidate back."""

    async def go_on(rig: Rig, registry: Elsewhere, control: RolloutControl) -> None:
        registry.reachable = True
        await rig.until(lambda: control.status("r1-2")["state"] == "rolled_back")
        assert registry.champion == "1"
        registry.heard()
        await control._look_at("m")
        assert registry.serves() == (0, "1")

    async def body() -> None:
        async with promoted(tmp_path) as (rig, registry, control):
            with capture_logs() as logs:
                await control.order("r1-2", "rollback", actor="bob", reason="")
                assert registry.serves() == (0, "1")
                asked = registry.asked
                await rig.until(lambda: registry.asked > asked + 2)
            registry.heard()
            assert (control.status("r1-2")["state"], registry.serves()) == ("rolling_back", (0, "1"))
            await rig.until(
                lambda: [(row.state, row.open) for row in rig.hands.store.all()] == [("rolling_back", True)]
            )
            assert [line["event"] for line in logs].count("alias_waits") == 1
            if not restarted:
                await go_on(rig, registry, control)
                return
            await control.close()
            async with at_work(rig, tmp_path) as again:
                await rig.until(lambda: again.status("r1-2")["state"] == "rolling_back")
                await go_on(rig, registry, again)

    asyncio.run(asyncio.wait_for(body(), 30))
