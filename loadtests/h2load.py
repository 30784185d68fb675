"""h2load (of nghttp2) as a generator: C, cheaper than ours, where it is installed.

It repeats the same headers, which flatters servers that keep what header compression gave them; gRPC's status is in
trailers, which it does not read: there an error counts as one only when the HTTP status is not 200.
"""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections import Counter
from pathlib import Path
from typing import Final

from loadtests.crew import Meter, Sample, Way, request_of
from loadtests.histogram import Histogram
from loadtests.lanes import OK
from loadtests.load import Taken
from loadtests.payloads import Payload
from loadtests.requests import Request
from loadtests.servers import Target
from server.errors import InvalidArgument

_SLACK_S: Final = 30.0


def path() -> str | None:
    """Where h2load is."""
    return shutil.which("h2load")


async def measure(target: Target, model: str, way: Way, payload: Payload, seconds: float, version: str = "") -> Sample:
    """One closed-loop window. Raises InvalidArgument when h2load is missing or says that it failed."""
    program = path()
    if program is None:
        raise InvalidArgument("h2load is not installed (nghttp2-client); use the generator 'own'")
    with tempfile.TemporaryDirectory() as name:
        body, log = Path(name) / "body", Path(name) / "log"
        arguments = _arguments(target, request_of(target, model, version, way, payload), way, body)
        load = [f"-c{way.connections}", f"-m{way.streams}", "-t1", f"-D{max(1, round(seconds))}", f"--log-file={log}"]
        meter = Meter(target.pid)
        meter.begin()
        process = await asyncio.create_subprocess_exec(
            program, *load, *arguments, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
        )
        try:
            async with asyncio.timeout(seconds + _SLACK_S):
                said, _ = await process.communicate()
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        meter.end()
        if process.returncode or not log.exists():
            raise InvalidArgument(f"h2load failed: {said.decode(errors='replace')[-1000:]}")
        return meter.sample(read_log(log.read_text(), float(max(1, round(seconds)))))


def _arguments(target: Target, request: Request, way: Way, body: Path) -> list[str]:
    """What to ask; the request's body goes to a file."""
    headers = [f"-H{name}: {value}" for name, value in request.headers]
    if way.protocol == "grpc":
        body.write_bytes(b"\0" + len(request.body).to_bytes(4, "big") + request.body)
        return [f"-d{body}", *headers, f"http://{target.grpc}{request.path}"]
    body.write_bytes(request.body)
    return ["--h1", f"-d{body}", *headers, f"http://{target.http}{request.path}"]


def read_log(text: str, seconds: float) -> Taken:
    """What ``--log-file`` says: a line for each request of start in us, status and latency in us."""
    taken = Taken(seconds=seconds, outcomes=Counter())
    latency: Histogram = taken.latency
    for line in text.splitlines():
        fields = line.split("\t")
        if len(fields) == 3 and fields[2].isdecimal():
            latency.record(int(fields[2]) * 1000)
            taken.outcomes[OK if fields[1] == "200" else f"http {fields[1]}"] += 1
    taken.completed = taken.outcomes[OK]
    return taken
