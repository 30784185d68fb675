"""The admin routes over real sockets, on a real history and a reconfiguration that keeps the protocol's promises."""

from __future__ import annotations

import asyncio
import functools
import gzip
import logging
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import structlog

from server.audit import AuditLog
from server.config.load import MAX_BYTES, parse_config
from server.errors import ModelLoadError, NotFound
from server.history import ConfigHistory, Generation, Stale
from server.pages import drift_page
from server.store.sqlite import SqliteStore
from server.transport.admin import AdminViews, _npz_headers, admin_app, is_loopback
from server.transport.answers import HttpSettings
from server.transport.reference.asgi import HttpServer
from tests.support.echo import EchoCatalog

TOKEN = "correct-horse-battery"
BEARER = {"authorization": f"Bearer {TOKEN}"}
CONFIG = "/admin/v1/config"
ROLLBACK = "/admin/v1/config:rollback"
DRIFT = "/admin/v1/monitors/fraud/7"


def text(name: str) -> bytes:
    return f"apiVersion: tidegate/v1\nserver: {{name: {name}}}\n".encode()


def in_loop(test: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    @functools.wraps(test)
    def run(*args: object, **kwargs: object) -> None:
        asyncio.run(asyncio.wait_for(test(*args, **kwargs), 30))

    return run


@dataclass
class Applying:
    """Implements Reconfigure: one lock around the comparison, the loading (which a test may hold) and the swap."""

    kept: ConfigHistory
    applied: Generation | None = None
    loading: int = 0
    may_load: asyncio.Event = field(default_factory=asyncio.Event)
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    waiting: int = 0
    all_waiting: asyncio.Event = field(default_factory=asyncio.Event)

    def generation(self) -> int:
        return self.applied.number if self.applied else 0

    def text(self) -> bytes:
        return (self.applied.text if self.applied else None) or b""

    async def plan(self, text: bytes) -> dict[str, Any]:
        config = parse_config(text.decode(), path="<body>")
        return {"server": config.server.name, "from": self.generation()}

    async def apply(self, text: bytes, *, expected: int | None, actor: str, reason: str) -> dict[str, Any]:
        self.waiting += 1
        if self.waiting == 2:
            self.all_waiting.set()
        async with self.turn:
            if expected is not None and expected != self.generation():
                raise Stale(expected, self.generation())
            plan = await self.plan(text)
            await self._load(text)
            return await self._swap(text, plan, actor, reason, None)

    async def rollback(self, to: int, *, actor: str, reason: str) -> dict[str, Any]:
        async with self.turn:
            old = await asyncio.to_thread(self.kept.get, to)
            if old.text is None:
                raise NotFound(f"generation {to} is too old")
            return await self._swap(old.text, await self.plan(old.text), actor, reason, to)

    def history(self, limit: int) -> list[dict[str, Any]]:
        return [entry.as_dict() for entry in self.kept.list(limit)]

    async def _load(self, text: bytes) -> None:
        self.loading += 1
        await self.may_load.wait()
        if b"broken" in text:
            raise ModelLoadError("model fraud could not be loaded: the file is damaged")
        if b"bug" in text:
            raise KeyError("a secret of the inside")

    async def _swap(
        self, text: bytes, plan: dict[str, Any], actor: str, reason: str, restores: int | None
    ) -> dict[str, Any]:
        append = functools.partial(
            self.kept.append, text, models={}, actor=actor, reason=reason, restores=restores, expected=self.generation()
        )
        self.applied = await asyncio.to_thread(append)
        return {"generation": self.applied.number, "plan": plan}


@dataclass
class Admin:
    client: httpx.AsyncClient
    applying: Applying
    audit: AuditLog

    async def post(self, path: str = CONFIG, body: bytes = b"", **headers: str) -> httpx.Response:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return await self.client.post(path, content=body, headers={**BEARER, **named})


@asynccontextmanager
async def admin(
    folder: Path, *, token: str | None = TOKEN, loopback: bool = True, hold: bool = False
) -> AsyncIterator[Admin]:
    store = SqliteStore(folder / "tidegate.db")
    audit = AuditLog(store)
    applying = Applying(ConfigHistory(store, audit, keep_texts=3))
    if not hold:
        applying.may_load.set()

    def experiment(id_: str) -> dict[str, Any]:
        if id_ != "e1":
            raise NotFound(f"no experiment {id_}")
        return {"id": id_}

    def rows(limit: int) -> list[dict[str, Any]]:
        return [{"seq": row.seq, "actor": row.event.actor, "action": row.event.action} for row in audit.tail(limit)]

    def drift(model: str, version: str) -> dict[str, Any]:
        assert threading.current_thread() is not threading.main_thread(), "the event loop was held up"
        if (model, version) != ("fraud", "7"):
            raise NotFound(f"{model}:{version} is not watched")
        return {"report": {"model": model, "version": version, "worst": float("nan")}}

    views = AdminViews(
        audit=rows,
        shadows=lambda: {"shadows": [1]},
        experiments=lambda: {"experiments": ["e1"]},
        experiment=experiment,
        monitors=lambda: {"monitors": ["fraud:7"]},
        monitor=drift,
        monitor_sample=lambda model, version: f"rows of {model}:{version}".encode(),
    )
    settings = HttpSettings(drain_idle_s=0.01)
    app = admin_app(EchoCatalog(), token=token, loopback=loopback, reconfigure=applying, views=views, settings=settings)
    listener = HttpServer(app, settings=settings)
    host, port = await listener.start("127.0.0.1", 0)
    try:
        async with httpx.AsyncClient(base_url=f"http://{host}:{port}", timeout=30, trust_env=False) as client:
            yield Admin(client, applying, audit)
    finally:
        await listener.drain(1)
        store.close()


# --- reading and changing ---


@in_loop
async def test_a_configuration_is_applied_and_read_back_to_the_byte(tmp_path: Path) -> None:
    async with admin(tmp_path) as server:
        empty = await server.client.get(CONFIG)
        assert (empty.status_code, empty.content, empty.headers["etag"]) == (200, b"", '"0"')
        body = b"# a comment stays\r\n" + text("one")
        made = await server.post(body=body)
        assert made.json() == {"generation": 1, "plan": {"server": "one", "from": 0}}
        assert (made.status_code, made.headers["etag"]) == (200, '"1"')
        got = await server.client.get(CONFIG)
        assert (got.content, got.headers["etag"]) == (body, '"1"')
        assert (got.headers["content-type"], got.headers["cache-control"]) == ("application/yaml", "no-store")


@in_loop
async def test_json_and_compressed_bodies_are_taken(tmp_path: Path) -> None:
    async with admin(tmp_path) as server:
        as_json = b'{"apiVersion": "tidegate/v1", "server": {"name": "j"}}'
        assert (await server.post(body=as_json)).json()["plan"]["server"] == "j"
        zipped = await server.post(body=gzip.compress(text("z")), content_encoding="gzip")
        assert zipped.json()["plan"]["server"] == "z"
        assert (await server.client.get(CONFIG)).content == text("z")


@in_loop
async def test_a_dry_run_changes_nothing(tmp_path: Path) -> None:
    async with admin(tmp_path) as server:
        await server.post(body=text("one"))
        for flag in ("1", "true"):
            answer = await server.post(f"{CONFIG}?dry_run={flag}", text("two"), if_match="1")
            plan = {"server": "two", "from": 1}
            assert (answer.status_code, answer.json()) == (200, {"generation": 1, "dry_run": True, "plan": plan})
        assert (await server.post(f"{CONFIG}?dry_run=1", b"nonsense: 1\n")).status_code == 400
        assert (await server.post(f"{CONFIG}?dry_run=1", text("two"), if_match="7")).status_code == 412
        assert (await server.client.get(CONFIG)).content == text("one")
        assert len(server.audit.tail(10)) == server.applying.loading == 1


@in_loop
async def test_every_mistake_is_told_with_its_place(tmp_path: Path) -> None:
    async with admin(tmp_path) as server:
        answer = await server.post(body=b"apiVersion: tidegate/v1\nserver:\n  nam: x\n  workers: 0\n")
        assert answer.status_code == 400
        problems = answer.json()["problems"]
        assert [(p["line"], p["column"], p["key"]) for p in problems] == [
            (3, 3, "server.nam"),
            (4, 12, "server.workers"),
        ]
        assert all(set(problem) == {"line", "column", "key", "message"} and problem["message"] for problem in problems)
        assert problems[0]["message"] in answer.json()["error"]
        assert server.applying.generation() == 0


@in_loop
async def test_a_model_that_does_not_load_is_told(tmp_path: Path) -> None:
    async with admin(tmp_path) as server:
        answer = await server.post(body=text("broken"))
        message = "model fraud could not be loaded: the file is damaged"
        problem = {"line": 0, "column": 0, "key": "", "message": message}
        assert (answer.status_code, answer.json()) == (400, {"error": message, "problems": [problem]})
        assert (await server.client.get(CONFIG)).headers["etag"] == '"0"'


@in_loop
async def test_the_unexpected_is_an_id_and_no_text(tmp_path: Path) -> None:
    async with admin(tmp_path) as server:
        with structlog.testing.capture_logs() as logs:
            answer = await server.post(body=text("bug"))
        assert (answer.status_code, list(answer.json())) == (500, ["error"])
        assert "secret" not in answer.text
        assert logs[0]["id"] in answer.text


# --- two operators ---


@pytest.mark.parametrize("given", ["1", '"1"', "*"])
@in_loop
async def test_the_applied_generation_matches(tmp_path: Path, given: str) -> None:
    async with admin(tmp_path) as server:
        await server.post(body=text("one"))
        assert (await server.post(body=text("two"), if_match=given)).json()["generation"] == 2


@pytest.mark.parametrize("given", ["0", '"2"', "9999999999999999999"])
@in_loop
async def test_another_generation_is_stale(tmp_path: Path, given: str) -> None:
    async with admin(tmp_path) as server:
        await server.post(body=text("one"))
        answer = await server.post(body=text("two"), if_match=given)
        assert (answer.status_code, answer.headers["etag"], answer.json()["generation"]) == (412, '"1"', 1)
        assert "generation 1 is applied" in answer.json()["error"]
        assert (await server.client.get(CONFIG)).content == text("one")


@pytest.mark.parametrize("given", ["", "x", '""', '"1', "-1", 'W/"1"', '"1", "2"', "1.0", "1" * 20])
@in_loop
async def test_what_is_no_generation_is_refused(tmp_path: Path, given: str) -> None:
    async with admin(tmp_path) as server:
        answer = await server.post(body=text("one"), if_match=given)
        assert answer.status_code == 400
        assert answer.json()["error"].startswith("If-Match must be one generation")
        assert server.applying.generation() == 0


@in_loop
async def test_of_two_operators_at_once_exactly_one_wins(tmp_path: Path) -> None:
    async with admin(tmp_path, hold=True) as server:
        posts = [
            asyncio.ensure_future(server.post(body=text(name), if_match='"0"', x_tidegate_actor=name))
            for name in ("al", "bo")
        ]
        await server.applying.all_waiting.wait()  # the first is loading, the second has come too
        server.applying.may_load.set()
        answers = await asyncio.gather(*posts)
        assert sorted(answer.status_code for answer in answers) == [200, 412]
        assert {answer.headers["etag"] for answer in answers} == {'"1"'}
        winner = ("al", "bo")[[answer.status_code for answer in answers].index(200)]
        assert (await server.client.get(CONFIG)).content == text(winner)
        assert [row.event.actor for row in server.audit.tail(10)] == [winner]
        assert server.applying.loading == 1


@in_loop
async def test_of_many_operators_at_once_each_generation_has_one(tmp_path: Path) -> None:
    async with admin(tmp_path) as server:
        for generation in range(3):
            posts = (server.post(body=text(f"n{i}"), if_match=str(generation)) for i in range(10))
            statuses = [answer.status_code for answer in await asyncio.gather(*posts)]
            assert sorted(statuses) == [200] + [412] * 9


# --- history and rollback ---


@in_loop
async def test_a_rollback_is_a_new_generation(tmp_path: Path) -> None:
    async with admin(tmp_path) as server:
        for name in ("one", "two"):
            await server.post(body=text(name))
        back = await server.post(f"{ROLLBACK}?to=1", x_tidegate_actor="bo", x_tidegate_reason="two was bad")
        assert (back.status_code, back.json()["generation"], back.headers["etag"]) == (200, 3, '"3"')
        assert (await server.client.get(CONFIG)).content == text("one")
        answer = (await server.client.get(f"{CONFIG}/history")).json()
        assert (answer["generation"], [entry["generation"] for entry in answer["history"]]) == (3, [3, 2, 1])
        newest = answer["history"][0]
        assert (newest["actor"], newest["reason"], newest["restores"]) == ("bo", "two was bad", 1)
        assert newest["sha256"] == answer["history"][2]["sha256"]
        shorter = (await server.client.get(f"{CONFIG}/history?limit=1")).json()
        assert shorter["history"] == [newest]


@pytest.mark.parametrize(
    ("query", "status", "complaint"),
    [
        ("?to=9", 404, "no generation 9"),
        ("?to=1", 404, "too old"),
        ("", 400, "to must be a whole number"),
        ("?to=0", 400, "to must be a whole number"),
        ("?to=-1", 400, "to must be a whole number"),
        ("?to=9223372036854775808", 400, "to must be a whole number"),
        ("?to=" + "9" * 5000, 400, "to must be a whole number"),
        ("?to=2&to=3", 400, "given 2 times"),
        ("?generation=2", 400, "unknown query parameter 'generation'"),
    ],
)
@in_loop
async def test_a_rollback_that_cannot_be(tmp_path: Path, query: str, status: int, complaint: str) -> None:
    async with admin(tmp_path) as server:
        for number in range(5):
            await server.post(body=text(f"n{number}"))
        answer = await server.post(ROLLBACK + query)
        assert answer.status_code == status
        assert complaint in answer.json()["error"]
        assert server.applying.generation() == 5


@in_loop
async def test_a_rollback_does_not_ignore_if_match(tmp_path: Path) -> None:
    async with admin(tmp_path) as server:
        await server.post(body=text("one"))
        answer = await server.post(f"{ROLLBACK}?to=1", if_match="1")
        assert (answer.status_code, server.applying.generation()) == (400, 1)


# --- what may not be sent ---


@pytest.mark.parametrize(
    "query", ["?dryrun=1", "?dry_run=yes", "?dry_run=", "?dry_run=1&dry_run=0", "?dry_run=1&x=2", "?DRY_RUN=1"]
)
@in_loop
async def test_a_misspelt_dry_run_is_no_real_run(tmp_path: Path, query: str) -> None:
    async with admin(tmp_path) as server:
        answer = await server.post(CONFIG + query, text("one"))
        assert (answer.status_code, server.applying.loading) == (400, 0)


@in_loop
async def test_bodies_have_a_limit(tmp_path: Path) -> None:
    async def endless() -> AsyncIterator[bytes]:
        for _ in range(MAX_BYTES // 65536 + 1):
            yield b"#" * 65536

    async with admin(tmp_path) as server:
        filled = text("full") + b"#" * (MAX_BYTES - len(text("full")))
        assert (await server.post(body=filled)).status_code == 200
        assert (await server.post(body=filled + b"#")).status_code == 413
        bomb = gzip.compress(filled + b"#")
        assert (await server.post(body=bomb, content_encoding="gzip")).status_code == 413
        chunked = await server.client.post(CONFIG, content=endless(), headers=BEARER)
        assert chunked.status_code == 413
        assert server.applying.generation() == 1


@pytest.mark.parametrize("body", [b"", b" \n", b"[]"])
@in_loop
async def test_what_is_no_configuration_is_refused(tmp_path: Path, body: bytes) -> None:
    async with admin(tmp_path) as server:
        answer = await server.post(body=body)
        assert (answer.status_code, server.applying.loading) == (400, 0)


@pytest.mark.parametrize("method", ["PUT", "DELETE", "PATCH"])
@in_loop
async def test_other_methods_are_refused(tmp_path: Path, method: str) -> None:
    async with admin(tmp_path) as server:
        answer = await server.client.request(method, CONFIG, headers=BEARER)
        assert (answer.status_code, answer.headers["allow"]) == (405, "GET, POST")
        assert (await server.client.get(f"{ROLLBACK}?to=1")).status_code == 405


# --- who ---


@pytest.mark.parametrize(
    ("headers", "actor", "reason"),
    [
        ({}, "admin", ""),
        ({"x-tidegate-actor": "", "x-tidegate-reason": ""}, "admin", ""),
        ({"x-tidegate-actor": "al@host", "x-tidegate-reason": "weights up"}, "al@host", "weights up"),
        ({"x-tidegate-actor": "Zoë", "x-tidegate-reason": "größer"}, "Zoë", "größer"),
        ({"x-tidegate-actor": "a" * 128, "x-tidegate-reason": "r" * 1024}, "a" * 128, "r" * 1024),
    ],
)
@in_loop
async def test_actor_and_reason_are_audited(tmp_path: Path, headers: dict[str, str], actor: str, reason: str) -> None:
    async with admin(tmp_path) as server:
        sent = {name: value.encode() for name, value in {**BEARER, **headers}.items()}
        assert (await server.client.post(CONFIG, content=text("one"), headers=sent)).status_code == 200
        event = server.audit.tail(1)[0].event
        assert (event.actor, event.action, event.detail["reason"]) == (actor, "config.applied", reason)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("x-tidegate-actor", b"a" * 129),
        ("x-tidegate-reason", b"r" * 1025),
        ("x-tidegate-actor", b"a\tb"),
        ("x-tidegate-actor", b"a\xff"),
        ("x-tidegate-reason", "line\u2028separator".encode()),
    ],
)
@in_loop
async def test_actors_and_reasons_that_no_log_should_show_are_refused(tmp_path: Path, name: str, value: bytes) -> None:
    async with admin(tmp_path) as server:
        for path, body in ((CONFIG, text("one")), (f"{ROLLBACK}?to=1", b"")):
            sent = {**{key: text_.encode() for key, text_ in BEARER.items()}, name: value}
            answer = await server.client.post(path, content=body, headers=sent)
            assert answer.status_code == 400
            assert name in answer.json()["error"]
        assert server.applying.generation() == 0


