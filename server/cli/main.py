"""The ``tidegate`` command. Exit codes: 0 ok, 2 wrong usage or configuration, 1 anything else."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from server import __version__
from server.cli.audit import audit
from server.cli.batch import batch
from server.cli.card import card
from server.cli.data import data
from server.cli.export import export
from server.cli.gate import gate
from server.cli.hooks import hook
from server.cli.monitor import monitor
from server.cli.registry import registry
from server.cli.retrain import retrain
from server.cli.rollouts import rollout
from server.cli.routes import explain_route
from server.errors import ConfigError, TidegateError

USAGE = 2


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="tidegate")
def cli() -> None:
    """A model serving gateway: ONNX models over HTTP and gRPC (Open Inference Protocol V2)."""


registry.add_command(card)
cli.add_command(registry)
cli.add_command(audit)
cli.add_command(hook)
cli.add_command(retrain)
cli.add_command(monitor)
cli.add_command(gate)
cli.add_command(rollout)
cli.add_command(explain_route)
cli.add_command(batch)
cli.add_command(data)
cli.add_command(export)


def main() -> None:
    """Entry point of the console script: domain errors end with one line on standard error, never a traceback."""
    try:
        code = cli(standalone_mode=False)  # what a command exits with; None when it just ends
        sys.exit(code or 0)
    except click.ClickException as error:
        error.show()
        sys.exit(USAGE)
    except click.Abort:
        sys.exit(1)
    except ConfigError as error:
        click.echo(error.message, err=True)
        sys.exit(USAGE)
    except TidegateError as error:
        click.echo(f"error: {error.message}", err=True)
        sys.exit(1)


@cli.command()
@click.argument("target", required=False, type=click.Path(path_type=Path))
@click.option(
    "--model-repository", type=click.Path(path_type=Path), help="Folder in Triton/KServe layout, or one .onnx."
)
@click.option("--http", metavar="HOST:PORT", help="HTTP inference address.  [default: 127.0.0.1:8000]")
@click.option("--grpc", metavar="HOST:PORT", help="gRPC inference address.  [default: 127.0.0.1:8001]")
@click.option("--metrics", metavar="HOST:PORT", help="Metrics address.  [default: 127.0.0.1:8002]")
@click.option("--admin", metavar="HOST:PORT", help="Admin address.  [default: 127.0.0.1:8003]")
@click.option("--state-dir", type=click.Path(path_type=Path), help="Where state is kept.  [default: ./tidegate-state]")
@click.option("--workers", type=int, help="Serving processes; this version serves from one.")
@click.option(
    "--in-process", is_flag=True, default=None, help="Serve without a supervisor (always so in this version)."
)
@click.option("--transport", type=click.Choice(["native", "reference"]), help="Protocol stack.  [default: native]")
@click.option("--single-port", is_flag=True, default=None, help="Open the HTTP address only; it answers gRPC too.")
@click.option("--model-control", type=click.Choice(["none", "poll", "explicit"]), help="Who loads and unloads models.")
@click.option("--load-model", multiple=True, metavar="NAME", help="Load at start in explicit mode; may be repeated.")
@click.option("--server-name", help="Name in the server metadata.  [default: tidegate]")
@click.option("--drain-seconds", type=float, help="How long SIGTERM waits for requests in flight.  [default: 30]")
@click.option("--log-format", type=click.Choice(["json", "text"]), help="[default: json]")
@click.option("--log-level", type=click.Choice(["debug", "info", "warning", "error"]), help="[default: info]")
def serve(target: Path | None, **flags: Any) -> None:
    """Serve models until SIGTERM.

    TARGET is a configuration file (.yaml), a model file (.onnx) or a folder of models; flags override the file.
    """
    from server import process
    from server.cli.start import read_file
    from server.config.compile import settings_from_flags

    file = None
    if target is not None and target.suffix in (".yaml", ".yml"):
        file = read_file(target, flags["state_dir"], repository_given=flags["model_repository"] is not None)
    elif target is not None:
        if flags["model_repository"] is not None:
            raise click.UsageError("give a model file or folder either as TARGET or as --model-repository, not both")
        flags["model_repository"] = target
    flags["load_model"] = flags["load_model"] or None
    sys.exit(process.serve(file, settings_from_flags(None if file is None else file.config, **flags)))


@cli.command("check-config")
@click.argument("file", required=False, type=click.Path(path_type=Path))
@click.option("--schema", is_flag=True, help="Print the JSON Schema of the configuration file.")
@click.option("--json", "as_json", is_flag=True, help="Problems, or the plan, as JSON.")
@click.option("--against", metavar="URL", help="Admin address of a running server: print what a reload would do.")
@click.option("--token", envvar="TIDEGATE_ADMIN_TOKEN", help="Bearer token, when reading asks for one.")
def check_config(file: Path | None, schema: bool, as_json: bool, against: str | None, token: str | None) -> None:
    """Check a configuration file: every mistake at once, with line and column."""
    from server.cli.golden import golden_problems
    from server.config.load import load_config
    from server.config.problems import InvalidConfig, render_problems
    from server.config.schema import config_schema

    if schema:
        click.echo(json.dumps(config_schema(), indent=2))
        return
    if file is None:
        raise click.UsageError("name the configuration file, or ask for --schema")
    try:
        config = load_config(file)
        if wrong := golden_problems(file, config):
            raise InvalidConfig(wrong)
        if against is not None:
            from server.cli.routes import plan_against, running_text, show_plan

            sys.exit(show_plan(plan_against(file, running_text(against, token)), as_json=as_json))
    except InvalidConfig as error:
        click.echo(render_problems(error.problems, as_json=as_json), err=not as_json)
        sys.exit(USAGE)
    click.echo("[]" if as_json else f"{file}: ok, {len(config.models)} models")


@cli.command()
@click.option("--state-dir", type=click.Path(path_type=Path), default=Path("tidegate-state"), show_default=True)
@click.option("--json", "as_json", is_flag=True, help="The findings as JSON.")
def doctor(state_dir: Path, as_json: bool) -> None:
    """Say what is installed, which execution providers really work, and what would get in the way."""
    from server.doctor import examine
    from server.runtime.onnx import OnnxRuntime

    findings = examine(state_dir, OnnxRuntime().describe)
    ok = all(finding.level != "error" for finding in findings)
    if as_json:
        rows = [{"check": f.check, "level": f.level, "detail": f.detail} for f in findings]
        click.echo(json.dumps({"ok": ok, "findings": rows}, indent=2))
    else:
        width = max(len(finding.check) for finding in findings)
        for finding in findings:
            click.echo(f"{finding.level:<8} {finding.check:<{width}}  {finding.detail}")
    sys.exit(0 if ok else 1)


@cli.command()
@click.option("--keep", is_flag=True, help="Leave the server up at the end and print how to stop it.")
@click.option("--seconds", type=float, default=12.0, show_default=True, help="Length of the load.")
@click.option("--state-dir", type=click.Path(path_type=Path), default=Path("demo-state"), show_default=True)
@click.option("--offline", is_flag=True, help="Use no network: skip what is not on this machine yet.")
@click.option("--plain", is_flag=True, help="Plain lines instead of a live display.")
@click.option(
    "--act",
    type=click.Choice(["serve", "loop", "all"]),
    default="all",
    show_default=True,
    help="serve: all protocols at once, every answer checked. loop: from drift to a new version, and a bad one's end.",
)
def demo(**options: Any) -> None:
    """Serve real models on real data and check every answer; then let drift, labels and gates change the model."""
    from server.demo.run import DemoOptions, run_demo

    sys.exit(run_demo(DemoOptions(**options)))
