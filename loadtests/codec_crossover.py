"""From which size on the codec process pays: ``python -m loadtests.codec_crossover``.

For requests of one FP32 tensor and for answers with one, by their size as JSON: CPU microseconds of the event loop's
thread when it parses (writes) them itself, and when it hands them to the process. A thread instead of the process
would save the loop nothing, as the interpreter's lock is held all the same. Both ways take turns, and medians are
shown; CPU times stand a busy neighbour. ``server.codec.offload_over`` should be about where the second gets cheaper.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from collections.abc import Awaitable, Callable

import numpy as np
import orjson

from server.codec.json import decode_infer, encode_infer
from server.codec.process.client import CodecProcess
from server.types import InferenceResponse, RequestLimits, Tensor

KIB = 1024
SIZES_KIB = (4, 8, 16, 32, 48, 64, 96, 128, 256, 1024)
LIMITS = RequestLimits()
Way = Callable[[], Awaitable[object]]


def values_of(size: int) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    """As many numbers as make about ``size`` bytes of JSON."""
    sample = np.random.default_rng(1).standard_normal(4096, dtype=np.float32)
    count = 4096 * size // len(orjson.dumps(sample, option=orjson.OPT_SERIALIZE_NUMPY))
    return np.resize(sample, count)


def decoding(codec: CodecProcess, size: int) -> tuple[Way, Way]:
    """A request of about ``size`` bytes is parsed: here, and there."""
    values = values_of(size)
    tensor = {"name": "x", "datatype": "FP32", "shape": [1, len(values)], "data": values}
    body = orjson.dumps({"inputs": [tensor]}, option=orjson.OPT_SERIALIZE_NUMPY)

    async def here() -> object:
        return decode_infer(body, model="m", version="1", limits=LIMITS, json_size=None)

    async def there() -> object:
        return await codec.decode(body, model="m", version="1", limits=LIMITS, json_size=None)

    return here, there


def encoding(codec: CodecProcess, size: int) -> tuple[Way, Way]:
    """An answer of about ``size`` bytes is written: here, and there."""
    values = values_of(size)
    response = InferenceResponse("m", "1", "", [Tensor("y", "FP32", (1, len(values)), values.tobytes())])

    async def here() -> object:
        return encode_infer(response, outputs=[], binary_default=False)

    async def there() -> object:
        return await codec.encode(response, outputs=[], binary_default=False)

    return here, there


async def cpu_us(way: Way) -> float:
    before = time.thread_time_ns()
    await way()
    return (time.thread_time_ns() - before) / 1e3


async def compare(ways: tuple[Way, Way], rounds: int) -> list[float]:
    """Median microseconds of each way."""
    taken = [[await cpu_us(way) for way in ways] for _ in range(rounds)]
    return [statistics.median(column) for column in zip(*taken, strict=True)]


async def run(rounds: int) -> None:
    codec = CodecProcess()
    try:
        if not await codec.ready():
            raise SystemExit("the codec process does not start")
        for title, kind in (("requests", decoding), ("answers", encoding)):
            print(f"\n{title:10} {'here':>10} {'process':>10}   us of the loop's thread")
            for size in SIZES_KIB:
                here, there = await compare(kind(codec, size * KIB), rounds)
                print(f"{size:6} KiB {here:10.0f} {there:10.0f}   {'process' if there < here else 'here'}", flush=True)
    finally:
        await codec.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=50, help="of each size, both ways in each")
    options = parser.parse_args()
    if options.rounds < 1:
        parser.error("rounds must be positive")
    asyncio.run(run(options.rounds))


if __name__ == "__main__":
    main()
