"""``registry.mlflow``: the MLflow server whose registered models are served, and how it is asked.

It knows nothing of the rest of the file, which holds it; ``compile_mlflow`` turns it into what the adapter is built of.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Final

from pydantic import Field

from router.registry.taking import Limits
from server.config import units
from server.config.kinds import (
    DURATION_SCHEMA,
    SIZE_SCHEMA,
    FilePath,
    HeaderSecret,
    Interval,
    Many,
    ModelName,
    Text,
    UpstreamUrl,
    bounded_duration,
    bounded_size,
    default,
)
from server.config.problems import Contradiction
from server.config.section import Section
from server.config.tree import KeyPath
from server.errors import ConfigError
from server.mlflow.options import MlflowOptions

_TERABYTE: Final = "1024GiB"

RequestTime = Annotated[int, bounded_duration("100ms", "1m"), DURATION_SCHEMA]
LongTime = Annotated[int, bounded_duration("1m", "365d"), DURATION_SCHEMA]
TakenSize = Annotated[int, bounded_size("1KiB", _TERABYTE), SIZE_SCHEMA]


class Mlflow(Section):
    """An MLflow tracking server (3.x) with ``--serve-artifacts``, followed by alias over REST.

    ``models``: names to follow; left out: every registered model. ``token``, or ``user`` and ``password``, are sent to
    ``url`` only. ``poll``: how often it is asked. ``webhook_secrets``: let its webhooks ask earlier; two while one is
    changed. ``check``: how often the bytes of what is served are compared with those first taken. ``keep_unused``: how
    long bytes are kept here that no alias names. ``promotes``: this gateway writes promotions back; of all gateways
    that follow one server, only one may. ``artifact_folders``: folders of this machine that MLflow keeps artifacts in,
    for a server that does not hand them out itself.
    """

    #: Where the tracking server is.
    url: UpstreamUrl
    models: Annotated[Many[ModelName], Field(max_length=1000)] = ()
    token: HeaderSecret | None = Field(default=None, repr=False)
    #: With ``password``, in the place of a token.
    user: Text | None = None
    #: The password of ``user``.
    password: HeaderSecret | None = Field(default=None, repr=False)
    #: PEM file of the authorities that are trusted for https.
    ca_file: FilePath | None = None
    poll: Interval = default("10s", units.parse_duration)
    #: Of one request to it.
    timeout: RequestTime = default("10s", units.parse_duration)
    #: Of the download of one version.
    download_timeout: LongTime = default("1h", units.parse_duration)
    check: LongTime = default("1d", units.parse_duration)
    keep_unused: LongTime = default("7d", units.parse_duration)
    #: The largest file that is taken.
    max_file: TakenSize = default("16GiB", units.parse_size)
    #: The most bytes of one version.
    max_version: TakenSize = default("32GiB", units.parse_size)
    webhook_secrets: Annotated[Many[HeaderSecret], Field(max_length=2)] = Field(default=(), repr=False)
    promotes: bool = False
    artifact_folders: Annotated[Many[FilePath], Field(max_length=100)] = ()


def mlflow_contradictions(mlflow: Mlflow, path: KeyPath) -> Iterator[Contradiction]:
    """Broken rules of the section at ``path`` that span several keys."""
    if mlflow.token is not None and mlflow.user is not None:
        yield Contradiction((*path, "token"), "wanted either a token or a user, not both", ((*path, "user"),))
    elif (mlflow.user is None) != (mlflow.password is None):
        yield Contradiction((*path, "user"), "a user and a password go together", ((*path, "password"),))
    elif mlflow.max_file > mlflow.max_version:
        text = "one file may be larger than max_version, the whole"
        yield Contradiction((*path, "max_file"), text, ((*path, "max_version"),))
    else:
        try:
            compile_mlflow(mlflow)
        except ConfigError as error:
            yield Contradiction((*path, "url"), error.message)


def compile_mlflow(mlflow: Mlflow) -> MlflowOptions:
    """What the adapter is built of. The section has no contradictions."""
    return MlflowOptions(
        url=mlflow.url,
        models=mlflow.models,
        token=mlflow.token or "",
        user=mlflow.user or "",
        password=mlflow.password or "",
        ca_file="" if mlflow.ca_file is None else str(mlflow.ca_file),
        poll_s=mlflow.poll / units.NS_PER_S,
        timeout_s=mlflow.timeout / units.NS_PER_S,
        download_s=mlflow.download_timeout / units.NS_PER_S,
        check_every_s=mlflow.check / units.NS_PER_S,
        keep_unused_s=mlflow.keep_unused / units.NS_PER_S,
        limits=Limits(mlflow.max_file, mlflow.max_version),
        hint_secrets=mlflow.webhook_secrets,
        promotes=mlflow.promotes,
        artifact_folders=tuple(Path(os.path.abspath(folder)) for folder in mlflow.artifact_folders),
    )
