"""The pages, on the real application with SQLite: what they show, what their forms do, and what they never let through."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
import time
from html import unescape
from pathlib import Path

import pytest
import sqlalchemy as sa
from pages_kit import EVIL, OWN, SHA, Checker, Pages, begin, serving, succeed

from llmprune.report import Report
from llmprune_service import tables
from llmprune_service.api import auth
from llmprune_service.api.html import FOLDER
from llmprune_service.schemas import ApiKeyRequest
from reports import sample_report

STATIC = FOLDER / "static"
SWAGGER = STATIC / "vendor" / "swagger-ui"


# What is on the pages -------------------------------------------------------------------------------------------------


def test_an_empty_list_says_how_to_submit(pages: Pages) -> None:
    """The first visit shows a form and two commands."""
    text = pages.get("/")
    assert "No jobs yet." in text
    assert "curl http://testserver/v1/jobs" in text
    assert "llmprune submit demo" in text


def test_list_shows_newest_first_and_filters(pages: Pages) -> None:
    """Status as text, model, method, target, progress; the filter leaves the others out."""
    pages.submit(model="org/old", method="magnitude", sparsity=0.625)
    begin(pages.jobs, pages.submit(model="org/new", pattern="2:4"))
    text = pages.get("/")
    assert text.index("org/new") < text.index("org/old")
    assert 'class="badge running">running<' in text
    assert 'value="50.0"' in text
    assert "62.5 % unstructured" in text
    queued = pages.get("/?status=queued")
    assert "org/old" in queued
    assert "org/new" not in queued
    assert "No failed jobs." in pages.get("/?status=failed")


def test_list_pages_of_fifty(pages: Pages) -> None:
    """The link leads to the rest, with the filter kept."""
    for number in range(51):
        pages.submit(model=f"org/m{number}")
    first = pages.get("/?status=queued")
    assert len(re.findall('href="/ui/jobs/', first)) == 50
    link = re.search(r'rel="next" href="([^"]+)"', first)
    assert link is not None
    second = pages.get(link[1].replace("&amp;", "&"))
    assert re.findall(r"org/m\d+", second) == ["org/m0"]


def test_unknown_status_is_refused(pages: Pages) -> None:
    """The error page names those that are."""
    text = pages.get("/?status=%3Cb%3E", status=422)
    assert "use one of queued, running" in text
    assert "<b>" not in text


@pytest.mark.parametrize(
    ("status", "verbs"),
    [
        ("queued", ["cancel"]),
        ("running", ["cancel"]),
        ("cancelling", []),
        ("succeeded", ["delete"]),
        ("failed", ["retry", "restart", "delete"]),
        ("cancelled", ["resume", "delete"]),
    ],
)
def test_buttons_fit_the_state(pages: Pages, status: str, verbs: list[str]) -> None:
    """What cannot be done is not offered; and only a job under way is followed or reloaded."""
    row = pages.job_in(status)
    text = pages.get(f"/ui/jobs/{row.id}")
    assert f'class="badge {status}">{status}<' in text
    assert re.findall(rf'action="/ui/jobs/{row.id}/(\w+)"', text) == verbs
    live = status in ("queued", "running", "cancelling")
    assert (f'data-events="/v1/jobs/{row.id}/events?after={row.last_seq}"' in text) == live
    assert ('<noscript><meta http-equiv="refresh"' in text) == live


def test_running_job_shows_where_it_is(pages: Pages) -> None:
    """The current phase is marked, the bar and the blocks are counted, the time left is there."""
    text = pages.get(f"/ui/jobs/{pages.job_in('running').id}")
    phases = re.findall(r'<li class="(\w+)"(?: aria-current="(\w+)")?>(\w+)<', text)
    done = [("done", "", "resolve"), ("done", "", "fetch")]
    assert phases[:4] == [*done, ("current", "step", "prune"), ("waiting", "", "evaluate")]
    assert re.search(r'<progress id="stage" max="4" value="2"', text)
    assert "2 of 4" in text
    assert re.search(r"Left of this stage</dt><dd>1\d\.\d s<", text)
    assert "Block 2 of 4, model.layers.1: 50.00 % zeros, output error 0.0100, 1.5 s" in text


def test_event_log_holds_the_newest_hundred(pages: Pages) -> None:
    """Newest first; progress is left to the bar."""
    execution = begin(pages.jobs, pages.submit())
    for number in range(120):
        execution.say("job.log", {"level": "warning", "message": f"message {number}"})
        execution.say("job.progress", {"stage": "prune", "done": 1, "total": 2, "detail": "windows"})
    execution.flush()
    text = pages.get(f"/ui/jobs/{execution.job.id}")
    assert re.findall(r"Warning: message (\d+)", text) == [str(number) for number in range(119, 19, -1)]
    assert "windows" not in text


def test_failed_job_shows_error_and_remedy(pages: Pages) -> None:
    """As an alert; the phase is marked as the one that failed."""
    text = pages.get(f"/ui/jobs/{pages.job_in('failed').id}")
    assert re.search(r'role="alert"><strong>out_of_memory</strong><p>The device is full. Lower batch_size.<', text)
    assert '<li class="failed">prune' in text


def test_finished_job_shows_numbers_and_files(pages: Pages) -> None:
    """The headline, the verdict, the report's link, every file with size, digest and link."""
    row = pages.job_in("succeeded")
    text = pages.get(f"/ui/jobs/{row.id}")
    for figure in (
        "16.21 → 21.94",
        "1.35x on wikitext2",
        "0.291",
        "50.01 %",
        "2.00 MiB",
        "dense 3.00 MiB",
        "71.0 → 142.0",
        "2.00x",
    ):
        assert figure in text, figure
    assert 'class="verdict degraded"><strong>Degraded but usable</strong>' in text
    assert f'href="/v1/jobs/{row.id}/report.html"' in text
    assert f'download href="/v1/jobs/{row.id}/artifacts/model.safetensors"' in text
    assert SHA in text
    assert "2.00 KiB" in text
    assert "Perplexity 16.21 → 21.94 (1.35x)" in pages.get("/")


