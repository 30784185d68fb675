"""Webhooks of MLflow as hints: who is believed, and how often."""

from __future__ import annotations

import base64
import hashlib
import hmac

import pytest

from server.errors import ConfigError
from server.mlflow.hints import HintRefused, MlflowHints

BODY = b'{"entity":"model_version_alias","action":"created","data":{}}'
NOW = 1_700_000_000
SECRET = "s\u00e9cret"


def signed(id_: str = "d-1", at: int = NOW, body: bytes = BODY, secret: str = SECRET) -> dict[str, str]:
    """As MLflow writes it: see ``mlflow/webhooks/delivery.py``, ``_generate_hmac_signature``."""
    content = f"{id_}.{at}.{body.decode()}"
    code = base64.b64encode(hmac.new(secret.encode(), content.encode(), hashlib.sha256).digest()).decode()
    return {"x-mlflow-delivery-id": id_, "x-mlflow-timestamp": str(at), "x-mlflow-signature": f"v1,{code}"}


class Subject:
    def __init__(self, *secrets: str) -> None:
        self.woken, self.now = 0, float(NOW)
        self.hints = MlflowHints(secrets or (SECRET,), self._wake, clock=lambda: self.now)

    def _wake(self) -> None:
        self.woken += 1


def test_a_signed_hint_wakes_once() -> None:
    subject = Subject()
    assert subject.hints.take(signed(), BODY)
    assert not subject.hints.take(signed(), BODY)
    assert not subject.hints.take(signed(at=NOW + 1), BODY)
    assert subject.woken == 1
    assert subject.hints.take(signed("d-2"), BODY)
    assert subject.woken == 2


def test_two_secrets_are_good_while_one_is_changed() -> None:
    subject = Subject("new", "old")
    assert subject.hints.take(signed("a", secret="old"), BODY)
    assert subject.hints.take(signed("b", secret="new"), BODY)


@pytest.mark.parametrize("age", [-301, 301])
def test_old_and_early_hints_are_refused(age: int) -> None:
    with pytest.raises(HintRefused):
        Subject().hints.take(signed(at=NOW - age), BODY)
    assert Subject().hints.take(signed(at=NOW - age + (1 if age > 0 else -1)), BODY)


@pytest.mark.parametrize(
    "changes",
    [
        {"x-mlflow-delivery-id": "d-2"},
        {"x-mlflow-delivery-id": ""},
        {"x-mlflow-timestamp": str(NOW + 1)},
        {"x-mlflow-timestamp": "soon"},
        {"x-mlflow-timestamp": "\u0661"},
        {"x-mlflow-signature": ""},
        {"x-mlflow-signature": "v1,"},
        {"x-mlflow-signature": "v2,AAAA"},
        {"x-mlflow-signature": "\u00e9"},
    ],
)
def test_forgeries_are_refused(changes: dict[str, str]) -> None:
    subject = Subject()
    with pytest.raises(HintRefused):
        subject.hints.take(signed() | changes, BODY)
    with pytest.raises(HintRefused):
        subject.hints.take({key: value for key, value in signed().items() if key not in changes}, BODY)
    assert subject.woken == 0


def test_another_body_or_secret_is_refused() -> None:
    for headers, body in ((signed(), BODY + b" "), (signed(secret="other"), BODY), (signed(), b"\xff")):
        with pytest.raises(HintRefused):
            Subject().hints.take(headers, body)


def test_delivery_ids_are_remembered_as_long_as_they_are_fresh_and_boundedly() -> None:
    subject = Subject()
    for number in range(10_001):
        assert subject.hints.take(signed(f"d-{number}"), BODY)
    assert len(subject.hints._seen) == 10_000
    subject.now += 601
    assert subject.hints.take(signed("d-5000", at=NOW + 601), BODY)
    assert len(subject.hints._seen) == 1


def test_no_secret_is_no_check() -> None:
    for secrets in ((), ("",), ("a", "")):
        with pytest.raises(ConfigError):
            MlflowHints(secrets, lambda: None)
