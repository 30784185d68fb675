"""Signatures against the specification's own example, and what is no secret."""

from __future__ import annotations

import base64

import pytest

from server.delivery.signature import SigningSecret, signature
from server.errors import ConfigError
from tests.support.receiver import KEY, SECRET, Received


def test_the_published_example() -> None:
    secret = SigningSecret.parse("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")
    signed = signature([secret], "msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, b'{"test": 2432232314}')
    assert signed == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


def test_each_live_secret_signs() -> None:
    old = bytes(range(24))
    secrets = [SigningSecret.parse(SECRET), SigningSecret(old)]
    header = signature(secrets, "id", 5, b"{}")
    assert len(header.split(" ")) == 2
    received = Received("/", {"webhook-id": "id", "webhook-timestamp": "5", "webhook-signature": header}, b"{}")
    assert received.signed_by(KEY)
    assert received.signed_by(old)
    assert not received.signed_by(b"x" * 24)


@pytest.mark.parametrize(
    "text",
    ["", "whsec_", SECRET.removeprefix("whsec_"), "whsec_not-base64!", SECRET[:-1], SECRET + "\n"]
    + ["whsec_" + base64.b64encode(bytes(size)).decode() for size in (0, 23, 65)],
)
def test_what_is_no_secret_is_refused_and_not_shown(text: str) -> None:
    with pytest.raises(ConfigError) as refused:
        SigningSecret.parse(text)
    assert len(text) < 10 or text.removeprefix("whsec_")[:8] not in refused.value.message


def test_a_secret_is_never_shown() -> None:
    secret = SigningSecret.parse(SECRET)
    assert repr(secret) == str(secret) == "SigningSecret()"
