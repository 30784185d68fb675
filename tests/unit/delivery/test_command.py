"""Local commands with real processes: outcomes, limits, one per model, restarts, what is left on disk."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from server.delivery.base import Delivered, Failed, Refused
from server.delivery.command import CommandOptions, CommandSink
from server.errors import ConfigError
from server.outbox import Event, Message
from tests.contracts.sink_contract import Case, SinkContract, message

SHELL = ("/bin/sh", "-c")
#: Within this time a command has begun and said so, on a busy machine too; then its time is over.
BEGUN_S = 5.0
#: Appends the id of the event on its standard input to a file.
PASS_ON = "import json, sys; open(sys.argv[1], 'a').write(json.load(sys.stdin)['id'] + '\\n')"


def sink(folder: Path, *argv: str, **options: Any) -> CommandSink:
    return CommandSink("ops", CommandOptions(argv, **{"timeout_s": 20.0, **options}), folder)


def shell(folder: Path, script: str, **options: Any) -> CommandSink:
    return sink(folder, *SHELL, script, **options)


def of(model: str, key: str) -> Message:
    event = Event("io.tidegate.test", f"/models/{model}", f"{model}:1", key)
    return Message(event.id, event.key, event.type, event.subject, time.time_ns(), event.body().encode())


def job(folder: Path, model: str = "m") -> Path:
    """The only job of a model."""
    (found,) = [path for path in (folder / model).iterdir() if path.is_dir()]
    return found


def until(condition: Callable[[], object], timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)  # a process tells nobody


def alive(pid: int) -> bool:
    """Whether a process runs: a dead one that nobody has waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


class TestCommandSink(SinkContract):
    @contextmanager
    def case(self) -> Iterator[Case]:
        with TemporaryDirectory() as root:
            seen, jobs = Path(root, "seen"), Path(root, "jobs")

            def passed_on() -> list[str]:
                return seen.read_text().split() if seen.exists() else []

            broken = (
                sink(jobs / "1", "/no/such/program"),
                shell(jobs / "2", "exit 1"),
                shell(jobs / "3", "sleep 60", timeout_s=0.2),
                sink(seen / "no folder", "/bin/true"),
            )
            seen.touch()
            yield Case(sink(jobs, sys.executable, "-c", PASS_ON, str(seen)), passed_on, broken)


# --- outcomes ---


@pytest.mark.parametrize(
    ("script", "outcome"),
    [
        ("exit 0", Delivered()),
        ("exit 75", Failed("the command asked to be tried again (exit code 75)")),
        ("exit 1", Refused("the command failed with exit code 1")),
        ("exit 127", Refused("the command failed with exit code 127")),
        ("kill -TERM $$", Failed("the command was ended by signal 15")),
        ("kill -SEGV $$", Refused("the command was ended by signal 11")),
        ("kill -KILL $$", Refused("the command was ended by signal 9")),
    ],
)
def test_how_a_command_ends(tmp_path: Path, script: str, outcome: object) -> None:
    assert shell(tmp_path, script).send(message()) == outcome


def test_a_program_that_is_not_there(tmp_path: Path) -> None:
    outcome = sink(tmp_path, "/no/such/program").send(message())
    assert isinstance(outcome, Refused)
    assert "/no/such/program" in outcome.reason


def test_a_failed_command_is_run_again_when_asked_again(tmp_path: Path) -> None:
    to = shell(tmp_path, f"echo x >> {tmp_path}/runs; exit 75")
    sent = message()
    assert all(isinstance(to.send(sent), Failed) for _ in range(3))
    assert (tmp_path / "runs").read_text() == "x\n" * 3


def test_a_successful_command_is_not_run_again_for_the_same_key(tmp_path: Path) -> None:
    to = shell(tmp_path, f"echo x >> {tmp_path}/runs")
    assert [to.send(message("k")), to.send(message("k")), to.send(message("other"))] == [Delivered()] * 3
    assert (tmp_path / "runs").read_text() == "x\n" * 2


# --- what a command is given ---


def test_no_shell_and_the_event_on_standard_input(tmp_path: Path) -> None:
    code = "import sys; open(sys.argv[1], 'w').write(repr(sys.argv[2:]) + sys.stdin.read())"
    sent = message(text="ключ")
    words = ["$HOME; rm -rf x", "*", "a b"]
    assert sink(tmp_path / "jobs", sys.executable, "-c", code, str(tmp_path / "out"), *words).send(sent) == Delivered()
    assert (tmp_path / "out").read_text() == repr(words) + sent.body.decode()


