"""``tidegate doctor``: what is installed, what works on this machine, and what would get in the way."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import resource
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

from server import __version__

PACKAGES = ("server", "router", "monitor")
MIN_OPEN_FILES = 4096


@dataclass(slots=True, frozen=True)
class Finding:
    """One check. ``level``: ok, warning (works, could bite) or error (will not work)."""

    check: str
    level: str
    detail: str


def examine(state_dir: Path, describe_runtime: Callable[[], Mapping[str, object]]) -> list[Finding]:
    """Every check, in the order in which they are shown. Nothing is changed; a probe file is written and goes."""
    return [
        Finding("tidegate", "ok", f"{__version__} on Python {platform.python_version()}, {platform.platform()}"),
        Finding("request path", "ok", _request_path()),
        Finding("processors", "ok", f"{len(os.sched_getaffinity(0))} usable"),
        *_runtime(describe_runtime),
        *_names(),
        _open_files(),
        _state(state_dir),
        _locale(),
        _otlp(),
    ]


def _request_path() -> str:
    spec = importlib.util.find_spec("server.gateway.core")
    if spec is not None and spec.origin is not None and spec.origin.endswith(tuple(EXTENSION_SUFFIXES)):
        return "compiled"
    return "interpreted, at a higher cost per request: a wheel built where a C compiler is has it compiled"


def _runtime(describe: Callable[[], Mapping[str, object]]) -> list[Finding]:
    try:
        facts = describe()
    except Exception as error:  # noqa: BLE001 - whatever keeps the runtime from starting is the finding
        return [Finding("onnxruntime", "error", f"does not start: {error}")]
    return [Finding(f"onnxruntime {name}", "ok", _plain(value)) for name, value in facts.items()]


def _plain(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {_plain(item)}" for key, item in value.items())
    if isinstance(value, list | tuple | set | frozenset):
        return ", ".join(str(item) for item in value) or "none"
    return str(value)


def _names() -> list[Finding]:
    """Our import names are generic: another distribution that owns one of them would be imported in our place."""
    owners = importlib.metadata.packages_distributions()
    others = {name: sorted(set(owners.get(name, ())) - {"tidegate"}) for name in PACKAGES}
    clashes = [f"'{name}' also belongs to {', '.join(found)}" for name, found in others.items() if found]
    if clashes:
        return [Finding("import names", "error", "; ".join(clashes))]
    return [Finding("import names", "ok", f"{', '.join(PACKAGES)} belong to nobody else")]


def _open_files() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    level = "ok" if soft >= MIN_OPEN_FILES else "warning"
    wanted = "" if level == "ok" else f"; raise it to {MIN_OPEN_FILES} or more for many connections"
    return Finding("open files limit", level, f"{soft} (hard {hard}){wanted}")


def _state(state_dir: Path) -> Finding:
    # One that is not there yet is made where its nearest folder is.
    place = next(folder for folder in (state_dir, *state_dir.absolute().parents) if os.path.lexists(folder))
    try:
        with tempfile.TemporaryFile(dir=place) as probe:
            probe.write(b"\0" * 4096)
            os.fsync(probe.fileno())
    except OSError as error:
        return Finding("state directory", "error", f"{place}: {error.strerror}")
    if place is not state_dir:
        return Finding("state directory", "ok", f"{state_dir} is not there yet; it can be made, written and synced")
    return Finding("state directory", "ok", f"{state_dir} can be written and synced")


def _locale() -> Finding:
    """Text operators of ONNX Runtime look for this locale when a model is loaded, whatever LANG says."""
    import locale

    before = locale.setlocale(locale.LC_CTYPE)
    try:
        locale.setlocale(locale.LC_CTYPE, "en_US.UTF-8")
    except locale.Error:
        return Finding("locale", "warning", "en_US.UTF-8 is not there: models that change the case of text cannot load")
    finally:
        locale.setlocale(locale.LC_CTYPE, before)
    return Finding("locale", "ok", "en_US.UTF-8 is there")


def _otlp() -> Finding:
    try:
        version = importlib.metadata.version("opentelemetry-exporter-otlp-proto-http")
    except importlib.metadata.PackageNotFoundError:
        return Finding("OTLP export", "warning", "not installed; for traces and metrics over OTLP: tidegate[otlp]")
    return Finding("OTLP export", "ok", f"exporter {version}")
