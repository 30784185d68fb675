"""``tidegate gate``: what a candidate shows on holdout data beside the champion. Needs no server."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from router.registry.base import CHALLENGER, CHAMPION
from router.registry.references import split_reference
from server.cli import show
from server.cli.registry import AS_JSON, STATE_DIR, opened
from server.errors import NotFound
from server.state import operator

if TYPE_CHECKING:
    from server.config.gates import GatePolicy
    from server.gates.keeper import Versions
    from server.gates.outcome import GateOutcome

#: Exit codes by status.
EXIT: Final = {"passed": 0, "failed": 3, "undecided": 4}


@click.group()
def gate() -> None:
    """Quality gates: is a candidate as good as the champion, everywhere, and as fast?"""


@gate.command()
@click.option("--model", metavar="M[:V|@ALIAS]", help="The candidate in the registry.  [default: its @challenger]")
@click.option("--against", metavar="M[:V|@ALIAS]", help="Whom to compare with.  [default: the model's @champion]")
@click.option("--candidate", type=click.Path(path_type=Path), help="The candidate as a model file, instead of --model.")
@click.option("--champion", type=click.Path(path_type=Path), help="Whom to compare with, as a model file.")
@click.option("--policy", type=click.Path(path_type=Path), help="A file that is one gate policy.")
@click.option(
    "--config", type=click.Path(path_type=Path), help="A configuration: its policy of the model, and its registry."
)
@STATE_DIR
@click.option("--record/--no-record", default=True, help="Write the verdict to the audit trail of the state folder.")
@AS_JSON
def check(
    model: str | None, against: str | None, candidate: Path | None, champion: Path | None, policy: Path | None,
    config: Path | None, state_dir: Path, record: bool, as_json: bool,
) -> None:  # fmt: skip
    """Run a gate policy. Exit code 0: passed, 3: failed, 4: not decidable, so a person has to."""
    if (model is None) == (candidate is None):
        raise click.UsageError("name the candidate with --model or with --candidate")
    if candidate is not None and against is not None:
        raise click.UsageError("--against goes with --model; name a file with --champion")
    if model is not None and champion is not None:
        raise click.UsageError("--champion goes with --candidate; name a version with --against")
    if candidate is not None and policy is not None and config is not None:
        raise click.UsageError("name the policy with --policy FILE or with --config FILE")
    name = candidate.stem if candidate is not None else split_reference(model or "")[0]
    asked = read_policy(name, policy, config)
    if candidate is not None:
        outcome = check_files(name, asked, candidate, champion, show_progress)
    else:
        outcome = check_registry(model or "", against, asked, state_dir, config, record, show_progress)
    if as_json:
        show.as_json(outcome.to_json())
    else:
        show_outcome(outcome)
    raise click.exceptions.Exit(EXIT[outcome.status.value])


def read_policy(model: str, policy: Path | None, config: Path | None) -> GatePolicy:
    """The policy of its own file, else of the configuration; or every mistake in it."""
    from server.config.gate_files import load_policy, policy_of

    if policy is not None:
        return load_policy(policy)
    if config is not None:
        return policy_of(config, model)
    raise click.UsageError("name the policy with --policy FILE or with --config FILE")


def check_files(
    name: str, policy: GatePolicy, candidate: Path, champion: Path | None, told: Callable[[str], None]
) -> GateOutcome:
    """A model file beside another one; nothing is recorded."""
    from server.gates.versions import FileVersions

    files = {"candidate": candidate} | ({} if champion is None else {"champion": champion})
    for path in files.values():
        if not path.is_file():
            raise NotFound(f"{path} is no file")
    return evaluate(name, policy, FileVersions(files), told, ("candidate", "champion"))


def check_registry(
    reference: str, against: str | None, policy: GatePolicy, state_dir: Path, config: Path | None, record: bool,
    told: Callable[[str], None],
) -> GateOutcome:  # fmt: skip
    """A version beside another one of the same model; the verdict goes to the audit."""
    from server.gates.keeper import event_of
    from server.gates.versions import RegistryVersions

    model, which = split_reference(reference)
    other, beside = split_reference(against or f"{model}@{CHAMPION}")
    if other != model:
        raise click.UsageError(f"--against must be of the same model, {model}, got {other}")
    with opened(state_dir, config) as found:
        candidate = found.registry.resolve(model, which or f"@{CHALLENGER}")
        both = (str(candidate.version), beside or f"@{CHAMPION}")
        outcome = evaluate(model, policy, RegistryVersions(found.registry), told, both)
        if record:
            found.state.audit.record(event_of(outcome, operator()))
        return outcome


def evaluate(
    model: str,
    policy: GatePolicy,
    versions: Versions,
    told: Callable[[str], None],
    both: tuple[str, str],
) -> GateOutcome:
    """One evaluation in this process; ``both``: references of the candidate and of the champion."""
    from server.gates.keeper import Gatekeeper
    from server.runtime.onnx import OnnxRuntime

    keeper = Gatekeeper({model: policy}, versions, OnnxRuntime(measure_budget_s=0), progress=told)
    try:
        return keeper.evaluate(model, *both)
    finally:
        keeper.close()


def show_progress(step: str) -> None:
    """What is going on, on standard error, where somebody looks at it."""
    if sys.stderr.isatty():
        click.echo(f"{step} ...", err=True)


def show_outcome(outcome: GateOutcome) -> None:
    """The findings as a table, and the verdict as the last line."""
    beside = f" beside {outcome.against}" if outcome.against else ""
    click.echo(f"{outcome.model}:{outcome.version}{beside}; policy {outcome.policy[:12] or '-'}")
    if outcome.data:
        facts = outcome.data
        click.echo(f"holdout: {facts['rows']} of {facts['of']} rows, sha256 {str(facts['sha256'])[:12]}")
    show.table(["GATE", "STATUS", "FINDING"], [[one.gate, one.status.value, one.reason] for one in outcome.findings])
    click.echo(f"verdict: {outcome.status.value}")