def test_broken_and_unevaluated_results_have_pages(pages: Pages) -> None:
    """JSON holds an infinite perplexity as a string; without an evaluation there is none."""
    row = pages.submit()
    succeed(begin(pages.jobs, row), perplexity_pruned="Infinity", ratio="Infinity", kl="NaN", verdict="broken")
    text = pages.get(f"/ui/jobs/{row.id}")
    assert "16.21 → not finite" in text
    row = pages.submit()
    numbers = dict.fromkeys(("text", "perplexity_dense", "perplexity_pruned", "ratio", "kl", "top1_agreement"))
    succeed(begin(pages.jobs, row), **numbers, decode_tokens_per_second=None, verdict="unmeasured")
    text = pages.get(f"/ui/jobs/{row.id}")
    assert "KL from dense" not in text
    assert "50.01 % zeros, not evaluated" in pages.get("/")


def test_commands_reproduce_the_job(pages: Pages) -> None:
    """A shell reads from the page the very configuration, quotes and all, pinned to the commit."""
    skip = ("*.down_proj", 'it\'s $(touch /tmp/x) `y` \\ "z"')
    row = pages.submit(model="org/model", skip=skip, pattern="2:4", eval=(), latency=False, seed=7, priority=8)
    with pages.jobs.engine.begin() as connection:
        connection.execute(sa.update(tables.jobs).values(revision="c0ffee"))
    blocks = preformatted(pages.get(f"/ui/jobs/{row.id}"))
    words = shlex.split(blocks[0])
    assert words[:2] == ["curl", "http://testserver/v1/jobs"]
    body = json.loads(words[words.index("-d") + 1])
    assert body == row.config | {"revision": "c0ffee", "priority": 8}
    submit = shlex.split(blocks[1])
    assert submit[:3] == ["llmprune", "submit", "org/model"]
    assert {f"--skip={glob}" for glob in skip} | {
        "--pattern=2:4",
        "--no-eval",
        "--no-latency",
        "--seed=7",
        "--priority=8",
    } <= set(submit)


