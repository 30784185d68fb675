"""``tidegate registry``: publish versions, move aliases, check and clean up. Safe beside a live server."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from router.registry.base import CHAMPION, RegistryError, Version
from router.registry.embedded import EmbeddedRegistry
from router.registry.gc import collect
from router.registry.manifest import Description, ManifestError, describe, parse_description
from router.registry.references import split_reference
from server.cli import show
from server.cli.profiles import check_profile, files_to_publish
from server.errors import TidegateError
from server.state import open_state, operator

STATE_DIR = click.option(
    "--state-dir", type=click.Path(path_type=Path), default=Path("tidegate-state"), show_default=True,
    help="The state folder that the registry lives in.",
)  # fmt: skip
ACTOR = click.option("--actor", default=None, help="Who does it, for the audit.  [default: you@this-host]")
AS_JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@click.group()
def registry() -> None:
    """The embedded registry: immutable versions, aliases, files by their content."""


@contextmanager
def opened(state_dir: Path) -> Iterator[EmbeddedRegistry]:
    """The registry of a state folder; what it refuses ends the command with one line."""
    state = open_state(state_dir)
    try:
        yield state.registry
    except (RegistryError, ManifestError) as error:
        raise TidegateError(str(error)) from error
    finally:
        state.close()


@registry.command()
@click.argument("model")
@click.argument("source", type=click.Path(path_type=Path))
@click.option("--alias", help="Point this alias at the version too; champion keeps the old one as previous.")
@click.option("--description", "about", type=click.Path(path_type=Path), help="JSON: signature, metrics, lineage, ...")
@click.option(
    "--profile",
    type=click.Path(path_type=Path),
    help="The version's drift reference profile. In a folder, a .tgp file is one by itself.",
)
@STATE_DIR
@ACTOR
@AS_JSON
def publish(
    model: str, source: Path, alias: str | None, about: Path | None, profile: Path | None, state_dir: Path,
    actor: str | None, as_json: bool,
) -> None:  # fmt: skip
    """Publish a version of MODEL from SOURCE, a model file or a folder. The same files are the same version."""
    with opened(state_dir) as found:
        description = read_description(about)
        files, roles = files_to_publish(source, profile)
        check_profile(files, roles, description)
        done = found.publish(model, files, description, roles=roles, alias=alias, actor=actor or operator())
    if as_json:
        show.as_json(asdict(done))
    else:
        what = "published" if done.created else "was there already"
        click.echo(f"{done.model}:{done.version} {what}, digest {done.digest[:12]}")


def read_description(path: Path | None) -> Description | None:
    """The publisher's description file, or a clear error."""
    if path is None:
        return None
    try:
        return parse_description(path.read_bytes())
    except OSError as error:
        raise TidegateError(f"{path} cannot be read: {error.strerror or error}") from error


@registry.command("list")
@click.argument("model", required=False)
@STATE_DIR
@AS_JSON
def list_(model: str | None, state_dir: Path, as_json: bool) -> None:
    """List all models, or the versions of one."""
    with opened(state_dir) as found:
        names = found.models() if model is None else (model,)
        rows = [row for name in names for row in version_rows(found, name)]
    if as_json:
        show.as_json(rows)
        return
    cells = [
        [row["model"], row["version"], ", ".join(row["aliases"]), row["created"], row["digest"][:12], row["state"]]
        for row in rows
    ]
    show.table(["MODEL", "VERSION", "ALIASES", "CREATED", "DIGEST", "STATE"], cells)


def version_rows(found: EmbeddedRegistry, model: str) -> list[dict[str, Any]]:
    """One plain row per version, with the aliases that point at it."""
    aliases = found.aliases(model)
    return [
        {
            "model": model,
            "version": version.version,
            "aliases": [alias for alias, number in aliases.items() if number == version.version],
            "created": version.created,
            "digest": version.digest,
            "state": "retired" if version.retired else "live",
        }
        for version in found.versions(model)
    ]


def chosen(found: EmbeddedRegistry, reference: str) -> Version:
    """The version that a reference means; a model alone means its champion."""
    model, which = split_reference(reference)
    return found.resolve(model, which or f"@{CHAMPION}")


@registry.command("show")
@click.argument("reference")
@STATE_DIR
def show_(reference: str, state_dir: Path) -> None:
    """Show a version's manifest as JSON. REFERENCE: MODEL (its champion), MODEL:7 or MODEL@alias."""
    with opened(state_dir) as found:
        version = chosen(found, reference)
        row = next(row for row in version_rows(found, version.model) if row["version"] == version.version)
    manifest = version.manifest
    if manifest is not None:
        row |= {"files": [asdict(entry) for entry in manifest.files], **describe(manifest.description)}
    show.as_json(row)