def test_the_environment_is_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIDEGATE_ADMIN_TOKEN", "hunter2")
    monkeypatch.setenv("HOME", "/var/lib/gateway")
    code = "import os, sys, json; json.dump([dict(os.environ), os.getcwd()], open(sys.argv[1], 'w'))"
    out, sent = tmp_path / "out", message("key-1")
    to = sink(tmp_path / "jobs", sys.executable, "-c", code, str(out), cwd=str(tmp_path), environment={"RATE": "0.1"})
    assert to.send(sent) == Delivered()
    environment, cwd = json.loads(out.read_text())
    assert cwd == str(tmp_path)
    assert environment["RATE"] == "0.1"
    assert environment["HOME"] == "/var/lib/gateway"
    assert environment["TIDEGATE_EVENT_ID"] == sent.id
    assert environment["TIDEGATE_IDEMPOTENCY_KEY"] == "key-1"
    assert "TIDEGATE_ADMIN_TOKEN" not in environment


def test_what_is_left_on_disk_holds_no_environment_and_is_private(tmp_path: Path) -> None:
    sent = message()
    assert shell(tmp_path, "echo out; echo err >&2", environment={"TOKEN": "hunter2"}).send(sent) == Delivered()
    found = job(tmp_path)
    assert sorted(path.name for path in found.iterdir()) == ["event.json", "log", "result.json"]
    assert (found / "log").read_text() == "out\nerr\n"
    assert (found / "event.json").read_bytes() == sent.body
    assert found.stat().st_mode & 0o077 == 0
    assert "hunter2" not in "".join(path.read_text() for path in found.iterdir())


# --- limits ---


def test_memory_is_limited(tmp_path: Path) -> None:
    code = "try:\n  bytearray(400 << 20)\nexcept MemoryError:\n  raise SystemExit(41)"
    limited = sink(tmp_path / "a", sys.executable, "-c", code, memory_bytes=200 << 20)
    assert limited.send(message()) == Refused("the command failed with exit code 41")
    assert sink(tmp_path / "b", sys.executable, "-c", code).send(message()) == Delivered()


def test_processor_time_is_limited(tmp_path: Path) -> None:
    outcome = sink(tmp_path, sys.executable, "-c", "while True: pass", cpu_s=1).send(message())
    assert isinstance(outcome, Refused)


def test_a_command_whose_time_is_over_may_clear_up(tmp_path: Path) -> None:
    script = f"trap 'echo bye > {tmp_path}/bye; exit 0' TERM; echo up > {tmp_path}/up; while :; do sleep 0.05; done"
    outcome = shell(tmp_path / "jobs", script, timeout_s=BEGUN_S).send(message())
    assert isinstance(outcome, Failed)
    assert "its time was over" in outcome.reason
    assert (tmp_path / "bye").read_text() == "bye\n"


def test_a_command_that_closes_its_streams_is_still_waited_for(tmp_path: Path) -> None:
    script = f"exec <&- >&- 2>&-; sleep 0.2; touch {tmp_path}/end; exit 75"
    outcome = shell(tmp_path / "jobs", script).send(message())
    assert outcome == Failed("the command asked to be tried again (exit code 75)")
    assert (tmp_path / "end").exists()


def test_a_command_that_stops_itself_is_ended_when_its_time_is_over(tmp_path: Path) -> None:
    script = f"echo $$ > {tmp_path}/pid; kill -STOP $$"
    outcome = shell(tmp_path / "jobs", script, timeout_s=BEGUN_S, grace_s=0.1).send(message())
    assert isinstance(outcome, Failed)
    assert "its time was over" in outcome.reason
    assert not alive(int((tmp_path / "pid").read_text()))


@pytest.mark.slow
def test_a_command_that_stops_its_runner_does_not_block_its_model(tmp_path: Path) -> None:
    script = f"echo $PPID $$ > {tmp_path}/pids; kill -STOP $PPID; exec sleep 300"
    outcome = shell(tmp_path / "jobs", script, timeout_s=BEGUN_S, grace_s=0.1).send(of("m", "k"))
    assert outcome == Failed("the command should have ended by now")
    pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    until(lambda: not any(alive(pid) for pid in pids))
    assert shell(tmp_path / "jobs", "exit 0").send(of("m", "other")) == Delivered()


