"""Runs a scenario: its server when it has to be started, its rounds, its result."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from loadtests import h2load, machine
from loadtests.crew import Crew, Pace, Sample
from loadtests.payloads import Payload
from loadtests.results import Result
from loadtests.scenario import Scenario, payload_of
from loadtests.servers import Target, check_reachable, serving
from server.errors import ConfigError


@contextmanager
def target_of(scenario: Scenario) -> Iterator[Target]:
    """The server of a scenario, started when it says so, on a core apart from the generator's.

    Raises ConfigError or ConnectionError when a server that is to run already does not.
    """
    given = scenario.target
    if given.serve is None:
        if given.pid and machine.born(given.pid) is None:
            raise ConfigError(f"target.pid must be that of a process of this machine, got {given.pid}")
        target = Target(given.label, given.http, given.grpc, pid=given.pid)
        check_reachable(target)
        yield target
        return
    cores, _ = machine.split_cores()
    with serving(given.serve, given.transport, cores) as (pid, ready):
        yield Target(given.label, ready["http"], ready["grpc"], pid=pid)


async def run(scenario: Scenario, target: Target, say: Callable[[str], object]) -> Result:
    """All rounds, or those until the target was gone. Raises ConfigError or OSError when it cannot be asked at all."""
    payload = payload_of(scenario, target.http, target.grpc)
    settings = {"scenario": scenario.model_dump(mode="json"), "generator_says": generator_says(scenario)}
    result = Result(scenario.name, settings)
    for number in range(scenario.rounds):
        try:
            sample = await _window(scenario, target, payload, number)
        except OSError as error:
            if not number:
                raise
            say(f"round {number + 1} of {scenario.rounds}: {error}")
            break
        result.add(scenario.name, target.label, sample)
        say(f"round {number + 1} of {scenario.rounds}: {line(sample)}")
    return result


async def _window(scenario: Scenario, target: Target, payload: Payload, number: int) -> Sample:
    way = scenario.way()
    if scenario.generator == "h2load":
        check_reachable(target)  # h2load itself takes a server that is gone for one that answers nothing
        return await h2load.measure(target, scenario.model, way, payload, scenario.duration_s, scenario.version)
    crew = Crew(target, scenario.model, way, payload, version=scenario.version)
    pace = Pace(scenario.rate, scenario.arrivals)
    try:
        return await crew.measure(
            scenario.duration_s,
            pace,
            ramp_s=scenario.ramp_s,
            count_instructions=bool(target.pid) and machine.counts_instructions(),
            seed=number + 1,
        )
    finally:
        await crew.close()


def generator_says(scenario: Scenario) -> str:
    """Who asks, for people."""
    if scenario.generator == "h2load":
        return "h2load (C; the same headers each time)"
    return "grpcio's asyncio client" if scenario.protocol == "grpcio" else "the generator of loadtests, on one core"


def line(sample: Sample) -> str:
    """A sample in one line."""
    parts = [f"{sample.rate:.0f}/s"]
    parts += [f"p{p:g} {sample.latency.percentile(p) / 1000:.0f} us" for p in (50, 99, 99.9)]
    if sample.server_cpu_s is not None:
        parts.append(f"server CPU {sample.cpu_us:.1f} us each")
    if sample.instructions is not None:
        parts.append(f"{sample.instructions_each:.0f} instructions each")
    if sample.late.count:
        parts.append(f"{sample.late_sends} of {sample.late.count} sent late")
    others = {outcome: count for outcome, count in sample.outcomes.items() if outcome != "ok"}
    return ", ".join(parts) + (f", errors {others}" if others else "")