@registry.command()
@click.argument("model")
@click.argument("name", required=False)
@click.argument("version", required=False, type=int)
@click.option("--expect", type=int, help="Only if the alias has this generation now (0: it was never set).")
@click.option("--drop", is_flag=True, help="Make the alias point nowhere.")
@STATE_DIR
@ACTOR
@AS_JSON
def alias(
    model: str, name: str | None, version: int | None, expect: int | None, drop: bool, state_dir: Path,
    actor: str | None, as_json: bool,
) -> None:  # fmt: skip
    """Show the aliases of MODEL, or point NAME at VERSION. A new champion makes the old one previous."""
    if (name is None and (drop or expect is not None)) or (name is not None and drop == (version is not None)):
        raise click.UsageError("give MODEL alone, or MODEL NAME VERSION, or MODEL NAME --drop")
    with opened(state_dir) as found:
        if name is not None:
            move_alias(found, model, name, version, expect, actor or operator())
        names = sorted({*found.aliases(model), *([name] if name is not None else [])})
        rows = [asdict(found.alias(model, known)) for known in names]
    if as_json:
        show.as_json(rows)
    else:
        show.table(
            ["ALIAS", "VERSION", "GENERATION"], [[r["alias"], r["version"] or "-", r["generation"]] for r in rows]
        )


def move_alias(
    found: EmbeddedRegistry, model: str, name: str, version: int | None, expect: int | None, actor: str
) -> None:
    """Set, promote or drop; with ``expect`` only when the alias has that generation."""
    if version is None:
        found.drop_alias(model, name, expected=expect, actor=actor)
    elif name == CHAMPION:
        found.promote(model, version, expected=expect, actor=actor)
    else:
        found.set_alias(model, name, version, expected=expect, actor=actor)


@registry.command()
@click.argument("reference")
@click.argument("folder", type=click.Path(path_type=Path))
@STATE_DIR
def fetch(reference: str, folder: Path, state_dir: Path) -> None:
    """Copy a version's files, verified, into the new FOLDER."""
    with opened(state_dir) as found:
        version = chosen(found, reference)
        fetched = found.fetch(version.model, version.version, folder)
    click.echo(f"{version.model}:{version.version}: {len(fetched.files)} files in {folder}")


@registry.command()
@click.argument("reference", required=False)
@STATE_DIR
@AS_JSON
def verify(reference: str | None, state_dir: Path, as_json: bool) -> None:
    """Hash the files of a version, of a model, or of everything again. Exit code 1 names what is damaged."""
    with opened(state_dir) as found:
        rows = [check(found, version) for version in wanted(found, reference)]
    damaged = [row for row in rows if row["problem"]]
    if as_json:
        show.as_json(rows)
    else:
        for row in damaged:
            click.echo(row["problem"], err=True)
        click.echo(f"{len(rows)} versions checked, {len(damaged)} damaged")
    raise click.exceptions.Exit(1 if damaged else 0)


def wanted(found: EmbeddedRegistry, reference: str | None) -> list[Version]:
    """The versions that are not retired: one, a model's, or all."""
    if reference is not None and split_reference(reference)[1]:
        return [chosen(found, reference)]
    names = found.models() if reference is None else (reference,)
    return [version for name in names for version in found.versions(name) if not version.retired]


def check(found: EmbeddedRegistry, version: Version) -> dict[str, Any]:
    """One row of ``verify``."""
    problem = ""
    try:
        found.verify(version.model, version.version)
    except RegistryError as error:
        problem = str(error)
    return {"model": version.model, "version": version.version, "problem": problem}


@registry.command()
@click.argument("reference")
@STATE_DIR
@ACTOR
def retire(reference: str, state_dir: Path, actor: str | None) -> None:
    """Give up the files of MODEL:VERSION, which must have no alias; ``gc`` then removes them. Its record stays."""
    model, which = split_reference(reference)
    if not which.isdigit():
        raise click.UsageError("name the version as MODEL:VERSION")
    with opened(state_dir) as found:
        found.retire(model, int(which), actor=actor or operator())
    click.echo(f"{model}:{which} is retired")


@registry.command()
@STATE_DIR
@ACTOR
@AS_JSON
def gc(state_dir: Path, actor: str | None, as_json: bool) -> None:
    """Remove files that no live version names, and what interrupted commands left behind."""
    with opened(state_dir) as found:
        done = collect(found, actor=actor or operator())
    if as_json:
        show.as_json(asdict(done))
    else:
        removed = f"{done.blobs} files ({show.size(done.bytes)}), {done.folders} unused folders, {done.temps} leftovers"
        click.echo(f"removed {removed}")
