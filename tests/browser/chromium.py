"""A headless Chromium, asked through its debugging protocol over a pipe: no driver, and no port that is open to others.

https://chromedevtools.github.io/devtools-protocol/ says what `call` can ask for.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome")
OPTIONS = ("--headless=new", "--remote-debugging-pipe", "--disable-gpu", "--no-first-run", "--disable-dev-shm-usage")
SECONDS = 60


class Unavailable(Exception):
    """There is no Chromium here, and why none could be installed."""


class Chromium:
    """A browser with one page; to be used in a `with` block. Raises Unavailable if none can be had."""

    def __enter__(self) -> Chromium:
        with contextlib.ExitStack() as stack:
            profile = stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True))
            asked, self._ask = os.pipe()
            self._answers, answered = os.pipe()
            ends = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (asked, answered)]

            def place() -> None:  # where the browser looks for its pipes
                for target, end in enumerate(ends, start=3):
                    os.dup2(end, target)

            options = [*OPTIONS, f"--user-data-dir={profile}", *(["--no-sandbox"] if os.geteuid() == 0 else [])]
            process = subprocess.Popen(
                [_browser(), *options, "about:blank"],
                preexec_fn=place,
                pass_fds=(3, 4),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            for end in (asked, answered, *ends):
                os.close(end)
            stack.callback(process.wait)
            stack.callback(process.kill)
            self._rest, self._number, self._session, self.events = b"", 0, None, []
            target = self.call("Target.createTarget", url="about:blank")["targetId"]
            self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
            for domain in ("Page", "Runtime", "Log", "Network"):
                self.call(f"{domain}.enable")
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
        os.close(self._ask)
        os.close(self._answers)

    def call(self, method: str, **parameters: object) -> dict:
        """Return the browser's answer; raises RuntimeError for an error of its."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        message |= {"sessionId": self._session} if self._session else {}
        os.write(self._ask, json.dumps(message).encode() + b"\0")
        while (answer := self._read()).get("id") != self._number:
            self.events.append(answer)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']['message']}")
        return answer["result"]

    def open(self, page: Path, width: int, height: int = 844, media: str = "", scheme: str = "light") -> None:
        """Show a file in a window of `width` pixels, as a phone does if that is narrow; forget earlier events."""
        phone = width < 600
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=phone)
        self.call(
            "Emulation.setEmulatedMedia", media=media, features=[{"name": "prefers-color-scheme", "value": scheme}]
        )
        self.events = []
        self.call("Page.navigate", url=page.resolve().as_uri())
        while not self.named("Page.loadEventFired"):
            self.events.append(self._read())

    def value(self, expression: str) -> object:
        """Return the value of a JavaScript expression in the page, waited for if it is a promise."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(answer["exceptionDetails"]["exception"]["description"])
        return answer["result"].get("value")

    def named(self, name: str) -> list[dict]:
        """Return the parameters of the events of a name since the page was opened."""
        return [event["params"] for event in self.events if event.get("method") == name]

    def picture(self, whole: bool = True) -> bytes:
        """Return the page as PNG: all of it, or what the window shows."""
        return base64.b64decode(self.call("Page.captureScreenshot", captureBeyondViewport=whole)["data"])

    def _read(self) -> dict:
        deadline = time.monotonic() + SECONDS
        while b"\0" not in self._rest:
            if not select.select([self._answers], [], [], max(0, deadline - time.monotonic()))[0]:
                raise RuntimeError(f"the browser says nothing for {SECONDS} seconds")
            part = os.read(self._answers, 1 << 20)
            if not part:
                raise RuntimeError("the browser has ended")
            self._rest += part
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)


def _browser() -> str:
    """Return the path of a Chromium, installed if it is missing; raises Unavailable."""
    if found := next(filter(None, map(shutil.which, NAMES)), None):
        return found
    if os.geteuid() or not shutil.which("apt-get"):
        raise Unavailable("There is no Chromium, and only root can install it, with apt-get.")
    print("installing chromium …", file=sys.stderr, flush=True)
    for action in (["update"], ["install", "--no-install-recommends", "chromium"]):
        command = ["apt-get", "--yes", "--quiet=2", *action]
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        finished = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if finished.returncode:
        raise Unavailable(f"apt-get does not install chromium: {finished.stderr.strip()[-500:]}")
    return shutil.which("chromium") or "chromium"