def test_invalid_configuration_still_has_a_page(pages: Pages) -> None:
    """A row from elsewhere may hold what no version accepts: the command line is left out."""
    row = pages.submit()
    with pages.jobs.engine.begin() as connection:
        connection.execute(sa.update(tables.jobs).values(config={"model": "demo", "sparsity": 7, "unknown": 1}))
    assert len(preformatted(pages.get(f"/ui/jobs/{row.id}"))) == 1


def test_workers_are_listed_for_administrators(pages: Pages) -> None:
    """Status, device and the job in hand; an explanation where there are none."""
    assert "llmprune worker" in pages.get("/ui/workers")
    row = pages.job_in("running")
    common = {"pid": 1, "slot": 0, "version": "1", "started_at": time.time() - 7300, "host": "gpu-7"}
    workers = [
        {**common, "id": "worker_a", "device": "NVIDIA H200", "job_id": row.id, "seen_at": time.time()},
        {**common, "id": "worker_b", "device": "cpu", "job_id": None, "seen_at": 0},
    ]
    with pages.jobs.engine.begin() as connection:
        connection.execute(sa.insert(tables.workers), workers)
    text = pages.get("/ui/workers")
    assert re.search(rf"busy</span>.*worker_a.*gpu-7.*NVIDIA H200.*{row.id}.*2 h ago", text)
    assert re.search(r"lost</span>.*worker_b", text)


# Forms ----------------------------------------------------------------------------------------------------------------


def test_submit_form_makes_the_job(pages: Pages) -> None:
    """Empty fields take the defaults; the browser goes to the job."""
    answer = pages.post("/ui/jobs", model="", method="sparsegpt", pattern="", sparsity="0.625", calibration=" synthetic ")
    assert answer.status_code == 303
    (row,) = pages.jobs.list("default")[0]
    assert answer.headers["location"] == f"/ui/jobs/{row.id}"
    assert row.config == {"method": "sparsegpt", "sparsity": 0.625, "calibration": "synthetic"}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"sparsity": "1.5"}, ["<code>sparsity</code>", "less than 1"]),
        ({"sparsity": "x"}, ["<code>sparsity</code>", "valid number"]),
        ({"pattern": "2:4", "sparsity": "0.7"}, ["pattern 2:4 means sparsity 0.5"]),
        ({"method": "wandaa"}, ["<code>method</code>", "Did you mean"]),
        ({"model": f"x/{EVIL}"}, ["<code>model</code>", "x/&lt;script&gt;"]),
        ({"calibration": "/etc/passwd"}, ["<code>calibration</code>"]),
    ],
)
def test_submit_form_keeps_what_was_wrong(pages: Pages, fields: dict[str, str], words: list[str]) -> None:
    """422 with the field, what is allowed, and the values as they were typed; nothing is queued."""
    answer = pages.post("/ui/jobs", **({"method": "wanda"} | fields))
    assert answer.status_code == 422
    assert 'role="alert"' in answer.text
    for word in words:
        assert word in answer.text, word
    for value in fields.values():
        assert value in answer.text or "<" in value
    assert "<script>alert" not in answer.text
    assert pages.jobs.list("default")[0] == []


def test_form_of_many_fields_or_bytes_is_read(pages: Pages) -> None:
    """What is not a field of ours is left alone, and what is no text does no harm."""
    headers = {"Content-Type": "application/x-www-form-urlencoded"}
    body = b"&".join([b"x=1"] * 1000) + b"&model=%ff%00\xff"
    answer = pages.client.post("/ui/jobs", content=body, headers=headers)
    assert answer.status_code == 422
    assert "<code>model</code>" in answer.text


def test_too_many_submissions_are_told_when(tmp_path: Path) -> None:
    """The API's limits hold for the form: 429 with Retry-After, on the page."""
    with serving(tmp_path, allowed_hosts=("testserver",), max_submissions_per_minute=1) as pages:
        assert pages.post("/ui/jobs").status_code == 303
        answer = pages.post("/ui/jobs")
    assert answer.status_code == 429
    assert int(answer.headers["retry-after"]) > 0
    assert "At most 1 submissions a minute" in answer.text


