"""A rollout that begins while the configuration is changed under it."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path

import pytest

from server.config.load import parse_config
from server.config.rollouts import RolloutTemplate, compile_rollouts
from server.control.publishing import Loaded
from server.control.rollouts.control import RolloutControl
from server.control.rollouts.tenure import Tenure
from tests.unit.control_rollouts.test_actions import TEXT, Rig


def templates(folder: Path) -> Mapping[str, RolloutTemplate]:
    return compile_rollouts(parse_config(TEXT, path="f", folder=folder))


@pytest.mark.parametrize("stays", [True, False])
def test_a_reload_while_a_rollout_is_written_down(tmp_path: Path, stays: bool) -> None:
    """The same section again goes on with it. Without its section it has ended, on disk too, and is let go of."""

    async def body() -> None:
        rig = Rig(tmp_path, busy_timeout_s=10)
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
        rig = Rig(tmp_path)
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
