"""Capture as one process runs it: the recorder, and whoever sends what it has written to another system."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from server.capture.events import EventSender
from server.capture.segments import default_format
from server.capture.service import Capture
from server.config.capture_options import CaptureSettings

_FOLDER = "capture"


@dataclass(slots=True, frozen=True)
class Recording:
    """``capture`` takes requests and labels; ``sender`` is None where nobody is sent them."""

    capture: Capture
    settings: CaptureSettings
    sender: EventSender | None = None

    def paths(self, model: str) -> tuple[str, ...]:
        """The pattern of the segments of a models entry; none when nothing of it is captured."""
        if not self.settings.of(model).sample:
            return ()
        pattern = f"requests-*.{default_format(self.settings.format)}"
        return (str(self.capture.folder.absolute() / model / pattern),)

    def close(self) -> None:
        """Write and send what waits. Blocks; call it off the loop, after the last answer."""
        self.capture.close()
        if self.sender is not None:
            self.sender.close()


def open_recording(settings: CaptureSettings | None, state_dir: Path) -> Recording | None:
    """Begin to record; None where nothing is to be. Raises ConfigError."""
    if settings is None:
        return None
    sender = None if settings.events is None else EventSender(settings, settings.events)
    try:
        folder = settings.folder or state_dir / _FOLDER
        capture = Capture(settings, folder, tell=None if sender is None else sender.tell)
    except BaseException:
        if sender is not None:
            sender.close()
        raise
    return Recording(capture, settings, sender)