@pytest.mark.parametrize(
    ("before", "verb", "after"),
    [
        ("queued", "cancel", "cancelled"),
        ("running", "cancel", "cancelling"),
        ("cancelled", "resume", "queued"),
        ("failed", "retry", "queued"),
        ("failed", "restart", "queued"),
    ],
)
def test_buttons_change_the_job(pages: Pages, before: str, verb: str, after: str) -> None:
    """Each verb leads back to the job; a restart forgets the finished blocks."""
    row = pages.job_in(before)
    answer = pages.post(f"/ui/jobs/{row.id}/{verb}")
    assert (answer.status_code, answer.headers["location"]) == (303, f"/ui/jobs/{row.id}")
    assert pages.jobs.get("default", row.id).status == after
    assert len(pages.jobs.blocks("default", row.id)) == (2 if before in ("running", "failed") and verb != "restart" else 0)


def test_delete_leads_back_to_the_list(pages: Pages) -> None:
    """The job is gone afterwards; its page is a 404 for people."""
    row = pages.job_in("failed")
    answer = pages.post(f"/ui/jobs/{row.id}/delete")
    assert (answer.status_code, answer.headers["location"]) == (303, "/")
    assert "There is no such job." in pages.get(f"/ui/jobs/{row.id}", status=404)


def test_impossible_verb_is_a_page_for_people_and_json_for_programs(pages: Pages) -> None:
    """The same problem in the form the client takes."""
    row = pages.job_in("succeeded")
    answer = pages.post(f"/ui/jobs/{row.id}/cancel")
    assert answer.status_code == 409
    assert "<h1>Conflict</h1>" in answer.text
    assert "The job is succeeded" in answer.text
    answer = pages.client.post(f"/ui/jobs/{row.id}/cancel", headers={"Accept": "application/json"})
    assert answer.status_code == 409
    assert answer.json()["detail"].startswith("The job is succeeded")


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Origin": ""},
        {"Origin": OWN, "Sec-Fetch-Site": "cross-site"},
        {"Origin": OWN, "Sec-Fetch-Site": "same-site"},
    ],
)
@pytest.mark.parametrize("path", ["/ui/jobs", "/login", "/logout", "/ui/jobs/{id}/cancel"])
def test_forms_of_other_sites_are_refused(pages: Pages, path: str, headers: dict[str, str]) -> None:
    """403, and nothing is changed."""
    row = pages.submit()
    answer = pages.client.post(path.format(id=row.id), headers=headers, follow_redirects=False)
    assert answer.status_code == 403
    assert [job.status for job in pages.jobs.list("default")[0]] == ["queued"]


# Signing in -----------------------------------------------------------------------------------------------------------


def sign_in(pages: Pages, key: str) -> None:
    """Through the form; the test server is plain http."""
    answer = pages.post("/login", key=key)
    assert (answer.status_code, answer.headers["location"]) == (303, "/")


@pytest.mark.parametrize("path", ["/", "/ui/jobs/job_" + "0" * 26, "/ui/workers", "/docs"])
def test_who_is_not_signed_in_is_asked_to(guarded: Pages, path: str) -> None:
    """People get the form, programs the problem."""
    answer = guarded.client.get(path, follow_redirects=False)
    assert (answer.status_code, answer.headers["location"]) == (303, "/login")
    assert guarded.client.get(path, headers={"Accept": "*/*"}).status_code == 401
    text = guarded.get("/login")
    assert 'name="key" type="password"' in text


def test_key_opens_a_session_and_signing_out_ends_it(guarded: Pages) -> None:
    """The cookie is out of reach of scripts and of other sites; the key is not in it."""
    key = guarded.settings.key_file.read_text().strip()
    answer = guarded.post("/login", key=f"  {key} ")
    cookie = answer.headers["set-cookie"]
    for attribute in ("HttpOnly", "SameSite=strict", "Path=/"):
        assert attribute in cookie
    assert key not in cookie
    assert "Sign out" in guarded.get("/")
    value = guarded.client.cookies[auth.COOKIE]
    assert guarded.post("/logout").headers["location"] == "/login"
    guarded.client.cookies.set(auth.COOKIE, value)
    guarded.state.credentials = auth.Credentials(guarded.state.engine)  # forgets whom it saw a moment ago
    assert guarded.client.get("/", follow_redirects=False).status_code == 303


