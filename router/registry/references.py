"""How people name a version of a model."""

from __future__ import annotations


def split_reference(reference: str) -> tuple[str, str]:
    """``model``, ``model:7`` or ``model@alias`` -> (model, "" | "7" | "@alias")."""
    for mark in ("@", ":"):
        model, found, rest = reference.partition(mark)
        if found:
            return model, f"@{rest}" if mark == "@" else rest
    return reference, ""