WRONG = [
    {},
    {"authorization": ""},
    {"authorization": "Bearer"},
    {"authorization": f"Basic {TOKEN}"},
    {"authorization": TOKEN},
    {"authorization": f"Bearer {TOKEN}x"},
    {"authorization": f"Bearer {TOKEN[:-1]}"},
    {"authorization": f"Bearer {TOKEN} {TOKEN}"},
    {"authorization": f"Bearer {TOKEN.upper()}"},
]


@pytest.mark.parametrize("headers", WRONG)
@in_loop
async def test_a_change_needs_the_token_on_loopback_too(tmp_path: Path, headers: dict[str, str]) -> None:
    async with admin(tmp_path) as server:
        with structlog.testing.capture_logs() as logs:
            for path in (CONFIG, f"{CONFIG}?dry_run=1", f"{ROLLBACK}?to=1"):
                answer = await server.client.post(path, content=text("one"), headers=headers)
                assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
                assert TOKEN not in answer.text
        assert (logs, server.applying.loading) == ([], 0)
        assert (await server.client.get(CONFIG)).status_code == 200


async def status_of_raw(server: Admin, *headers: bytes) -> int:
    """The status of posting a configuration with header lines that no client library would send."""
    url = server.client.base_url
    reader, writer = await asyncio.open_connection(url.host, url.port)
    body = text("raw")
    lines = [b"POST %b HTTP/1.1" % CONFIG.encode(), b"host: x", b"content-length: %d" % len(body), *headers]
    writer.write(b"\r\n".join([*lines, b"", body]))
    status = int((await reader.readline()).split()[1])
    writer.close()
    await writer.wait_closed()
    return status


