"""Sweeps over HTTP: submitting, extending, comparing, and the verbs."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from typing import Any, get_args

import pytest
from api_server import Service, pointers, problem

from llmprune.io.pareto import AXES
from llmprune_service.schemas import AxisName

SWEEP = {
    "base": {"num_samples": 8},
    "methods": ["wanda", "magnitude"],
    "patterns": ["unstructured", "2:4"],
    "sparsities": [0.5, 0.6],
}
NAMES = ["wanda-0.5", "wanda-0.6", "wanda-2-4", "magnitude-0.5", "magnitude-0.6", "magnitude-2-4"]


def submit(service: Service, key: str | None = None, **fields: Any) -> dict[str, Any]:
    """A new sweep."""
    answer = service.post("/v1/sweeps", json={**SWEEP, **fields}, key=key)
    assert answer.status_code == 202, answer.text
    sweep: dict[str, Any] = answer.json()
    return sweep


def points(service: Service, sweep: dict[str, Any], **query: str) -> list[dict[str, Any]]:
    """The points of a sweep."""
    data: list[dict[str, Any]] = service.get(f"/v1/sweeps/{sweep['id']}/points", params=query).json()["data"]
    return data


def job_of(service: Service, sweep: dict[str, Any], name: str) -> str:
    """Id of a point's job."""
    return next(str(point["job_id"]) for point in points(service, sweep) if point["name"] == name)


def test_a_sweep_is_queued_as_ordinary_jobs(service: Service) -> None:
    """One for each combination, with the submission's own fields; each can be opened, and the list filters them."""
    other = service.submit()
    answer = service.post("/v1/sweeps", json={**SWEEP, "priority": 7, "metadata": {"team": "nlp"}})
    sweep = answer.json()
    assert (answer.status_code, answer.headers["location"]) == (202, f"/v1/sweeps/{sweep['id']}")
    assert (sweep["status"], sweep["num_points"], sweep["counts"]) == ("queued", 6, {"queued": 6})
    assert (sweep["model"], sweep["priority"], sweep["metadata"], sweep["config"]) == ("demo", 7, {"team": "nlp"}, SWEEP)
    listed = points(service, sweep)
    assert [point["name"] for point in listed] == NAMES
    jobs = [service.get(point["links"]["job"]).json() for point in listed]
    assert all((job["sweep_id"], job["kind"], job["priority"]) == (sweep["id"], "prune", 7) for job in jobs)
    assert [job["point"] for job in jobs] == NAMES and all(job["links"]["sweep"] == sweep["links"]["self"] for job in jobs)
    assert jobs[2]["config"] == {"num_samples": 8, "method": "wanda", "pattern": "2:4", "sparsity": 0.5, "sequential": "none"}
    filtered = service.get(sweep["links"]["jobs"]).json()["data"]
    assert {job["id"] for job in filtered} == {job["id"] for job in jobs}
    assert service.get(f"/v1/jobs/{other}").json()["sweep_id"] is None
    assert service.get(sweep["links"]["self"]).json() == sweep


def test_the_same_idempotency_key_makes_one_sweep(service: Service) -> None:
    """Another body, or a job, with the same key is refused."""
    headers = {"Idempotency-Key": "abc-1"}
    first, second = (service.post("/v1/sweeps", json=SWEEP, headers=headers) for _ in range(2))
    assert first.json() == second.json() and second.headers["idempotent-replayed"] == "true"
    problem(service.post("/v1/sweeps", json={**SWEEP, "methods": "wanda"}, headers=headers), 422, "idempotency-key-reused")
    problem(service.post("/v1/jobs", json={}, headers=headers), 422, "idempotency-key-reused")
    assert len(service.get("/v1/jobs").json()["data"]) == 6


@pytest.mark.parametrize(
    ("body", "detail"),
    [
        ({}, "a sweep of nothing"),
        ({"methods": ["wanda", "wanda"]}, "methods names wanda twice"),
        ({"methods": ["flap"], "patterns": ["2:4"]}, "2:4"),
    ],
)
def test_a_sweep_that_makes_no_sense_is_refused(service: Service, body: dict[str, Any], detail: str) -> None:
    """With what to do instead; nothing is queued."""
    assert detail in problem(service.post("/v1/sweeps", json=body), 422)["detail"]
    assert service.get("/v1/jobs").json()["data"] == service.get("/v1/sweeps").json()["data"] == []


