"""Pages for people, made of plain values: one self-contained HTML text each. Knows nothing else of the server."""

from server.pages.drift import drift_page

__all__ = ["drift_page"]