@in_loop
async def test_headers_that_no_client_library_sends(tmp_path: Path) -> None:
    good = b"authorization: Bearer " + TOKEN.encode()
    async with admin(tmp_path) as server:
        for headers in ([b"authorization: Bearer "], [good, good], [good, b"authorization: Bearer x"]):
            assert await status_of_raw(server, *headers) == 401
        assert server.applying.loading == 0
        assert await status_of_raw(server, good + b" ", b'if-match:  "0" ') == 200
        assert await status_of_raw(server, good, b"if-match: 1", b"if-match: 1") == 400


@pytest.mark.parametrize("scheme", ["Bearer ", "bearer ", "BEARER  "])
@in_loop
async def test_the_scheme_is_known_in_any_case(tmp_path: Path, scheme: str) -> None:
    async with admin(tmp_path) as server:
        headers = {"authorization": scheme + TOKEN}
        assert (await server.client.post(CONFIG, content=text("one"), headers=headers)).status_code == 200


READ = [
    CONFIG,
    f"{CONFIG}/history",
    "/admin/v1/models",
    "/admin/v1/audit",
    "/admin/v1/shadows",
    "/admin/v1/experiments",
    "/admin/v1/monitors",
    DRIFT,
    f"{DRIFT}?format=html",
    f"{DRIFT}?format=npz",
]


