"""Runs the ``tidegate`` command as its users do: in a process of its own, while the replay goes on."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from server.demo.process import environment

_TIMEOUT_S: Final = 120.0


class CommandFailed(Exception):
    """A command that must work did not. The message has what it said."""


@dataclass(frozen=True, slots=True)
class Done:
    """What a command printed, and its exit code."""

    code: int
    output: str
    errors: str

    def json(self) -> Any:
        """What it printed, as JSON. Raises CommandFailed when it is none."""
        try:
            return json.loads(self.output)
        except ValueError:
            raise CommandFailed(f"wanted JSON from a command, got {self.output[:200]!r}") from None


@dataclass(frozen=True, slots=True)
class Tidegate:
    """The command line with one state folder."""

    state_dir: Path

    async def run(self, *words: str, codes: tuple[int, ...] = (0,)) -> Done:
        """One command. Raises CommandFailed when it ends with none of ``codes``."""
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "server", *words,
            stdin=asyncio.subprocess.DEVNULL, stdout=pipe, stderr=pipe, env=environment(),
        )  # fmt: skip
        try:
            output, errors = await asyncio.wait_for(process.communicate(), _TIMEOUT_S)
        except BaseException:
            if process.returncode is None:
                process.kill()
                await process.wait()
            raise
        done = Done(process.returncode or 0, output.decode(errors="replace"), errors.decode(errors="replace"))
        if done.code not in codes:
            said = (done.errors or done.output).strip()[-1000:]
            raise CommandFailed(f"tidegate {' '.join(words[:3])} ended with {done.code}: {said}")
        return done

    async def here(self, *words: str, codes: tuple[int, ...] = (0,)) -> Done:
        """One command on the state folder."""
        return await self.run(*words, "--state-dir", str(self.state_dir), codes=codes)

    async def publish(
        self, model: str, file: Path, profile: Path, alias: str, description: Mapping[str, Any] | None = None
    ) -> int:
        """Publish a version with its profile under an alias; its number."""
        words = ["registry", "publish", model, str(file), "--profile", str(profile), "--alias", alias, "--json"]
        if description is not None:
            about = file.with_suffix(".json")
            await asyncio.to_thread(about.write_text, json.dumps(description), encoding="utf-8")
            words += ["--description", str(about)]
        return int((await self.here(*words)).json()["version"])
