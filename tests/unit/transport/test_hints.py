"""Hints over real sockets: signed ones, those with the token, and everybody else's."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import pytest

from server.mlflow.hints import MAX_HINT_BYTES, MlflowHints
from server.transport.admin import admin_app
from server.transport.answers import HttpSettings
from server.transport.app import Boundary
from server.transport.hints import PATH, RegistryHints
from server.transport.reference.asgi import HttpServer
from server.transport.status import StatusTable
from tests.support.echo import EchoCatalog

TOKEN = "correct-horse-battery"
SECRET = "s"
BODY = b'{"entity":"model_version_alias"}'


def signed(id_: str, secret: str = SECRET) -> dict[str, str]:
    stamp = str(int(time.time()))
    code = hmac.new(secret.encode(), f"{id_}.{stamp}.".encode() + BODY, hashlib.sha256).digest()
    signature = "v1," + base64.b64encode(code).decode()
    return {"X-MLflow-Delivery-Id": id_, "X-MLflow-Timestamp": stamp, "X-MLflow-Signature": signature}


class Woken:
    count = 0

    def wake(self) -> None:
        self.count += 1


@asynccontextmanager
async def listening(woken: Woken, *secrets: str, token: str | None = TOKEN) -> AsyncIterator[httpx.AsyncClient]:
    hints = RegistryHints(woken.wake, MlflowHints(secrets, woken.wake) if secrets else None, token=token)
    guarded = admin_app(EchoCatalog(), token=token, loopback=False)
    app = hints.in_front_of(guarded, Boundary(StatusTable()))
    listener = HttpServer(app, settings=HttpSettings(drain_idle_s=0.01))
    host, port = await listener.start("127.0.0.1", 0)
    try:
        async with httpx.AsyncClient(base_url=f"http://{host}:{port}", timeout=30, trust_env=False) as client:
            yield client
    finally:
        await listener.drain(1)


def statuses(woken: Woken, requests: list[dict[str, str]], *secrets: str, token: str | None = TOKEN) -> list[int]:
    async def ask() -> list[int]:
        async with listening(woken, *secrets, token=token) as client:
            return [(await client.post(PATH, content=BODY, headers=headers)).status_code for headers in requests]

    return asyncio.run(asyncio.wait_for(ask(), 30))


def test_a_signature_stands_for_the_token_and_wakes_once() -> None:
    woken, headers = Woken(), signed("d-1")
    assert statuses(woken, [headers, headers, signed("d-2")], "s") == [202, 202, 202]
    assert woken.count == 2


def test_the_token_wakes_without_a_signature() -> None:
    woken = Woken()
    assert statuses(woken, [{"Authorization": f"Bearer {TOKEN}"}]) == [202]
    assert woken.count == 1


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Bearer wrong"},
        {"Authorization": "Bearer"},
        {"Authorization": TOKEN},
        signed("d", "other"),
    ],
)
def test_nobody_else_wakes_it(headers: dict[str, str]) -> None:
    woken = Woken()
    assert statuses(woken, [headers], "s") == [401]
    assert statuses(woken, [headers]) == [401]
    assert statuses(woken, [headers], "s", token=None) == [401]
    assert woken.count == 0


def test_a_wrong_signature_is_refused_with_the_token_too() -> None:
    woken = Woken()
    assert statuses(woken, [{**signed("d", "other"), "Authorization": f"Bearer {TOKEN}"}], "s") == [401]
    assert woken.count == 0


def test_large_bodies_other_methods_and_other_paths() -> None:
    async def ask() -> list[int]:
        async with listening(Woken(), "s") as client:
            large = await client.post(PATH, content=bytes(MAX_HINT_BYTES + 1), headers=signed("d"))
            got = await client.get(PATH)
            models = await client.get("/admin/v1/models", headers={"Authorization": f"Bearer {TOKEN}"})
            closed = await client.get("/admin/v1/models")
            return [large.status_code, got.status_code, models.status_code, closed.status_code]

    assert asyncio.run(asyncio.wait_for(ask(), 30)) == [413, 405, 200, 401]