@in_loop
async def test_reading_needs_the_token_off_loopback(tmp_path: Path) -> None:
    async with admin(tmp_path, loopback=False) as server:
        for path in (*READ, "/admin/v1/nothing"):
            for headers in WRONG:
                assert (await server.client.get(path, headers=headers)).status_code == 401
                assert (await server.client.head(path, headers=headers)).status_code == 401
        for path in READ:
            assert (await server.client.get(path, headers=BEARER)).status_code == 200


@in_loop
async def test_without_a_token_nothing_can_be_changed(tmp_path: Path) -> None:
    for token in (None, ""):
        async with admin(tmp_path, token=token) as server:
            for headers in ({}, BEARER):
                answer = await server.client.post(CONFIG, content=text("one"), headers=headers)
                assert answer.status_code == 401
            assert await status_of_raw(server, b"authorization: Bearer ", b"if-match: 0") == 401
            assert (await server.client.get(CONFIG)).status_code == 200


@in_loop
async def test_the_token_is_never_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    async with admin(tmp_path) as server:
        with structlog.testing.capture_logs() as logs:
            await server.post(body=text("bug"))
            await server.post(body=text("one"))
    ours = [record.getMessage() for record in caplog.records if not record.name.startswith(("http", "hpack"))]
    assert logs
    assert TOKEN not in str(logs)
    assert TOKEN not in "".join(ours)


