"""Draw book/_static/try_it_still.svg, the picture that stands in for the page "Try it" on paper.

    .venv/bin/python tools/try_it_still.py

Opens the page's own scripts in a headless Chromium, writes 300 edits without and with history, and keeps the curves.
A test compares the committed picture with what the page draws now.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))
from browser import MISSING, Browser, find_browser  # noqa: E402
from pocket_page import open_page, try_it  # noqa: E402

STILL = ROOT / "book" / "_static" / "try_it_still.svg"


def main() -> int:
    program = find_browser()
    if program is None:
        print(MISSING, file=sys.stderr)
        return 1
    browser = Browser(program)
    try:
        open_page(browser, try_it.STATES["labyrinth"])
        STILL.write_text(browser.evaluate("Pocket.picture()"), encoding="utf-8")
    finally:
        browser.close()
    print(STILL)
    return 0


if __name__ == "__main__":
    sys.exit(main())
