"""What ``make bench`` measures: rows (ways to ask), columns (who is asked), and the goals that relate cells.

Columns: ``native`` and ``reference`` are Tidegate on its two transports; ``usual-grpc`` and ``usual-http`` do the same
work in the usual way; ``ngh2``, ``bare``, ``native-echo`` and ``grpc-echo`` are floors that answer without a model
(see ``loadtests.floors``); ``onnxruntime`` is the model alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from loadtests.crew import Pace, Protocol, Way
from loadtests.models import HEAVY, MODEL, WIDE

NATIVE: Final = "native"
REFERENCE: Final = "reference"
USUAL_GRPC: Final = "usual-grpc"
USUAL_HTTP: Final = "usual-http"
NGH2: Final = "ngh2"
BARE: Final = "bare"
NATIVE_ECHO: Final = "native-echo"
GRPC_ECHO: Final = "grpc-echo"
ALONE: Final = "onnxruntime"
CLOSED: Final = Pace()
#: Columns of Tidegate itself.
OURS: Final = (NATIVE, REFERENCE)
FLOORS: Final = (NGH2, BARE, NATIVE_ECHO, GRPC_ECHO)

SMALL_ALONE: Final = "small alone"
SMALL_BESIDE: Final = "small beside large"
HEAVY_ROW: Final = "heavy model"


@dataclass(slots=True, frozen=True)
class Row:
    """One way to ask ``columns``. ``metric`` is what the table shows first."""

    name: str
    says: str
    model: str
    way: Way
    columns: tuple[str, ...]
    metric: str = "cpu_us"
    pace: Pace = CLOSED
    #: Asked by h2load instead of our own generator.
    external: bool = False
    #: A large JSON tensor comes once a second meanwhile.
    beside_large: bool = False
    #: The model's thread has the server's core to itself; all else of the server shares the generator's.
    model_apart: bool = False
    #: Nothing is pinned while it is measured.
    all_cores: bool = False


@dataclass(slots=True, frozen=True)
class Goal:
    """``metric`` of one cell is at most (``at_least``: at least) ``limit`` times that of another one.

    ``limit`` None: no goal, a ratio to be known.
    """

    row: str
    column: str
    base_row: str
    base_column: str
    metric: str
    limit: float | None
    at_least: bool = False


_GRPC: Final = (NATIVE, REFERENCE, USUAL_GRPC, BARE, NATIVE_ECHO, GRPC_ECHO)
_GRPC_COST: Final = (NATIVE, REFERENCE, USUAL_GRPC, NGH2, BARE, NATIVE_ECHO, GRPC_ECHO)
_GRPCIO: Final = (NATIVE, REFERENCE, USUAL_GRPC, NGH2, BARE)
_HTTP: Final = (NATIVE, REFERENCE, USUAL_HTTP, BARE, NATIVE_ECHO)


def _small(name: str, says: str, protocol: Protocol, connections: int, streams: int, columns: tuple[str, ...]) -> Row:
    return Row(name, says, MODEL, Way(protocol, connections, streams), columns)


ROWS: Final = (
    _small("gRPC 64x1", "30 floats, 64 connections, 1 call each", "grpc", 64, 1, _GRPC_COST),
    _small("gRPC 8x8", "30 floats, 8 connections, 8 calls each", "grpc", 8, 8, _GRPC_COST),
    _small("grpcio 8x8", "the same from grpcio's own client", "grpcio", 8, 8, _GRPCIO),
    _small("HTTP JSON 64", "30 floats as JSON, 64 connections", "http-json", 64, 1, _HTTP),
    _small("HTTP binary 64", "30 floats as a binary tensor, 64 connections", "http-binary", 64, 1, _HTTP),
    Row("h2load JSON 64", "HTTP JSON again, asked by h2load", MODEL, Way("http-json", 64), _HTTP[:4], external=True),
    Row("gRPC 1x1", "one request in flight: median latency", MODEL, Way("grpc", 1), _GRPC, "p50_us"),
    Row("h2load gRPC 1x1", "the same asked by h2load", MODEL, Way("grpc", 1), _GRPC, "p50_us", external=True),
    Row("gRPC 600 kB", "150,000 floats, 2 connections, 4 calls each", WIDE, Way("grpc", 2, 4), _GRPC[:3]),
    Row("HTTP 600 kB", "150,000 floats as a binary tensor", WIDE, Way("http-binary", 8), _HTTP[:3]),
    Row(
        SMALL_ALONE,
        "gRPC, 300 requests a second, open loop",
        MODEL,
        Way("grpc", 16),
        (NATIVE, REFERENCE),
        "p99_us",
        Pace(300.0),
    ),
    Row(
        SMALL_BESIDE,
        "the same beside a 1.4 MB JSON tensor each second",
        MODEL,
        Way("grpc", 16),
        (NATIVE, REFERENCE),
        "p99_us",
        Pace(300.0),
        beside_large=True,
    ),
    Row(HEAVY_ROW, "gRPC, batches of over 5 ms", HEAVY, Way("grpc", 4, 8), (NATIVE,), "rate", model_apart=True),
)

GOALS: Final = (
    *[
        goal
        for row in ("gRPC 64x1", "gRPC 8x8")
        for goal in (
            Goal(row, NATIVE, row, USUAL_GRPC, "cpu_us", 1 / 12),
            Goal(row, NATIVE, row, NGH2, "cpu_us", 1.6),
            Goal(row, NATIVE, row, BARE, "cpu_us", None),
        )
    ],
    Goal("grpcio 8x8", NATIVE, "grpcio 8x8", USUAL_GRPC, "cpu_us", 1 / 6),
    Goal("grpcio 8x8", NATIVE, "grpcio 8x8", NGH2, "cpu_us", None),
    Goal("grpcio 8x8", NATIVE, "grpcio 8x8", BARE, "cpu_us", None),
    Goal("HTTP JSON 64", NATIVE, "HTTP JSON 64", USUAL_HTTP, "cpu_us", 1 / 4),
    Goal("HTTP binary 64", NATIVE, "HTTP binary 64", USUAL_HTTP, "cpu_us", 1 / 5),
    Goal("h2load gRPC 1x1", NATIVE, "h2load gRPC 1x1", USUAL_GRPC, "p50_us", 1 / 4),
    Goal("gRPC 600 kB", NATIVE, "gRPC 600 kB", USUAL_GRPC, "cpu_us", 1.0),
    Goal("HTTP 600 kB", NATIVE, "gRPC 600 kB", USUAL_GRPC, "cpu_us", 1.0),
    Goal(SMALL_BESIDE, NATIVE, SMALL_ALONE, NATIVE, "p99_us", 1.2),
    Goal(HEAVY_ROW, NATIVE, HEAVY_ROW, ALONE, "rate", 0.97, at_least=True),
)
