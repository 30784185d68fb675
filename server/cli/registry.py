"""``tidegate registry``: publish versions, move aliases, check and clean up. Safe beside a live server.

With ``--config`` the registry is the one that server is served from; one that follows MLflow can be read only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from router.registry.base import CHAMPION, RegistryError, Version
from router.registry.embedded import EmbeddedRegistry
from router.registry.gc import collect
from router.registry.manifest import Description, describe, parse_description
from router.registry.references import split_reference
from server.cli import show
from server.cli.profiles import check_profile, files_to_publish
from server.errors import TidegateError
from server.state import operator

if TYPE_CHECKING:
    from server.offline.registries import Opened, Registry

STATE_DIR = click.option(
    "--state-dir", type=click.Path(path_type=Path), default=Path("tidegate-state"), show_default=True,
    help="The state folder that the registry lives in.",
)  # fmt: skip
CONFIG = click.option(
    "--config", type=click.Path(path_type=Path), help="A server's configuration: the registry that it is served from."
)
ACTOR = click.option("--actor", default=None, help="Who does it, for the audit.  [default: you@this-host]")
AS_JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@click.group()
def registry() -> None:
    """The registry: immutable versions, aliases, files by their content. One that is MLflow's can be read."""


@contextmanager
def opened(state_dir: Path, config: Path | None) -> Iterator[Opened]:
    """The registry that is meant, to be read; what it refuses ends the command with one line."""
    from server.offline.registries import opened

    with opened(folder_given(state_dir), config) as found:
        yield found


@contextmanager
def writing(state_dir: Path, config: Path | None, *, make: bool = False) -> Iterator[EmbeddedRegistry]:
    """The registry that is meant, to be changed: one that is MLflow's ends the command with one line.

    ``make``: where there is none, one is made.
    """
    from server.offline.registries import opened

    with opened(folder_given(state_dir), config, make=make, reads=False) as found:
        yield found.writable()


def folder_given(state_dir: Path) -> Path | None:
    """The state folder that was named; None for the default, which a configuration goes before."""
    source = click.get_current_context().get_parameter_source("state_dir")
    return None if source is ParameterSource.DEFAULT else state_dir


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
@CONFIG
@ACTOR
@AS_JSON
def publish(
    model: str, source: Path, alias: str | None, about: Path | None, profile: Path | None, state_dir: Path,
    config: Path | None, actor: str | None, as_json: bool,
) -> None:  # fmt: skip
    """Publish a version of MODEL from SOURCE, a model file or a folder. The same files are the same version."""
    with writing(state_dir, config, make=True) as found:
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
@CONFIG
@AS_JSON
def list_(model: str | None, state_dir: Path, config: Path | None, as_json: bool) -> None:
    """List all models, or the versions of one."""
    with opened(state_dir, config) as found:
        names = found.registry.models() if model is None else (model,)
        rows = [row for name in names for row in version_rows(found.registry, name)]
    if as_json:
        show.as_json(rows)
        return
    cells = [
        [row["model"], row["version"], ", ".join(row["aliases"]), row["created"], row["digest"][:12], row["state"]]
        for row in rows
    ]
    show.table(["MODEL", "VERSION", "ALIASES", "CREATED", "DIGEST", "STATE"], cells)


def version_rows(found: Registry, model: str) -> list[dict[str, Any]]:
    """One plain row per version, with the aliases that point at it."""
    aliases, refused = found.aliases(model), _refused(found, model)
    return [
        {
            "model": model,
            "version": version.version,
            "aliases": [alias for alias, number in aliases.items() if number == version.version],
            "created": version.created,
            "digest": version.digest,
            "state": "refused" if version.version in refused else _state(found, version),
        }
        for version in found.versions(model)
    ]


def _refused(found: Registry, model: str) -> Mapping[int, str]:
    return {} if isinstance(found, EmbeddedRegistry) else found.refused(model)


def _state(found: Registry, version: Version) -> str:
    """Of MLflow's versions, those have a digest whose bytes were taken."""
    if isinstance(found, EmbeddedRegistry):
        return "retired" if version.retired else "live"
    return "pinned" if version.digest else "not taken"


def version_row(found: Registry, version: Version) -> dict[str, Any]:
    """The row of one version; of one that no longer is in MLflow, what is known of it here."""
    rows = [row for row in version_rows(found, version.model) if row["version"] == version.version]
    known = {"model": version.model, "version": version.version, "aliases": [], "state": "pinned"}
    return {**(rows[0] if rows else known), "created": version.created, "digest": version.digest}


def chosen(found: Registry, reference: str) -> Version:
    """The version that a reference means; a model alone means its champion."""
    model, which = split_reference(reference)
    return found.resolve(model, which or f"@{CHAMPION}")