@pytest.mark.parametrize(
    ("fields", "pointer"),
    [
        ({"methods": ["wanda", "wonder"]}, "/methods"),
        ({"base": {"model": "../etc"}}, "/base/model"),
        ({"base": {"method": "wonder"}, "methods": []}, "/base/method"),
        ({"base": {"sparsety": 0.5}}, "/base/sparsety"),
        ({"timeout_s": 10**8}, "/timeout_s"),
        ({"sparsity": 0.5}, "/sparsity"),
        ({"sparsities": [1.5]}, "/sparsities/0"),
    ],
)
def test_what_is_wrong_is_pointed_at(service: Service, fields: dict[str, Any], pointer: str) -> None:
    """Where it stands in the sweep: an axis, the base, or beside them."""
    assert list(pointers(service.post("/v1/sweeps", json={**SWEEP, **fields}))) == [pointer]


def test_the_number_of_points_is_limited(make_service: Callable[..., Service]) -> None:
    """The problem names the limit, for a sweep, for one that is extended, and for one that would take for ever to lay out."""
    service = make_service(max_sweep_points=6)
    for body in (
        {**SWEEP, "sparsities": [0.5, 0.6, 0.7]},
        {"sparsities": [n / 1000 for n in range(100)], "methods": ["wanda"]},
    ):
        refused = problem(service.post("/v1/sweeps", json=body), 422, "too-many-points")
        assert "at most 6 points" in refused["detail"] and "LLMPRUNE_MAX_SWEEP_POINTS" in refused["detail"]
    sweep = submit(service)
    path = f"/v1/sweeps/{sweep['id']}/points"
    problem(service.post(path, json={"sparsities": [0.7]}), 422, "too-many-points")
    assert service.get(sweep["links"]["self"]).json() == sweep


@pytest.mark.parametrize(
    ("settings", "status", "code"),
    [
        ({"max_queued": 6, "max_sweep_points": 6}, 429, "too-many-jobs"),
        ({"max_queued": 5}, 422, "too-many-points"),
        ({"tenant_quota_bytes": 20 * 2**20}, 507, "quota-exceeded"),
        ({"disk_floor_bytes": 2**60}, 507, "disk-full"),
    ],
)
def test_a_sweep_is_queued_whole_or_not(
    make_service: Callable[..., Service], settings: dict[str, int], status: int, code: str
) -> None:
    """Limits are those of its jobs together."""
    service = make_service(**settings)
    before = service.submit()
    problem(service.post("/v1/sweeps", json=SWEEP), status, code)
    assert [job["id"] for job in service.get("/v1/jobs").json()["data"]] == [before]
    assert service.get("/v1/sweeps").json()["data"] == []


def test_a_sweep_is_extended(service: Service) -> None:
    """Axes that are left out have their values; what is there stays as it is, so that repeating it changes nothing."""
    sweep = submit(service, methods=["wanda"], metadata={"team": "nlp"})
    service.jobs.cancel(None, job_of(service, sweep, "wanda-0.5"))
    path = f"/v1/sweeps/{sweep['id']}/points"
    first = service.post(path, json={"sparsities": [0.7, 0.5]})
    assert first.status_code == 202, first.text
    assert (first.json()["added"], first.json()["known"]) == (["wanda-0.7"], ["wanda-0.5", "wanda-2-4"])
    again = service.post(path, json={"sparsities": [0.7, 0.5]}).json()
    assert (again["added"], again["sweep"]["num_points"]) == ([], 4)
    assert again["sweep"]["config"]["sparsities"] == [0.5, 0.6, 0.7]
    assert again["sweep"]["counts"] == {"cancelled": 1, "queued": 3}
    owl = service.post(path, json={"allocations": ["owl"], "patterns": ["unstructured"]}).json()
    assert owl["added"] == ["wanda-0.5-owl", "wanda-0.6-owl", "wanda-0.7-owl"]
    assert owl["sweep"]["config"]["allocations"] == ["uniform", "owl"]
    assert [point["name"] for point in points(service, sweep)][:4] == ["wanda-0.5", "wanda-0.6", "wanda-2-4", "wanda-0.7"]
    assert service.get(f"/v1/jobs/{job_of(service, sweep, 'wanda-0.7-owl')}").json()["metadata"] == {"team": "nlp"}
    assert "nothing to add" in problem(service.post(path, json={}), 422)["detail"]
    assert list(pointers(service.post(path, json={"methods": ["wonder"]}))) == ["/methods"]