# --- views ---


@in_loop
async def test_what_is_served_and_going_on_can_be_read(tmp_path: Path) -> None:
    async with admin(tmp_path) as server:
        await server.post(body=text("one"))
        await server.post(body=text("two"), x_tidegate_actor="bo")
        events = (await server.client.get("/admin/v1/audit")).json()["events"]
        assert [(event["seq"], event["actor"]) for event in events] == [(1, "admin"), (2, "bo")]
        assert (await server.client.get("/admin/v1/audit?limit=1")).json()["events"] == events[1:]
        assert (await server.client.get("/admin/v1/shadows")).json() == {"shadows": [1]}
        assert (await server.client.get("/admin/v1/experiments")).json() == {"experiments": ["e1"]}
        assert (await server.client.get("/admin/v1/experiments/e1")).json() == {"id": "e1"}
        assert (await server.client.get("/admin/v1/experiments/e2")).status_code == 404
        models = (await server.client.get("/admin/v1/models")).json()["models"]
        assert models
        assert set(models[0]) == {"name", "version", "state", "reason"}


@in_loop
async def test_drift_is_answered_as_json_as_a_page_and_as_rows(tmp_path: Path) -> None:
    async with admin(tmp_path) as server:
        assert (await server.client.get("/admin/v1/monitors")).json() == {"monitors": ["fraud:7"]}
        plain = {"report": {"model": "fraud", "version": "7", "worst": None}}
        for query in ("", "?format=json"):
            assert (await server.client.get(DRIFT + query)).json() == plain
        page = await server.client.get(f"{DRIFT}?format=html")
        assert page.text == drift_page(plain)
        assert page.headers["content-type"] == "text/html; charset=utf-8"
        assert page.headers["content-security-policy"] == "frame-ancestors 'none'"
        rows = await server.client.get(f"{DRIFT}?format=npz")
        assert (rows.content, rows.headers["content-type"]) == (b"rows of fraud:7", "application/x-npz")
        assert rows.headers["content-disposition"] == 'attachment; filename="fraud_7.npz"'
        for answer in (page, rows):
            assert answer.headers["x-content-type-options"] == "nosniff"
            assert answer.headers["cache-control"] == "no-store"


