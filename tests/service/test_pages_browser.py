"""The pages in a real Chromium, where there is one: live progress, plots, forms, policy, fit and contrast.

LLMPRUNE_SCREENSHOTS names a directory to leave pictures of them in.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import Browser, need_chromium, open_browser
from pages_kit import begin, finish_block, listening, sample_plan, succeed

from llmprune.io.render import render_html
from llmprune.spec import PruneConfig
from llmprune_service.api.plan import Outcome
from llmprune_service.execution import Execution
from llmprune_service.schemas import JobRequest
from reports import sample_report


@pytest.fixture(scope="module")
def window(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """One for all tests: starting it takes longer than most of them. In it llmprune.test is this machine."""
    need_chromium()
    profile = tmp_path_factory.mktemp("browser") / "profile"
    with open_browser(profile, "--host-resolver-rules=MAP llmprune.test 127.0.0.1") as found:
        yield found


@pytest.fixture
def browser(window: Browser) -> Browser:
    """As new."""
    window.reset()
    return window


async def a_plan(config: PruneConfig, revision: str | None) -> Outcome:
    """Stands in for the child process that makes plans."""
    return Outcome(sample_plan(), None)


def test_from_the_form_to_the_report(browser: Browser, tmp_path: Path) -> None:
    """Plan, submit, progress, curves and report without a reload; nothing comes from elsewhere, the policy is not violated."""
    with listening(tmp_path) as (url, state):
        state.planner.plan = a_plan
        browser.open(f"{url}/")
        browser.type("[name=sparsity]", "0.4")
        assert browser.run("return document.querySelector('[type=range]').value") == "0.4"
        assert "Fraction of zeros" in browser.text("#hint")
        browser.click("#do-plan")
        browser.wait(lambda: "2 min 05 s" in browser.text("#plan"))
        browser.keep("plan", height=700)
        assert state.jobs.list("default")[0] == []
        browser.click(".submit button")
        browser.wait(lambda: browser.text("#status") == "queued")
        browser.run("window.still = true")  # gone after a reload
        (row,) = state.jobs.list("default")[0]
        assert row.config == {"sparsity": 0.4}
        execution = begin(state.jobs, row)
        browser.wait(lambda: browser.text(".phases .current").startswith("prune"))
        assert browser.run("return document.getElementById('stage').value") == 2
        finish_block(execution, 2, 4)
        browser.wait(lambda: browser.run("return document.getElementById('stage').value") == 3)
        assert "3 of 4" in browser.text(".facts")
        assert "Block 3 of 4" in browser.text(".log li")
        assert browser.text("#connection") == "Live"
        assert browser.text("#actions").split() == ["Cancel", "Duplicate"]
        for done in range(5):
            refine(execution, done)
        browser.wait(lambda: count(browser, "#plot-refine circle") == 5)
        refine(execution, 5)
        browser.wait(lambda: count(browser, "#plot-refine circle") == 6)
        browser.keep("running", height=1200)
        succeed(execution, sample_report(num_blocks=24))
        browser.wait(lambda: browser.text("#status") == "succeeded")
        browser.wait(lambda: count(browser, "#plot-sparsity rect") == 24 * 8)
        assert "16.21 → 21.94" in browser.text(".tiles")
        assert "model.safetensors" in browser.text("#files")
        assert browser.run("return window.still")
        browser.keep("job", height=1000)
        assert browser.complaints() == []
        asked = browser.requested()
    assert any("/events?after=" in address for address in asked)
    assert [address for address in asked if not address.startswith(f"{url}/")] == []


def refine(execution: Execution, done: int) -> None:
    """A pass of a refinement, as the worker tells it."""
    progress = {"stage": "refine", "done": done, "total": 8, "began": 0, "resumed_at": 0}
    facts = {"stage": "refine", "done": done, "total": 8, "detail": "", "value": 3.5 - 0.1 * done}
    execution.say("job.progress", facts, progress=progress)
    execution.flush()


def count(browser: Browser, css: str) -> int:
    """How many match."""
    return int(browser.run("return document.querySelectorAll(arguments[0]).length", css))


def test_two_jobs_are_compared(browser: Browser, tmp_path: Path) -> None:
    """Ticked in the list, which may refresh meanwhile; a point tells its numbers and leads to its job."""
    with listening(tmp_path) as (url, state):
        rows = [state.jobs.submit("default", JobRequest(model="org/model", method=name))[0] for name in ("wanda", "ria")]
        for number, row in enumerate(rows):
            report = sample_report(num_blocks=2)
            quality = report.quality[0].model_copy(update={"perplexity_pruned": 25.0 + number})
            succeed(begin(state.jobs, row), report.model_copy(update={"quality": (quality,)}))
        browser.open(f"{url}/")
        browser.click(f"#pick-{rows[0].id}")
        state.jobs.submit("default", JobRequest())
        browser.wait(lambda: "queued" in browser.text("#jobs"))
        assert browser.run("return document.getElementById(arguments[0]).checked", f"pick-{rows[0].id}")
        browser.click(f"#pick-{rows[1].id}")
        browser.keep("jobs")
        browser.click("#pick button")
        browser.wait(lambda: browser.text("h1") == "Compare")
        assert count(browser, "svg .point") == 2 and "★" in browser.text(".compared")
        address = browser.run("return location.href")
        assert all(f"job={row.id}" in address for row in rows)
        browser.run("document.querySelector('[name=x]').value = 'kl'")
        browser.click(".panel .primary")
        browser.wait(lambda: "x=kl" in browser.run("return location.search"))
        browser.hover("svg .on-front")
        assert "perplexity 25.00" in browser.text(".tip")
        browser.keep("compare", height=1000)
        browser.run("document.querySelector('svg a').focus()")
        assert "KL from dense" in browser.text(".tip")
        browser.click("svg a")
        browser.wait(lambda: browser.text("h1") == "org/model")
        assert browser.complaints() == []


def test_plots_answer_pointer_and_keys_and_become_pictures(browser: Browser, tmp_path: Path) -> None:
    """In a page of the service and in the report's own file, under either's policy."""
    file = tmp_path / "report.html"
    file.write_text(render_html(sample_report()), encoding="utf-8")
    browser.devtools("Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(tmp_path)})
    with listening(tmp_path) as (url, state):
        row = state.jobs.submit("default", JobRequest())[0]
        succeed(begin(state.jobs, row))
        for address, name in ((f"{url}/ui/jobs/{row.id}", "sparsity"), (file.as_uri(), "errors")):
            browser.open(address)
            plot = f"figure[data-name={name}]"
            browser.hover(f"{plot} .mark")
            first = browser.text(".tip")
            assert first == {"sparsity": "block 0, q_proj: 52.00 %", "errors": "0: 0.0194"}[name]
            browser.run("document.querySelector(arguments[0]).focus()", f"{plot} .scroll")
            browser.press("ArrowRight")
            assert browser.text(".tip") == first  # it begins with the first mark
            browser.press("ArrowRight")
            assert browser.text(".tip") not in ("", first)
            browser.press("Escape")
            assert browser.text(".tip:not([hidden])") == ""
            browser.click(f"{plot} .png")
            picture = tmp_path / f"{name}.png"
            browser.wait(lambda picture=picture: picture.is_file() and picture.read_bytes()[:4] == b"\x89PNG")
            assert browser.complaints() == [], address
    browser.keep("report", height=1400)


def test_pages_can_be_read_without_scripts(browser: Browser, tmp_path: Path) -> None:
    """Numbers, plots, form and buttons are the server's."""
    with listening(tmp_path) as (url, state):
        row = state.jobs.submit("default", JobRequest())[0]
        succeed(begin(state.jobs, row))
        browser.devtools("Emulation.setScriptExecutionDisabled", {"value": True})
        browser.open(f"{url}/ui/jobs/{row.id}")
        assert "16.21 → 21.94" in browser.text(".tiles") and count(browser, "svg.plot") == 3
        browser.open(f"{url}/ui/compare?job={row.id}")
        assert count(browser, "svg .point") == 1
        browser.open(f"{url}/")
        browser.type("[name=model]", "demo")
        browser.click(".submit button")
        browser.wait(lambda: browser.text("#status") == "queued")


