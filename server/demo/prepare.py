"""Prepares what the demo serves and who calls it: data, trained models, published models, the clients' environment."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from server.demo import data, scenarios, train, wheels
from server.demo.installer import ClientsUnavailable, clients_python
from server.demo.options import DemoOptions
from server.demo.report import Reporter
from server.demo.scenarios import Scenario
from server.demo.wheels import WheelFile, WheelUnavailable


@dataclass(frozen=True, slots=True)
class Prepared:
    """All that is needed before the server starts. ``clients_python`` None: gRPC is left out."""

    scenario: Scenario
    clients_python: Path | None
    skipped: list[str]


@dataclass(slots=True)
class Preparation:
    """Shows each step. Raises WheelUnavailable or ClientsUnavailable unless offline, where they only skip a part."""

    options: DemoOptions
    reporter: Reporter
    skipped: list[str] = field(default_factory=list)

    def run(self) -> Prepared:
        self.reporter.line("\n[bold]Data and models[/bold]")
        with self.reporter.step("data") as step:
            digits, flights = data.load_digits(), data.load_flights()
            total = len(digits.train_digit) + len(digits.test_digit)
            step.detail = (
                f"{total:,} scanned digits (scikit-learn), {len(flights.late):,} flights from New York in 2013"
            )
        scenario = Scenario(digits, flights.months(3, 3))
        self._digits(scenario)
        self._flights(scenario, flights.months(1, 2))
        self._published("magika", lambda progress: self._magika(scenario, progress))
        self._published("silero_vad", lambda progress: self._silero(scenario, progress))
        return Prepared(scenario, self._clients(), self.skipped)

    def _digits(self, scenario: Scenario) -> None:
        versions = {}
        for version, (kind, _) in train.DIGIT_VERSIONS.items():
            with self.reporter.step(f"digits:{version}") as step:
                versions[version] = train.train_digits(scenario.digits, version)
                step.detail = f"{kind}, trained and exported, {_kilobytes(versions[version])}"
        scenarios.add_digits(scenario, versions)

    def _flights(self, scenario: Scenario, winter: data.Flights) -> None:
        with self.reporter.step("flights:1") as step:
            onnx = train.train_flights(winter)
            scenarios.add_flights(scenario, onnx)
            step.detail = f"random forest on {len(winter.late):,} flights of January-February, {_kilobytes(onnx)}"
        self.reporter.known_when()

    def _published(self, name: str, add: Callable[[Callable[[str], None]], str]) -> None:
        """Add a published model; offline it may be missing."""
        try:
            with self.reporter.step(f"{name}:1") as step:
                step.detail = add(step.progress)
        except WheelUnavailable as error:
            if not self.options.offline:
                raise WheelUnavailable(f"{error}. With --offline the demo goes on without it.") from error
            self._skip(name, str(error))

    def _magika(self, scenario: Scenario, progress: Callable[[str], None]) -> str:
        onnx = self._wheel_file(wheels.MAGIKA_MODEL, progress)
        config = data.MagikaConfig.parse(self._wheel_file(wheels.MAGIKA_CONFIG, progress))
        files = data.python_files()
        scenarios.add_magika(scenario, onnx, config, files)
        return f"ONNX file of the magika {wheels.MAGIKA_MODEL.version} wheel, on {len(files)} files of this Python"

    def _silero(self, scenario: Scenario, progress: Callable[[str], None]) -> str:
        onnx = self._wheel_file(wheels.SILERO_MODEL, progress)
        scenarios.add_silero(scenario, onnx)
        return f"ONNX file of the silero-vad {wheels.SILERO_MODEL.version} wheel, on synthetic voices and noise"

    def _wheel_file(self, file: WheelFile, progress: Callable[[str], None]) -> bytes:
        cache = self.options.state_dir / "wheels"
        return wheels.read_wheel_file(file, cache, offline=self.options.offline, progress=progress)

    def _clients(self) -> Path | None:
        try:
            with self.reporter.step("tritonclient, in its own environment") as step:
                python = clients_python(self.options.clients_venv, offline=self.options.offline, progress=step.progress)
                step.detail = str(self.options.clients_venv)
        except ClientsUnavailable as error:
            if not self.options.offline:
                raise ClientsUnavailable(f"{error}. With --offline the demo goes on without gRPC.") from error
            self._skip("gRPC callers", str(error))
            return None
        return python

    def _skip(self, name: str, reason: str) -> None:
        self.skipped.append(name)
        self.reporter.skipped(name, reason)


def _kilobytes(content: bytes) -> str:
    return f"{len(content) / 1024:,.0f} kB"
