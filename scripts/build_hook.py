"""Hatchling's hook: a wheel carries the request path compiled, where it is built on a machine with a C compiler.

``TIDEGATE_COMPILE`` says how: ``auto`` (the default; without a compiler the wheel is pure Python, which does the same
at a higher cost per request, and says so), ``1`` (a wheel that cannot be compiled is an error), ``0`` (never).
"""

from __future__ import annotations

import importlib.util
import os
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class CompileHook(BuildHookInterface[Any]):
    """Adds the shared objects to a standard wheel; an editable one stays as it is."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        wanted = os.environ.get("TIDEGATE_COMPILE", "auto")
        if wanted not in {"auto", "0", "1"}:
            raise ValueError(f"TIDEGATE_COMPILE: wanted auto, 0 or 1, got {wanted!r}")
        if version == "editable" or wanted == "0":
            return
        compiling = _compiling(Path(self.root))
        self._made = tempfile.TemporaryDirectory()
        out = Path(self._made.name, "tree")
        self.app.display_info("compiling the request path (about a minute)")
        try:
            compiled = compiling.compile_into(out, Path(self.root))
        except compiling.CannotCompile as error:
            if wanted == "1":
                raise RuntimeError(f"TIDEGATE_COMPILE=1, and {error}") from None
            self.app.display_warning(f"left uncompiled: {error}")
            return
        build_data["pure_python"] = False
        build_data["infer_tag"] = True
        build_data["force_include"].update({str(out / path): str(path) for path in compiled})

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """The wheel is written: what went into it is not needed any more."""
        if hasattr(self, "_made"):
            self._made.cleanup()


def _compiling(root: Path) -> Any:
    """``scripts/compiling.py``, from its file: a build's path does not name the project."""
    spec = importlib.util.spec_from_file_location("compiling", root / "scripts" / "compiling.py")
    if spec is None or spec.loader is None:
        raise ImportError("scripts/compiling.py is absent")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
