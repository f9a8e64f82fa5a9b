"""The whole book as built: strict build, links and anchors, references, alternative texts, nothing from elsewhere."""

from __future__ import annotations

import copy
import functools
import itertools
import json
import re
from urllib.parse import unquote, urlsplit

import pytest
from bs4 import BeautifulSoup
from pocket_page import try_it
from whole_book import ROOT, pages, whole_book

from editkit.press.format import format_value

pytestmark = pytest.mark.xdist_group("book")


_FENCED = re.compile(r"^(`{3,})([^\n]*)\n.*?^\1`*[ \t]*$", re.M | re.S)


@functools.cache
def parsed():
    """{path: page} of all built pages; building them is the first test: warnings are errors."""
    html = whole_book()
    return {
        path: BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser")
        for path in sorted(html.rglob("*.html"))
        if "_static" not in path.parts
    }


def test_every_page_of_the_contents_is_built_without_a_warning():
    names = {path.relative_to(whole_book()).with_suffix("").as_posix() for path in parsed()}
    wanted = {path.relative_to(ROOT / "book").with_suffix("").as_posix() for path in pages(ROOT / "book")}
    assert wanted <= names and len(names) > 20


def test_every_internal_link_and_anchor_resolves():
    anchors = {
        path: {tag.get(key) for key in ("id", "name") for tag in page.select(f"[{key}]")}
        for path, page in parsed().items()
    }
    broken, states = [], set()
    for path, page in parsed().items():
        states |= {link["href"].partition("#")[2] for link in page.select("a.ek-try-link")}
        for link in page.select("a[href]"):
            url = urlsplit(link["href"])
            if url.scheme or url.netloc or link["href"] in ("#", ""):
                continue
            target = (path.parent / unquote(url.path)).resolve() if url.path else path
            is_state = target.name == "try_it.html" and url.fragment not in anchors.get(target, ())
            if is_state and url.fragment:  # a state of that page, not a place on it
                if url.fragment not in try_it.STATES.values():
                    broken.append(f"{path.name}: {link['href']} is no prepared state")
            elif not target.exists():
                broken.append(f"{path.name}: {link['href']} is not there")
            elif url.fragment and target in anchors and unquote(url.fragment) not in anchors[target]:
                broken.append(f"{path.name}: no anchor {link['href']}")
    assert not broken, "\n".join(broken[:20])
    assert states == set(try_it.STATES.values()), "every chapter's state of the page Try it is linked somewhere"


def test_pages_load_nothing_from_other_hosts():
    for path, page in parsed().items():
        for tag in page.select("script[src], link[href], img[src], iframe[src], source[src], video[src]"):
            address = tag.get("src") or tag.get("href")
            if address.startswith("data:"):
                continue
            assert not urlsplit(address).netloc, f"{path.name} loads {address}"
            assert (path.parent / unquote(urlsplit(address).path)).resolve().exists(), (
                f"{path.name}: {address}"
            )


def test_every_picture_has_an_alternative_text():
    for path, page in parsed().items():
        for picture in page.select("main img"):
            assert picture.get("alt", "").strip(), f"{path.name}: {picture.get('src')} has no alt text"
        for picture in page.select("figure svg"):
            assert picture.get("aria-label", "").strip(), f"{path.name}: a figure has no alt text"


def test_no_reference_is_left_in_its_raw_form():
    """MyST prints a role or directive that it does not know as text."""
    for path, page in parsed().items():
        text = copy.copy(page.select_one("main") or page)  # the pages are shared by the tests
        for tag in text.select("pre, code, script, style, svg, .math, dt.sig"):
            tag.extract()
        raw = re.search(
            r"\{(?:val|doc|ref|numref|eq|term|cite|prf:ref|py:\w+)[\w:]*\}`|\[missing: |\$|`[\w.]+`|^:{3,}|\]\(\S",
            text.get_text(),
            re.M,
        )
        assert not raw, f"{path.name}: {raw}"


def test_every_quoted_number_is_that_of_its_sidecar():
    """All {val} of all pages, in their order, against the sidecars read as plain JSON."""
    checked = 0
    for source in pages(ROOT / "book"):
        text = _FENCED.sub(
            lambda m: m[0] if m[2].startswith("{") else "", source.read_text(encoding="utf-8")
        )
        wanted = [printed(*role.strip().partition(" ")[::2]) for role in re.findall(r"\{val\}`([^`]+)`", text)]
        path = whole_book() / source.relative_to(ROOT / "book").with_suffix(".html")
        roles = parsed()[path].select("a.ek-val:not(.ek-bench)")
        found = [a.get_text() for a in roles if not a.find_parent(class_="ek-entry")]
        assert found == wanted, source.name
        checked += len(wanted)
    assert checked > 300


def printed(target: str, option: str) -> str:
    """What {val}`target option` should print, from the committed sidecar."""
    alias, key = target.split(":", 1)
    sidecar = json.loads((whole_book.layout.results / alias.split("@")[0] / "run.json").read_text(encoding="utf-8"))
    option = option.strip()
    spec = None if option in ("", "bare") else option
    return format_value(sidecar["values"][key.strip()], spec=spec, interval=option != "bare")


def test_every_page_of_a_run_offers_its_notebook_parameters_and_data():
    for path, page in parsed().items():
        if path.parent.name != "runs" or path.name == "index.html":
            continue
        sidecar = json.loads((whole_book.layout.results / path.stem / "run.json").read_text(encoding="utf-8"))
        links = {a["href"] for a in page.select("a.ek-download")}
        assert f"../runs/{path.stem}/{sidecar['notebook'].split('/')[-1]}" in links, f"{path.name}: no notebook"
        names = {row.td.get_text(strip=True) for row in page.select("table.ek-parameters tbody tr")}
        assert {p["name"] for p in sidecar["parameters"]} == names, path.name
        for figure in sidecar["figures"].values():
            assert not figure["data"] or f"../runs/{path.stem}/reference/{figure['data']}" in links, path.name


def test_every_figure_and_table_of_a_run_links_to_it():
    for path, page in parsed().items():
        for caption in page.select("figure.ek-figure figcaption, table.ek-run-table:not(.ek-benchmarks) > caption"):
            links = caption.select("a[href*='runs/'], a[href$='.html'], a[href='#']")
            assert links, f"{path.name}: {caption.get_text()[:60]}"


def test_headings_have_one_title_and_no_gaps():
    for path, page in parsed().items():
        levels = [
            int(tag.name[1]) for tag in page.select("main article h1, main article h2, main article h3")
        ]
        if path.name in ("index.html", "genindex.html", "search.html", "py-modindex.html", "prf-prf.html"):
            continue
        assert levels.count(1) == 1, f"{path.name} has {levels.count(1)} titles"
        assert all(b - a <= 1 for a, b in itertools.pairwise(levels)), f"{path.name}: {levels}"


def test_the_search_index_knows_methods_and_terms():
    index = (whole_book() / "searchindex.js").read_text(encoding="utf-8")
    methods = ("memit", "alphaedit", "tophash", "gradsim", "memoir", "hors", "rledit", "malmen", "wise", "grace")
    for word in (*methods, "entangl", "make_editor", "second_mo"):
        assert word in index.lower(), f"search does not find {word}"


def test_the_reference_covers_every_package():
    text = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "book" / "api").glob("*.md"))
    for init in sorted((ROOT / "editkit").glob("*/__init__.py")):
        name = init.parent.name
        assert f"```{{api}} editkit.{name}\n" in text, f"book/api/ has no page for editkit.{name}"
