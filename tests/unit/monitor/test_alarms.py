"""The alarm's states: persistence, hysteresis, one episode per cause."""

from __future__ import annotations

import json

import numpy as np
import pytest

from monitor.alarms import AlarmBook
from monitor.errors import SettingsError, StateError
from monitor.types import AlarmRules

RULES = AlarmRules(k=2, m=3, clear_looks=3)
NONE = np.zeros(3, bool)


def run(book: AlarmBook, signs: str, window: str = "short") -> list[str]:
    """One column; "x" is over, "." is quiet, "-" is neither. What changed at each look."""
    changes = []
    for sign in signs:
        found = book.look(window, np.array([sign == "x"]), np.array([sign == "."]))
        changes.append("".join("R" if change.raised else "C" for change in found) or "_")
    return changes


def book(rules: AlarmRules = RULES) -> AlarmBook:
    return AlarmBook(1, ["short", "long"], rules)


@pytest.mark.parametrize(
    ("signs", "changes"),
    [
        ("x....", "_____"),
        ("xx", "_R"),
        ("x.x", "__R"),
        ("x..x", "____"),
        ("xx...", "_R__C"),
        ("xx..-...", "_R_____C"),
        ("xx..x...", "_R_____C"),
        ("xxxxxx", "_R____"),
        ("xx-x-x-x-x", "_R________"),
        ("xx...xx", "_R__C_R"),
    ],
)
def test_changes(signs: str, changes: str) -> None:
    assert "".join(run(book(), signs)) == changes


def test_a_flapping_signal_is_one_episode() -> None:
    one = book()
    assert "".join(run(one, "x.x.x-" * 50)).count("R") == 1


def test_alarm_ends_only_when_every_window_is_quiet() -> None:
    one = book()
    run(one, "xx", "short")
    run(one, "x", "long")
    assert run(one, "....", "short") == ["_"] * 4
    assert run(one, "...", "long") == ["_", "_", "C"]


def test_a_window_that_never_looked_does_not_hold_an_alarm() -> None:
    assert run(book(), "xx...")[-1] == "C"


def test_persistence_is_of_one_window() -> None:
    one = book()
    assert run(one, "x", "short") == ["_"]
    assert run(one, "x", "long") == ["_"]


def test_episodes_are_numbered_per_column() -> None:
    one = AlarmBook(2, ["w"], AlarmRules(k=1, m=1, clear_looks=1))
    over, calm = np.array([True, False]), np.array([False, True])
    assert [(c.column, c.episode) for c in one.look("w", over, calm)] == [(0, 1)]
    assert [(c.column, c.raised, c.episode) for c in one.look("w", ~over, ~calm)] == [(0, False, 1), (1, True, 1)]
    assert [(c.column, c.raised, c.episode) for c in one.look("w", over, calm)] == [(0, True, 2), (1, False, 1)]


def test_state_goes_on_after_a_restart() -> None:
    one, two = book(), book()
    run(one, "x", "short")
    two.restore(json.loads(json.dumps(one.to_dict())))
    assert run(two, "x", "short") == ["R"]
    three = book()
    three.restore(json.loads(json.dumps(two.to_dict())))
    assert three.active.tolist() == [True]
    assert run(three, "...", "short")[-1] == "C"


def test_states_that_do_not_fit_are_refused() -> None:
    with pytest.raises(StateError, match="2 columns, wanted 1"):
        book().restore(AlarmBook(2, ["short"], RULES).to_dict())
    with pytest.raises(StateError, match="damaged"):
        book().restore({"active": [True]})


def test_restart_forgets_alarms_but_not_numbers() -> None:
    one = book()
    run(one, "xx")
    one.restart()
    assert not one.active.any()
    assert run(one, "xx") == ["_", "R"]
    assert one.to_dict()["episodes"] == [2]


@pytest.mark.parametrize("wrong", [{"k": 0}, {"k": 4}, {"m": 65}, {"clear_looks": 0}, {"ert_rows": 0}, {"min_psi": -1}])
def test_impossible_rules_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(SettingsError):
        AlarmRules(**wrong)


@pytest.mark.parametrize("m", [1, 3, 64])
def test_looks_at_which_nothing_happens_are_looks(m: int) -> None:
    """Stretches of them, longer than a history too, leave what a book knows that enters each by itself."""
    rules = AlarmRules(k=1 if m == 1 else 2, m=m, clear_looks=4)
    rng = np.random.default_rng(m)
    book, twin = (AlarmBook(3, ["short", "long"], rules) for _ in range(2))
    for stretch in rng.integers(1, 90, 40).tolist():
        window = str(rng.choice(["short", "long"]))
        over, quiet = rng.random(3) < 0.4, rng.random(3) < 0.4
        assert book.look(window, over, quiet & ~over) == twin.look(window, over, quiet & ~over)
        for _ in range(stretch):
            assert book.look(window, NONE, ~NONE) == twin.look(window, NONE, ~NONE)
            twin.to_dict()
        assert book.alarmed == twin.alarmed == bool(book.active.any())
    assert book.to_dict() == twin.to_dict()


def test_what_passes_by_is_a_look_with_nothing_over_and_all_quiet() -> None:
    one, other = book(), book()
    for each in (one, other):
        run(each, "x")
    for _ in range(70):
        one.pass_by("short")
    run(other, "." * 70)
    assert one.to_dict() == other.to_dict()
    assert one.to_dict()["looks"] == {"short": 71, "long": 0}
    assert run(one, "x") == ["_"]  # the first is forgotten


def test_a_restart_forgets_what_passed_by() -> None:
    one = book()
    one.pass_by("short")
    one.restart()
    assert one.to_dict() == book().to_dict()
