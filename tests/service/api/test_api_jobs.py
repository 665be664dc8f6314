"""Submitting, listing, waiting, and the verbs, over HTTP."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from api_server import JOB, Server, Service, problem, wait_for

from llmprune_service.api.plan import Outcome, Planner, _outcome
from llmprune_service.ids import JOB_ID


def test_a_submission_is_accepted_and_can_be_found(service: Service) -> None:
    """202 with a Location; the config holds what was asked for and nothing else."""
    answer = service.post("/v1/jobs", json={**JOB, "priority": 7, "metadata": {"team": "nlp"}})
    job = answer.json()
    assert answer.status_code == 202
    assert JOB_ID.fullmatch(job["id"])
    assert answer.headers["location"] == f"/v1/jobs/{job['id']}"
    assert (job["status"], job["priority"], job["metadata"], job["config"]) == ("queued", 7, {"team": "nlp"}, JOB)
    assert service.get(answer.headers["location"]).json() == job


def test_an_empty_object_is_a_job(service: Service) -> None:
    """No model means the bundled one."""
    assert service.post("/v1/jobs", json={}).json()["model"] == "demo"


def test_the_same_idempotency_key_makes_one_job(service: Service) -> None:
    """Same body: the same job, and said so. Another body: refused."""
    headers = {"Idempotency-Key": "abc-1"}
    first = service.post("/v1/jobs", json=JOB, headers=headers)
    second = service.post("/v1/jobs", json=JOB, headers=headers)
    assert [answer.status_code for answer in (first, second)] == [202, 202]
    assert "idempotent-replayed" not in first.headers
    assert second.headers["idempotent-replayed"] == "true"
    assert first.json()["id"] == second.json()["id"]
    assert second.headers["location"] == first.headers["location"]
    problem(service.post("/v1/jobs", json={**JOB, "seed": 1}, headers=headers), 422, "idempotency-key-reused")
    assert len(service.get("/v1/jobs").json()["data"]) == 1


def test_idempotency_keys_are_of_one_tenant(service: Service) -> None:
    """Another tenant's equal key is another key."""
    headers = {"Idempotency-Key": "abc-1"}
    keys = [service.key("write", tenant=tenant) for tenant in ("acme", "rival")]
    jobs = {service.post("/v1/jobs", json=JOB, headers=headers, key=key).json()["id"] for key in keys}
    assert len(jobs) == 2


@pytest.mark.parametrize("key", ["", "a b", "x" * 256])
def test_a_strange_idempotency_key_is_refused(service: Service, key: str) -> None:
    """And named as what is wrong."""
    answer = service.post("/v1/jobs", json=JOB, headers={"Idempotency-Key": key})
    assert problem(answer, 422)["errors"][0]["parameter"] == "idempotency-key"


def test_pages_over_fifty_jobs_have_no_gaps_and_no_repeats(service: Service) -> None:
    """Newest first, however the jobs come in meanwhile."""
    submitted = [service.submit() for _ in range(50)]
    seen: list[str] = []
    after: str | None = None
    while True:
        page = service.get("/v1/jobs", params={"limit": 7} | ({"after": after} if after else {})).json()
        seen += [job["id"] for job in page["data"]]
        service.submit()  # newer than all pages to come
        after = page["next"]
        assert page["has_more"] == (after is not None)
        if after is None:
            break
    assert seen == submitted[::-1]


def test_lists_are_filtered(service: Service) -> None:
    """By status, model, method and metadata, all of which must match."""
    wanted = service.submit(method="magnitude", metadata={"team": "nlp", "run": "1"})
    other = service.submit(metadata={"team": "nlp"})
    service.jobs.cancel(None, other)

    def found(**query: str) -> set[str]:
        return {job["id"] for job in service.get("/v1/jobs", params=query).json()["data"]}

    assert found(**{"metadata[team]": "nlp"}) == {wanted, other}
    assert found(**{"metadata[team]": "nlp", "metadata[run]": "1"}) == {wanted}
    assert found(method="magnitude") == found(status="queued") == {wanted}
    assert found(model="demo") == {wanted, other}
    assert found(model="gpt2") == found(**{"metadata[team]": "vision"}) == set()


