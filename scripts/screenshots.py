"""Pictures of the report, taken by headless Chromium: wide and phone, light and dark, and printed.

    python scripts/screenshots.py [FILE.json ...] [-o FOLDER]

Without a file, the demo's adapter `reply` is converted and validated first (a minute or two). Exit
code 1 where a page is wider than its window, asks the network for something, or logs an error; 2 where there
is no Chromium. It is driven over a pipe by its DevTools protocol
(https://chromedevtools.github.io/devtools-protocol), so that nothing but Chromium is needed.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parent.parent
FOLDER = REPO / ".cache" / "screenshots"
NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = (
    "--headless",
    "--no-sandbox",  # it shows a file of ours, and a root user's Chromium has no other way
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
)
# name -> (width in CSS pixels, pixels a CSS pixel, colour scheme)
VIEWS = {
    "desktop": (1280, 1, "light"),
    "desktop-dark": (1280, 1, "dark"),
    "phone": (390, 2, "light"),
    "phone-dark": (390, 2, "dark"),
}
# What sticks out of the page, if anything does; boxes that scroll may hold wider things.
WIDER = """(() => {
  const width = document.documentElement.clientWidth;
  const out = [...document.querySelectorAll("body *")].filter(e =>
    !e.closest(".scroll > *, svg *") && e.getBoundingClientRect().right > width + 1);
  return JSON.stringify({page: document.documentElement.scrollWidth, width,
    out: out.slice(0, 5).map(e => e.tagName + "." + e.className),
    height: document.documentElement.scrollHeight});
})()"""


class Browser:
    """Chromium's end of the pipe: one JSON message after another, each ended by a zero byte."""

    def __init__(self, chromium: str, profile: str) -> None:
        inner_in, self._write = os.pipe()
        self._read, inner_out = os.pipe()
        self.events: list[dict[str, Any]] = []
        self._last, self._rest = 0, b""
        # Chromium reads from descriptor 3 and writes to 4
        script = f'exec 3<&{inner_in} 4>&{inner_out}; exec "$@"'
        words = ["bash", "-c", script, "bash", chromium, *FLAGS, f"--user-data-dir={profile}"]
        self.process = subprocess.Popen(
            words, pass_fds=(inner_in, inner_out), stderr=subprocess.DEVNULL
        )
        os.close(inner_in)
        os.close(inner_out)

    def call(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        """One command, and its result; events that come in between are kept."""
        self._last += 1
        message = {"id": self._last, "method": method, "params": params}
        if session is not None:
            message["sessionId"] = session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") != self._last:
                self.events.append(answer)
            elif "error" in answer:
                raise SystemExit(f"error: Chromium, {method}: {answer['error']['message']}")
            else:
                result: dict[str, Any] = answer["result"]
                return result

    def wait(self, method: str) -> None:
        """Until an event has come."""
        while not any(e.get("method") == method for e in self.events):
            self.events.append(self._next())

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            piece = os.read(self._read, 1 << 20)
            if not piece:
                raise SystemExit("error: Chromium ended")
            self._rest += piece
        raw, _, self._rest = self._rest.partition(b"\0")
        message: dict[str, Any] = json.loads(raw)
        return message

    def close(self) -> None:
        """End it."""
        try:
            self.call("Browser.close")
            self.process.wait(20)
        except (SystemExit, OSError, subprocess.TimeoutExpired):
            self.process.kill()
            self.process.wait()
        os.close(self._write)
        os.close(self._read)


def find() -> str | None:
    """Where Chromium is."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


@contextmanager
def opened(chromium: str) -> Iterator[Browser]:
    """A browser with an empty profile of its own."""
    with tempfile.TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True) as profile:
        browser = Browser(chromium, profile)
        try:
            yield browser
        finally:
            browser.close()


def take(browser: Browser, page: Path, folder: Path) -> list[str]:
    """Every view of one page, and its print; what is wrong with them."""
    wrong: list[str] = []
    for name, (width, scale, scheme) in VIEWS.items():
        target = browser.call("Target.createTarget", url="about:blank")["targetId"]
        at = browser.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        browser.events.clear()
        for domain in ("Page", "Network", "Log", "Runtime"):
            browser.call(f"{domain}.enable", at)
        screen = {"width": width, "height": 900, "deviceScaleFactor": scale}
        browser.call("Emulation.setDeviceMetricsOverride", at, **screen, mobile=width < 600)
        media = [{"name": "prefers-color-scheme", "value": scheme}]
        browser.call("Emulation.setEmulatedMedia", at, features=media)
        browser.call("Page.navigate", at, url=page.as_uri())
        browser.wait("Page.loadEventFired")
        answer = browser.call("Runtime.evaluate", at, expression=WIDER)
        found = json.loads(answer["result"]["value"])
        if found["page"] > width or found["out"]:
            wrong.append(f"{name}: {found['page']} pixels wide of {width}: {found['out']}")
        picture = folder / f"{page.stem}-{name}.png"
        clip = {"x": 0, "y": 0, "width": width, "height": min(found["height"], 16_000 // scale)}
        shot = browser.call(
            "Page.captureScreenshot", at, clip=clip | {"scale": 1}, captureBeyondViewport=True
        )
        picture.write_bytes(base64.b64decode(shot["data"]))
        print(f"{picture}  {found['width']} x {found['height']}", flush=True)
        wrong += [f"{name}: {problem}" for problem in _problems(browser, page)]
        if name == "desktop":
            paper = browser.call("Page.printToPDF", at, printBackground=False)
            (folder / f"{page.stem}.pdf").write_bytes(base64.b64decode(paper["data"]))
        browser.call("Target.closeTarget", targetId=target)
    return wrong


def _problems(browser: Browser, page: Path) -> list[str]:
    """Requests to anything but the page itself, and errors in the log."""
    found = []
    for event in browser.events:
        params = event.get("params", {})
        if event.get("method") == "Network.requestWillBeSent":
            url = params["request"]["url"]
            if url != page.as_uri():
                found.append(f"asks for {url[:200]}")
        if event.get("method") == "Log.entryAdded" and params["entry"]["level"] == "error":
            found.append(params["entry"]["text"][:200])
    return found


def validated(folder: Path) -> Path:
    """The document of the demo's adapter `reply` and its MLX form."""
    sys.path.insert(0, str(REPO / "examples"))
    from base import prepare

    base, source, target = prepare(), REPO / "examples" / "reply", folder / "reply-mlx"
    loraduct("convert", source, "--to", "mlx", "-o", target, "--base", base, "--force")
    file = folder / "reply.json"
    file.write_text(loraduct("validate", source, target, "--base", base, "--json"))
    return file


def loraduct(*arguments: str | Path) -> str:
    """Run the command line; a validation that failed (exit code 3) is a document too."""
    words = [sys.executable, "-m", "loraduct", *map(str, arguments)]
    done = subprocess.run(words, cwd=REPO, stdout=subprocess.PIPE, text=True)
    if done.returncode not in (0, 3):
        raise SystemExit(done.returncode)
    return done.stdout


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE.json")
    parser.add_argument("-o", "--output", type=Path, default=FOLDER, metavar="FOLDER")
    given = parser.parse_args()
    chromium = find()
    if chromium is None:
        print("no Chromium here, so no pictures (on Debian: apt install chromium)", file=sys.stderr)
        return 2
    folder = given.output.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    wrong = []
    with opened(chromium) as browser:
        for file in given.files or [validated(folder)]:
            page = folder / f"{file.stem}.html"
            loraduct("report", file.resolve(), "-o", page, "--force")
            wrong += [f"{file.stem}: {problem}" for problem in take(browser, page, folder)]
    for line in wrong:
        print(f"error: {line}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
