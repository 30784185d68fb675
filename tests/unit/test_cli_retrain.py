"""``tidegate retrain`` against a real server of the admin address's two routes."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from server.cli.retrain import retrain
from server.errors import ConfigError, TidegateError

JOB = {
    "trigger_id": "abc",
    "model": "fraud",
    "state": "requested",
    "since": "2026-11-22T03:00:00Z",
    "requested": "2026-11-22T03:00:00Z",
    "kinds": ["drift", "labels"],
    "champion": "7",
    "version": "",
    "detail": "",
}


class Admin(ThreadingHTTPServer):
    """Answers with ``status`` and ``body``; keeps what it was asked."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.asked: list[tuple[str, str, str | None, Any]] = []
        self.status, self.body = 202, json.dumps(JOB)

    @property
    def url(self) -> str:
        return f"127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: Admin

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(("POST", self.path, self.headers["Authorization"], body))
        self._say(self.server.status, self.server.body)

    def do_GET(self) -> None:
        self.server.asked.append(("GET", self.path, self.headers["Authorization"], None))
        self._say(200, json.dumps({"retrains": [JOB, {**JOB, "model": "other"}]}))

    def _say(self, status: int, text: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def admin() -> Iterator[Admin]:
    with Admin() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def run(*arguments: str) -> Result:
    return CliRunner().invoke(retrain, arguments)


def test_asks_with_a_reason(admin: Admin) -> None:
    result = run("fraud", "--reason", "new labels", "--actor", "ana", "--token", "t", "--url", admin.url)
    assert result.exit_code == 0
    assert result.output == "abc  fraud  requested\n"
    asked = {"reason": "new labels", "actor": "ana"}
    assert admin.asked == [("POST", "/admin/v1/retrains/fraud", "Bearer t", asked)]


def test_the_token_is_that_of_the_state_folder_when_none_is_given(admin: Admin, tmp_path: Path) -> None:
    (tmp_path / "admin-token").write_text("made\n")
    for folder, sent in ((tmp_path, "Bearer made"), (tmp_path / "none", None)):
        done = run("fraud", "--reason", "now", "--actor", "ana", "--url", admin.url, "--state-dir", str(folder))
        assert done.exit_code == 0
        assert admin.asked.pop() == ("POST", "/admin/v1/retrains/fraud", sent, {"reason": "now", "actor": "ana"})


@pytest.mark.parametrize("token", ["se\ncret", "secret\x7f", "secr\u00e9t", "secret\ud800"])
def test_a_token_that_no_header_carries_is_refused_and_not_shown(admin: Admin, token: str) -> None:
    for arguments in (("--list",), ("--reason", "now")):
        refused = run("fraud", *arguments, "--token", token, "--url", admin.url)
        assert isinstance(refused.exception, ConfigError)
        assert "wanted printable ASCII" in str(refused.exception)
        assert "cr" not in str(refused.exception).replace("characters", "").replace("carry", "")
    assert admin.asked == []


def test_shows_jobs(admin: Admin) -> None:
    result = run("fraud", "--list", "--url", admin.url)
    assert result.output.splitlines()[0].split()[:3] == ["TRIGGER_ID", "MODEL", "STATE"]
    assert len(result.output.splitlines()) == 2
    assert "drift, labels" in result.output
    assert len(json.loads(run("--list", "--json", "--url", admin.url).output)) == 2
    assert {method for method, *_ in admin.asked} == {"GET"}


def test_says_why_it_was_refused(admin: Admin) -> None:
    admin.status, admin.body = 409, '{"error": "a rollout of it is open"}'
    result = run("fraud", "--reason", "now", "--url", admin.url)
    assert isinstance(result.exception, TidegateError)
    assert str(result.exception).endswith("answers 409: a rollout of it is open")


def test_what_is_no_answer(admin: Admin) -> None:
    admin.body = "[1]"
    assert isinstance(run("fraud", "--reason", "now", "--url", admin.url).exception, TidegateError)


@pytest.mark.parametrize("arguments", [(), ("fraud",), ("--reason", "now")])
def test_wants_a_model_and_a_reason(arguments: tuple[str, ...]) -> None:
    assert run(*arguments).exit_code == 2


def test_wants_an_address() -> None:
    assert isinstance(run("fraud", "--reason", "now", "--url", "ftp://host").exception, ConfigError)