def test_an_unchanged_job_is_not_sent_again(service: Service) -> None:
    """The ETag names the state; it changes with everything that can be seen."""
    path = f"/v1/jobs/{service.submit()}"
    tag = service.get(path).headers["etag"]
    same = service.get(path, headers={"If-None-Match": f'"other", W/{tag}'})
    assert (same.status_code, same.content, same.headers["etag"]) == (304, b"", tag)
    service.request("PATCH", path, json={"metadata": {"a": "b"}})
    changed = service.get(path, headers={"If-None-Match": tag})
    assert changed.status_code == 200
    assert changed.headers["etag"] != tag


def test_a_long_poll_is_held_until_the_job_changes(server: Server) -> None:
    """And no longer: the answer is the changed job."""
    job_id = server.submit()
    timer = threading.Timer(0.5, server.claim, [job_id])
    timer.start()
    began = time.monotonic()
    answer = server.client.get(f"/v1/jobs/{job_id}", params={"wait": 20})
    assert 0.4 < time.monotonic() - began < 10
    assert answer.json()["status"] == "running"
    timer.join()


def test_a_long_poll_ends_with_its_time_and_never_waits_for_what_is_over(server: Server) -> None:
    """Nothing happened: 304 for who knows the state, 200 else; a finished job or an old ETag is answered at once."""
    path = f"/v1/jobs/{(job_id := server.submit())}"
    tag = server.client.get(path).headers["etag"]
    assert server.client.get(path, params={"wait": 0.2}, headers={"If-None-Match": tag}).status_code == 304
    assert server.client.get(path, params={"wait": 0.2}).status_code == 200
    server.jobs.cancel(None, job_id)
    began = time.monotonic()
    assert server.client.get(path, params={"wait": 20}, headers={"If-None-Match": tag}).status_code == 200
    tag = server.client.get(path, params={"wait": 20}).headers["etag"]
    assert server.client.get(path, params={"wait": 20}, headers={"If-None-Match": tag}).status_code == 304
    assert time.monotonic() - began < 15


def test_prefer_wait_holds_the_answer_to_a_submission(server: Server) -> None:
    """Until the job has ended, or for so long."""

    def end() -> None:
        while not (rows := server.jobs.list(None, status="queued")[0]):
            time.sleep(0.02)
        time.sleep(0.3)
        server.jobs.cancel(None, rows[0].id)

    thread = threading.Thread(target=end)
    thread.start()
    answer = server.client.post("/v1/jobs", json=JOB, headers={"Prefer": "respond-async, wait=20"})
    thread.join()
    assert (answer.status_code, answer.json()["status"]) == (202, "cancelled")
    assert answer.headers["preference-applied"] == "wait=20"
    late = server.client.post("/v1/jobs", json=JOB, headers={"Prefer": "wait=0"})
    assert late.json()["status"] == "queued"


def test_a_job_that_was_queued_is_answered_with_202_whatever_comes_after(make_server: Callable[..., Server]) -> None:
    """Too many held answers for this key: it is not held, but not refused either."""
    server = make_server(max_streams=0)
    answer = server.client.post("/v1/jobs", json=JOB, headers={"Prefer": "wait=20"})
    assert (answer.status_code, answer.json()["status"]) == (202, "queued")


def test_cancel_resume_and_retry(service: Service) -> None:
    """Cancel is idempotent; each verb says what it needs."""
    path = f"/v1/jobs/{(job_id := service.submit())}"
    assert "queued" in problem(service.post(f"{path}/resume"), 409, "conflict")["detail"]
    for _ in range(2):
        answer = service.post(f"{path}/cancel")
        assert (answer.status_code, answer.json()["status"], answer.headers["location"]) == (202, "cancelled", path)
    assert service.post(f"{path}/resume").json()["status"] == "queued"
    service.claim(job_id).fail("gpu_oom", "no memory")
    failed = service.get(path).json()
    assert failed["error"] == {"code": "gpu_oom", "message": "no memory"}
    problem(service.post(f"{path}/cancel"), 409)
    assert service.post(f"{path}/retry").json()["status"] == "queued"


