"""Callers over gRPC through tritonclient: a script for the clients' own interpreter; it imports nothing of ours.

    python -I triton_worker.py PLAN.json

The plan names the server, the seconds to call for, and per workload its arrays (npz: ``column.*``, ``fixed.*``,
``initial.*``, ``offsets``), callers, pace and how answers are carried into the next call of a stream. The script prints
``{"event": "ready"}``, waits for a line on stdin, calls, prints its counts twice a second and a last time with
``"event": "done"``, and leaves what it saw beside the plan: ``<file>.calls.npz`` with ``request``, ``latency_ns`` and
``output.*`` joined along the rows, and ``<file>.errors.json``. The end of stdin before that line ends it.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

CALL_TIMEOUT_S = 30.0
REPORT_EVERY_S = 0.5
PAUSE_AFTER_ERROR_S = 0.1


class Calls:
    """The requests of one workload as tritonclient takes them, and the log of what came back."""

    def __init__(self, plan: dict[str, Any], folder: Path) -> None:
        self.plan = plan
        with np.load(folder / f"{plan['file']}.npz") as arrays:
            groups: dict[str, dict[str, np.ndarray[Any, Any]]] = {"column": {}, "fixed": {}, "initial": {}}
            for key in arrays.files:
                group, _, name = key.partition(".")
                groups.setdefault(group, {})[name] = arrays[key]
        self.columns, self.fixed, self.initial = groups["column"], groups["fixed"], groups["initial"]
        self.offsets = groups["offsets"][""]
        self.requests: list[int] = []
        self.latencies_ns: list[int] = []
        self.outputs: dict[str, list[np.ndarray[Any, Any]]] = {name: [] for name in plan["outputs"]}
        self.errors: list[str] = []

    def arrays(self, index: int) -> dict[str, np.ndarray[Any, Any]]:
        rows = slice(self.offsets[index], self.offsets[index + 1])
        return {**{name: values[rows] for name, values in self.columns.items()}, **self.fixed}

    def add(self, index: int, latency_ns: int, answer: dict[str, np.ndarray[Any, Any] | None]) -> None:
        rows = self.offsets[index + 1] - self.offsets[index]
        values = {name: answer[name] for name in self.outputs}
        bad = [name for name, value in values.items() if value is None or value.shape[:1] != (rows,)]
        if bad:
            self.errors.append(f"outputs {bad} are missing or do not have {rows} rows")
            return
        self.requests.append(index)
        self.latencies_ns.append(latency_ns)
        for name, value in values.items():
            assert value is not None  # noqa: S101 - checked above
            self.outputs[name].append(value)

    def save(self, folder: Path) -> None:
        joined = {f"output.{name}": np.concatenate(parts) for name, parts in self.outputs.items() if parts}
        numbers = {
            "request": np.asarray(self.requests, np.int64),
            "latency_ns": np.asarray(self.latencies_ns, np.int64),
        }
        np.savez(folder / f"{self.plan['file']}.calls.npz", **numbers, **joined)  # type: ignore[arg-type]
        (folder / f"{self.plan['file']}.errors.json").write_text(json.dumps(self.errors), encoding="utf-8")

    def summary(self) -> dict[str, Any]:
        recent = self.latencies_ns[-500:]
        median_ms = float(np.median(recent)) / 1e6 if recent else 0.0
        return {"requests": len(self.requests), "errors": len(self.errors), "median_ms": median_ms}


def triton_inputs(grpc: Any, utils: Any, arrays: dict[str, np.ndarray[Any, Any]]) -> list[Any]:
    inputs = []
    for name, values in arrays.items():
        content = values.astype(object) if values.dtype.kind == "S" else values
        one = grpc.InferInput(name, list(values.shape), utils.np_to_triton_dtype(content.dtype))
        inputs.append(one.set_data_from_numpy(content))
    return inputs


async def one_caller(
    client: Any, modules: tuple[Any, Any], calls: Calls, caller: int, wait_s: float, end: float
) -> None:
    """Call until ``end``; callers take turns at the workload's blocks (a stream, or a single request)."""
    await asyncio.sleep(wait_s)
    plan, (grpc, utils) = calls.plan, modules
    outputs = [grpc.InferRequestedOutput(name) for name in [*plan["outputs"], *plan["carry"]]]
    length = plan["stream_length"]
    blocks = (len(calls.offsets) - 1) // length
    block, step, state = caller, 0, calls.initial
    while (begun := time.monotonic()) < end:
        index = block % blocks * length + step
        inputs = triton_inputs(grpc, utils, {**calls.arrays(index), **state})
        step += 1
        started = time.perf_counter_ns()
        try:
            answer = await client.infer(
                plan["model"], inputs, model_version=plan["version"], outputs=outputs, client_timeout=CALL_TIMEOUT_S
            )
            latency_ns = time.perf_counter_ns() - started
            values = {output.name(): answer.as_numpy(output.name()) for output in outputs}
            calls.add(index, latency_ns, values)
            state = {target: values[source] for source, target in plan["carry"].items()}
        except utils.InferenceServerException as error:
            calls.errors.append(str(error)[:300])
            step = length
            await asyncio.sleep(PAUSE_AFTER_ERROR_S)
        if step == length:
            block, step, state = block + plan["callers"], 0, calls.initial
        await asyncio.sleep(max(0.0, begun + plan["pace_s"] - time.monotonic()))


def say(message: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


async def report(all_calls: list[Calls], event: str) -> None:
    say({"event": event, "workloads": {calls.plan["name"]: calls.summary() for calls in all_calls}})


async def report_forever(all_calls: list[Calls]) -> None:
    while True:
        await asyncio.sleep(REPORT_EVERY_S)
        await report(all_calls, "progress")


async def run(plan: dict[str, Any], folder: Path) -> None:
    modules = importlib.import_module("tritonclient.grpc.aio"), importlib.import_module("tritonclient.utils")
    all_calls = [Calls(workload, folder) for workload in plan["workloads"]]
    async with modules[0].InferenceServerClient(plan["address"]) as client:
        if not await client.is_server_ready():
            raise SystemExit("the server is not ready")
        say({"event": "ready"})
        if not await asyncio.to_thread(sys.stdin.readline):
            return
        end = time.monotonic() + plan["seconds"]
        reporter = asyncio.create_task(report_forever(all_calls))
        await asyncio.gather(
            *(
                one_caller(client, modules, calls, caller, calls.plan["pace_s"] * number / len(all_calls), end)
                for number, calls in enumerate(all_calls)
                for caller in range(calls.plan["callers"])
            )
        )
        reporter.cancel()
    for calls in all_calls:
        calls.save(folder)
    await report(all_calls, "done")


if __name__ == "__main__":
    plan_path = Path(sys.argv[1])
    asyncio.run(run(json.loads(plan_path.read_text(encoding="utf-8")), plan_path.parent))
