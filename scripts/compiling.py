"""Compile the request path to native code with mypyc: the same source, type-checked, without the interpreter between.

    python -m scripts.compiling OUT      a copy of the packages in OUT, with the compiled modules beside their source

Needs mypy, setuptools, a C compiler and Python's headers, all of them only here. Building a wheel does this by itself
(``scripts/build_hook.py``); an editable install stays interpreted, so that what is edited is what runs. Measured: the
path from the bytes of a request to the bytes of its answer takes 0.5 to 0.7 of the interpreted processor time.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("server", "router", "monitor")

#: What every request passes through. Together in one group: calls between them are plain C calls.
MODULES = (
    "monitor/tap.py",
    "router/breaker.py",
    "router/compiled.py",
    "router/decision.py",
    "router/retry.py",
    "router/table.py",
    "router/window.py",
    "server/admission.py",
    "server/batching/assemble.py",
    "server/batching/batcher.py",
    "server/batching/offloop.py",
    "server/batching/planner.py",
    "server/checks.py",
    "server/codec/binary.py",
    "server/codec/elements.py",
    "server/codec/forms.py",
    "server/codec/json.py",
    "server/codec/pieces.py",
    "server/codec/protobuf.py",
    "server/codec/scan.py",
    "server/gateway/call.py",
    "server/gateway/core.py",
    "server/gateway/deadlines.py",
    "server/gateway/policy.py",
    "server/gateway/polling.py",
    "server/gateway/served.py",
    "server/gateway/tracing.py",
    "server/telemetry/instruments.py",
    "server/telemetry/metrics.py",
    "server/telemetry/stats.py",
    "server/telemetry/trace.py",
    "server/transport/native/cycle.py",
    "server/transport/native/h2.py",
    "server/transport/native/heads.py",
    "server/transport/native/http1.py",
    "server/transport/native/metadata.py",
    "server/transport/native/server.py",
    "server/transport/native/session.py",
    "server/transport/native/streams.py",
    "server/transport/native/unary.py",
    "server/transport/native/windows.py",
    "server/transport/native/wire.py",
    "server/types.py",
)

#: What the compiled modules build on must be there with its types (so build-system.requires names it too): a class
#: whose base is unknown compiles to something else. What other libraries type may be unknown.
TYPED = ("httptools", "ngh2", "numpy", "orjson", "starlette", "structlog", "uvicorn")
_MYPY = """[mypy]
python_version = {version}
explicit_package_bases = True
ignore_missing_imports = True
follow_untyped_imports = False
[mypy-server._pb.*]
ignore_errors = True
"""
_SETUP = """
from mypyc.build import mypycify
from setuptools import setup

modules = mypycify(["--config-file", {config!r}, *{modules!r}], opt_level="2", debug_level="0", group_name="tidegate",
                   target_dir={scratch!r})
setup(name="tidegate-compiled", packages=[], ext_modules=modules,
      script_args=["build_ext", "--inplace", "--build-temp", {scratch!r}, "--build-lib", {scratch!r}])
"""
_LIMIT_S = 900

#: Calls within the shared object are direct and may be inlined, those of Python's functions need no stub.
_FLAGS = "-fno-semantic-interposition -fno-plt -fvisibility=hidden"
#: What only failing code calls, said to the compiler: it lays such code apart, and what runs stays close together. The
#: signatures are those of mypyc's runtime.
_COLD = """
struct _object;
__attribute__((cold)) void CPy_AddTraceback(const char *, const char *, int, struct _object *);
__attribute__((cold)) void CPy_TypeErrorTraceback(const char *, const char *, int, struct _object *, const char *,
                                                  struct _object *);
"""


class CannotCompile(Exception):
    """No compiler, no headers, or a step of it failed; the text says which."""


def check_tools() -> None:
    """Raise CannotCompile naming the first thing that is missing."""
    compiler = (os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc").split()[0]
    if shutil.which(compiler) is None:
        raise CannotCompile(f"no C compiler: {compiler} is not on PATH")
    header = Path(sysconfig.get_paths()["include"], "Python.h")
    if not header.exists():
        raise CannotCompile(
            f"no headers of Python: {header} is absent (on Debian and Ubuntu: apt-get install python3-dev)"
        )
    for tool in ("mypyc", "setuptools", *TYPED):
        if importlib.util.find_spec(tool) is None:
            raise CannotCompile(f"{tool} is not installed")


def compile_into(out: Path, source: Path = ROOT, modules: Sequence[str] = MODULES) -> list[Path]:
    """Copy the packages from ``source`` to ``out`` and compile there; the shared objects, relative to ``out``.

    Raises CannotCompile; ``out`` is then of no use.
    """
    check_tools()
    for package in PACKAGES:
        shutil.copytree(source / package, out / package, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    with tempfile.TemporaryDirectory() as scratch:
        config, program, cold = Path(scratch, "mypy.ini"), Path(scratch, "setup.py"), Path(scratch, "cold.h")
        config.write_text(_MYPY.format(version="{}.{}".format(*sys.version_info)), encoding="utf-8")
        text = _SETUP.format(config=str(config), modules=list(modules), scratch=scratch)
        program.write_text(text, encoding="utf-8")
        cold.write_text(_COLD, encoding="utf-8")
        # CFLAGS would replace those that Python was built with (wrapping integers, no assertions); these are added.
        flags = f"{os.environ.get('CPPFLAGS', '')} {_FLAGS} -include {shlex.quote(str(cold))}"
        environment = {**os.environ, "MYPY_CACHE_DIR": str(Path(scratch, "cache")), "CPPFLAGS": flags}
        try:
            done = subprocess.run(
                [sys.executable, str(program)],
                cwd=out, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=_LIMIT_S,
                check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise CannotCompile(f"it took over {_LIMIT_S} s") from None
    if done.returncode:
        raise CannotCompile(f"the compiler failed; its last words:\n{done.stdout[-2000:]}")
    return sorted(found.relative_to(out) for found in out.rglob("*.so"))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m scripts.compiling", description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="a folder; one that was compiled into before is replaced")
    out = parser.parse_args().out.resolve()
    if out.is_dir() and any(out.iterdir()) and not any(out.glob("*.so")):
        sys.stderr.write(f"cannot compile: {out} is there, and nothing that was compiled: it is not replaced\n")
        return 1
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as made:
        try:
            compiled = compile_into(Path(made, "tree"))
        except CannotCompile as error:
            sys.stderr.write(f"cannot compile: {error}\n")
            return 1
        shutil.rmtree(out, ignore_errors=True)
        Path(made, "tree").rename(out)
    sys.stdout.write(f"{len(compiled)} shared objects in {out}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
