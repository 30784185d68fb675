"""Which requests are captured: those whose id hashes below the share, so that everybody who knows the id agrees.

The id is the client's own where it sent one, else the gateway's (``x-tidegate-id``). A label that comes hours later,
on another replica or after a restart, is thus kept exactly when its request was.
"""

from __future__ import annotations

from typing import Final

from xxhash import xxh3_64_intdigest

#: Share of all requests, as ``sample`` counts it.
FULL_SHARE: Final = 10_000
#: Keeps the draw apart from those of splits and shadows, which hash ids too.
_SEED: Final = 0x63617074757265


def sample_id(client_id: str, tidegate_id: str) -> str:
    """The id that a request is drawn by."""
    return client_id or tidegate_id


def edge_of(sample: int) -> int:
    """The bound that the hash of a drawn id lies below; ``sample`` in 1/10,000."""
    return (sample << 64) // FULL_SHARE


def drawn(request_id: str, edge: int) -> bool:
    """Is the request of this id in the sample?"""
    return xxh3_64_intdigest(request_id.encode("utf-8", "surrogatepass"), _SEED) < edge
