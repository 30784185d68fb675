"""The configuration that ``serve`` starts with: the file, or the last good text when the file is bad."""

from __future__ import annotations

from pathlib import Path

import click

from server.config.load import parse_config
from server.config.problems import InvalidConfig, Problem
from server.errors import ConfigError
from server.history import LastGood
from server.watching import read_config
from server.wiring import ConfigFile


def read_file(path: Path, state_dir: Path | None, *, repository_given: bool) -> ConfigFile:
    """Read and check a file. A bad one is said loudly, and the last good text of the state folder serves instead.

    Raises InvalidConfig when there is no such text either.
    """
    try:
        text = read_config(path)
    except OSError as error:
        raise InvalidConfig([Problem(str(path), 0, 0, "", f"cannot be read: {error.strerror or error}")]) from error
    try:
        return _parsed(path, text, repository_given)
    except ConfigError as error:
        kept = LastGood(state_dir or Path("tidegate-state")).read()
        if kept is None:
            raise
        click.echo(f"{error.message}\n{path} is not served: starting with the last good configuration", err=True)
        return _parsed(path, kept, repository_given)


def _parsed(path: Path, text: bytes, repository_given: bool) -> ConfigFile:
    try:
        decoded = text.decode()
    except UnicodeDecodeError as error:
        raise InvalidConfig([Problem(str(path), 0, 0, "", f"is not UTF-8 at byte {error.start}")]) from error
    config = parse_config(decoded, path=str(path), folder=path.parent, repository_given=repository_given)
    return ConfigFile(path, text, config)
