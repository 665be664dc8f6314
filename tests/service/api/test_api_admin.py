"""Workers, webhooks and metrics over HTTP."""

from __future__ import annotations

import sqlalchemy as sa
from api_server import Service, pointers, problem
from prometheus_client.parser import text_string_to_metric_families

from llmprune_service import tables
from llmprune_service.ids import new_id


def add_worker(service: Service, *, seen_ago: float = 0.0, job_id: str | None = None) -> str:
    """A row as a worker writes it."""
    worker_id = new_id("worker")
    with service.engine.begin() as connection:
        values = {"id": worker_id, "host": "h", "pid": 1, "slot": 0, "device": "cpu", "version": "1", "job_id": job_id}
        moment = service.jobs.now - seen_ago
        connection.execute(sa.insert(tables.workers).values(**values, started_at=moment, seen_at=moment))
    return worker_id


def test_workers_and_what_they_do(service: Service) -> None:
    """Idle, busy, lost; draining once they are told to."""
    idle, busy, lost = add_worker(service), add_worker(service, job_id=service.submit()), add_worker(service, seen_ago=999)
    status = {worker["id"]: worker["status"] for worker in service.get("/v1/workers").json()["data"]}
    assert status == {idle: "idle", busy: "busy", lost: "lost"}
    drained = service.post(f"/v1/workers/{busy}/drain")
    assert (drained.status_code, drained.json()["status"]) == (202, "draining")
    problem(service.post("/v1/workers/nobody/drain"), 404)


def test_webhooks(service: Service) -> None:
    """Secrets are shown once, and once more when they are renewed; other tenants see nothing."""
    made = service.post("/v1/webhooks", json={"url": "https://hooks.example.com/x", "events": ["job.failed"]})
    assert made.status_code == 201
    hook = made.json()
    assert hook["secret"].startswith("whsec_")
    listed = service.get("/v1/webhooks").json()["data"]
    assert [(entry["id"], entry["events"], entry["secret"]) for entry in listed] == [(hook["id"], ["job.failed"], None)]
    path = f"/v1/webhooks/{hook['id']}"
    other = service.key("read", "write", tenant="acme")
    for method, suffix in (("DELETE", ""), ("POST", "/rotate"), ("POST", "/test")):
        problem(service.request(method, path + suffix, key=other), 404)
    assert service.post(f"{path}/rotate").json()["secret"] not in (None, hook["secret"])
    sent = service.post(f"{path}/test")
    assert sent.status_code == 202
    with service.engine.connect() as connection:
        delivery = connection.execute(sa.select(tables.deliveries)).one()
    assert (delivery.id, delivery.event) == (sent.json()["id"], "webhook.test")
    assert service.request("DELETE", path).status_code == 204
    assert service.get("/v1/webhooks").json()["data"] == []


def test_a_webhook_to_this_machine_is_refused(service: Service) -> None:
    """With a pointer, as any other field."""
    assert "/url" in pointers(service.post("/v1/webhooks", json={"url": "https://127.0.0.1/x"}))
    assert "/events/0" in pointers(service.post("/v1/webhooks", json={"url": "https://e.example/", "events": ["job.born"]}))


def test_the_tenants_signing_secret_stays_the_same(service: Service) -> None:
    """And is the tenant's own."""
    secrets = [service.get("/v1/webhooks/secret").json()["secret"] for _ in range(2)]
    assert secrets[0] == secrets[1]
    assert secrets[0] != service.get("/v1/webhooks/secret", key=service.key("write", tenant="acme")).json()["secret"]


def test_metrics(service: Service) -> None:
    """They parse, count right, and name no job and no model."""
    running, queued = service.submit(), service.submit(priority=9)
    service.run(running, num_blocks=3)
    service.succeed(done := service.submit())
    service.column(done, started_at=100.0, finished_at=107.5, recoveries=2)
    worker = add_worker(service, seen_ago=999)
    with service.engine.begin() as connection:
        values = {"tenant": "default", "url": "https://e.example/", "event": "job.failed", "body": "{}", "created_at": 1.0}
        connection.execute(sa.insert(tables.deliveries).values(id="msg_1", status="dead", **values))
    answer = service.get("/metrics")
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    samples = {
        (sample.name, *sorted(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }
    assert samples["llmprune_jobs", "running"] == samples["llmprune_jobs", "succeeded"] == 1
    assert samples["llmprune_queue_depth", "9"] == 1
    assert 0 <= samples["llmprune_oldest_queued_seconds",] < 60
    assert samples["llmprune_job_duration_seconds_count", "succeeded"] == 1
    assert samples["llmprune_job_duration_seconds_sum", "succeeded"] == 7.5
    assert samples["llmprune_blocks_total",] == 6
    assert samples["llmprune_recoveries_total",] == 2
    assert samples["llmprune_webhook_failures_total",] == 1
    assert samples["llmprune_worker_up", "0", worker] == 0
    assert samples["llmprune_disk_free_bytes",] > 0
    assert "demo" not in answer.text
    assert not any(job_id in answer.text for job_id in (running, queued, done))