def test_a_retry_from_the_start_forgets_the_blocks(service: Service) -> None:
    """One from the failed phase keeps them."""
    path = f"/v1/jobs/{(job_id := service.submit())}"
    service.run(job_id).fail("crash", "it crashed")
    assert [block["block"] for block in service.get(f"{path}/checkpoints").json()["data"]] == [0, 1, 2]
    service.post(f"{path}/retry", params={"from": "failed"})
    assert len(service.get(f"{path}/checkpoints").json()["data"]) == 3
    service.claim(job_id).fail("crash", "again")
    service.post(f"{path}/retry", params={"from": "start"})
    assert service.get(f"{path}/checkpoints").json()["data"] == []


def test_priority_can_be_changed_while_a_job_waits(service: Service) -> None:
    """Metadata always; null changes nothing."""
    path = f"/v1/jobs/{(job_id := service.submit())}"
    assert service.request("PATCH", path, json={"priority": 9}).json()["priority"] == 9
    service.claim(job_id)
    problem(service.request("PATCH", path, json={"priority": 1}), 409)
    changed = service.request("PATCH", path, json={"metadata": {"a": "b"}}).json()
    assert (changed["metadata"], changed["priority"]) == ({"a": "b"}, 9)


def test_a_finished_job_is_deleted_with_its_files(service: Service) -> None:
    """One that runs is not."""
    path = f"/v1/jobs/{(job_id := service.submit())}"
    problem(service.request("DELETE", path), 409)
    service.succeed(job_id)
    folder = service.settings.data_dir / "artifacts" / "default" / job_id
    assert folder.exists()
    gone = service.request("DELETE", path)
    assert (gone.status_code, gone.content) == (204, b"")
    problem(service.get(path), 404)
    assert not folder.exists()


