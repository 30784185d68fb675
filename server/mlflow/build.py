"""All that serving from MLflow takes, made of its options and of the state folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from router.registry.base import Database, Journal
from router.registry.pinned import PinnedRegistry
from router.registry.taking import Ends
from server.mlflow.client import MlflowOrigin
from server.mlflow.follower import Follower
from server.mlflow.hints import MlflowHints
from server.mlflow.options import MlflowOptions
from server.mlflow.promotion import MlflowAliases

FOLDER: Final = "mlflow"


@dataclass(slots=True, frozen=True)
class MlflowPart:
    """``registry`` to serve from, ``follower`` that keeps it true, ``aliases`` to write promotions back with.

    ``hints``: None when the options name no secret for webhooks.
    """

    registry: PinnedRegistry
    follower: Follower
    aliases: MlflowAliases
    hints: MlflowHints | None

    def standing(self) -> dict[str, object]:
        """How things are with MLflow, as plain values."""
        return self.registry.standing().as_dict()


def open_mlflow(
    options: MlflowOptions, state_dir: Path, database: Database, journal: Journal, ends: Ends | None = None
) -> MlflowPart:
    """Nothing is asked yet: ``follower.start`` does. ``ends``: see PinnedRegistry. Raises ConfigError or StoreError."""
    origin, root = MlflowOrigin(options), state_dir / FOLDER
    registry = PinnedRegistry(
        origin, database, root, journal, limits=options.limits, check_every_s=options.check_every_s, ends=ends
    )
    follower = Follower(registry, poll_s=options.poll_s, keep_unused_s=options.keep_unused_s)
    aliases = MlflowAliases(origin, database, journal, root / "writer.lock", promotes=options.promotes)
    hints = MlflowHints(options.hint_secrets, follower.hint) if options.hint_secrets else None
    return MlflowPart(registry, follower, aliases, hints)