def test_points_are_compared(service: Service) -> None:
    """By what their reports say; those that have not succeeded are there, without values."""
    sweep = submit(service, methods=["wanda"], patterns=["unstructured"], sparsities=[0.5, 0.6, 0.7, 0.8])
    jobs = [point["job_id"] for point in points(service, sweep)]
    service.succeed(jobs[0], values={"sparsity": 0.5, "perplexity": 21.0, "bytes": 10.0})
    service.succeed(jobs[1], sparsity=0.6, perplexity_pruned="Infinity")
    service.claim(jobs[2]).fail("out_of_memory", "no memory")
    assert service.get(sweep["links"]["self"]).json()["status"] == "running"
    found = service.get(sweep["links"]["points"]).json()
    assert (found["x"], found["y"], found["differing"]) == ("sparsity", "perplexity", ["sparsity"])
    assert [point["status"] for point in found["data"]] == ["succeeded", "succeeded", "failed", "queued"]
    assert [point["on_front"] for point in found["data"]] == [True, False, False, False]
    assert found["data"][0]["values"] == {"perplexity": 21.0, "sparsity": 0.5, "bytes": 10.0}
    assert (found["data"][1]["values"]["perplexity"], found["data"][3]["values"]) == (None, {})
    assert found["data"][2]["error"] == {"code": "out_of_memory", "message": "no memory"}
    assert any("not finite" in note for note in found["notes"])
    by_size = service.get(sweep["links"]["points"], params={"x": "bytes", "y": "sparsity"}).json()
    assert (by_size["x"], by_size["y"]) == ("bytes", "sparsity")
    problem(service.get(sweep["links"]["points"], params={"x": "beauty"}), 422)

    answer = service.get(sweep["links"]["csv"])
    assert answer.headers["content-type"] == "text/csv; charset=utf-8"
    assert answer.headers["content-disposition"] == f'attachment; filename="{sweep["id"]}.csv"'
    lines = list(csv.DictReader(io.StringIO(answer.text)))
    assert [line["job_id"] for line in lines] == jobs
    assert (lines[0]["front"], lines[0]["perplexity"], lines[1]["perplexity"]) == ("1", "21.0", "inf")
    assert (lines[2]["error"], lines[3]["target_sparsity"]) == ("out_of_memory: no memory", "0.8")

    plot = service.get(sweep["links"]["plot"])
    assert plot.headers["content-type"] == "image/svg+xml"
    assert plot.text.startswith("<svg") and f'href="/ui/jobs/{jobs[0]}"' in plot.text and jobs[3] not in plot.text


def test_every_axis_of_a_plot_has_its_name() -> None:
    """Those of the library."""
    assert get_args(AxisName) == tuple(AXES)


def test_a_sweep_is_cancelled_resumed_and_retried(service: Service) -> None:
    """Its jobs are, those that can be; where there are none, it says so."""
    sweep = submit(service, methods=["wanda"], patterns=["unstructured"], sparsities=[0.5, 0.6, 0.7])
    path, jobs = f"/v1/sweeps/{sweep['id']}", [point["job_id"] for point in points(service, sweep)]
    assert "none of its jobs is failed" in problem(service.post(f"{path}/retry"), 409, "conflict")["detail"]
    service.succeed(jobs[0])
    running = service.claim(jobs[1])
    for _ in range(2):
        answer = service.post(f"{path}/cancel")
        assert (answer.status_code, answer.headers["location"]) == (202, path)
        assert answer.json()["counts"] == {"succeeded": 1, "cancelling": 1, "cancelled": 1}
    problem(service.request("DELETE", path), 409)
    running.cancelled()
    ended = service.get(path).json()
    assert ended["status"] == "cancelled" and ended["finished_at"] is not None
    assert service.post(f"{path}/cancel").status_code == 202
    resumed = service.post(f"{path}/resume").json()
    assert (resumed["status"], resumed["counts"], resumed["finished_at"]) == ("running", {"succeeded": 1, "queued": 2}, None)
    problem(service.post(f"{path}/resume"), 409, "conflict")
    service.claim(jobs[1]).fail("gpu_oom", "no memory")
    service.succeed(jobs[2])
    assert service.get(path).json()["status"] == "failed"
    assert service.post(f"{path}/retry").json()["counts"] == {"succeeded": 2, "queued": 1}
    service.succeed(jobs[1])
    assert service.get(path).json()["status"] == "succeeded"
    problem(service.post(f"{path}/cancel"), 409, "conflict")


