"""Webhooks over real sockets: who may be called, signed how, how often; and the guard against calls to private addresses."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import shutil
import socket
import ssl
import subprocess
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import sqlalchemy as sa

from llmprune_service import net, tables, webhooks
from llmprune_service.database import make_engine
from llmprune_service.problems import Problem
from llmprune_service.schemas import WebhookRequest
from llmprune_service.settings import Settings

LOCAL = ("127.0.0.1",)
HOST = "hooks.example.com"
VIEW = {"object": "job", "id": "job_1", "status": "succeeded", "model": "größe"}


class Queue:
    """Records what would be queued: delivery, attempt and delay."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int, float]] = []

    def enqueue_delivery(self, connection: sa.Connection, delivery_id: str, attempt: int, delay_seconds: float = 0) -> None:
        assert connection.in_transaction()
        self.calls.append((delivery_id, attempt, delay_seconds))


class Receiver:
    """A web server that answers POSTs with the statuses of a list, the last one for ever."""

    def __init__(self, *statuses: int, **headers: str) -> None:
        self.statuses = list(statuses) or [204]
        self.headers = headers
        self.requests: list[SimpleNamespace] = []

    def __enter__(self) -> Receiver:
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                receiver.requests.append(SimpleNamespace(path=self.path, headers=self.headers, body=body))
                self.send_response(receiver.statuses.pop(0) if len(receiver.statuses) > 1 else receiver.statuses[0])
                for name, value in receiver.headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}/hook?a=b"
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@contextmanager
def talking(talk: Callable[[socket.socket], None], host: str = "127.0.0.1", port: int = 0) -> Iterator[int]:
    """A server that hands each connection to ``talk``; gives its port."""
    with socket.create_server((host, port)) as server:

        def serve() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                with connection, suppress(OSError):
                    talk(connection)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield server.getsockname()[1]
        finally:
            server.shutdown(socket.SHUT_RDWR)
            thread.join()


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """Of a service that may call receivers on this machine."""
    return Settings(data_dir=tmp_path, webhook_hosts=LOCAL)


@pytest.fixture
def strict(tmp_path: Path) -> Settings:
    """Of a service as it is installed."""
    return Settings(data_dir=tmp_path)


