"""Tells receivers of jobs: signed by the Standard Webhooks scheme, queued with the event itself, tried for about a day.

https://www.standardwebhooks.com: ``webhook-signature`` is the HMAC-SHA256 of ``id.timestamp.body``. A delivery keeps its id
over all attempts, so that receivers can drop what they have seen: it arrives at least once.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import secrets
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from http import HTTPStatus
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError

from llmprune import __version__
from llmprune_service import net, tables
from llmprune_service.database import now
from llmprune_service.engine import Queue
from llmprune_service.ids import new_id
from llmprune_service.problems import Problem, not_found
from llmprune_service.schemas import WebhookRequest, WebhookView
from llmprune_service.settings import Settings

Row = sa.Row[Any]
MAX_WEBHOOKS = 32
TEST_EVENT = "webhook.test"
# Seconds before the second attempt, the third and so on; eight attempts in 23.6 hours.
BACK_OFF = (5, 5 * 60, 30 * 60, 2 * 3600, 5 * 3600, 10 * 3600, 6 * 3600)
OLD_SECRET_SECONDS = 24 * 3600
_PREFIX = "whsec_"
_SECRET_BYTES = 32


def create(engine: sa.Engine, tenant: str, request: WebhookRequest, settings: Settings) -> WebhookView:
    """Register a receiver; the answer alone holds its secret.

    Raises:
        Problem: 422 for a URL that may not be asked, 409 for a tenant with too many receivers.
    """
    try:
        net.check_url(request.url, settings)
    except net.Refused as refusal:
        raise Problem(422, "policy", str(refusal), errors=[{"pointer": "/url", "detail": str(refusal)}]) from None
    hooks = tables.webhooks
    values = {"id": new_id("wh"), "tenant": tenant, "url": request.url, "events": list(request.events), "secret": _new_secret()}
    with engine.begin() as connection:
        row = connection.execute(sa.insert(hooks).values(**values, created_at=now(connection)).returning(hooks)).one()
        count = sa.select(sa.func.count()).where(hooks.c.tenant == tenant)
        if connection.execute(count).scalar_one() > MAX_WEBHOOKS:
            raise Problem(409, "too-many-webhooks", f"A tenant has at most {MAX_WEBHOOKS} webhooks. Delete one first.")
    return _view(row, secret=row.secret)


def list_(engine: sa.Engine, tenant: str) -> list[WebhookView]:
    """The tenant's receivers, oldest first, without their secrets."""
    hooks = tables.webhooks
    with engine.connect() as connection:
        rows = connection.execute(sa.select(hooks).where(hooks.c.tenant == tenant).order_by(hooks.c.created_at, hooks.c.id))
        return [_view(row) for row in rows]


def delete(engine: sa.Engine, tenant: str, id: str) -> None:
    """Forget a receiver; what is still to be delivered to it is given up. Raises Problem 404."""
    hooks = tables.webhooks
    with engine.begin() as connection:
        if not connection.execute(sa.delete(hooks).where(hooks.c.id == id, hooks.c.tenant == tenant)).rowcount:
            raise not_found("webhook")


def rotate(engine: sa.Engine, tenant: str, id: str) -> WebhookView:
    """Give a receiver a new secret; for 24 hours the old one signs too. Raises Problem 404."""
    hooks = tables.webhooks
    with engine.begin() as connection:
        update = sa.update(hooks).where(hooks.c.id == id, hooks.c.tenant == tenant)
        until = now(connection) + OLD_SECRET_SECONDS
        values = {"secret": _new_secret(), "old_secret": hooks.c.secret, "old_secret_until": until}
        row = connection.execute(update.values(values).returning(hooks)).first()
    if row is None:
        raise not_found("webhook")
    return _view(row, secret=row.secret)


def tenant_secret(engine: sa.Engine, tenant: str) -> str:
    """The secret that signs for the receivers jobs name themselves; made when it is first asked for."""
    table = tables.signing_secrets
    query = sa.select(table.c.secret).where(table.c.tenant == tenant)
    with engine.connect() as connection:
        secret = connection.execute(query).scalar()
    if secret is None:
        try:
            with engine.begin() as connection:
                connection.execute(sa.insert(table).values(tenant=tenant, secret=_new_secret()))
        except IntegrityError:
            pass  # another process was first
        with engine.connect() as connection:
            secret = connection.execute(query).scalar_one()
    return str(secret)


def announce(connection: sa.Connection, queue: Queue, job_row: Row, event_type: str, body: Mapping[str, Any]) -> None:
    """Queue an event for every receiver that wants it, in the transaction that writes it; ``body`` is the job's view."""
    hooks = tables.webhooks
    rows = connection.execute(sa.select(hooks).where(hooks.c.tenant == job_row.tenant).order_by(hooks.c.id)).all()
    receivers = [(row.id, row.url) for row in rows if event_type in row.events]
    own = job_row.webhook
    if own is not None and event_type in own["events"]:
        receivers.append((None, own["url"]))
    if receivers:
        _queue(connection, queue, job_row.tenant, receivers, event_type, body, job_id=job_row.id)


