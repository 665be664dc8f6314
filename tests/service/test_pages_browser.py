"""The pages in a real Chromium, where there is one: live progress, forms, policy, fit and contrast."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import Browser, need_chromium, open_browser
from pages_kit import begin, finish_block, listening, succeed

from llmprune_service.schemas import JobRequest


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    """A window, in which llmprune.test is this machine."""
    need_chromium()
    with open_browser(tmp_path / "profile", "--host-resolver-rules=MAP llmprune.test 127.0.0.1") as found:
        yield found


def test_progress_moves_while_one_looks(browser: Browser, tmp_path: Path) -> None:
    """From the form to the report without a reload; nothing comes from elsewhere, and the policy is not violated."""
    with listening(tmp_path) as (url, state):
        browser.open(f"{url}/")
        browser.type("[name=sparsity]", "0.4")
        browser.click(".submit button")
        browser.wait(lambda: browser.text("#status") == "queued")
        browser.run("window.still = true")  # gone after a reload
        (row,) = state.jobs.list("default")[0]
        execution = begin(state.jobs, row)
        browser.wait(lambda: browser.text(".phases .current").startswith("prune"))
        assert browser.run("return document.getElementById('stage').value") == 2
        finish_block(execution, 2, 4)
        browser.wait(lambda: browser.run("return document.getElementById('stage').value") == 3)
        assert "3 of 4" in browser.text(".facts")
        assert "Block 3 of 4" in browser.text(".log li")
        assert browser.text("#connection") == "Live"
        assert browser.text("#actions") == "Cancel"
        succeed(execution)
        browser.wait(lambda: browser.text("#status") == "succeeded")
        assert "16.21 → 21.94" in browser.text(".tiles")
        assert "model.safetensors" in browser.text("#files")
        assert browser.run("return window.still")
        assert browser.complaints() == []
        asked = browser.requested()
    assert any("/events?after=" in address for address in asked)
    assert [address for address in asked if not address.startswith(f"{url}/")] == []


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
        browser.resize(width, 800)
        for path in ("/", f"/ui/jobs/{row.id}", "/login", "/ui/workers"):
            browser.open(f"{url}{path}")
            assert browser.run("return document.documentElement.scrollWidth") <= width, (path, browser.complaints())


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
        seen = {
            "/": [*badges, "#jobs a", "#jobs td:nth-child(3)", ".tabs a", ".hint", ".primary", "header nav a"],
            f"/ui/jobs/{done.id}": [".verdict", ".sub", ".tiles dt", ".phases .done", ".log time", "pre", ".button"],
            f"/ui/jobs/{failed.id}": [".alert", ".phases .failed", ".log .job-failed span"],
        }
        for path, selectors in seen.items():
            browser.open(f"{url}{path}")
            ratios = {css: contrast(browser, css) for css in selectors}
            assert min(ratios.values()) >= 4.5, ratios