@pytest.mark.slow
def test_a_gigabyte_of_output_fills_no_disk(tmp_path: Path) -> None:
    assert shell(tmp_path, "head -c 1000000000 /dev/zero; echo end", timeout_s=50.0).send(message()) == Delivered()
    kept = [job(tmp_path) / name for name in ("log", "log.1")]
    assert sum(path.stat().st_size for path in kept) <= 1024 * 1024
    assert kept[0].read_bytes().endswith(b"\0end\n")


def test_the_end_of_time_kills_grandchildren_wherever_they_went(tmp_path: Path) -> None:
    script = f"""
        trap '' TERM
        sleep 300 & echo $! >> {tmp_path}/pids
        setsid sh -c 'trap "" TERM; echo $$ >> {tmp_path}/pids; (sleep 300 & echo $! >> {tmp_path}/pids); sleep 300' &
        wait; sleep 300
    """
    outcome = shell(tmp_path / "jobs", script, timeout_s=BEGUN_S, grace_s=0.2).send(message())
    assert isinstance(outcome, Failed)
    pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    assert len(pids) == 3
    assert not any(alive(pid) for pid in pids)


def test_what_a_command_leaves_behind_is_killed_and_holds_up_nobody(tmp_path: Path) -> None:
    noisy = f"echo $$ > {tmp_path}/pid; while :; do echo noise; done"
    script = f"setsid sh -c '{noisy}' & while ! [ -s {tmp_path}/pid ]; do :; done"
    assert shell(tmp_path / "jobs", script).send(message()) == Delivered()
    assert not alive(int((tmp_path / "pid").read_text()))


def test_the_log_is_bounded_and_keeps_the_end(tmp_path: Path) -> None:
    code = "for number in range(200_000): print(number)"
    assert sink(tmp_path, sys.executable, "-c", code, log_bytes=10_000).send(message()) == Delivered()
    older, newer = (job(tmp_path) / "log.1").read_bytes(), (job(tmp_path) / "log").read_bytes()
    assert len(older) == 5000
    assert 0 < len(newer) <= 5000
    assert (older + newer).endswith(b"199998\n199999\n")


def test_old_jobs_go(tmp_path: Path) -> None:
    to = shell(tmp_path, "exit 0", keep=3)
    for number in range(6):
        assert to.send(of("m", str(number))) == Delivered()
    assert len([path for path in (tmp_path / "m").iterdir() if path.is_dir()]) == 3


@pytest.mark.parametrize("model", ["..", "x" * 255, "a/../../b", "\u0436"])
def test_no_model_leaves_the_folder(tmp_path: Path, model: str) -> None:
    assert shell(tmp_path / "jobs", "exit 0").send(of(model, "k")) == Delivered()
    assert [path.name for path in tmp_path.iterdir()] == ["jobs"]
    assert len(list((tmp_path / "jobs").iterdir())) == 1


# --- one per model ---

EXCLUSIVE = "mkdir {0}/busy || exit 9; sleep 0.05; rmdir {0}/busy; echo x >> {0}/runs"


def test_commands_of_one_model_run_one_at_a_time(tmp_path: Path) -> None:
    sinks = [shell(tmp_path / "jobs", EXCLUSIVE.format(tmp_path)) for _ in range(2)]
    with ThreadPoolExecutor(6) as pool:
        outcomes = list(pool.map(lambda number: sinks[number % 2].send(of("m", str(number))), range(6)))
    assert outcomes == [Delivered()] * 6
    assert (tmp_path / "runs").read_text() == "x\n" * 6


def test_another_event_of_the_model_comes_later_and_another_model_at_once(tmp_path: Path) -> None:
    script = f"echo x >> {tmp_path}/up; while ! [ -e {tmp_path}/go ]; do sleep 0.02; done"
    to = shell(tmp_path / "jobs", script, queue_s=0.1)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(to.send, of("m", "1"))
        until(lambda: (tmp_path / "up").exists())
        assert to.send(of("m", "2")) == Failed("another job of the model is running", 60.0)
        second = pool.submit(to.send, of("other", "1"))
        until(lambda: len((tmp_path / "up").read_text()) == 4)
        (tmp_path / "go").touch()
        assert [first.result(10), second.result(10)] == [Delivered()] * 2