def test_buttons_work_in_a_browser(browser: Browser, tmp_path: Path) -> None:
    """Cancel, resume and delete, as a user clicks them; the list refreshes itself."""
    with listening(tmp_path) as (url, state):
        row = state.jobs.submit("default", JobRequest(model="org/model"))[0]
        browser.open(f"{url}/ui/jobs/{row.id}")
        browser.click("#do-cancel")
        browser.wait(lambda: browser.text("#status") == "cancelled")
        browser.click("#do-resume")
        browser.wait(lambda: browser.text("#status") == "queued")
        browser.open(f"{url}/")
        state.jobs.cancel("default", row.id)
        browser.wait(lambda: browser.text("#jobs .badge") == "cancelled")
        browser.click("#jobs a")
        browser.wait(lambda: browser.text(".confirm summary"))
        browser.click(".confirm summary")
        browser.click("#do-delete")
        browser.wait(lambda: "No jobs yet." in browser.text("#jobs"))
        assert browser.complaints() == []


def test_signing_in_over_plain_http(browser: Browser, tmp_path: Path) -> None:
    """On a name that browsers do not trust they send no Sec-Fetch-Site: the form's Origin must do."""
    with listening(tmp_path, auth=True, allowed_hosts=("llmprune.test",)) as (url, state):
        site = url.replace("127.0.0.1", "llmprune.test")
        browser.open(f"{site}/")
        browser.wait(lambda: browser.text("h1") == "Sign in")
        browser.type("[name=key]", state.settings.key_file.read_text().strip())
        browser.click(".login button")
        browser.wait(lambda: browser.text("h1") == "Jobs")
        assert browser.run("return document.cookie") == ""
        row = state.jobs.submit("default", JobRequest())[0]
        browser.open(f"{site}/ui/jobs/{row.id}")
        browser.wait(lambda: browser.text("#connection") == "Live")  # the stream takes the cookie
        browser.open(f"{site}/docs")  # its own policy lets the button work too
        browser.click(".signout button")
        browser.wait(lambda: browser.text("h1") == "Sign in")


