"""Positions of keys: the same key and salt give the same position in every process, on every machine, for ever.

XXH3-64 is fast and well mixed but not made to withstand an adversary: where users choose their own keys and gain by
their arm, a secret in the seed keeps them from working it out beforehand.
"""

from __future__ import annotations

from xxhash import xxh3_64_intdigest


def seed_of(salt: str, secret: bytes = b"") -> int:
    """The 64-bit seed of everything drawn under one salt (the id of a rollout, an experiment or a shadow)."""
    data = salt.encode()
    return xxh3_64_intdigest(data + b"\0" + secret if secret else data)


def position(key: str, seed: int) -> int:
    """Where a key stands in 0 .. 2^64 - 1."""
    try:
        return xxh3_64_intdigest(key.encode(), seed)
    except UnicodeEncodeError:  # lone surrogates: header bytes that are no UTF-8, decoded with surrogateescape
        return xxh3_64_intdigest(key.encode("utf-8", "surrogatepass"), seed)


def redraw(draw: int, seed: int) -> int:
    """An independent position from one 64-bit random number, for one more thing to be drawn for the same request."""
    return xxh3_64_intdigest(draw.to_bytes(8, "little"), seed)
