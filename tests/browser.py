"""A headless Chromium for tests, driven over its DevTools pipe: no driver, no port, no further package."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
MISSING = (
    "no Chromium or Chrome was found on the PATH, so nothing was looked at in a browser; "
    "install one (Debian: apt install chromium) to run these checks"
)
OPTIONS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--disable-extensions", "--hide-scrollbars",
    "--allow-file-access-from-files", "--remote-debugging-pipe",
)  # fmt: skip
# Contrast of a text with what lies behind it, by the formula of WCAG 2.
CONTRAST = """
(() => {
  const channel = c => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
  const parts = s => (s.match(/[\\d.]+/g) || [0, 0, 0]).map(Number);
  const light = s => {
    const [r, g, b] = parts(s).map(channel);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const back = e => {
    for (; e; e = e.parentElement) {
      const c = getComputedStyle(e).backgroundColor, p = parts(c);
      if (p.length < 4 || p[3] > 0.5) return c;
    }
    return 'rgb(255, 255, 255)';
  };
  const poor = [];
  const look = (e, color) => {
    const a = light(color), b = light(back(e)), ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) poor.push(e.textContent.trim().slice(0, 40) + ' ' + ratio.toFixed(1));
  };
  document.querySelectorAll('main figure svg text').forEach(e => look(e, getComputedStyle(e).fill));
  document.querySelectorAll('main .ek-val, main .ek-verdict, main .ek-rule, main figcaption, main .ek-entry-origin')
    .forEach(e => look(e, getComputedStyle(e).color));
  return poor;
})()
"""
# What of a page's content sticks out of it, is cut, or is printed on top of something else.
LAYOUT = """
(() => {
  const wide = document.documentElement.clientWidth, bad = [];
  const say = (what, e) => bad.push(what + ': ' + (e.closest('[id]')?.id || '') + ' "' +
    (e.textContent || '').trim().replace(/\\s+/g, ' ').slice(0, 50) + '"');
  const shown = e => e.getClientRects().length && getComputedStyle(e).visibility !== 'hidden';
  const scrolls = e => {
    for (; e && e.tagName !== 'MAIN'; e = e.parentElement)
      if (['auto', 'scroll'].includes(getComputedStyle(e).overflowX)) return true;
    return false;
  };
  if (document.documentElement.scrollWidth > wide + 1) bad.push('the page scrolls sideways');
  const kinds = 'main :is(table, pre, figure, p, li, h1, h2, h3, .math, .ek-entry, svg, img)';
  for (const e of document.querySelectorAll(kinds)) {
    if (!shown(e)) continue;
    const r = e.getBoundingClientRect();
    if (r.right > wide + 1 && !scrolls(e)) say('sticks out', e);
    const style = getComputedStyle(e);
    if (style.overflowX === 'hidden' && e.scrollWidth > e.clientWidth + 2 && !e.closest('mjx-container')) say('cut', e);
  }
  for (const table of document.querySelectorAll('main table')) {
    const box = table.closest('.ek-scroll, .pst-scrollable-table-container, .ek-table') || table;
    if (shown(table) && box.scrollWidth > box.clientWidth + 2) {
      const cell = table.querySelector('tbody td, tbody th');
      if (!['auto', 'scroll'].includes(getComputedStyle(box).overflowX)) say('table is cut', table);
      else if (cell && getComputedStyle(cell).position !== 'sticky') say('first column leaves', table);
    }
  }
  for (const svg of document.querySelectorAll('main figure svg')) {
    const texts = [...svg.querySelectorAll('text')].filter(t => t.textContent.trim())
      .map(t => ({text: t.textContent.trim(), id: t.closest('[id]').id, r: t.getBoundingClientRect()}));
    const box = svg.getBoundingClientRect();
    texts.forEach((a, i) => {
      if (a.r.left < box.left - 2 || a.r.right > box.right + 2) bad.push(`label leaves its figure: ${a.id} ${a.text}`);
      texts.slice(i + 1).forEach(b => {
        const w = Math.min(a.r.right, b.r.right) - Math.max(a.r.left, b.r.left);
        const h = Math.min(a.r.bottom, b.r.bottom) - Math.max(a.r.top, b.r.top);
        const small = Math.min(a.r.width * a.r.height, b.r.width * b.r.height);
        if (w > 0 && h > 0 && w * h > 0.35 * small) bad.push(`labels overlap: ${a.id} ${a.text} / ${b.text}`);
      });
    });
  }
  return bad;
})()
"""


def find_browser() -> str | None:
    """Path of a Chromium or Chrome, if this machine has one."""
    return next(filter(None, map(shutil.which, NAMES)), None)


def _high(descriptor: int) -> int:
    """A copy well above 3 and 4, which the shell is going to overwrite."""
    copy = fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, 20)
    os.close(descriptor)
    return copy


class Browser:
    """One page of a headless browser; what happens on it is collected in `console` and `requests`."""

    def __init__(self, program: str, timeout: float = 120.0):
        self.timeout = timeout
        self.profile = tempfile.TemporaryDirectory(prefix="editkit-browser-", ignore_cleanup_errors=True)
        to_read, self._write = map(_high, os.pipe())
        self._read, to_write = map(_high, os.pipe())
        # Chromium reads commands from descriptor 3 and answers on 4.
        command = [program, *OPTIONS, f"--user-data-dir={self.profile.name}", "about:blank"]
        shell = f'exec 3<&{to_read} 4>&{to_write} {to_read}<&- {to_write}>&-; exec "$@"'
        self.process = subprocess.Popen(
            ["bash", "-c", shell, "bash", *command], pass_fds=(to_read, to_write),
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(to_read)
        os.close(to_write)
        self._buffer, self._count, self._session = b"", 0, None
        self.console: list[str] = []
        self.requests: list[str] = []
        self._loaded = False
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def close(self) -> None:
        try:
            self._session = None
            self.call("Browser.close")
            self.process.wait(20)
        except (OSError, TimeoutError, RuntimeError, subprocess.TimeoutExpired):
            self.process.kill()
            self.process.wait()
        finally:
            os.close(self._write)
            os.close(self._read)
            self.profile.cleanup()

    # ---------------------------------------------------------------- protocol

    def call(self, method: str, **parameters):
        """Send one command and return its result."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        wanted = self._count
        answer = self._pump(lambda m: m.get("id") == wanted, method)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error'].get('message')}")
        return answer["result"]

    def _pump(self, done, what: str) -> dict:
        end = time.monotonic() + self.timeout
        while True:
            while b"\0" in self._buffer:
                raw, self._buffer = self._buffer.split(b"\0", 1)
                message = json.loads(raw)
                self._note(message)
                if done(message):
                    return message
            ready, _, _ = select.select([self._read], [], [], max(0.0, end - time.monotonic()))
            if not ready:
                raise TimeoutError(f"the browser did not answer to {what} within {self.timeout:.0f} s")
            chunk = os.read(self._read, 1 << 20)
            if not chunk:
                raise RuntimeError("the browser has ended")
            self._buffer += chunk

    def _note(self, message: dict) -> None:
        method, data = message.get("method"), message.get("params", {})
        if method == "Runtime.consoleAPICalled" and data["type"] in ("error", "assert"):
            self.console.append(" ".join(str(a.get("value", a.get("description", ""))) for a in data["args"]))
        elif method == "Runtime.exceptionThrown":
            details = data["exceptionDetails"]
            self.console.append(details.get("exception", {}).get("description") or details["text"])
        elif method == "Log.entryAdded" and data["entry"]["level"] == "error":
            self.console.append(f"{data['entry']['text']} {data['entry'].get('url', '')}".strip())
        elif method == "Network.requestWillBeSent":
            self.requests.append(data["request"]["url"])
        elif method == "Page.loadEventFired":
            self._loaded = True

    # ---------------------------------------------------------------- what tests use

    def open(self, path: Path | str, *, width: int = 1200, dark: bool = False, fragment: str = "") -> None:
        """Load a local page at a window width and theme, wait for it and for its mathematics."""
        self.console.clear()
        self.requests.clear()
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=900,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setEmulatedMedia", features=scheme)
        self._loaded = False
        self.call("Page.navigate", url=Path(path).resolve().as_uri() + fragment)
        if not self._loaded:
            self._pump(lambda m: m.get("method") == "Page.loadEventFired", "loading the page")
        self.evaluate("Promise.resolve(window.MathJax?.startup?.promise)")
        self.evaluate("new Promise(done => setTimeout(done, 100))")

    def resize(self, width: int, *, media: str = "") -> None:
        """Another window width, or "print", for the page that is open."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=900,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        self.call("Emulation.setEmulatedMedia", media=media)
        self.evaluate("new Promise(done => setTimeout(done, 50))")

    def evaluate(self, expression: str):
        """The value of a JavaScript expression; promises are awaited."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(answer["exceptionDetails"]["exception"].get("description", "exception"))
        return answer["result"].get("value")

    def screenshot(self, clip: dict | None = None, *, scale: float = 1.0, full: bool = False) -> bytes:
        """PNG of the window, of the whole page (`full`) or of a rectangle {x, y, width, height} of it."""
        options = {"clip": {**clip, "scale": scale}} if clip else {}
        return base64.b64decode(
            self.call("Page.captureScreenshot", captureBeyondViewport=bool(clip or full), **options)["data"]
        )
