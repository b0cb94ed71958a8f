"""A headless Chromium, driven over the DevTools protocol on a pipe: what a person does, and what they see."""

import base64
import fcntl
import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--headless",
    "--no-sandbox",  # it refuses to run as root otherwise; it sees only our own page
    "--remote-debugging-pipe",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-extensions",
    "--no-first-run",
    "--no-proxy-server",
    "--mute-audio",
)
# Chromium reads commands from descriptor 3 and writes to 4, each message ended by a zero byte.
START = (
    "import os, sys; os.dup2(int(sys.argv[1]), 3); os.dup2(int(sys.argv[2]), 4);"
    "os.execv(sys.argv[3], sys.argv[3:])"
)
PATIENCE = 20.0


def find_browser() -> str:
    """Chromium's path. Skips the test without one; in continuous integration that is a failure."""
    for name in NAMES:
        if found := shutil.which(name):
            return found
    missing = f"none of {', '.join(NAMES)} is installed; scripts/install_browser.sh does it"
    if os.environ.get("CI"):
        pytest.fail(missing)
    pytest.skip(missing)


@contextmanager
def browsing(profile: Path) -> Iterator["Browser"]:
    """A browser with a fresh profile."""
    read_commands, write_commands = _high_pipe()
    read_replies, write_replies = _high_pipe()
    command = [sys.executable, "-S", "-c", START, str(read_commands), str(write_replies), find_browser()]
    process = subprocess.Popen(
        [*command, *FLAGS, f"--user-data-dir={profile}", "about:blank"],
        pass_fds=(read_commands, write_replies),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(read_commands)
    os.close(write_replies)
    with os.fdopen(write_commands, "wb", buffering=0) as out, os.fdopen(read_replies, "rb") as back:
        try:
            yield Browser(out, back)
        finally:
            process.kill()
            process.wait()


def _high_pipe() -> tuple[int, int]:
    """A pipe whose descriptors are neither 3 nor 4."""
    ends = os.pipe()
    high = tuple(fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in ends)
    for end in ends:
        os.close(end)
    return high[0], high[1]


class Browser:
    """The connection; `open` gives a tab."""

    def __init__(self, out: Any, back: Any) -> None:
        self._out = out
        self._back = back
        self._numbers = itertools.count(1)
        self._waiting = b""
        self.events: list[dict[str, Any]] = []

    def call(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        """One command and its result. Events that come meanwhile are kept in `events`."""
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": params}
        if session is not None:
            message["sessionId"] = session
        self._out.write(json.dumps(message).encode() + b"\0")
        while True:
            reply = self._next()
            if reply.get("id") == number:
                assert "error" not in reply, (method, reply["error"])
                return reply["result"]
            self.events.append(reply)

    def open(self, url: str, *, width: int = 1200, height: int = 800, dark: bool = False) -> "Tab":
        """A new tab with its own storage."""
        context = self.call("Target.createBrowserContext")["browserContextId"]
        target = self.call("Target.createTarget", url="about:blank", browserContextId=context)["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        tab = Tab(self, session)
        for domain in ("Page", "Runtime", "Log", "Network"):
            tab.call(f"{domain}.enable")
        tab.look(width=width, height=height, dark=dark)
        tab.call("Page.navigate", url=url)
        return tab

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._waiting:
            read = self._back.read1(1 << 20)
            assert read, "the browser ended"
            self._waiting += read
        message, _, self._waiting = self._waiting.partition(b"\0")
        return json.loads(message)


class Tab:
    """One page."""

    def __init__(self, browser: Browser, session: str) -> None:
        self._browser = browser
        self._session = session

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        return self._browser.call(method, self._session, **params)

    def look(self, *, width: int, height: int, dark: bool) -> None:
        """Size in CSS pixels, and the colour scheme the user prefers."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def value(self, expression: str) -> Any:
        """What a JavaScript expression is worth, as JSON."""
        done = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in done, (expression, done["exceptionDetails"])
        return done["result"].get("value")

    def wait(self, expression: str) -> None:
        """Until an expression is true."""
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            if self.value(f"Boolean({expression})"):
                return
            time.sleep(0.01)
        raise AssertionError(f"{expression} did not come true; the page says: {self.text('body')}")

    def text(self, selector: str) -> str:
        """What a reader sees of the first match; "" where there is none."""
        return self.value(f"document.querySelector({json.dumps(selector)})?.innerText ?? ''")

    def texts(self, selector: str) -> list[str]:
        """What a reader sees of every match."""
        return self.value(
            f"[...document.querySelectorAll({json.dumps(selector)})].map((match) => match.innerText)"
        )

    def shown(self, selector: str) -> bool:
        """Whether the first match can be seen."""
        return self.value(f"document.querySelector({json.dumps(selector)})?.checkVisibility() ?? false")

    def fill(self, selector: str, text: str) -> None:
        """Focuses a field, empties it and types."""
        self.value(
            f"(field => {{ field.focus(); field.select(); }})(document.querySelector({json.dumps(selector)}))"
        )
        self.call("Input.insertText", text=text)

    def press(self, key: str) -> None:
        """Enter, Escape or Tab, wherever the focus is."""
        code = {"Enter": 13, "Escape": 27, "Tab": 9}[key]
        shared = {"key": key, "code": key, "windowsVirtualKeyCode": code}
        self.call(
            "Input.dispatchKeyEvent", type="keyDown", **shared, **({"text": "\r"} if code == 13 else {})
        )
        self.call("Input.dispatchKeyEvent", type="keyUp", **shared)

    def click(self, selector: str) -> None:
        """Clicks in the middle of the first match, where a mouse would."""
        place = self.value(
            f"(box => [box.x + box.width / 2, box.y + box.height / 2])"
            f"(document.querySelector({json.dumps(selector)}).getBoundingClientRect())"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.call(
                "Input.dispatchMouseEvent", type=kind, x=place[0], y=place[1], button="left", clickCount=1
            )

    def screenshot(self, file: Path) -> None:
        """A PNG of what is visible."""
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))

    def complaints(self) -> list[str]:
        """Uncaught errors and what the browser logged as one, a violated policy among them.

        A refusal by the server is logged too, as a network error, and is none of the page's.
        """
        self.value("0")  # so that what happened before has arrived
        found = []
        for event in self._browser.events:
            if event.get("sessionId") != self._session:
                continue
            if event["method"] == "Runtime.exceptionThrown":
                found.append(json.dumps(event["params"]["exceptionDetails"]))
            if event["method"] == "Log.entryAdded":
                entry = event["params"]["entry"]
                if entry["level"] == "error" and entry["source"] != "network":
                    found.append(entry["text"])
        return found

    def requested(self) -> set[str]:
        """Every URL the page asked for."""
        return {
            event["params"]["request"]["url"]
            for event in self._browser.events
            if event["method"] == "Network.requestWillBeSent" and event.get("sessionId") == self._session
        }