def send_test(engine: sa.Engine, queue: Queue, tenant: str, id: str) -> str:
    """Queue an event of type ``webhook.test``; returns the id of its delivery. Raises Problem 404."""
    hooks = tables.webhooks
    with engine.begin() as connection:
        row = connection.execute(sa.select(hooks).where(hooks.c.id == id, hooks.c.tenant == tenant)).first()
        if row is None:
            raise not_found("webhook")
        return _queue(connection, queue, tenant, [(row.id, row.url)], TEST_EVENT, {}, job_id=None)[0]


def _queue(
    connection: sa.Connection,
    queue: Queue,
    tenant: str,
    receivers: Sequence[tuple[str | None, str]],
    event: str,
    data: Mapping[str, Any],
    *,
    job_id: str | None,
) -> list[str]:
    """Add a delivery for each (webhook id, URL), and its first attempt to the queue; returns their ids."""
    seconds = float(connection.execute(sa.select(now(connection))).scalar_one())
    timestamp = datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")
    body = json.dumps({"type": event, "timestamp": timestamp, "data": data}, separators=(",", ":"))
    shared = {"tenant": tenant, "job_id": job_id, "event": event, "body": body, "status": "pending", "created_at": seconds}
    rows = [{**shared, "id": new_id("msg"), "webhook_id": webhook_id, "url": url} for webhook_id, url in receivers]
    connection.execute(sa.insert(tables.deliveries), rows)
    for row in rows:
        queue.enqueue_delivery(connection, str(row["id"]), 1, 0)
    return [str(row["id"]) for row in rows]


def deliver(engine: sa.Engine, queue: Queue, delivery_id: str, attempt: int, settings: Settings) -> None:
    """Make one attempt, counted from 1, and queue the next if it fails; 410 and the last failure end the delivery.

    A receiver's fault raises nothing. An attempt that was made before, or is not due any more, is not made again.
    """
    deliveries = tables.deliveries
    query = sa.select(deliveries).where(deliveries.c.id == delivery_id)
    with engine.connect() as connection:
        row = connection.execute(query).first()
    if row is None or row.status != "pending" or row.attempts >= attempt:
        return
    keys = _signing_secrets(engine, row)
    if not keys:
        _note(engine, queue, row, attempt, "The webhook was deleted.", gone=True)
        return
    body = row.body.encode()
    headers = sign(keys, row.id, int(time.time()), body)
    headers |= {"Content-Type": "application/json", "User-Agent": f"llmprune/{__version__}"}
    try:
        status = net.post(row.url, body=body, headers=headers, settings=settings)
    except (net.Refused, net.Unreachable) as failure:
        _note(engine, queue, row, attempt, str(failure))
        return
    error = None if 200 <= status < 300 else f"The receiver answered {status}."
    _note(engine, queue, row, attempt, error, gone=status == HTTPStatus.GONE)


def sign(keys: Sequence[str], id: str, timestamp: int, body: bytes) -> dict[str, str]:
    """The three headers of the scheme; one signature for each secret ``whsec_...``, separated by spaces."""
    message = f"{id}.{timestamp}.".encode() + body
    digests = [hmac.new(base64.b64decode(key.removeprefix(_PREFIX)), message, hashlib.sha256).digest() for key in keys]
    signature = " ".join("v1," + base64.b64encode(digest).decode() for digest in digests)
    return {"webhook-id": id, "webhook-timestamp": str(timestamp), "webhook-signature": signature}


def _note(engine: sa.Engine, queue: Queue, row: Row, attempt: int, error: str | None, *, gone: bool = False) -> None:
    """File how an attempt ended, and queue the next one in the same transaction; what another worker filed stands."""
    deliveries, hooks = tables.deliveries, tables.webhooks
    again = error is not None and not gone and attempt <= len(BACK_OFF)
    status = "delivered" if error is None else "pending" if again else "dead"
    with engine.begin() as connection:
        values = {"status": status, "attempts": attempt, "error": error}
        if error is None:
            values["delivered_at"] = now(connection)
        mine = (deliveries.c.id == row.id, deliveries.c.status == "pending", deliveries.c.attempts < attempt)
        if not connection.execute(sa.update(deliveries).where(*mine).values(values)).rowcount:
            return
        if again:
            queue.enqueue_delivery(connection, row.id, attempt + 1, BACK_OFF[attempt - 1])
        if gone and row.webhook_id is not None:
            connection.execute(sa.delete(hooks).where(hooks.c.id == row.webhook_id))


def _signing_secrets(engine: sa.Engine, row: Row) -> list[str]:
    """The secrets a delivery is signed with; none if its webhook was deleted."""
    if row.webhook_id is None:
        return [tenant_secret(engine, row.tenant)]
    hooks = tables.webhooks
    with engine.connect() as connection:
        valid = (hooks.c.old_secret_until > now(connection)).label("old_is_valid")
        hook = connection.execute(sa.select(hooks, valid).where(hooks.c.id == row.webhook_id)).first()
    if hook is None:
        return []
    return [hook.secret, hook.old_secret] if hook.old_is_valid else [hook.secret]


def _new_secret() -> str:
    return _PREFIX + base64.b64encode(secrets.token_bytes(_SECRET_BYTES)).decode()


def _view(row: Row, secret: str | None = None) -> WebhookView:
    return WebhookView(id=row.id, url=row.url, events=tuple(row.events), created_at=row.created_at, secret=secret)