@pytest.fixture(params=["sqlite", "postgres"])
def engine(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[sa.Engine]:
    """An empty database of each kind."""
    if request.param == "sqlite":
        engine = make_engine(f"sqlite:///{tmp_path / 'test.db'}")
    else:
        engine = make_engine(request.getfixturevalue("postgres_server").create(f"test_{uuid.uuid4().hex}"))
    tables.metadata.create_all(engine)
    yield engine
    engine.dispose()


@pytest.fixture
def queue() -> Queue:
    """Of deliveries."""
    return Queue()


def announce(engine: sa.Engine, queue: Queue, event: str = "job.succeeded", **job: Any) -> list[str]:
    """Announce an event of a job; returns the ids of its deliveries."""
    row = SimpleNamespace(**{"id": "job_1", "tenant": "default", "webhook": None} | job)
    before = len(queue.calls)
    with engine.begin() as connection:
        webhooks.announce(connection, queue, row, event, VIEW)
    return [delivery for delivery, _, _ in queue.calls[before:]]


def stored(engine: sa.Engine, delivery: str) -> Any:
    """The row of a delivery."""
    with engine.connect() as connection:
        return connection.execute(sa.select(tables.deliveries).where(tables.deliveries.c.id == delivery)).one()


def signature(secret: str, request: SimpleNamespace) -> str:
    """The signature a receiver computes, by the letter of the specification."""
    message = b".".join([request.headers["webhook-id"].encode(), request.headers["webhook-timestamp"].encode(), request.body])
    digest = hmac.new(base64.b64decode(secret[len("whsec_") :]), message, hashlib.sha256).digest()
    return "v1," + base64.b64encode(digest).decode()


def test_signature_is_the_published_one() -> None:
    """The test vector of the Standard Webhooks libraries."""
    headers = webhooks.sign(
        ["whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"], "msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, b'{"test": 2432232314}'
    )
    assert headers == {
        "webhook-id": "msg_p5jXN8AQM9LWM0D4loKWxJek",
        "webhook-timestamp": "1614265330",
        "webhook-signature": "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=",
    }


def test_an_event_arrives_signed(engine: sa.Engine, queue: Queue, settings: Settings) -> None:
    """With the job as the API shows it, once."""
    with Receiver() as receiver:
        hook = webhooks.create(engine, "default", WebhookRequest(url=receiver.url), settings)
        [delivery] = announce(engine, queue)
        assert queue.calls == [(delivery, 1, 0)]
        webhooks.deliver(engine, queue, delivery, 1, settings)
        webhooks.deliver(engine, queue, delivery, 1, settings)
    [request] = receiver.requests
    assert request.path == "/hook?a=b" and request.headers["Host"] == receiver.url[7:].partition("/")[0]
    assert request.headers["webhook-id"] == delivery and request.headers["Content-Type"] == "application/json"
    assert abs(time.time() - int(request.headers["webhook-timestamp"])) < 60
    assert request.headers["webhook-signature"] == signature(str(hook.secret), request)
    body = json.loads(request.body)
    assert (body["type"], body["data"]) == ("job.succeeded", VIEW) and b": " not in request.body
    assert abs(datetime.fromisoformat(body["timestamp"]).timestamp() - time.time()) < 60
    row = stored(engine, delivery)
    assert (row.status, row.attempts, row.error, row.job_id) == ("delivered", 1, None, "job_1")
    assert row.delivered_at >= row.created_at


def test_who_is_told(engine: sa.Engine, queue: Queue, settings: Settings) -> None:
    """The tenant's receivers that want the event, and the job's own; nobody else's."""
    for tenant, events in (("default", ["job.failed"]), ("default", ["job.succeeded"]), ("other", ["job.succeeded"])):
        webhooks.create(
            engine, tenant, WebhookRequest(url=f"https://{tenant}.example.com/{events[0]}", events=events), settings
        )
    own = {"url": "https://own.example.com", "events": ["job.succeeded"]}
    told = [stored(engine, delivery) for delivery in announce(engine, queue, webhook=own)]
    assert [(row.url, row.webhook_id is None, row.tenant) for row in told] == [
        ("https://default.example.com/job.succeeded", False, "default"),
        ("https://own.example.com", True, "default"),
    ]
    assert len(announce(engine, queue, "job.failed", webhook=own)) == 1
    assert announce(engine, queue, "job.running", webhook=own) == []


def test_an_event_that_is_rolled_back_is_not_announced(engine: sa.Engine, queue: Queue, settings: Settings) -> None:
    """Its deliveries go with it."""
    webhooks.create(engine, "default", WebhookRequest(url="https://example.com"), settings)
    row: Any = SimpleNamespace(id="job_1", tenant="default", webhook=None)
    with engine.connect() as connection:
        webhooks.announce(connection, queue, row, "job.succeeded", VIEW)
        assert connection.execute(sa.select(tables.deliveries)).all()
        connection.rollback()
        assert not connection.execute(sa.select(tables.deliveries)).all()


def test_a_jobs_own_webhook_is_signed_by_its_tenant(engine: sa.Engine, queue: Queue, settings: Settings) -> None:
    """With the secret that the tenant can ask for."""
    with Receiver() as receiver:
        [delivery] = announce(engine, queue, webhook={"url": receiver.url, "events": ["job.succeeded"]}, tenant="team-a")
        webhooks.deliver(engine, queue, delivery, 1, settings)
    [request] = receiver.requests
    assert request.headers["webhook-signature"] == signature(webhooks.tenant_secret(engine, "team-a"), request)
    assert webhooks.tenant_secret(engine, "team-b") != webhooks.tenant_secret(engine, "team-a")


def test_a_tenants_secret_is_made_once(engine: sa.Engine) -> None:
    """Also when everybody asks for it first."""
    barrier = threading.Barrier(8)

    def ask(_: int) -> str:
        barrier.wait()
        return webhooks.tenant_secret(engine, "default")

    with ThreadPoolExecutor(8) as pool:
        [secret] = set(pool.map(ask, range(8)))
    assert secret.startswith("whsec_") and len(base64.b64decode(secret[6:])) == 32


def test_failures_are_repeated_at_growing_distances(engine: sa.Engine, queue: Queue, settings: Settings) -> None:
    """Eight attempts in about a day, then the delivery is dead."""
    with Receiver(500, 404, 301, 503) as receiver:
        webhooks.create(engine, "default", WebhookRequest(url=receiver.url), settings)
        announce(engine, queue)
        for number, (delivery, attempt, _) in enumerate(queue.calls, 1):  # it grows meanwhile
            webhooks.deliver(engine, queue, delivery, attempt, settings)
            row = stored(engine, delivery)
            assert (row.attempts, row.status) == (number, "dead" if number == 8 else "pending")
    assert [(attempt, delay) for _, attempt, delay in queue.calls] == [
        (1, 0), (2, 5), (3, 300), (4, 1800), (5, 7200), (6, 18000), (7, 36000), (8, 21600),
    ]  # fmt: skip
    assert 23 < sum(delay for *_, delay in queue.calls) / 3600 < 24
    assert len(receiver.requests) == 8 and len({request.headers["webhook-id"] for request in receiver.requests}) == 1
    assert row.error == "The receiver answered 503." and row.delivered_at is None
    webhooks.deliver(engine, queue, row.id, 9, settings)
    assert len(receiver.requests) == 8


def test_a_receiver_that_recovers(engine: sa.Engine, queue: Queue, settings: Settings) -> None:
    """Gets it at the next attempt, and an attempt that was made before is not made again."""
    with Receiver(503, 200) as receiver:
        webhooks.create(engine, "default", WebhookRequest(url=receiver.url), settings)
        [delivery] = announce(engine, queue)
        for attempt in (1, 1, 2, 2, 1):
            webhooks.deliver(engine, queue, delivery, attempt, settings)
    assert len(receiver.requests) == 2 and queue.calls == [(delivery, 1, 0), (delivery, 2, 5)]
    assert (stored(engine, delivery).status, stored(engine, delivery).error) == ("delivered", None)


def test_a_receiver_that_is_gone_is_forgotten(engine: sa.Engine, queue: Queue, settings: Settings) -> None:
    """410 ends the delivery and the webhook."""
    with Receiver(410) as receiver:
        webhooks.create(engine, "default", WebhookRequest(url=receiver.url), settings)
        kept = webhooks.create(engine, "default", WebhookRequest(url="https://example.com"), settings)
        delivery, _ = announce(engine, queue)
        webhooks.deliver(engine, queue, delivery, 1, settings)
    assert stored(engine, delivery).status == "dead" and len(queue.calls) == 2
    assert [hook.id for hook in webhooks.list_(engine, "default")] == [kept.id]


def test_a_deleted_webhook_hears_nothing_more(engine: sa.Engine, queue: Queue, settings: Settings) -> None:
    """What was still to come is dead."""
    with Receiver() as receiver:
        hook = webhooks.create(engine, "default", WebhookRequest(url=receiver.url), settings)
        [delivery] = announce(engine, queue)
        webhooks.delete(engine, "default", hook.id)
        webhooks.deliver(engine, queue, delivery, 1, settings)
    assert receiver.requests == [] and stored(engine, delivery).status == "dead"
    webhooks.deliver(engine, queue, "msg_none", 1, settings)


def test_both_secrets_sign_for_a_day(engine: sa.Engine, queue: Queue, settings: Settings) -> None:
    """After a rotation; then the new one alone."""
    with Receiver() as receiver:
        old = webhooks.create(engine, "default", WebhookRequest(url=receiver.url), settings)
        new = webhooks.rotate(engine, "default", old.id)
        assert new.secret != old.secret and new.id == old.id
        for seconds in (0, 24 * 3600 - 60, 24 * 3600 + 60):
            with engine.begin() as connection:
                until = tables.webhooks.c.old_secret_until
                connection.execute(sa.update(tables.webhooks).values(old_secret_until=until - seconds))
            [delivery] = announce(engine, queue)
            webhooks.deliver(engine, queue, delivery, 1, settings)
            with engine.begin() as connection:
                connection.execute(sa.update(tables.webhooks).values(old_secret_until=until + seconds))
    for request, keys in zip(receiver.requests, [(new, old), (new, old), (new,)], strict=True):
        assert request.headers["webhook-signature"] == " ".join(signature(str(key.secret), request) for key in keys)


def test_a_webhook_can_be_tried(engine: sa.Engine, queue: Queue, settings: Settings) -> None:
    """By its own tenant, whatever events it is for."""
    with Receiver() as receiver:
        hook = webhooks.create(engine, "default", WebhookRequest(url=receiver.url, events=["job.failed"]), settings)
        delivery = webhooks.send_test(engine, queue, "default", hook.id)
        assert queue.calls == [(delivery, 1, 0)]
        webhooks.deliver(engine, queue, delivery, 1, settings)
    assert json.loads(receiver.requests[0].body)["type"] == "webhook.test"


def test_tenants_do_not_see_each_other(engine: sa.Engine, queue: Queue, settings: Settings) -> None:
    """Another's webhook is not there; secrets are shown once."""
    hook = webhooks.create(engine, "default", WebhookRequest(url="https://example.com"), settings)
    for attempt in (
        lambda: webhooks.delete(engine, "other", hook.id),
        lambda: webhooks.rotate(engine, "other", hook.id),
        lambda: webhooks.send_test(engine, queue, "other", hook.id),
    ):
        with pytest.raises(Problem) as raised:
            attempt()
        assert raised.value.status == 404
    assert webhooks.list_(engine, "other") == [] and queue.calls == []
    assert webhooks.list_(engine, "default") == [hook.model_copy(update={"secret": None})]


def test_webhooks_are_checked_and_counted(engine: sa.Engine, strict: Settings) -> None:
    """One to a private address, and one too many, are not kept."""
    with pytest.raises(Problem) as raised:
        webhooks.create(engine, "default", WebhookRequest(url="https://10.0.0.1/"), strict)
    assert (raised.value.status, raised.value.errors[0]["pointer"]) == (422, "/url")
    for _ in range(webhooks.MAX_WEBHOOKS):
        webhooks.create(engine, "default", WebhookRequest(url="https://example.com"), strict)
    with pytest.raises(Problem) as raised:
        webhooks.create(engine, "default", WebhookRequest(url="https://example.com"), strict)
    assert raised.value.status == 409 and len(webhooks.list_(engine, "default")) == webhooks.MAX_WEBHOOKS


def test_a_receivers_fault_raises_nothing(engine: sa.Engine, queue: Queue, strict: Settings) -> None:
    """Nobody there, or a name that leads inside: the next attempt is queued, and the row says why."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    settings = strict.model_copy(update={"webhook_hosts": LOCAL})
    for url, used, expected in (
        (f"http://127.0.0.1:{port}", settings, "connection"),
        ("https://127.1", strict, "not public"),
    ):
        [delivery] = announce(engine, queue, webhook={"url": url, "events": ["job.succeeded"]})
        webhooks.deliver(engine, queue, delivery, 1, used)
        row = stored(engine, delivery)
        assert (row.status, row.attempts) == ("pending", 1) and expected in row.error
        assert queue.calls[-1] == (delivery, 2, 5)


@pytest.mark.parametrize(
    "url",
    [
        "http://example.com/", "ftp://example.com/", "file:///etc/passwd", "//example.com/", "example.com", "https://", "https:///x",
        "https://user@example.com/", "https://user:secret@example.com/", "https://example.com/#fragment", "https://example.com#",
        "https://example.com:80/", "https://example.com:22/", "https://example.com:99999/", "https://example.com:x/",
        "https://exam ple.com/", "https://example.com/a b", "https://example.com/\n", "https://example.com\\@10.0.0.1/",
        "https://exämple.com/", "https://example.com/" + "a" * 2048, "https://%31%30.0.0.1/",
        "https://127.0.0.1/", "https://10.0.0.1/", "https://172.16.0.1/", "https://192.168.0.1/", "https://169.254.169.254/",
        "https://100.64.0.1/", "https://100.100.100.200/", "https://0.0.0.0/", "https://255.255.255.255/", "https://224.0.0.1/",
        "https://240.0.0.1/", "https://198.18.0.1/", "https://192.0.0.192/", "https://168.63.129.16/",
        "https://[::1]/", "https://[::]/", "https://[fe80::1]/", "https://[fe80::1%25eth0]/", "https://[fc00::1]/",
        "https://[fd00:ec2::254]/", "https://[fec0::1]/", "https://[ff0e::1]/", "https://[2001:db8::1]/", "https://[::7f00:1]/",
        "https://[::ffff:127.0.0.1]/", "https://[::ffff:100.64.0.1]/", "https://[::ffff:a9fe:a9fe]/",
        "https://[64:ff9b::10.0.0.1]/", "https://[64:ff9b::a9fe:a9fe]/", "https://[64:ff9b:1::808:808]/",
        "https://[2002:a00:1::]/", "https://[2002:808:808::1]/", "https://[2001:0:4136:e378:8000:63bf:3fff:fdd2]/",
        "https://localhost/", "https://2130706433/", "https://0x7f000001/", "https://metadata/",
    ],
)  # fmt: skip
def test_urls_that_are_refused(strict: Settings, url: str) -> None:
    """By their form alone."""
    with pytest.raises(net.Refused, match=r"^[TA].*\.$"):
        net.check_url(url, strict)


@pytest.mark.parametrize(
    "url",
    [
        "https://example.com", "https://example.com:443/a?b=c", "HTTPS://Example.com:8443/", "https://8.8.8.8/",
        "https://[2606:4700::1111]/", "https://[::ffff:8.8.8.8]/", "https://[64:ff9b::8.8.8.8]/", "https://xn--exmple-cua.com/",
    ],
)  # fmt: skip
def test_urls_that_are_accepted(strict: Settings, url: str) -> None:
    """Public hosts over TLS."""
    assert net.check_url(url, strict).scheme == "https"


def test_listed_hosts_are_trusted(settings: Settings) -> None:
    """Any port, and http; that host alone."""
    for url in ("http://127.0.0.1/", "http://127.0.0.1:9/x", "https://127.0.0.1:9/"):
        net.check_url(url, settings)
    for url in (
        "http://127.0.0.2/",
        "http://127.0.0.1.example.com/",
        "http://127.0.0.1:9@example.com/",
        "http://127.0.0.1:65536/",
        "http://127.0.0.1:0/",
    ):
        with pytest.raises(net.Refused):
            net.check_url(url, settings)


def resolving(monkeypatch: pytest.MonkeyPatch, *answers: list[str]) -> list[str]:
    """Let names resolve to these answers in turn, the last one for ever; gives the names that were looked up."""
    real, asked = socket.getaddrinfo, []

    def getaddrinfo(host: Any, port: Any, *args: Any, **kwargs: Any) -> Any:
        if not str(host).endswith("example.com"):
            return real(host, port, *args, **kwargs)
        asked.append(host)
        found = answers[min(len(asked), len(answers)) - 1]
        return [info for address in found for info in real(address, port, *args, **kwargs)]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    return asked


def post(url: str, settings: Settings, timeout: float = 10.0) -> int:
    """POST a small body."""
    return net.post(url, body=b"{}", headers={"X-Test": "1"}, settings=settings, timeout=timeout)


@pytest.mark.parametrize("addresses", [["10.0.0.1"], ["8.8.8.8", "127.0.0.1"], ["::1"], ["8.8.8.8", "::ffff:10.0.0.1"]])
def test_names_with_a_private_address_are_refused(
    strict: Settings, monkeypatch: pytest.MonkeyPatch, addresses: list[str]
) -> None:
    """Whichever of its addresses that is; nothing is connected to."""
    asked = resolving(monkeypatch, addresses)
    with pytest.raises(net.Refused, match="not public"):
        post(f"https://{HOST}/", strict)
    assert asked == [HOST]


def test_a_name_that_does_not_exist(strict: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Is told apart from one that must not be asked."""

    def fail(*_: Any, **__: Any) -> Any:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    with pytest.raises(net.Unreachable, match="not known"):
        post(f"https://{HOST}/", strict)


def answering(received: list[bytes], answer: bytes = b"HTTP/1.1 204 No Content\r\n\r\n") -> Callable[[socket.socket], None]:
    """Talk that notes a request and answers it."""

    def talk(connection: socket.socket) -> None:
        request = b""
        while not request.endswith(b"{}"):  # closing with a part unread would reset the connection
            part = connection.recv(65536)
            if not part:
                return
            request += part
        received.append(request)
        connection.sendall(answer)

    return talk


@pytest.fixture
def tls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ssl.SSLContext:
    """A certificate for HOST that this process trusts."""
    if shutil.which("openssl") is None:
        pytest.skip("makes its certificate with openssl, which is not installed")
    command = (
        "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 1 -subj /CN=test -keyout key -out cert"
    )
    subprocess.run([*command.split(), "-addext", f"subjectAltName=DNS:{HOST}"], cwd=tmp_path, check=True, capture_output=True)
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "cert"))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "cert", tmp_path / "key")
    return context


