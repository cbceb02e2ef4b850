"""A headless Chromium driven over a pipe: real keys and clicks, no dependency, no port."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
PATIENCE = 60.0  # seconds for one answer: a browser starts slowly on a busy machine
# The contrast of each text with what lies behind it, by WCAG 2.2; backgrounds are opaque or none.
CONTRASTS = """
(() => {
  const canvas = document.createElement('canvas').getContext('2d', { willReadFrequently: true });
  const pixel = (colour) => {
    canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
    return canvas.getImageData(0, 0, 1, 1).data;
  };
  const light = (colour) => {
    const [r, g, b] = [...pixel(colour)].map((c) => c / 255)
      .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const colour = getComputedStyle(at).backgroundColor;
      if (pixel(colour)[3] === 255) return colour;
    }
    return 'white';
  };
  const found = [];
  for (const element of document.querySelectorAll('main *')) {
    const written = [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
    if (element.closest('svg') || !written) continue;
    const [a, b] = [light(getComputedStyle(element).color), light(behind(element))];
    found.push([(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), element.outerHTML.slice(0, 80)]);
  }
  return found;
})()
"""


def find_chromium() -> str | None:
    """Path of a Chromium, or None."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Chromium:
    """One browser with one page; collects what the page complains of and asks of the network."""

    def __init__(self, binary: str, profile: Path) -> None:
        self._to_browser, self._from_browser = os.pipe(), os.pipe()
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
        command = [binary, *options, "--disable-extensions", f"--user-data-dir={profile}"]
        # The browser reads commands from descriptor 3 and answers on 4.
        reads, writes = self._to_browser[0], self._from_browser[1]
        wired = f'exec "$0" "$@" 3<&{reads} 4>&{writes}'
        self._process = subprocess.Popen(
            ["/bin/bash", "-c", wired, *command, "--remote-debugging-pipe", "about:blank"],
            pass_fds=(reads, writes),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(reads)
        os.close(writes)
        self._number, self._buffer, self._session = 0, b"", ""
        self.events: list[dict[str, Any]] = []
        target = next(t for t in self.call("Target.getTargets")["targetInfos"] if t["type"] == "page")
        attached = self.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a command and wait for its answer."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to_browser[1], json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + PATIENCE
        while True:
            answer = self._receive(deadline)
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]
            self.events.append(answer)

    def _receive(self, deadline: float) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            ready, _, _ = select.select(
                [self._from_browser[0]], [], [], max(0.0, deadline - time.monotonic())
            )
            data = os.read(self._from_browser[0], 1 << 20) if ready else b""
            if not data:
                raise RuntimeError("the browser does not answer")
            self._buffer += data
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)

    def open(self, page: Path) -> None:
        """Load a page and wait until its scripts have run."""
        self.events.clear()
        self.call("Page.navigate", url=page.as_uri())
        self.wait_for(f"document.readyState === 'complete' && location.href === {json.dumps(page.as_uri())}")

    def evaluate(self, expression: str) -> Any:
        """Value of a JavaScript expression; a promise is awaited. Raises RuntimeError where it throws."""
        answer = self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True, userGesture=True
        )
        if "exceptionDetails" in answer:
            raise RuntimeError(f"{expression}: {answer['exceptionDetails']}")
        return answer["result"].get("value")

    def wait_for(self, condition: str) -> None:
        """Wait until a JavaScript condition holds. Raises RuntimeError where it never does."""
        deadline = time.monotonic() + PATIENCE
        while not self.evaluate(condition):
            if time.monotonic() > deadline:
                raise RuntimeError(f"never came true: {condition}")
            time.sleep(0.02)

    def press(self, key: str, code: int, text: str = "") -> None:
        """Press and release a key of a Windows key code; ``text`` is what it types."""
        pressed = {"key": key, "code": key, "windowsVirtualKeyCode": code}
        self.call("Input.dispatchKeyEvent", type="keyDown", **pressed, **({"text": text} if text else {}))
        self.call("Input.dispatchKeyEvent", type="keyUp", **pressed)

    def drag(self, start: tuple[float, float], stop: tuple[float, float]) -> None:
        """Press the left button at one place of the window and let it go at another."""
        for kind, (x, y), buttons in (
            ("mousePressed", start, 1),
            ("mouseMoved", stop, 1),
            ("mouseReleased", stop, 0),
        ):
            mouse = {"x": x, "y": y, "button": "left", "buttons": buttons, "clickCount": 1}
            self.call("Input.dispatchMouseEvent", type=kind, **mouse)

    def look(self, width: int, height: int, scheme: str) -> None:
        """Take the window's size in CSS pixels and the reader's colour scheme, "light" or "dark"."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def screenshot(self, path: Path) -> None:
        """Write a picture of the whole page as PNG."""
        picture = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(picture["data"]))

    def complaints(self) -> list[str]:
        """Exceptions, console errors and warnings, and log entries since the page was opened."""
        self.evaluate("null")  # what was sent before its answer has come by now
        kinds = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")
        return [json.dumps(event["params"]) for event in self.events if event.get("method") in kinds]

    def addresses(self) -> list[str]:
        """Every address the page asked for since it was opened."""
        self.evaluate("null")
        asked = (e["params"] for e in self.events if e.get("method") == "Network.requestWillBeSent")
        return [parameters["request"]["url"] for parameters in asked]

    def __enter__(self) -> Chromium:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for end in (self._to_browser[1], self._from_browser[0]):
            os.close(end)  # the browser leaves when its pipe ends
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
