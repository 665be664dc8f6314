"""Workers, API keys and webhooks."""

from __future__ import annotations

from typing import Literal, cast

from fastapi import APIRouter, Request

from llmprune_service import webhooks
from llmprune_service.api import auth
from llmprune_service.api.deps import EngineDep, JobsDep, SettingsDep
from llmprune_service.api.openapi import KEYED, problems
from llmprune_service.api.views import Delivery, Secret
from llmprune_service.engine import Queue
from llmprune_service.jobs import Row
from llmprune_service.schemas import ApiKeyRequest, ApiKeyView, Page, WebhookRequest, WebhookView, WorkerView

router = APIRouter(prefix="/v1", responses=KEYED)


@router.get("/workers", tags=["workers"], summary="Workers")
def list_workers(_: auth.admin, jobs: JobsDep) -> Page[WorkerView]:
    """All that have not said goodbye; `lost` ones have not been seen for too long."""
    return Page[WorkerView](data=tuple(map(worker_view, jobs.workers())), has_more=False)


@router.post("/workers/{worker_id}/drain", status_code=202, tags=["workers"], summary="Drain a worker", responses=problems(404))
def drain(_: auth.admin, worker_id: str, jobs: JobsDep) -> WorkerView:
    """It stops after the current block, or after the grace period; its job goes on elsewhere."""
    return worker_view(jobs.drain(worker_id))


def worker_view(row: Row) -> WorkerView:
    """A worker as administrators see it; ``row`` has ``alive`` beside the columns of workers."""
    return WorkerView(
        id=row.id, host=row.host, slot=row.slot, device=row.device, version=row.version, status=worker_status(row),
        job_id=row.job_id, started_at=row.started_at, seen_at=row.seen_at,
    )  # fmt: skip


def worker_status(row: Row) -> Literal["idle", "busy", "draining", "lost"]:
    """What a worker does, in a word."""
    if not row.alive:
        return "lost"
    if row.draining:
        return "draining"
    return "busy" if row.job_id else "idle"


@router.get("/api-keys", tags=["keys"], summary="API keys")
def list_api_keys(_: auth.admin, engine: EngineDep) -> Page[ApiKeyView]:
    """Of all tenants, oldest first."""
    return Page[ApiKeyView](data=tuple(auth.list_keys(engine)), has_more=False)


@router.post("/api-keys", status_code=201, tags=["keys"], summary="Make an API key")
def create_api_key(_: auth.admin, body: ApiKeyRequest, engine: EngineDep) -> ApiKeyView:
    """The answer is the only place where `key` can be read."""
    return auth.create_key(engine, body)


@router.delete("/api-keys/{key_id}", status_code=204, tags=["keys"], summary="Revoke an API key", responses=problems(404, 409))
def delete_api_key(_: auth.admin, key_id: str, engine: EngineDep) -> None:
    """Within five seconds it is refused everywhere, with the browser sessions it opened."""
    auth.delete_key(engine, key_id)


@router.get("/webhooks", tags=["webhooks"], summary="Webhooks")
def list_webhooks(principal: auth.writer, engine: EngineDep) -> Page[WebhookView]:
    """The tenant's, oldest first."""
    return Page[WebhookView](data=tuple(webhooks.list_(engine, principal.tenant)), has_more=False)


@router.post("/webhooks", status_code=201, tags=["webhooks"], summary="Register a webhook", responses=problems(409))
def create_webhook(principal: auth.writer, body: WebhookRequest, engine: EngineDep, settings: SettingsDep) -> WebhookView:
    """It is told of all the tenant's jobs, signed by the Standard Webhooks scheme; only this answer holds the secret."""
    return webhooks.create(engine, principal.tenant, body, settings)


@router.get("/webhooks/secret", tags=["webhooks"], summary="The tenant's signing secret")
def webhook_secret(principal: auth.writer, engine: EngineDep) -> Secret:
    """It signs what goes to webhooks that jobs name themselves."""
    return Secret(secret=webhooks.tenant_secret(engine, principal.tenant))


@router.delete(
    "/webhooks/{webhook_id}", status_code=204, tags=["webhooks"], summary="Delete a webhook", responses=problems(404)
)
def delete_webhook(principal: auth.writer, webhook_id: str, engine: EngineDep) -> None:
    """What was not delivered to it yet is given up."""
    webhooks.delete(engine, principal.tenant, webhook_id)


@router.post("/webhooks/{webhook_id}/rotate", tags=["webhooks"], summary="Renew a secret", responses=problems(404))
def rotate_webhook(principal: auth.writer, webhook_id: str, engine: EngineDep) -> WebhookView:
    """For 24 hours the old secret signs too."""
    return webhooks.rotate(engine, principal.tenant, webhook_id)


@router.post(
    "/webhooks/{webhook_id}/test", status_code=202, tags=["webhooks"], summary="Send a test event", responses=problems(404)
)
def send_test_event(principal: auth.writer, webhook_id: str, request: Request, engine: EngineDep) -> Delivery:
    """An event of type `webhook.test`, delivered like any other."""
    queue = cast(Queue, request.app.state.queue)
    return Delivery(id=webhooks.send_test(engine, queue, principal.tenant, webhook_id))
