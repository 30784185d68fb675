"""What the configuration says of an MLflow server, in plain types."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import SplitResult, urlsplit

from router.registry.taking import Limits
from server.errors import ConfigError


@dataclass(slots=True, frozen=True)
class MlflowOptions:
    """An MLflow tracking server and what is taken from it. Raises ConfigError for an address that cannot be called.

    ``models``: names to follow; empty: every registered model. ``token`` (a bearer token) or ``user`` and ``password``
    go to ``url`` and nowhere else. ``hint_secrets``: of MLflow's webhooks; empty: those are not taken. ``promotes``:
    whether this gateway writes promotions back; of all that follow one server, one may. ``timeout_s`` is for one
    request but for downloads, where it is the longest silence. ``artifact_folders``: where artifacts that MLflow keeps
    on a disk of this machine may lie.
    """

    url: str
    models: tuple[str, ...] = ()
    token: str = field(default="", repr=False)
    user: str = ""
    password: str = field(default="", repr=False)
    ca_file: str = ""
    poll_s: float = 10.0
    timeout_s: float = 10.0
    download_s: float = 3600.0
    check_every_s: float = 86_400.0
    keep_unused_s: float = 7 * 86_400.0
    limits: Limits = field(default_factory=Limits)
    hint_secrets: tuple[str, ...] = field(default=(), repr=False)
    promotes: bool = False
    artifact_folders: tuple[Path, ...] = ()

    def __post_init__(self) -> None:
        parts = self.parts
        if parts.scheme not in ("http", "https") or not parts.hostname or _port(parts) == 0:
            raise ConfigError("the address of MLflow must be http://HOST or https://HOST, perhaps with port and path")
        if parts.username is not None or parts.query or parts.fragment or not _is_plain(self.url):
            raise ConfigError("the address of MLflow must be ASCII without spaces, a user, a query or a fragment")
        for folder in self.artifact_folders:
            if not folder.is_absolute() or ".." in folder.parts:
                raise ConfigError(f"an artifact folder must be an absolute path without '..', got {folder}")
        if self.token and self.user:
            raise ConfigError("MLflow is given either a token or a user and a password")
        if not all(map(_is_plain, (self.token, self.user, self.password))) or ":" in self.user:
            raise ConfigError(
                "what MLflow is logged in with must be printable ASCII without spaces, and no ':' in a user"
            )

    @property
    def parts(self) -> SplitResult:
        """The address in parts."""
        return urlsplit(self.url)

    @property
    def name(self) -> str:
        """Which registry this is, for pins and people: the address without a slash at its end."""
        return self.url.rstrip("/")


def _port(parts: SplitResult) -> int | None:
    try:
        return parts.port
    except ValueError:
        return 0


def _is_plain(text: str) -> bool:
    return text.isascii() and text.isprintable() and " " not in text