@pytest.mark.parametrize(
    ("path", "status", "text_"),
    [
        ("/admin/v1/monitors/fraud/8", 404, "fraud:8 is not watched"),
        ("/admin/v1/monitors/fraud/8?format=html", 404, "fraud:8 is not watched"),
        (f"{DRIFT}?format=pdf", 400, "format must be one of json, html, npz, got 'pdf'"),
        (f"{DRIFT}?form=html", 400, "unknown query parameter 'form': wanted format"),
        (f"{DRIFT}?format=html&format=json", 400, "given 2 times"),
        ("/admin/v1/monitors?format=html", 400, "unknown query parameter"),
    ],
)
@in_loop
async def test_what_is_not_watched_or_not_a_format_is_told(tmp_path: Path, path: str, status: int, text_: str) -> None:
    async with admin(tmp_path) as server:
        answer = await server.client.get(path)
        assert answer.status_code == status
        assert text_ in answer.json()["error"]


def test_a_file_of_rows_is_named_safely() -> None:
    name = dict(_npz_headers('../"fr\u00e4ud\r\n' + "x" * 200, "7"))[b"content-disposition"]
    assert name.startswith(b'attachment; filename="____fr_ud__xxx')
    assert len(name) < 140


@in_loop
async def test_without_captured_rows_the_format_is_not_found() -> None:
    views = AdminViews(monitor=lambda model, version: {"report": {}})
    app = admin_app(EchoCatalog(), token=None, loopback=True, views=views)
    listener = HttpServer(app, settings=HttpSettings(drain_idle_s=0.01))
    host, port = await listener.start("127.0.0.1", 0)
    async with httpx.AsyncClient(base_url=f"http://{host}:{port}", timeout=30, trust_env=False) as client:
        answers = [(await client.get(f"{DRIFT}{query}")).status_code for query in ("", "?format=npz")]
    await listener.drain(1)
    assert answers == [200, 404]