@pytest.mark.parametrize("key", ["", "prn_x", "prn_" + "0" * 26 + "_" + "a" * 43])
def test_wrong_key_is_refused(guarded: Pages, key: str) -> None:
    """401 with the form again, and no cookie."""
    answer = guarded.post("/login", key=key)
    assert answer.status_code == 401
    assert "This key is not valid here." in answer.text
    assert "set-cookie" not in answer.headers
    if key:
        assert key not in answer.text


def test_login_code_works_once(guarded: Pages) -> None:
    """The link that `llmprune serve` prints."""
    code = auth.login_code(guarded.state.engine, guarded.settings)
    answer = guarded.client.get(f"/login?code={code}", follow_redirects=False)
    assert (answer.status_code, answer.headers["location"]) == (303, "/")
    assert "Jobs" in guarded.get("/")
    text = guarded.get(f"/login?code={code}", status=401)
    assert "was used or is too old" in text
    assert code not in text


def test_reader_sees_its_tenants_jobs_only_and_no_buttons(guarded: Pages) -> None:
    """Other tenants' jobs are not found, nothing can be changed, and workers are not shown."""
    request = ApiKeyRequest(tenant="team", name="reader", scopes=("read",))
    key = auth.create_key(guarded.state.engine, request).key
    assert key is not None
    mine, foreign = guarded.submit("team", model="org/mine"), guarded.submit("default", model="org/foreign")
    sign_in(guarded, key)
    text = guarded.get("/")
    assert "org/mine" in text
    assert "org/foreign" not in text
    assert '/ui/jobs"' not in text
    assert "/ui/workers" not in text
    assert "<form" not in guarded.get(f"/ui/jobs/{mine.id}").replace('<form class="signout"', "")
    guarded.get(f"/ui/jobs/{foreign.id}", status=404)
    guarded.get("/ui/workers", status=403)
    for path in ("/ui/jobs", f"/ui/jobs/{mine.id}/cancel"):
        assert guarded.post(path).status_code == 403
    assert "Authorization: Bearer $LLMPRUNE_API_KEY" in guarded.get(f"/ui/jobs/{mine.id}")


# What holds for all pages ---------------------------------------------------------------------------------------------


def preformatted(text: str) -> list[str]:
    """The contents of all <pre>, as text."""
    return [unescape(block) for block in re.findall(r"<pre[^>]*>(.*?)</pre>", text, re.DOTALL)]


def all_pages(pages: Pages) -> dict[str, str]:
    """Every page of the service by its path, jobs in all states."""
    rows = [pages.job_in(status) for status in ("queued", "running", "succeeded", "failed", "cancelled")]
    paths = ["/", f"/?like={rows[0].id}", "/?status=failed", "/ui/compare", "/ui/sweeps", "/ui/workers", "/login", "/docs"]
    paths += [f"/ui/compare?job={rows[2].id}&job=none", *(f"/ui/jobs/{row.id}" for row in rows)]
    found = {path: pages.get(path) for path in paths}
    found["error"] = pages.get("/ui/jobs/none", status=404)
    found["refused"] = pages.post("/ui/jobs", sparsity="7").text
    return found


def test_pages_are_well_formed_and_strict(pages: Pages) -> None:
    """No inline script or style, every tag closed, every field named, landmarks, and nothing from elsewhere."""
    found = all_pages(pages)
    assert len(found) == 16
    for path, text in found.items():
        checker = Checker()
        checker.feed(text)
        checker.close()
        assert checker.faults == [], path
        assert {"main", "header", "title"} <= set(checker.tags), path
        assert all(link.startswith(("/", "#")) and not link.startswith("//") for link in checker.links), path