def secure(context: ssl.SSLContext, talk: Callable[[socket.socket], None]) -> Callable[[socket.socket], None]:
    """Talk over TLS."""

    def shake_hands(connection: socket.socket) -> None:
        with context.wrap_socket(connection, server_side=True) as wrapped:
            talk(wrapped)

    return shake_hands


def test_the_certificate_is_checked_for_the_name(
    strict: Settings, monkeypatch: pytest.MonkeyPatch, tls: ssl.SSLContext
) -> None:
    """Though the connection goes to an address: the server is told the name, and must be it."""
    settings = strict.model_copy(update={"webhook_hosts": (HOST, "other.example.com")})
    resolving(monkeypatch, ["127.0.0.1"])
    received: list[bytes] = []
    named: list[str | None] = []
    tls.sni_callback = lambda _socket, name, _context: named.append(name)
    with talking(secure(tls, answering(received))) as port:
        assert post(f"https://{HOST}:{port}/hook", settings) == 204
        with pytest.raises(net.Unreachable, match="certificate"):
            post(f"https://other.example.com:{port}/hook", settings)
    assert named == [HOST, "other.example.com"] and len(received) == 1
    assert f"Host: {HOST}:{port}\r\n".encode() in received[0] and b"\r\nX-Test: 1\r\n" in received[0]


