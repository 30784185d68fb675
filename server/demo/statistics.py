"""The server's own counts, from its statistics endpoint: rows, executions and batch sizes per model version."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from server.demo.clients import CallFailed, HttpClient


@dataclass(frozen=True, slots=True)
class Served:
    """What one model version has run: ``batches`` maps a batch's rows to how many such batches there were."""

    rows: int
    executions: int
    batches: Mapping[int, int]

    def since(self, before: Served) -> Served:
        """What was added after ``before``."""
        batches = {rows: count - before.batches.get(rows, 0) for rows, count in self.batches.items()}
        added = {rows: count for rows, count in batches.items() if count}
        return Served(self.rows - before.rows, self.executions - before.executions, added)

    @property
    def mean_batch(self) -> float:
        return self.rows / self.executions if self.executions else 0.0

    @property
    def largest_batch(self) -> int:
        return max(self.batches, default=0)


async def served(client: HttpClient, models: Iterable[str]) -> dict[str, Served]:
    """``model:version`` -> counts since the server's start. Raises CallFailed."""
    found = {}
    for model in models:
        document = await client.get(f"/v2/models/{model}/stats")
        try:
            for version in document["model_stats"]:
                found[f"{version['name']}:{version['version']}"] = _served(version)
        except (KeyError, TypeError, ValueError) as error:
            raise CallFailed(f"the statistics of {model} are not Triton's: {type(error).__name__}: {error}") from error
    return found


def _served(version: Mapping[str, Any]) -> Served:
    batches = {int(batch["batch_size"]): int(batch["compute_infer"]["count"]) for batch in version["batch_stats"]}
    return Served(int(version["inference_count"]), int(version["execution_count"]), batches)
