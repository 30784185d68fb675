"""What the demo can be told. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


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