def test_a_sweep_is_deleted_with_its_jobs(service: Service) -> None:
    """And their files; a key that made it can be used again."""
    key = {"Idempotency-Key": "abc-1"}
    sweep = service.post("/v1/sweeps", json={"methods": ["wanda", "magnitude"]}, headers=key).json()
    jobs = [point["job_id"] for point in points(service, sweep)]
    problem(service.request("DELETE", sweep["links"]["self"]), 409)
    for job_id in jobs:
        service.succeed(job_id)
    gone = service.request("DELETE", sweep["links"]["self"])
    assert (gone.status_code, gone.content) == (204, b"")
    for path in (sweep["links"]["self"], *(f"/v1/jobs/{job_id}" for job_id in jobs)):
        problem(service.get(path), 404)
    assert list((service.settings.data_dir / "artifacts" / "default").iterdir()) == []
    assert service.post("/v1/sweeps", json={"methods": ["wanda"]}, headers=key).status_code == 202


def test_a_sweep_goes_with_its_last_job(service: Service) -> None:
    """Jobs are deleted one by one too, by who looks at them and by the time they are kept."""
    sweep = submit(service, methods=["wanda"], sparsities=[0.5], patterns=["unstructured", "2:4"])
    first, last = (point["job_id"] for point in points(service, sweep))
    for job_id in (first, last):
        service.jobs.cancel(None, job_id)
    service.jobs.delete("default", first)
    assert service.get(sweep["links"]["self"]).json()["num_points"] == 1
    assert service.post(sweep["links"]["points"], json={"sparsities": [0.5, 0.7]}).json()["added"] == ["wanda-0.5", "wanda-0.7"]
    service.post(f"{sweep['links']['self']}/cancel")
    for point in points(service, sweep):
        service.jobs.delete("default", point["job_id"])
    problem(service.get(sweep["links"]["self"]), 404)


def test_sweeps_are_listed_and_of_one_tenant(service: Service) -> None:
    """Newest first, in pages; another tenant's are not found."""
    acme, rival = service.key("read", "write", tenant="acme"), service.key("read", "write", tenant="rival")
    mine = [submit(service, key=acme, methods=["wanda"])["id"] for _ in range(3)]
    page = service.get("/v1/sweeps", key=acme, params={"limit": 2}).json()
    assert ([sweep["id"] for sweep in page["data"]], page["next"]) == (mine[:0:-1], mine[1])
    rest = service.get("/v1/sweeps", key=acme, params={"after": page["next"]}).json()
    assert ([sweep["id"] for sweep in rest["data"]], rest["has_more"]) == (mine[:1], False)
    assert service.get("/v1/sweeps", key=rival).json()["data"] == []
    path = f"/v1/sweeps/{mine[0]}"
    for asked in ("GET ", "DELETE ", "POST /cancel", "POST /resume", "POST /retry", "GET /points", "GET /points.csv"):
        method, end = asked.split(" ")
        problem(service.request(method, path + end, key=rival), 404)
    problem(service.post(f"{path}/points", key=rival, json={"sparsities": [0.1]}), 404)
    problem(service.get("/v1/sweeps/sweep_1"), 404)
    assert service.get("/v1/jobs", key=rival, params={"sweep": mine[0]}).json()["data"] == []


def test_an_unchanged_sweep_is_not_sent_again(service: Service) -> None:
    """The ETag changes with the state of its jobs."""
    sweep = submit(service, methods=["wanda"])
    tag = service.get(sweep["links"]["self"]).headers["etag"]
    assert service.get(sweep["links"]["self"], headers={"If-None-Match": tag}).status_code == 304
    service.jobs.cancel(None, job_of(service, sweep, "wanda-2-4"))
    assert service.get(sweep["links"]["self"], headers={"If-None-Match": tag}).status_code == 200
