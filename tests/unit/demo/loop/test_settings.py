"""server.demo.loop.settings: files that the server takes."""

from __future__ import annotations

from pathlib import Path

import pytest

from server.config.gate_files import load_policy, policy_of
from server.config.load import load_config
from server.demo.loop.rows import MODEL
from server.demo.loop.settings import FORCED, ROLLOUT, STEPS, Places, config_text, forced_text, policy_text


@pytest.fixture
def places(tmp_path: Path) -> Places:
    return Places(tmp_path)


def test_the_configuration_has_no_mistakes(places: Places) -> None:
    places.config.write_text(config_text(places))
    model = load_config(places.config).models[MODEL]
    assert model.gate == MODEL
    assert model.retrain is not None
    assert model.rollout is not None
    assert model.rollout.id == ROLLOUT
    assert [step.weight for step in model.rollout.steps] == [100 * share for share in STEPS]


def test_the_policy_is_the_same_by_itself_and_in_the_configuration(places: Places) -> None:
    places.config.write_text(config_text(places))
    places.policy.write_text(policy_text(places))
    assert load_policy(places.policy).digest() == policy_of(places.config, MODEL).digest()


def test_forced_is_the_same_but_for_what_would_refuse(places: Places) -> None:
    places.config.write_text(forced_text(places))
    model = load_config(places.config).models[MODEL]
    assert model.gate is None
    assert model.rollout is not None
    assert model.rollout.id == FORCED
    assert model.rollout.shadow is None
    assert set(model.rollout.gates) == {"errors", "ceiling", "drift"}