@registry.command("show")
@click.argument("reference")
@STATE_DIR
@CONFIG
def show_(reference: str, state_dir: Path, config: Path | None) -> None:
    """Show a version's manifest as JSON. REFERENCE: MODEL (its champion), MODEL:7 or MODEL@alias."""
    with opened(state_dir, config) as found:
        version = chosen(found.registry, reference)
        row = version_row(found.registry, version)
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
@CONFIG
@ACTOR
@AS_JSON
def alias(
    model: str, name: str | None, version: int | None, expect: int | None, drop: bool, state_dir: Path,
    config: Path | None, actor: str | None, as_json: bool,
) -> None:  # fmt: skip
    """Show the aliases of MODEL, or point NAME at VERSION. A new champion makes the old one previous."""
    if (name is None and (drop or expect is not None)) or (name is not None and drop == (version is not None)):
        raise click.UsageError("give MODEL alone, or MODEL NAME VERSION, or MODEL NAME --drop")
    if name is not None:
        with writing(state_dir, config) as found:
            move_alias(found, model, name, version, expect, actor or operator())
    with opened(state_dir, config) as known:
        rows = alias_rows(known.registry, model, name)
    if as_json:
        show.as_json(rows)
    else:
        cells = [[row["alias"], row["version"] or "-", row.get("generation", "-")] for row in rows]
        show.table(["ALIAS", "VERSION", "GENERATION"], cells)


def alias_rows(found: Registry, model: str, name: str | None) -> list[dict[str, Any]]:
    """Every alias of a model, and ``name`` even if it points nowhere. MLflow counts no generations."""
    aliases = found.aliases(model)
    if isinstance(found, EmbeddedRegistry):
        return [asdict(found.alias(model, known)) for known in sorted({*aliases, *([name] if name else [])})]
    return [{"alias": known, "version": aliases[known]} for known in sorted(aliases)]


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
@CONFIG
def fetch(reference: str, folder: Path, state_dir: Path, config: Path | None) -> None:
    """Copy a version's files, verified, into the new FOLDER."""
    with opened(state_dir, config) as found:
        version = chosen(found.registry, reference)
        fetched = found.registry.fetch(version.model, version.version, folder)
    click.echo(f"{version.model}:{version.version}: {len(fetched.files)} files in {folder}")


@registry.command()
@click.argument("reference", required=False)
@STATE_DIR
@CONFIG
@AS_JSON
def verify(reference: str | None, state_dir: Path, config: Path | None, as_json: bool) -> None:
    """Hash the files of a version, of a model, or of everything again. Exit code 1 names what is damaged."""
    with opened(state_dir, config) as found:
        rows = [check(found.registry, version) for version in wanted(found.registry, reference)]
    damaged = [row for row in rows if row["problem"]]
    if as_json:
        show.as_json(rows)
    else:
        for row in damaged:
            click.echo(row["problem"], err=True)
        click.echo(f"{len(rows)} versions checked, {len(damaged)} damaged")
    raise click.exceptions.Exit(1 if damaged else 0)


def wanted(found: Registry, reference: str | None) -> list[Version]:
    """The versions whose files are here, as they were not retired, or were taken: one, a model's, or all."""
    if reference is not None and split_reference(reference)[1]:
        return [chosen(found, reference)]
    names = found.models() if reference is None else (reference,)
    return [version for name in names for version in found.versions(name) if version.digest and not version.retired]


def check(found: Registry, version: Version) -> dict[str, Any]:
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
@CONFIG
@ACTOR
def retire(reference: str, state_dir: Path, config: Path | None, actor: str | None) -> None:
    """Give up the files of MODEL:VERSION, which must have no alias; ``gc`` then removes them. Its record stays."""
    model, which = split_reference(reference)
    if not which.isdigit():
        raise click.UsageError("name the version as MODEL:VERSION")
    with writing(state_dir, config) as found:
        found.retire(model, int(which), actor=actor or operator())
    click.echo(f"{model}:{which} is retired")


@registry.command()
@STATE_DIR
@CONFIG
@ACTOR
@AS_JSON
def gc(state_dir: Path, config: Path | None, actor: str | None, as_json: bool) -> None:
    """Remove files that no live version names, and what interrupted commands left behind."""
    with writing(state_dir, config) as found:
        done = collect(found, actor=actor or operator())
    if as_json:
        show.as_json(asdict(done))
    else:
        removed = f"{done.blobs} files ({show.size(done.bytes)}), {done.folders} unused folders, {done.temps} leftovers"
        click.echo(f"removed {removed}")
