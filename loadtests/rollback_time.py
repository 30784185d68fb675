"""How long a candidate that breaks stays in use: seconds from its first failure to a share of nothing.

    python -m loadtests.rollback_time [--rate 1000] [--share 5%] [--repeats 5] [--output FILE.json]

Version 1 is a model of the gateway's own, version 2 another server's, on 5 % of the traffic with the shipped settings
of gates. h2load (Debian's nghttp2-client) asks at a steady rate over 20 connections. Then the other server is killed:
from one request to the next all that reaches the candidate fails. What is told is when the rollout was seen to have a
share of nothing, and when its verdict was written down; and, of a rollout of its own, how long an order to abort took.

Target: 3 s to a share of nothing, 1 s from the verdict to it, 0.1 s for an abort.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from loadtests.models import FEATURES, MODEL, write_model
from loadtests.servers import serving

CONNECTIONS = 20
#: Long enough for the gates to have seen good traffic.
BEFORE_S = 6.0
PATIENCE_S = 60.0
_VERDICTS = ("rollout.rolling_back", "rollout.rolled_back")


@dataclass
class Times:
    """Seconds. The verdict may be on disk after the table is in force: then its time is not over 0."""

    to_nothing_s: float
    verdict_to_nothing_s: float
    abort_s: float


class Admin:
    """The admin address of the gateway under test."""

    def __init__(self, address: str, folder: Path) -> None:
        self._url = f"http://{address}/admin/v1/"
        self._token = (folder / "state-native" / "admin-token").read_text().strip()

    def ask(self, path: str, method: str = "GET") -> Any:
        headers = {"Authorization": f"Bearer {self._token}"}
        request = urllib.request.Request(self._url + path, method=method, headers=headers)  # noqa: S310 - our own
        with urllib.request.urlopen(request, timeout=10) as answer:  # noqa: S310
            return json.loads(answer.read())

    def until(self, name: str, wanted: str) -> dict[str, Any]:
        """The rollout once it is in that state, or has that share."""
        end = time.perf_counter() + PATIENCE_S
        found: dict[str, Any] = {}
        while time.perf_counter() < end:
            listed = {row["id"]: row for row in self.ask("rollouts")["rollouts"]}
            found = listed.get(name, {})
            if found and wanted in (found["state"], f"{found['weight']:g}"):
                return found
            time.sleep(0.01)
        raise RuntimeError(f"rollout {name} did not come to {wanted}: {found}")


def configuration(folder: Path, upstream: str, share: str, name: str) -> Path:
    path = folder / "tidegate.yaml"
    steps = f"[{{weight: {share}, certify: {{errors: 1.3}}}}, {{weight: 100%}}]"
    gates = "{errors: {event: error, worse_than: 1.2, action: rollback}, ceiling: {event: error, max_rate: 2%}}"
    path.write_text(
        "apiVersion: tidegate/v1\n"
        "models:\n"
        f"  {MODEL}:\n"
        "    versions:\n"
        f'      "1": {{source: {folder}/good.onnx}}\n'
        f'      "2": {{upstream: {{url: "http://{upstream}", model: {MODEL}}}}}\n'
        '    stable: "1"\n'
        f'    rollout: {{id: {name}, candidate: "2", steps: {steps}, gates: {gates}}}\n'
    )
    return path


@contextmanager
def traffic(http: str, rate: int, folder: Path) -> Iterator[None]:
    """h2load at ``rate`` requests a second, for as long as the block."""
    body = folder / "body.json"
    data = [0.1 * number for number in range(FEATURES)]
    body.write_text(json.dumps({"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, FEATURES], "data": data}]}))
    url = f"http://{http}/v2/models/{MODEL}/infer"
    command = [
        "h2load",
        "--h1",
        "-c",
        str(CONNECTIONS),
        "--rps",
        str(rate / CONNECTIONS),
        "-D",
        "120",
        "-d",
        str(body),
        url,
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield
    finally:
        process.terminate()
        process.wait()


def once(rate: int, share: str) -> Times:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "other").mkdir()
        write_model(folder / "good.onnx")
        write_model(folder / "other" / f"{MODEL}.onnx")
        abort_s = _abort(folder, rate, share)
        with serving(folder / "other" / f"{MODEL}.onnx") as (other_pid, other):
            path = configuration(folder, other["http"], share, "breaks")
            with serving(path) as (_, gateway), traffic(gateway["http"], rate, folder):
                admin = Admin(gateway["admin"], folder)
                admin.until("breaks", "step")
                time.sleep(BEFORE_S)
                began = time.time()
                os.kill(other_pid, signal.SIGKILL)
                admin.until("breaks", "0")
                nothing = time.time()
                return Times(nothing - began, nothing - _verdict(admin, began), abort_s)


def _abort(folder: Path, rate: int, share: str) -> float:
    with serving(folder / "other" / f"{MODEL}.onnx") as (_, other):
        path = configuration(folder, other["http"], share, "aborted")
        with serving(path) as (_, gateway), traffic(gateway["http"], rate, folder):
            admin = Admin(gateway["admin"], folder)
            admin.until("aborted", "step")
            time.sleep(1.0)
            began = time.perf_counter()
            admin.ask("rollouts/aborted:abort", "POST")
            took = time.perf_counter() - began
            admin.until("aborted", "0")
            return took


def _verdict(admin: Admin, began: float) -> float:
    """When the verdict was written down, as seconds of the wall clock."""
    admin.until("breaks", "rolled_back")
    events = admin.ask("audit")["events"]
    times = [datetime.fromisoformat(event["ts"]).timestamp() for event in events if event["action"] in _VERDICTS]
    return min(time for time in times if time > began)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rate", type=int, default=1000, help="requests a second")
    parser.add_argument("--share", default="5%", help="the candidate's, of the traffic")
    parser.add_argument("--repeats", type=int, default=5, help="rollouts that break, each with one that is aborted")
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="keep the times of each")
    options = parser.parse_args()
    if options.rate < 1 or options.repeats < 1:
        parser.error("rate and repeats must be positive")
    # SIGTERM ends the servers as Ctrl-C does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if shutil.which("h2load") is None:
        print("rollback_time: h2load is not installed: it is in Debian's nghttp2-client", file=sys.stderr)
        return 2
    try:
        found = [once(options.rate, options.share) for _ in range(options.repeats)]
    except (OSError, RuntimeError) as error:
        print(f"rollback_time: {type(error).__name__}: {error}", file=sys.stderr)
        return 2
    for field, target in (("to_nothing_s", 3.0), ("verdict_to_nothing_s", 1.0), ("abort_s", 0.1)):
        values = [getattr(times, field) for times in found]
        print(f"{field:22s} median {statistics.median(values):.3f}, largest {max(values):.3f}; target {target:g}")
    if options.output:
        options.output.write_text(json.dumps([asdict(times) for times in found], indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
