"""``tidegate export``: a version as one folder that is served without a registry, and the check of such a folder."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from server.cli import show
from server.cli.registry import AS_JSON, CONFIG, STATE_DIR, folder_given


@click.command()
@click.argument("reference", required=False)
@click.argument("folder", required=False, type=click.Path(path_type=Path))
@click.option("--verify", type=click.Path(path_type=Path), metavar="DIR", help="Check an exported folder instead.")
@STATE_DIR
@CONFIG
@AS_JSON
def export(
    reference: str | None, folder: Path | None, verify: Path | None, state_dir: Path, config: Path | None, as_json: bool
) -> None:
    """Write MODEL (its champion), MODEL@ALIAS or MODEL:7 to the new FOLDER, which `serve FOLDER/config.yaml` serves."""
    from server.offline.bundle import export_bundle, verify_bundle

    if verify is not None and reference is None:
        bundle = verify_bundle(verify)
    elif verify is None and reference is not None and folder is not None:
        bundle = export_bundle(reference, folder_given(state_dir), folder, config)
    else:
        raise click.UsageError("give REFERENCE and FOLDER, or --verify DIR alone")
    if as_json:
        show.as_json(asdict(bundle))
        return
    done = "is whole" if verify is not None else "written"
    size = show.size(bundle.bytes)
    click.echo(f"{bundle.model}:{bundle.version} ({bundle.digest[:12]}), {bundle.files} files, {size}: {done}")
