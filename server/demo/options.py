"""What the demo can be told. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

#: ``serve``: real models over all protocols; ``loop``: from drift to a promoted version, and back from a bad one.
Act: TypeAlias = Literal["serve", "loop", "all"]


@dataclass(frozen=True, slots=True)
class DemoOptions:
    """What ``tidegate demo`` can be told. ``state_dir`` keeps downloads, models, logs and what the server learned."""

    state_dir: Path = Path("demo-state")
    #: Length of the load.
    seconds: float = 12.0
    #: Leave the server up at the end.
    keep: bool = False
    #: Use no network: what is not on this machine yet is skipped.
    offline: bool = False
    #: No live display; also so when stdout is no terminal.
    plain: bool = False
    #: Virtual environment with tritonclient; made when missing.
    clients_venv: Path = Path(".venv-clients")
    act: Act = "all"

    @property
    def serves(self) -> bool:
        return self.act in ("serve", "all")

    @property
    def loops(self) -> bool:
        return self.act in ("loop", "all")

    @property
    def kept_file(self) -> Path:
        """Where a server that stays up is written down."""
        return self.state_dir / "kept-server.json"
