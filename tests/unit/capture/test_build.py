"""server.capture.build: the folder, the sender, and what is told of where segments are."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest

from server.capture.build import open_recording
from server.config.capture_options import CaptureSettings, CaptureSpec, EventOptions
from server.errors import ConfigError


def test_nothing_is_recorded_unless_it_is_asked_for(tmp_path: Path) -> None:
    assert open_recording(None, tmp_path) is None
    assert not list(tmp_path.iterdir())


def test_segments_lie_in_the_state_folder_or_where_it_says(tmp_path: Path) -> None:
    settings = CaptureSettings(specs={"m": CaptureSpec(sample=100)}, format="jsonl")
    made = open_recording(settings, tmp_path)
    assert made is not None
    with closing(made):
        assert made.paths("m") == (str(tmp_path / "capture" / "m" / "requests-*.jsonl"),)
        assert made.paths("other") == ()
        with pytest.raises(ConfigError, match="written by another process"):
            open_recording(settings, tmp_path)
    elsewhere = open_recording(CaptureSettings(CaptureSpec(1), folder=tmp_path / "other"), tmp_path)
    assert elsewhere is not None
    with closing(elsewhere):
        assert elsewhere.capture.folder == tmp_path / "other"


def test_a_sender_ends_with_it_and_with_what_cannot_begin(tmp_path: Path) -> None:
    settings = CaptureSettings(CaptureSpec(1), events=EventOptions("http://127.0.0.1:1/"))
    made = open_recording(settings, tmp_path)
    assert made is not None
    assert made.sender is not None
    with pytest.raises(ConfigError):
        open_recording(settings, tmp_path)
    made.close()
    bad = CaptureSettings(
        CaptureSpec(1), events=EventOptions("https://127.0.0.1:1/", ca_file=str(tmp_path / "none.pem"))
    )
    with pytest.raises(ConfigError, match=r"events\.ca_file"):
        open_recording(bad, tmp_path)