def test_the_same_event_twice_at_once_is_one_run(tmp_path: Path) -> None:
    to = shell(tmp_path / "jobs", EXCLUSIVE.format(tmp_path))
    barrier = threading.Barrier(4)

    def send(_: int) -> object:
        barrier.wait()
        return to.send(of("m", "k"))

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(send, range(4))) == [Delivered()] * 4
    assert (tmp_path / "runs").read_text() == "x\n"


# --- restarts ---

GATEWAY = """
import sys
from pathlib import Path
from server.delivery.command import CommandOptions, CommandSink
from tests.unit.delivery.test_command import of
CommandSink("ops", CommandOptions(("/bin/sh", "-c", sys.argv[2]), timeout_s=20.0), Path(sys.argv[1])).send(of("m", "k"))
"""


@contextmanager
def gateway(folder: Path, script: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process that sends the event; it is killed at the end if it still runs."""
    process = subprocess.Popen([sys.executable, "-c", GATEWAY, str(folder), script])
    try:
        yield process
    finally:
        process.kill()
        process.wait(10)


def killed_gateway(folder: Path, tmp_path: Path, script: str) -> None:
    with gateway(folder, script):
        until(lambda: (tmp_path / "up").exists())


WAITING = "echo x >> {0}/up; while ! [ -e {0}/go ]; do sleep 0.02; done; exit {1}"


@pytest.mark.parametrize("code", [0, 1, 75])
def test_a_gateway_that_comes_back_finds_the_command_running(tmp_path: Path, code: int) -> None:
    script = WAITING.format(tmp_path, code)
    killed_gateway(tmp_path / "jobs", tmp_path, script)
    with ThreadPoolExecutor(1) as pool:
        outcome = pool.submit(shell(tmp_path / "jobs", script, queue_s=0.1).send, of("m", "k"))
        (tmp_path / "go").touch()
        assert type(outcome.result(10)) is {0: Delivered, 1: Refused, 75: Failed}[code]
    assert (tmp_path / "up").read_text() == "x\n"


@pytest.mark.parametrize("code", [0, 1, 75])
def test_a_gateway_that_comes_back_later_finds_the_outcome(tmp_path: Path, code: int) -> None:
    script = WAITING.format(tmp_path, code)
    killed_gateway(tmp_path / "jobs", tmp_path, script)
    (tmp_path / "go").touch()
    until(lambda: (job(tmp_path / "jobs") / "result.json").exists())
    outcome = shell(tmp_path / "jobs", script).send(of("m", "k"))
    assert type(outcome) is {0: Delivered, 1: Refused, 75: Failed}[code]
    assert (tmp_path / "up").read_text() == "x\n"


def test_a_killed_runner_takes_its_command_with_it_and_the_event_is_tried_again(tmp_path: Path) -> None:
    script = f"echo $PPID $$ > {tmp_path}/pids; exec sleep 300"
    to = shell(tmp_path / "jobs", script)
    with ThreadPoolExecutor(1) as pool:
        outcome = pool.submit(to.send, of("m", "k"))
        until(lambda: (tmp_path / "pids").exists() and len((tmp_path / "pids").read_text().split()) == 2)
        runner, command = map(int, (tmp_path / "pids").read_text().split())
        os.kill(runner, signal.SIGKILL)
        assert outcome.result(10) == Failed("the command's runner was killed")
    until(lambda: not alive(command))
    assert shell(tmp_path / "jobs", "exit 0").send(of("m", "k")) == Delivered()


def test_a_damaged_outcome_is_as_good_as_none(tmp_path: Path) -> None:
    to = shell(tmp_path, "exit 0")
    for text in ("{", "[]", '{"exit": "x"}', '{"exit": 0}'):
        assert to.send(of("m", "k")) == Delivered()
        (job(tmp_path) / "result.json").write_text(text)
    assert to.send(of("m", "k")) == Delivered()


# --- options ---


@pytest.mark.parametrize(
    "wrong",
    [
        {"argv": ()},
        {"argv": ("",)},
        {"argv": ("a", "b\0")},
        {"timeout_s": 0},
        {"timeout_s": 24 * 3600},
        {"grace_s": -1},
        {"memory_bytes": -1},
        {"log_bytes": 1},
        {"keep": 0},
    ],
)
def test_impossible_commands(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="command"):
        replace(CommandOptions(("/bin/true",)), **wrong)


def test_a_lease_outlasts_the_command() -> None:
    options = CommandOptions(("/bin/true",), timeout_s=100.0, grace_s=5.0, queue_s=30.0)
    assert CommandSink("ops", options, Path("x")).timeout_s > 135
