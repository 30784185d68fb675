"""server.demo.loop.commands: the real command line, and what becomes of its exit codes."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from server.demo.loop.commands import CommandFailed, Done, Tidegate
from tests.support import models


def test_a_command_on_the_state_folder(tmp_path: Path) -> None:
    models.affine(tmp_path / "model.onnx")
    tidegate = Tidegate(tmp_path / "state")
    asyncio.run(tidegate.here("registry", "publish", "m", str(tmp_path / "model.onnx")))
    done = asyncio.run(tidegate.here("registry", "list", "--json"))
    assert (done.code, [row["model"] for row in done.json()]) == (0, ["m"])


def test_an_unexpected_exit_code_says_what_the_command_said(tmp_path: Path) -> None:
    tidegate = Tidegate(tmp_path / "state")
    with pytest.raises(CommandFailed, match=r"registry show m:1.* ended with 1: .*m"):
        asyncio.run(tidegate.here("registry", "show", "m:1"))
    assert asyncio.run(tidegate.here("registry", "show", "m:1", codes=(1,))).code == 1


def test_output_that_is_no_json_is_told() -> None:
    with pytest.raises(CommandFailed, match="wanted JSON"):
        Done(0, "hello", "").json()
