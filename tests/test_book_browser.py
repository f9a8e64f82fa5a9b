"""Key pages in a headless browser, from the file system: mathematics, figures, both themes, a phone, the search.

Left out, with a plain message, where no Chromium or Chrome is installed.
"""

from __future__ import annotations

import io

import numpy as np
import pytest
from browser import CONTRAST, LAYOUT, MISSING, Browser, find_browser
from PIL import Image
from whole_book import whole_book

pytestmark = pytest.mark.xdist_group("book")

PAGES = ("intro", "try_it", "ledger", "howto_read", "glossary", "labyrinth/derivation", "foundations/world",
         "foundations/metrics", "contributing/method", "api/methods", "runs/index", "horse/main",
         "troubleshooting/errors", "runs/clare-prediction")  # fmt: skip
# Figures of references from before `plotting.thin_tick_labels` and `spread_labels`; goes when they are made anew.
OLD = (
    "clare-graph",
    "compare-methods",
    "horse-cost",
    "labyrinth-exactness",
    "lifelong-cost",
    "lifelong-generalisation",
)
AWAITED = tuple(f"labels overlap: {alias}-" for alias in OLD)
FORMULAS = "[...document.querySelectorAll('main .math')]"
FIGURES = "[...document.querySelectorAll('main figure svg, main figure img')]"


@pytest.fixture(scope="module")
def browser():
    program = find_browser()
    if program is None:
        pytest.skip(MISSING)
    made = Browser(program)
    yield made
    made.close()


def built(page: str):
    path = whole_book() / f"{page}.html"
    return path if path.is_file() else pytest.skip(f"{page} is not in the table of contents")


@pytest.mark.parametrize("page", PAGES)
def test_a_page_opens_without_errors_and_asks_no_other_host(browser, page):
    browser.open(built(page))
    assert not browser.console
    foreign = [url for url in browser.requests if not url.startswith(("file:", "data:", "blob:"))]
    assert not foreign, f"{page} asks for {foreign}"
    assert browser.evaluate("document.querySelector('main h1').textContent.trim().length") > 3


@pytest.mark.parametrize("page", ["labyrinth/derivation", "glossary"])
def test_all_mathematics_is_typeset(browser, page):
    browser.open(built(page))
    number = browser.evaluate(f"{FORMULAS}.length")
    assert number > 10
    assert browser.evaluate(f"{FORMULAS}.filter(e => !e.querySelector('mjx-container svg')).length") == 0
    assert browser.evaluate("document.querySelectorAll('mjx-merror, [data-mjx-error]').length") == 0
    sizes = browser.evaluate(f"{FORMULAS}.map(e => e.getBoundingClientRect()).map(r => [r.width, r.height])")
    assert all(width > 2 and height > 2 for width, height in sizes), "a formula has no extent"


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("page", ["intro", "foundations/world"])
def test_figures_are_not_blank(browser, page, dark):
    browser.open(built(page), dark=dark)
    places = browser.evaluate(
        f"{FIGURES}.map(e => e.getBoundingClientRect()).map(r => "
        "({x: r.x + scrollX, y: r.y + scrollY, width: r.width, height: r.height}))"
    )
    assert places, f"{page} has no figures"
    assert all(place["width"] > 100 and place["height"] > 50 for place in places)
    for place in places[:2]:  # each costs a drawing of the whole page
        picture = Image.open(io.BytesIO(browser.screenshot(place, scale=0.5))).convert("RGB")
        pixels = np.asarray(picture).reshape(-1, 3).astype(np.int64) @ (65536, 256, 1)
        colors, counts = np.unique(pixels, return_counts=True)
        assert len(colors) > 8 and counts.max() < 0.995 * len(pixels), f"a figure of {page} is blank"


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("page", ["intro", "try_it", "ledger", "foundations/world", "horse/main"])
def test_text_can_be_read_in_both_themes(browser, page, dark):
    browser.open(built(page), dark=dark)
    assert browser.evaluate("document.documentElement.dataset.theme") == ("dark" if dark else "light")
    poor = browser.evaluate(CONTRAST)
    assert not poor, f"too little contrast: {poor[:8]}"


def test_nothing_sticks_out_is_cut_or_overlaps_on_any_page(browser):
    """All pages at the widths of a desktop, a tablet and a phone, and on paper."""
    found = {}
    for path in sorted(whole_book().rglob("*.html")):
        if path.name in ("genindex.html", "search.html") or "_static" in path.parts:
            continue
        browser.open(path, width=1300)
        for width, media in ((1300, ""), (768, ""), (390, ""), (1000, "print")):
            browser.resize(width, media=media)
            bad = [b for b in browser.evaluate(LAYOUT) if not b.startswith(AWAITED)]
            if bad:
                found[f"{path.relative_to(whole_book())} at {width} {media}"] = bad[:5]
    assert not found, "\n".join(f"{page}: {bad}" for page, bad in found.items())


def test_a_wide_table_uses_the_room_and_a_narrow_window_keeps_its_first_column(browser):
    browser.open(built("labyrinth/tables"), width=1300)
    wide = "[...document.querySelectorAll('main table')].sort((a, b) => b.scrollWidth - a.scrollWidth)[0]"
    text = "document.querySelector('main article p').getBoundingClientRect().width"
    assert browser.evaluate(f"{wide}.clientWidth") >= browser.evaluate(text)
    browser.resize(390)
    left = f"{wide}.querySelector('tbody td').getBoundingClientRect().left"
    before = browser.evaluate(left)
    browser.evaluate(f"{wide}.scrollLeft = 200")
    assert browser.evaluate(f"{wide}.scrollLeft") > 50, "the widest table does not scroll on a phone"
    assert abs(browser.evaluate(left) - before) < 2


def test_a_phone_sees_a_sentence_and_a_picture_first(browser):
    browser.open(built("intro"), width=390)
    top = "document.querySelector('main article {}').getBoundingClientRect().top"
    assert browser.evaluate(top.format("p")) < 400
    assert browser.evaluate(top.format("figure")) < browser.evaluate(top.format("table"))
    assert browser.evaluate(top.format("figure")) < 900


@pytest.mark.parametrize("word", ["AlphaEdit", "TopHash", "HORSE", "second_moment", "entanglement"])
def test_the_search_finds_methods_functions_and_terms(browser, word):
    browser.open(built("search"), fragment=f"?q={word}")
    for _ in range(50):
        if browser.evaluate("document.querySelectorAll('#search-results li a').length"):
            break
        browser.evaluate("new Promise(done => setTimeout(done, 100))")
    assert browser.evaluate("document.querySelectorAll('#search-results li a').length") > 0
    assert not browser.console


def test_the_block_behind_a_page_unfolds_on_a_phone(browser):
    browser.open(built("horse/main"), width=390)
    browser.evaluate("document.querySelectorAll('.ek-beside details').forEach(e => e.open = true)")
    places = browser.evaluate(
        "[...document.querySelectorAll('.ek-beside-table td')].map(e => e.getBoundingClientRect())"
        ".map(r => [r.left, r.right])"
    )
    assert places and all(left >= 0 and right <= 390 for left, right in places)


def test_without_a_browser_the_message_says_so(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert find_browser() is None
    assert "no Chromium or Chrome was found" in MISSING and "apt install chromium" in MISSING
