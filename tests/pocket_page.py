"""The page "Try it" without the book around it: its panels, scripts and model in a folder, for the tests of both."""

from __future__ import annotations

import functools
import shutil
import sys
import tempfile
from pathlib import Path

from editkit.press.pocket import write_page

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "book" / "_ext"))
import try_it  # noqa: E402

# The colours that the book's theme defines (light).
THEME = """:root { --pst-color-text-base: #222832; --pst-color-text-muted: #48566b; --pst-color-border: #d1d5da;
  --pst-color-surface: #f3f4f5; --pst-color-background: #fff; }
"""


@functools.cache
def standalone() -> Path:
    """index.html with all panels; it lives as long as the process."""
    keep = tempfile.TemporaryDirectory(prefix="editkit-try-it-")
    standalone.keep = keep  # removed with the process
    root = Path(keep.name)
    write_page(root)
    for path in try_it.SOURCES.glob("*.js"):
        shutil.copyfile(path, root / path.name)
    style = THEME + "".join(
        (ROOT / "book" / "_static" / name).read_text(encoding="utf-8")
        for name in ("companion.css", "try_it.css")
    )
    panels = "".join(f'<div class="ek-try" data-try="{name}"></div>' for name in try_it.PANELS)
    scripts = "".join(f'<script defer src="{name}"></script>' for name in try_it.SCRIPTS)
    (root / "index.html").write_text(
        '<!doctype html><html lang="en" data-theme="light"><meta charset="utf-8"><title>Try it</title>'
        f'<meta name="viewport" content="width=device-width"><style>{style}</style>'
        f"<main>{panels}</main>{scripts}</html>",
        encoding="utf-8",
    )
    return root / "index.html"


def open_page(browser, state: str = "", **options) -> None:
    """Open the page and wait until the model is there and the link's edits are done."""
    browser.call("Page.navigate", url="about:blank")  # another fragment alone would load nothing
    browser.evaluate("new Promise(done => setTimeout(done, 200))")
    browser.open(standalone(), fragment=f"#{state}" if state else "", **options)
    wait(browser)


def wait(browser) -> None:
    """Until the page is ready and no job runs."""
    ready = "document.documentElement.dataset.try === 'ready' && Pocket.idle"
    browser.evaluate(
        f"new Promise(done => {{ const look = () => {ready} ? done() : setTimeout(look, 50); look(); }})"
    )
