"""How lists of mistakes are shown."""

from __future__ import annotations

import json

from server.config.problems import InvalidConfig, Problem, render_problems
from server.errors import ConfigError

LATER = Problem("a.yaml", 10, 3, "server.name", "wanted text, got nothing")
EARLIER = Problem("a.yaml", 2, 30, "", "a second document starts here")
PLACELESS = Problem("--http", 0, 0, "", "wanted HOST:PORT")


def test_text_form() -> None:
    assert render_problems([LATER, EARLIER, PLACELESS]).splitlines() == [
        "a.yaml:10:3: server.name: wanted text, got nothing",
        "a.yaml:2:30: a second document starts here",
        "--http: wanted HOST:PORT",
    ]


def test_json_form() -> None:
    assert json.loads(render_problems([LATER], as_json=True)) == [
        {"path": "a.yaml", "line": 10, "column": 3, "key": "server.name", "message": "wanted text, got nothing"}
    ]
    assert json.loads(render_problems([], as_json=True)) == []


def test_error_lists_its_problems_in_the_order_of_the_file() -> None:
    error = InvalidConfig([LATER, EARLIER])
    assert isinstance(error, ConfigError)
    assert error.code == "config_error"
    assert error.problems == [EARLIER, LATER]
    assert error.message == render_problems([EARLIER, LATER])