def test_pages_send_a_strict_policy(pages: Pages) -> None:
    """Only the page of the vendored library may have inline styles; none may have inline scripts or other sources."""
    for path in ("/", "/login", "/ui/workers", f"/ui/jobs/{pages.submit().id}"):
        headers = pages.client.get(path).headers
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert "form-action 'self'" in policy
        # With no-referrer, browsers send "Origin: null" with forms, which is refused.
        assert headers["referrer-policy"] == "same-origin"
        assert headers["cache-control"] == "no-store"
    policy = pages.client.get("/docs").headers["content-security-policy"]
    assert re.findall(r"[\w-]+ [^;]*unsafe[^;]*", policy) == ["style-src 'self' 'unsafe-inline'"]
    assert "http" not in policy


def test_pages_and_what_they_load_are_small(pages: Pages) -> None:
    """Below 90 kB in all, the API's description aside; and the report of a model of 80 layers below 200 kB."""
    row = pages.submit()
    succeed(begin(pages.jobs, row), sample_report(num_blocks=80))
    found = all_pages(pages) | {"large": pages.get(f"/ui/jobs/{row.id}")}
    own = 0
    for link in {link for text in found.values() for link in re.findall(r'(?:src|href)="(/static/[^"]+)"', text)}:
        answer = pages.client.get(link)
        assert answer.status_code == 200, link
        own += len(answer.content) if "vendor" not in link else 0
    for path, text in found.items():
        assert own + len(text.encode()) < (200_000 if path == "large" else 90_000), path


def evil_report() -> Report:
    """All that a model, a text or a device may be called is markup."""
    report = sample_report(num_blocks=2)
    text = report.quality[0].text.model_copy(update={"source": EVIL})
    assert report.latency is not None
    sites = tuple(site.model_copy(update={"name": f"{report.blocks[0].name}.{EVIL}"}) for site in report.blocks[0].sites[:1])
    return report.model_copy(update={
        "model": report.model.model_copy(update={"name": EVIL}),
        "config": report.config.model_copy(update={"model": EVIL, "method": EVIL}),
        "blocks": (report.blocks[0].model_copy(update={"sites": sites}),),
        "quality": (report.quality[0].model_copy(update={"text": text}),),
        "latency": report.latency.model_copy(update={"device": EVIL, "note": EVIL}),
        "warnings": (EVIL,),
    })  # fmt: skip


def test_markup_in_a_name_is_text(pages: Pages) -> None:
    """A row that came straight from the database: its model, method, error, log and block names are escaped everywhere."""
    row = pages.job_in("succeeded")
    execution = begin(pages.jobs, pages.submit())
    execution.say("job.log", {"level": EVIL, "message": EVIL})
    execution.say(f"job.{EVIL}", {EVIL: EVIL})
    execution.fail(EVIL, EVIL)
    report = evil_report()
    values = {"model": EVIL, "method": EVIL, "pattern": EVIL, "config": {"model": EVIL, EVIL: EVIL}, "revision": EVIL}
    with pages.jobs.engine.begin() as connection:
        connection.execute(sa.update(tables.jobs).values(values))
        connection.execute(sa.update(tables.blocks).values(name=EVIL))
        connection.execute(sa.update(tables.reports).values(report=report.model_dump(mode="json")))
        connection.execute(sa.insert(tables.artifacts).values(
            job_id=row.id, name='"><img src=x onerror=alert(1)>', bytes=1, sha256=EVIL, media_type=EVIL, path="x",
        ))  # fmt: skip
    paths = ("/", f"/?like={row.id}", f"/ui/jobs/{row.id}", f"/ui/jobs/{execution.job.id}", f"/ui/compare?job={row.id}")
    for path in paths:
        text = pages.get(path)
        checker = Checker()
        checker.feed(text)
        checker.close()
        assert checker.faults == [], path
        assert "<script>alert" not in text
        assert "<img" not in text
        assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text


def test_vendored_files_are_the_published_ones() -> None:
    """The README's table names every file beside it, with its digest."""
    rows = re.findall(r"\| `([^`]+)` \| `([0-9a-f]{64})` \|", (SWAGGER / "README.md").read_text())
    found = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in SWAGGER.iterdir() if file.name != "README.md"}
    assert dict(rows) == found
    assert {"swagger-ui-bundle.js", "swagger-ui.css", "LICENSE", "NOTICE"} <= found.keys()