def test_a_name_is_looked_up_once(strict: Settings, monkeypatch: pytest.MonkeyPatch, tls: ssl.SSLContext) -> None:
    """A name that was public when it was checked and is private when it is used: it is not looked up when it is used."""
    public, private = "127.0.0.2", "127.0.0.1"  # stands for one: tests have no network
    monkeypatch.setattr(net, "_is_public", lambda address: address == public)
    asked = resolving(monkeypatch, [public], [private])
    outside: list[bytes] = []
    inside: list[bytes] = []
    with ExitStack() as stack:
        port = stack.enter_context(talking(secure(tls, answering(outside)), host=public))
        stack.enter_context(talking(secure(tls, answering(inside)), host=private, port=port))
        monkeypatch.setattr(net, "_PORTS", (port,))
        assert post(f"https://{HOST}:{port}/", strict) == 204
        assert (asked, len(outside), len(inside)) == ([HOST], 1, 0)
        with pytest.raises(net.Refused):
            post(f"https://{HOST}:{port}/", strict)
    assert (len(outside), len(inside)) == (1, 0)


def test_the_next_address_is_tried(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nobody listens at the first, as with IPv6 on many hosts."""
    listed = settings.model_copy(update={"webhook_hosts": (HOST,)})
    resolving(monkeypatch, ["127.0.0.2", "127.0.0.1", "127.0.0.3"])
    received: list[bytes] = []
    with talking(answering(received)) as port:
        assert post(f"http://{HOST}:{port}/", listed) == 204
    assert len(received) == 1


def test_redirects_are_not_followed(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """They would lead anywhere; nor is a proxy of the environment asked."""
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    with Receiver() as inside, Receiver(307, Location=inside.url) as receiver:
        assert post(receiver.url, settings) == 307
    assert len(receiver.requests) == 1 and inside.requests == []


def test_huge_answers_are_cut(settings: Settings) -> None:
    """A body is not read, and headers only so far."""
    sent = {"body": 0, "header": 0}

    def flood(part: str, start: bytes) -> Callable[[socket.socket], None]:
        def talk(connection: socket.socket) -> None:
            connection.recv(65536)
            connection.sendall(start)
            while sent[part] < 2**26:
                sent[part] += connection.send(b"a" * 2**16)

        return talk

    with talking(flood("body", b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\n")) as port:
        assert post(f"http://127.0.0.1:{port}/", settings) == 200
    with talking(flood("header", b"HTTP/1.1 200 OK\r\nX: ")) as port, pytest.raises(net.Unreachable):
        post(f"http://127.0.0.1:{port}/", settings)
    assert max(sent.values()) < 2**24


@pytest.mark.parametrize("drip", [b"", b"H", b"HTTP/1.1 100 Continue\r\n\r\n"], ids=["silent", "byte", "interim"])
def test_slow_receivers_are_cut_at_the_deadline(settings: Settings, drip: bytes) -> None:
    """Silent ones, and those that always send a little more."""
    done = threading.Event()

    def talk(connection: socket.socket) -> None:
        while not done.wait(0.05):
            connection.sendall(drip)

    with talking(talk) as port:
        began = time.monotonic()
        with pytest.raises(net.Unreachable):
            post(f"http://127.0.0.1:{port}/", settings, timeout=0.4)
        assert time.monotonic() - began < 8
        done.set()


def test_slow_lookups_are_cut_at_the_deadline(strict: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lookup goes on behind the scenes; nobody waits for it."""
    done = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: done.wait(10))
    began = time.monotonic()
    with pytest.raises(net.Unreachable, match=r"No answer within 0.3 seconds."):
        post(f"https://{HOST}/", strict, timeout=0.3)
    assert time.monotonic() - began < 8
    done.set()