@pytest.mark.parametrize("path", ["/admin/v1/audit", f"{CONFIG}/history"])
@pytest.mark.parametrize("query", ["?limit=0", "?limit=-1", "?limit=1001", "?limit=", "?limit=ten", "?limits=5"])
@in_loop
async def test_limits_are_bounded(tmp_path: Path, path: str, query: str) -> None:
    async with admin(tmp_path) as server:
        assert (await server.client.get(path + query)).status_code == 400


@in_loop
async def test_what_was_not_handed_in_is_not_there() -> None:
    listener = HttpServer(admin_app(EchoCatalog(), token=None, loopback=True), settings=HttpSettings(drain_idle_s=0.01))
    host, port = await listener.start("127.0.0.1", 0)
    async with httpx.AsyncClient(base_url=f"http://{host}:{port}", timeout=30, trust_env=False) as client:
        statuses = {path: (await client.get(path)).status_code for path in (*READ, "/admin/v1/experiments/e1")}
    await listener.drain(1)
    assert {path for path, status in statuses.items() if status == 200} == {"/admin/v1/models"}
    assert set(statuses.values()) == {200, 404}


@pytest.mark.parametrize(
    ("host", "alone"),
    [("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("::", False),
     ("10.0.0.1", False), ("gateway.example", False), ("", False)],
)  # fmt: skip
def test_loopback(host: str, alone: bool) -> None:
    assert is_loopback(host) is alone
