"""A real Airflow 3 on loopback with sqlite: API server, scheduler and DAG processor, in an environment of its own."""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.support.environments import environment
from tests.support.ports import reserved_port
from tests.support.v2 import call

#: Who may run DAGs, who may only look, and who may do everything; each with the same password.
USER, LOOKER, ADMIN = "tidegate", "looker", "admin"
PASSWORD = "a pass:word"
#: Tokens end so soon that a test can wait for it, and late enough that a busy machine can use one.
TOKEN_SECONDS = 5

_JSON = {"Content-Type": "application/json"}
_PARTS = ("api-server", "scheduler", "dag-processor")
#: ``retrain`` keeps the run's ``conf`` and publishes a model for it; ``resting`` is paused from the beginning.
_DAGS = """\
import json, os, pathlib, subprocess
from airflow.sdk import DAG, task

OUT = pathlib.Path(os.environ["TEST_OUT"])

def training(name, paused):
    with DAG(name, schedule=None, is_paused_upon_creation=paused):
        @task
        def train(dag_run=None):
            with (OUT / dag_run.run_id).open("a") as file:
                file.write(json.dumps(dag_run.conf) + "\\n")
            if (OUT / "publish").exists():
                (OUT / "about.json").write_text(json.dumps(
                    {"lineage": {"trigger_id": dag_run.conf["data"]["trigger_id"]}}))
                subprocess.run(json.loads((OUT / "publish").read_text()), check=True)
        train()

training("retrain", False)
training("resting", True)
"""


def interpreter() -> Path:
    """The Python that has Airflow; the test is skipped where that cannot be had."""
    try:
        return environment("airflow")
    except subprocess.CalledProcessError:
        index = [sys.executable, "-m", "pip", "index", "versions", "apache-airflow"]
        if subprocess.run(index, capture_output=True, timeout=120, check=False).returncode == 0:
            raise
        pytest.skip("no package index that has apache-airflow is reachable")


class AirflowServer:
    """Airflow in ``root``, which may be stopped and started again on its port; ``out`` is where its tasks write."""

    def __init__(self, root: Path) -> None:
        self.root, self.out, self.port = root, root / "out", reserved_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._python = str(interpreter())
        self._processes: list[subprocess.Popen[bytes]] = []
        self.out.mkdir()
        (root / "dags").mkdir()
        (root / "dags" / "training.py").write_text(_DAGS)
        (root / "passwords.json").write_text(json.dumps(dict.fromkeys((USER, LOOKER, ADMIN), PASSWORD)))
        migrate = [self._python, "-m", "airflow", "db", "migrate"]
        with (root / "migrate.log").open("wb") as log:
            subprocess.run(migrate, env=self._environment(""), stdout=log, stderr=log, check=True, timeout=180)

    def start(self) -> None:
        """All of it, with a key for tokens of its own, as an Airflow has that is not told one."""
        key = secrets.token_hex(64)
        for part in _PARTS:
            with (self.root / f"{part}.log").open("ab") as log:
                # A group of its own: its workers end with it.
                command = [self._python, "-m", "airflow", part]
                self._processes.append(
                    subprocess.Popen(
                        command, env=self._environment(key), stdout=log, stderr=log, start_new_session=True
                    )
                )
        self.until(self._ready, 150)

    def stop(self) -> None:
        for process in self._processes:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(30)
        self._processes.clear()

    def until(self, condition: Callable[[], object], seconds: float = 60) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, self.said()
            assert all(process.poll() is None for process in self._processes), self.said()
            time.sleep(0.2)  # Airflow tells nobody

    def said(self) -> str:
        return "\n".join((self.root / f"{part}.log").read_text()[-2000:] for part in _PARTS)

    # -- its API, as a person uses it -------------------------------------------------------------------------------

    def token(self, user: str = ADMIN) -> str:
        status, answer, _ = call(self._host, "POST", "/auth/token", {"username": user, "password": PASSWORD}, _JSON)
        assert status == 201, answer
        return str(answer["access_token"])

    def ask(self, method: str, path: str, body: Any = None, token: str = "") -> tuple[int, Any]:
        headers = {**_JSON, "Authorization": f"Bearer {token or self.token()}"}
        return call(self._host, method, f"/api/v2/{path}", body, headers)[:2]

    def runs(self, dag: str) -> list[Mapping[str, Any]]:
        status, answer = self.ask("GET", f"dags/{dag}/dagRuns")
        assert status == 200, answer
        return list(answer["dag_runs"])

    def trained(self, run_id: str) -> list[Any]:
        """What the task of a run was given, once for each time it ran."""
        path = self.out / run_id
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    # -- inside -----------------------------------------------------------------------------------------------------

    @property
    def _host(self) -> str:
        return f"127.0.0.1:{self.port}"

    def _ready(self) -> bool:
        """Whether it answers and knows its DAGs."""
        try:
            return self.ask("GET", "dags/retrain")[0] == 200
        except (OSError, AssertionError):  # nobody listens yet, or who does has no token to give
            return False

    def _environment(self, key: str) -> dict[str, str]:
        settings = {
            "CORE__LOAD_EXAMPLES": "False",
            "CORE__DAGS_FOLDER": str(self.root / "dags"),
            "CORE__PARALLELISM": "2",
            "CORE__SIMPLE_AUTH_MANAGER_USERS": f"{USER}:user,{LOOKER}:viewer,{ADMIN}:admin",
            "CORE__SIMPLE_AUTH_MANAGER_PASSWORDS_FILE": str(self.root / "passwords.json"),
            "CORE__EXECUTION_API_SERVER_URL": f"{self.url}/execution/",
            "DATABASE__SQL_ALCHEMY_CONN": f"sqlite:///{self.root}/airflow.db",
            "API__HOST": "127.0.0.1",
            "API__PORT": str(self.port),
            "API__WORKERS": "1",
            "API_AUTH__JWT_SECRET": key,
            "API_AUTH__JWT_EXPIRATION_TIME": str(TOKEN_SECONDS),
            "API_AUTH__JWT_LEEWAY": "0",
            # Nothing leaves this machine.
            "USAGE_DATA_COLLECTION__ENABLED": "False",
        }
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("AIRFLOW_", "PYTHON"))}
        # It starts programs of its own by their names.
        path = f"{Path(self._python).parent}{os.pathsep}{os.environ['PATH']}"
        own = {"AIRFLOW_HOME": str(self.root), "PATH": path, "TEST_OUT": str(self.out)}
        return {**inherited, **own, **{f"AIRFLOW__{name}": value for name, value in settings.items()}}
