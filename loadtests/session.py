"""Sessions of onnxruntime as everything that is measured runs them.

Imports nothing of the project: peers use it in environments of their own.
"""

from __future__ import annotations

from pathlib import Path

import onnxruntime as ort


def session(path: Path) -> ort.InferenceSession:
    """On one thread that does not spin, as the server's sessions on one core."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
