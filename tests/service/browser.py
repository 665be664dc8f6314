"""A real headless Chromium, driven through chromedriver's WebDriver protocol: no Python package beside the HTTP client."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import time
from base64 import b64decode
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest

CHROMIUM = "/usr/bin/chromium"
_ARGUMENTS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--hide-scrollbars", "--window-size=1200,900",
)  # fmt: skip
_ELEMENT = "element-6066-11e4-a52e-4f735466cecf"


class Browser:
    """One window. All waiting is done by looking again until a deadline."""

    def __init__(self, client: httpx2.Client, session: str) -> None:
        self._client = client
        self._session = session

    def open(self, url: str) -> None:
        """Go to a page; returns once it is loaded, its style sheets too: on a busy machine the driver answers before that."""
        self._call("POST", "url", {"url": url})
        self.wait(lambda: self.run("return document.readyState") == "complete")

    def run(self, script: str, *values: object) -> Any:
        """What the body of a function returns in the page."""
        return self._call("POST", "execute/sync", {"script": script, "args": list(values)})

    def text(self, css: str) -> str:
        """The visible text of the first match, empty where there is none."""
        return str(self.run("return document.querySelector(arguments[0])?.innerText ?? ''", css))

    def wait(self, condition: Callable[[], Any], seconds: float = 20) -> Any:
        """The first true value of the condition; fails when the time is over."""
        deadline = time.monotonic() + seconds
        while not (value := condition()):
            assert time.monotonic() < deadline, self.run("return document.body.innerText")
            time.sleep(0.05)
        return value

    def click(self, css: str) -> None:
        """As a user does: what is covered or not visible cannot be clicked."""
        self._call("POST", f"element/{self._find(css)}/click", {})

    def type(self, css: str, text: str) -> None:
        """Type into a field."""
        self._call("POST", f"element/{self._find(css)}/value", {"text": text})

    def screenshot(self, file: Path, *, width: int, height: int) -> None:
        """Save what the window shows as PNG."""
        self.resize(width, height)
        file.write_bytes(b64decode(self._call("GET", "screenshot")))

    def keep(self, name: str, *, width: int = 1200, height: int = 900) -> None:
        """Save a screenshot where LLMPRUNE_SCREENSHOTS says, if it does; the page is as it was afterwards."""
        if folder := os.environ.get("LLMPRUNE_SCREENSHOTS"):
            Path(folder).mkdir(parents=True, exist_ok=True)
            self.screenshot(Path(folder, f"{name}.png"), width=width, height=height)
            self.devtools("Emulation.clearDeviceMetricsOverride", {})

    def reset(self) -> None:
        """As a new window: an empty page, no cookies, nothing emulated, nothing in the logs."""
        self.open("about:blank")
        self.devtools("Emulation.clearDeviceMetricsOverride", {})
        self.devtools("Emulation.setEmulatedMedia", {"media": "", "features": []})
        self.devtools("Emulation.setScriptExecutionDisabled", {"value": False})
        self.devtools("Network.clearBrowserCookies", {})
        self.complaints()
        self.requested()

    def hover(self, css: str) -> None:
        """Put the pointer on the first match."""
        self.run("document.querySelector(arguments[0]).scrollIntoView({ block: 'center' })", css)
        place = {"type": "pointerMove", "duration": 0, "x": 0, "y": 0, "origin": {_ELEMENT: self._find(css)}}
        self._call("POST", "actions", {"actions": [{"type": "pointer", "id": "mouse", "actions": [place]}]})

    def press(self, key: str) -> None:
        """A key, as DevTools names it, with whatever has the focus."""
        for kind in ("keyDown", "keyUp"):
            self.devtools("Input.dispatchKeyEvent", {"type": kind, "key": key, "code": key})

    def resize(self, width: int, height: int) -> None:
        """Make the viewport as large, below the smallest window too."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.devtools("Emulation.setDeviceMetricsOverride", metrics)

    def devtools(self, command: str, parameters: dict[str, Any]) -> Any:
        """A command of the DevTools protocol."""
        return self._call("POST", "goog/cdp/execute", {"cmd": command, "params": parameters})

    def complaints(self) -> list[str]:
        """What the console got since the last call: violations of the policy, errors, failed requests."""
        return [entry["message"] for entry in self._call("POST", "se/log", {"type": "browser"})]

    def requested(self) -> list[str]:
        """URLs asked for since the last call, data: and the like left out."""
        entries = [json.loads(entry["message"])["message"] for entry in self._call("POST", "se/log", {"type": "performance"})]
        urls = [entry["params"]["request"]["url"] for entry in entries if entry["method"] == "Network.requestWillBeSent"]
        return [url for url in urls if url.startswith("http")]

    def _find(self, css: str) -> str:
        found: dict[str, str] = self._call("POST", "element", {"using": "css selector", "value": css})
        return found[_ELEMENT]

    def _call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        answer = self._client.request(method, f"/session/{self._session}/{path}", json=body).json()["value"]
        assert not (isinstance(answer, dict) and "error" in answer), answer
        return answer


def need_chromium() -> None:
    """Skip the test where Chromium or its driver is not installed."""
    if not Path(CHROMIUM).is_file() or shutil.which("chromedriver") is None:
        pytest.skip("needs Chromium and its driver: apt-get install chromium chromium-driver")


@contextmanager
def open_browser(profile: Path, *arguments: str) -> Iterator[Browser]:
    """A window with a profile of its own; further command line arguments go to Chromium."""
    with subprocess.Popen(["chromedriver", "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as driver:
        try:
            assert driver.stdout is not None
            port = next(match[1] for line in driver.stdout if (match := re.search(r"successfully on port (\d+)", line)))
            options = {"binary": CHROMIUM, "args": [*_ARGUMENTS, f"--user-data-dir={profile}", *arguments]}
            logging = {"browser": "ALL", "performance": "ALL"}
            wanted = {"browserName": "chrome", "goog:chromeOptions": options, "goog:loggingPrefs": logging}
            with httpx2.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
                answer = client.post("/session", json={"capabilities": {"alwaysMatch": wanted}}).json()["value"]
                session = answer["sessionId"]
                yield Browser(client, session)
                client.delete(f"/session/{session}")
        finally:
            driver.terminate()
