"""``python -m loadtests``: run a scenario, compare two results, draw one.

python -m loadtests run SCENARIO.yaml [--output RESULT.json] [--html PAGE.html]
python -m loadtests compare A.json B.json
python -m loadtests plot RESULT.json [-o PAGE.html]
"""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path

import click
import uvloop

from loadtests import compare as comparison
from loadtests import machine, plots, results, runner
from loadtests.lanes import OK
from loadtests.scenario import load_scenario
from loadtests.servers import ROOT
from server.errors import TidegateError

_FILE = click.Path(path_type=Path, dir_okay=False)
_EXISTING = click.Path(path_type=Path, dir_okay=False, exists=True)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Load tests of V2 servers."""


@main.command()
@click.argument("scenario", type=_EXISTING)
@click.option("--output", type=_FILE, help="Where the result goes; a dated file below loadtests/results by default.")
@click.option("--html", type=_FILE, help="Draw it too.")
def run(scenario: Path, output: Path | None, html: Path | None) -> None:
    """Run a SCENARIO file and keep the result."""
    output = output or ROOT / "loadtests" / "results" / f"{scenario.stem}-{time.strftime('%Y%m%d-%H%M%S')}.json"
    _, generator_cores = machine.split_cores()
    try:
        for path in filter(None, (output, html)):
            results.check_folder(path.parent)
        wanted = load_scenario(scenario)
        with runner.target_of(wanted) as target, machine.pinned(generator_cores):
            result = uvloop.run(runner.run(wanted, target, click.echo))
    except (TidegateError, OSError, RuntimeError) as error:
        raise click.ClickException(str(error)) from None
    result.save(output)
    click.echo(f"Asked by {result.settings['generator_says']}. Result: {output}")
    if html is not None:
        html.write_text(plots.page_of(result))
    samples = result.cells[wanted.name][target.label]
    if len(samples) < wanted.rounds:
        raise click.ClickException(f"the server was gone: {len(samples)} of {wanted.rounds} rounds were measured")
    outcomes = Counter[str]()
    for sample in samples:
        outcomes.update(sample.outcomes)
    if not outcomes[OK]:
        raise click.ClickException(f"no request succeeded: {dict(outcomes)}")


@main.command()
@click.argument("first", type=_EXISTING)
@click.argument("second", type=_EXISTING)
def compare(first: Path, second: Path) -> None:
    """How the SECOND result relates to the FIRST one."""
    try:
        click.echo(comparison.text(results.load(first), results.load(second)))
    except TidegateError as error:
        raise click.ClickException(str(error)) from None


@main.command()
@click.argument("result", type=_EXISTING)
@click.option("-o", "--output", type=_FILE, help="RESULT.html by default.")
def plot(result: Path, output: Path | None) -> None:
    """Draw a RESULT as one self-contained page."""
    output = output or result.with_suffix(".html")
    try:
        page = plots.page_of(results.load(result))
        results.check_folder(output.parent)
        output.write_text(page)
    except (TidegateError, OSError) as error:
        raise click.ClickException(str(error)) from None
    click.echo(str(output))


if __name__ == "__main__":
    main()