def test_submissions_are_limited_per_tenant(make_service: Callable[..., Service]) -> None:
    """429 says when to come back; another tenant is not held up."""
    service = make_service(max_submissions_per_minute=2)
    answers = [service.post("/v1/jobs", json=JOB) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [202, 202, 429]
    problem(answers[-1], 429, "too-many-submissions")
    assert 1 <= int(answers[-1].headers["retry-after"]) <= 30
    assert service.post("/v1/jobs", json=JOB, key=service.key("write", tenant="acme")).status_code == 202


def test_queued_jobs_and_disk_are_limited(make_service: Callable[..., Service]) -> None:
    """429 for jobs, 507 for bytes; nothing is half-created."""
    service = make_service(max_queued=1)
    assert service.post("/v1/jobs", json=JOB).status_code == 202
    answer = service.post("/v1/jobs", json=JOB)
    problem(answer, 429, "too-many-jobs")
    assert answer.headers["retry-after"]
    assert len(service.get("/v1/jobs").json()["data"]) == 1


@pytest.mark.parametrize(
    ("setting", "code"), [({"tenant_quota_bytes": 1000}, "quota-exceeded"), ({"disk_floor_bytes": 2**60}, "disk-full")]
)
def test_a_full_host_takes_no_jobs(make_service: Callable[..., Service], setting: dict[str, int], code: str) -> None:
    """The tenant's quota and the disk's floor, before anything is queued."""
    service = make_service(**setting)
    problem(service.post("/v1/jobs", json=JOB), 507, code)
    assert service.get("/v1/jobs").json()["data"] == []


def test_the_report_has_no_path_of_the_worker(service: Service) -> None:
    """It is there once the job has succeeded."""
    path = f"/v1/jobs/{(job_id := service.submit())}"
    problem(service.get(f"{path}/report"), 404, "no-report")
    service.succeed(job_id)
    report = service.get(f"{path}/report")
    assert report.json()["schema_version"] == 1
    assert "/srv/secret" not in report.text


def test_the_methods_and_their_parameters(service: Service) -> None:
    """Enough to draw a form."""
    answer = service.get("/v1/methods").json()
    assert {"magnitude", "wanda", "sparsegpt"} <= {method["name"] for method in answer["data"]}
    properties = answer["config_schema"]["properties"]
    assert "sparsity" in properties
    assert properties["refine"]["enum"] == ["none", "icbs"] and properties["icbs_preset"]["enum"] == ["default", "paper"]


def test_a_refined_job_is_taken(service: Service) -> None:
    """Method icbs is stored as what it is; weights that a method changes cannot be refined."""
    job = service.post("/v1/jobs", json=JOB | {"method": "icbs", "icbs_passes": 3}).json()
    assert {name: job["config"][name] for name in ("method", "refine", "icbs_passes")} == {
        "method": "wanda", "refine": "icbs", "icbs_passes": 3,
    }  # fmt: skip
    refused = problem(service.post("/v1/jobs", json=JOB | {"method": "alps", "refine": "icbs"}), 422)
    assert "--reconstruct" in str(refused)


def test_the_pareto_front_is_of_one_text(service: Service) -> None:
    """A point is on the front if no other is as sparse and better; perplexities of other texts do not compare."""
    wanted = {
        (0.5, 20.0, "wikitext2"): True,
        (0.5, 25.0, "wikitext2"): False,
        (0.4, 21.0, "wikitext2"): False,
        (0.7, 40.0, "wikitext2"): True,
        (0.4, 90.0, "c4"): True,
        (0.6, "Infinity", "wikitext2"): False,
    }
    for sparsity, perplexity, text in wanted:
        service.succeed(service.submit(), sparsity=sparsity, perplexity_pruned=perplexity, text=text)
    service.submit()  # unfinished
    points = service.get("/v1/pareto", params={"model": "demo"}).json()["data"]
    found = {(point["sparsity"], point["text"], point["perplexity_pruned"]): point["on_front"] for point in points}
    expected = {(s, t, None if p == "Infinity" else p): front for (s, p, t), front in wanted.items()}
    assert found == expected
    assert service.get("/v1/pareto", params={"model": "gpt2"}).json()["data"] == []


def test_a_plan_is_made_in_another_process(service: Service) -> None:
    """For the bundled model, without queueing anything or leaving anything behind."""
    answer = service.post("/v1/jobs:validate", json={**JOB, "latency": False, "skip": ["*.down_proj"], "export": "packed"})
    assert answer.status_code == 200, answer.text
    plan = answer.json()
    assert (plan["model"], plan["revision"], plan["warnings"]) == ("demo", None, [])
    assert plan["weights_bytes"] > 10**6
    assert (plan["plan"]["config"]["skip"], plan["plan"]["config"]["export"]) == (["*.down_proj"], "packed")
    assert service.get("/v1/jobs").json()["data"] == []
    assert list(service.settings.data_dir.glob("plan-*")) == []


def test_a_plan_that_cannot_be_made_is_a_warning_without_paths() -> None:
    """What the library says, wherever it lies; and a plan that does not fit is still shown."""
    refused = _outcome(2, b"", "Starting\nError: '/srv/hub/models--x' has\nno config.json.\n")
    assert (refused.plan, refused.warning) == (None, "No plan: '...' has no config.json.")
    crashed = _outcome(1, b"", "Traceback (most recent call last):\n  File '/srv/x.py'\nModuleNotFoundError: torch")
    assert crashed.plan is None
    assert crashed.warning is not None and "/srv" not in crashed.warning
    tight = _outcome(2, b'{"problems": ["/srv has no room."]}', "Error: /srv has no room.")
    assert (tight.plan, tight.warning) == ({"problems": ["... has no room."]}, "This host cannot run it: ... has no room.")


def test_only_two_plans_are_made_at_a_time(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is a process of hundreds of megabytes."""
    gate = threading.Event()
    monkeypatch.setattr(Planner, "_run", lambda *_: gate.wait(20) and Outcome(None, "late"))
    planner: Planner = service.app.state.planner
    with ThreadPoolExecutor() as pool:
        held = [pool.submit(service.post, "/v1/jobs:validate", json=JOB) for _ in range(2)]
        wait_for(lambda: planner._running == 2, "the plans did not begin")
        answer = service.post("/v1/jobs:validate", json=JOB)
        gate.set()
    problem(answer, 429, "too-many-plans")
    assert answer.headers["retry-after"]
    assert [future.result().json()["warnings"] for future in held] == [["late"]] * 2