def test_description_of_the_api_is_drawn(browser: Browser, tmp_path: Path) -> None:
    """By the vendored library, under its policy, without another host."""
    with listening(tmp_path) as (url, _):
        browser.open(f"{url}/docs")
        browser.wait(lambda: "/v1/jobs" in browser.text("#swagger-ui .opblock-summary-path"))
        assert browser.complaints() == []
        assert [address for address in browser.requested() if not address.startswith(f"{url}/")] == []


@pytest.mark.parametrize("width", [320, 390, 1200])
def test_pages_fit_the_window(browser: Browser, tmp_path: Path, width: int) -> None:
    """Nothing sticks out at the side of a phone."""
    with listening(tmp_path) as (url, state):
        row = state.jobs.submit("default", JobRequest(model="a-long-organisation/" + "a-very-long-model-name-" * 4))[0]
        succeed(begin(state.jobs, row))
        paths = (
            "/",
            f"/?like={row.id}",
            f"/ui/jobs/{row.id}",
            f"/ui/compare?job={row.id}&job=none",
            "/login",
            "/ui/workers",
            "/ui/sweeps",
        )
        for path in paths:
            browser.resize(width, 800)
            browser.open(f"{url}{path}")
            assert browser.run("return document.documentElement.scrollWidth") <= width, (path, browser.complaints())
            browser.keep(f"width-{width}-{paths.index(path)}", width=width, height=1200)


def contrast(browser: Browser, css: str) -> float:
    """The contrast ratio (WCAG 2) of the first match's text on its own or inherited ground."""
    script = """
      const lum = (c) => { const [r, g, b] = c.match(/[\\d.]+/g).map((v) => v / 255)
        .map((v) => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
      let box = document.querySelector(arguments[0]); const ink = lum(getComputedStyle(box).color);
      while (/rgba\\(.*, 0\\)/.test(getComputedStyle(box).backgroundColor)) box = box.parentElement;
      const ground = lum(getComputedStyle(box).backgroundColor);
      return (Math.max(ink, ground) + 0.05) / (Math.min(ink, ground) + 0.05);"""
    return float(browser.run(script, css))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_contrast(browser: Browser, tmp_path: Path, scheme: str) -> None:
    """At least 4.5 to 1 for small text, in both schemes."""
    with listening(tmp_path) as (url, state):
        jobs = state.jobs
        done, failed = (jobs.submit("default", JobRequest())[0] for _ in range(2))
        succeed(begin(jobs, done))
        begin(jobs, failed).fail("code", "message")
        begin(jobs, jobs.submit("default", JobRequest())[0])
        jobs.submit("default", JobRequest())
        browser.devtools("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]})
        badges = [f".badge.{status}" for status in ("queued", "running", "failed", "succeeded")]
        listed = ("#jobs a", "#jobs td:nth-child(4)", ".verbs a", ".tabs a", "legend", ".hint", ".primary", "header nav a")
        shown = (".verdict", ".sub", ".tiles dt", ".phases .done", ".log time", "pre", ".button", "figcaption", "svg text")
        seen = {
            "/": [*badges, *listed],
            f"/ui/jobs/{done.id}": shown,
            f"/ui/jobs/{failed.id}": [".alert", ".phases .failed", ".log .job-failed span"],
            f"/ui/compare?job={done.id}&job=none": [".alert", ".hint", "svg .tick", ".compared td", ".picks label"],
        }
        for path, selectors in seen.items():
            browser.open(f"{url}{path}")
            ratios = {css: contrast(browser, css) for css in selectors}
            assert min(ratios.values()) >= 4.5, ratios
