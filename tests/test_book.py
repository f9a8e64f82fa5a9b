"""The book: the gate before it, the numbers in it, and pages that need nothing from elsewhere."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat
import pytest
import yaml
from browser import CONTRAST, Browser
from bs4 import BeautifulSoup
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from editkit.base.errors import ConfigError, DataError
from editkit.cli import main
from editkit.press import book
from editkit.press import notebook as nb
from editkit.press.format import format_value
from editkit.press.inputs import key, prepare
from editkit.press.layout import Layout
from editkit.press.quote import Lookup, Runs, agreement, other_execution
from editkit.press.reference import references
from editkit.press.study import load_study

pytestmark = pytest.mark.xdist_group("book")

ROOT = Path(__file__).resolve().parents[1]
SVG = '<svg width="100%" role="img"><title>t</title><path style="stroke: var(--ek-ink, #232426)"/></svg>'
PAGE = """\
# Welcome

The score is {val}`demo:score`, bare {val}`demo:score bare`, coarse {val}`demo:score .0%`,
once {val}`demo@reference:score`, elsewhere {val}`elsewhere:seconds`.
See {numref}`fig-demo` and {numref}`tab-demo`.

$$ W + \\Delta = \\operatorname{argmin}_A f(A) $$

```{run-figure} demo:curve
:name: fig-demo
```

```{run-table} demo:scores
:name: tab-demo
:columns: method, score
```

```{run-explorer} demo:graph
Facts: nobody's, no licence.
```

```{run-explorer} elsewhere:curve
```
"""


def sidecar(layout, run, score, **more):
    """The sidecar of a finished run, as `editkit run` writes it."""
    record = key(run, layout.root, {"opened": [], "modules": {}, "packages": {}})
    value = {
        "value": score,
        "lo": score - 0.01,
        "hi": score + 0.01,
        "n": 100,
        "unit": "",
        "note": "ROME protocol",
    }
    return {
        "schema": 1, "run_id": run.run_id, "alias": run.spec.alias, "title": run.spec.title, "tags": [],
        "study": "default", "notebook": run.spec.notebook, "started": "2026-01-02T03:04:05+00:00",
        "wall_seconds": 1.5,
        "git": {"commit": "0123456789abcdef", "dirty": False},
        "parameters": [{"name": "n", "type": "int", "value": 7, "default": 3, "help": "how many"}],
        "values": {"score": value | {"fmt": ".1%"}},
        "tables": {"scores": {"file": "scores.csv", "caption": "Scores.", "fmt": {"score": ".1%"},
                              "columns": ["method", "n", "score"], "rows": 2}},
        "figures": {"curve": {"file": "curve.svg", "data": "curve.data.csv", "caption": "A curve; n = 7.",
                              "alt": "t"},
                    "graph": {"file": "graph.svg", "data": "graph.data.csv", "caption": "A graph.", "alt": "g"}},
        "timings": {"edit": 0.25}, "packages": {"python": "3.11", "torch": "2.0"},
        "hardware": {"processor": "a CPU", "cores": 2, "memory_gib": 4.0, "accelerators": [],
                     "torch_threads": 1, "system": "Linux"},
        "peak_memory_mib": {"host": 123.4, "accelerator": None}, "stderr_cells": [],
        "inputs": record | {"hash": "f" * 64},
        **more,
    }  # fmt: skip


def put(folder, content, notebook=None):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.json").write_text(json.dumps(content))
    (folder / "scores.csv").write_text("method,n,score\nmemit,1200,0.987\nrome,7,\n")
    (folder / "curve.svg").write_text(SVG)
    (folder / "curve.data.csv").write_text("x\n1\n")
    (folder / "graph.svg").write_text(SVG)
    (folder / "graph.data.csv").write_text(
        "prompt,subject,answer,E to,E\n{} is,A </script>,b,1 2,0.9 0.5\n{} is,C,b,0,0.9\nIs {}?,D,é,,\n"
    )
    if notebook is not None:
        nbformat.write(notebook, folder / f"{content['run_id']}.ipynb")


def executed(template):
    done = nbformat.from_dict(template)
    injected = new_code_cell("n = 7", metadata={"tags": ["injected-parameters"]})
    done.cells.insert(2, injected)
    for cell in done.cells:
        if cell.cell_type == "code":
            cell.execution_count = 1
    text = '<text y="20" style="fill: var(--ek-ink, #232426)">label</text>'
    shown = f'<figure class="ek-figure"><svg>{text}</svg></figure>'
    done.cells[3].outputs = [new_output("stream", name="stdout", text="hello\n"),
                             new_output("display_data", data={"text/html": shown, "text/plain": "figure"}),
                             new_output("stream", name="stderr", text="a stray warning\n")]  # fmt: skip
    done.metadata["papermill"] = {"exception": None, "parameters": {"n": 7}}
    done.metadata["kernelspec"] = {"display_name": "Python 3", "language": "python", "name": "python3"}
    done.metadata["language_info"] = {"name": "python"}
    return done


def make_project(root):
    """A project with one finished run and two references, of which one has no run here."""
    for folder in ("studies", "notebooks"):
        (root / folder).mkdir()
    shutil.copytree(
        ROOT / "book" / "_ext", root / "book" / "_ext", ignore=shutil.ignore_patterns("__pycache__")
    )
    shutil.copytree(ROOT / "book" / "_static", root / "book" / "_static")
    shutil.copy2(ROOT / "_config.yml", root / "_config.yml")
    (root / "book" / "references.bib").write_text("@misc{a, title={A}, author={B}, year={2020}}\n")
    (root / "book" / "intro.md").write_text(PAGE)
    (root / "book" / "_toc.yml").write_text(yaml.safe_dump({"format": "jb-book", "root": "intro"}))
    cells = [new_markdown_cell("# Any title\n\nOwn number: {val}`:score bare`."),
             new_code_cell("n: int = 3  # how many", metadata={"tags": ["parameters"]}),
             new_code_cell("from editkit.press import start\nrun = start(globals())"),
             new_code_cell("run.finish()")]  # fmt: skip
    nbformat.write(new_notebook(cells=cells), root / "notebooks" / "demo.ipynb")
    (root / "studies" / "default.yaml").write_text(
        "runs:\n  - {notebook: notebooks/demo.ipynb, alias: demo, title: A demo, parameters: {n: 7}}\n"
    )
    layout = Layout(root)
    study = load_study(root / "studies" / "default.yaml")
    [run] = prepare(study.runs, root)
    put(layout.run_dir(run.run_id), sidecar(layout, run, 0.9871), executed(run.template))
    put(layout.results / "demo", sidecar(layout, run, 0.95, run_id="demo-of-old", started="2025-12-24T00:00:00+00:00"))
    elsewhere = {"value": 12.34, "lo": None, "hi": None, "n": None, "unit": "s", "note": "", "fmt": ".1f"}
    put(
        layout.results / "elsewhere",
        sidecar(
            layout,
            run,
            0.5,
            alias="elsewhere",
            run_id="elsewhere-1",
            title="",
            values={"seconds": elsewhere},
            figures={"curve": {"file": "curve.svg", "data": None, "caption": "A curve.", "alt": "t"}},
        ),
    )
    return layout, study, run


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    layout, study, run = make_project(tmp_path_factory.mktemp("book"))
    index, done, missing = book.build(study, layout)
    assert done and not missing
    return layout, study, run, index.parent


def soup(html, page):
    return BeautifulSoup((html / page).read_text(encoding="utf-8"), "html.parser")


def test_numbers_are_those_of_the_sidecars(built):
    values = soup(built[3], "intro.html").select("a.ek-val")
    assert [v.get_text() for v in values] == [
        "98.7\u202f% [97.7, 99.7]", "98.7\u202f%", "99\u202f% [98, 100]", "95.0\u202f% [94.0, 96.0]",
        "12.3\u202fs",
    ]  # fmt: skip
    assert values[0]["href"] == "runs/demo.html"
    assert "commit 01234567" in values[0]["title"] and "n = 100" in values[0]["title"]
    assert "ROME protocol" in values[0]["title"] and "95 % interval" in values[0]["title"]


def test_reference_results_are_marked_as_such(built):
    page = soup(built[3], "intro.html")
    marked = [v.get_text() for v in page.select("a.ek-val") if v.find_next_sibling("sup")]
    assert marked[-1] == "12.3\u202fs"
    titles = [v["title"] for v in page.select("a.ek-val")]
    assert [t.startswith("reference run") for t in titles] == [False, False, False, True, True]
    assert "not executed for this copy" in soup(built[3], "runs/elsewhere.html").get_text()


def test_figures_are_inlined_numbered_and_linked(built):
    page = soup(built[3], "intro.html")
    figure = page.select_one("figure#fig-demo")
    assert figure.select_one("svg[role=img] path") and "A curve; n = 7." in figure.figcaption.get_text()
    assert {"runs/demo.html", "runs/demo/curve.data.csv"} <= {a["href"] for a in figure.select("a")}
    assert [a.get_text() for a in page.select("a[href='#fig-demo'], a[href='#tab-demo']")][:2] == [
        "Fig. 1",
        "Table 1",
    ]


def test_tables_show_the_wanted_columns_formatted(built):
    table = soup(built[3], "intro.html").select_one("table#tab-demo")
    assert [th.get_text(strip=True) for th in table.select("th")] == ["method", "score"]
    assert [td.get_text(strip=True) for td in table.select("td")] == ["memit", "98.7\u202f%", "rome", "n/a"]


def test_the_page_of_a_run_says_where_it_comes_from(built):
    page = soup(built[3], "runs/demo.html")
    text = page.get_text()
    assert page.h1.get_text(strip=True).startswith("A demo") and "Own number: 98.7" in text
    for part in (
        "notebooks/demo.ipynb",
        "0123456789abcdef",
        "a CPU, 2 cores",
        "123 MiB",
        "torch 2.0",
        "n = 7",
        "how many",
    ):
        assert part in text
    assert "hello" in text and "a stray warning" not in text
    assert not page.find(string=re.compile("n = 7$")) or "injected" not in str(page)
    for link in page.select("a.ek-download"):
        assert (built[3] / "runs" / link["href"]).resolve().is_file() or (
            built[3] / link["href"][3:]
        ).is_file()


def test_long_code_is_folded_on_the_page_of_a_run(built):
    kinds = ((5, []), (40, []), (40, ["hide-cell"]))
    cells = [new_code_cell("x = 1\n" * n, metadata={"tags": tags}) for n, tags in kinds]
    shown = book.page(new_notebook(cells=cells), "demo", "A demo")
    tags = [cell.metadata.get("tags", []) for cell in shown.cells if cell.cell_type == "code"]
    assert tags == [[], ["hide-input"], ["hide-cell"]]


def test_this_run_stands_beside_the_reference_run(built):
    """0.9871 ± 0.01 here, 0.95 ± 0.01 in the reference: intervals apart, said on the page and at the number."""
    page = soup(built[3], "intro.html")
    [table] = page.select("table.ek-beside-table")
    assert [td.get_text() for td in table.select("tbody td")] == [
        "score ROME protocol", "98.7\u202f% [97.7, 99.7]; n = 100", "≠", "95.0\u202f% [94.0, 96.0]; n = 100", "",
    ]  # fmt: skip
    assert "1 beside the reference run (1 with intervals apart)" in page.select_one(".ek-beside summary").get_text()
    first = page.select_one("a.ek-val")
    assert first.find_next_sibling("sup").get_text() == "≠ref" and "reference run: 95.0" in first["title"]
    own = soup(built[3], "runs/demo.html")
    assert own.select("table.ek-beside-table") and not soup(built[3], "runs/index.html").select(".ek-beside")


def test_notebooks_behind_a_page_can_be_downloaded_and_run(built):
    for page in ("intro.html", "runs/demo.html", "runs/elsewhere.html"):
        found = soup(built[3], page)
        links = [a["href"] for a in found.select(".ek-beside a.ek-runnable")]
        menu = [a["href"] for a in found.select(".dropdown-download-buttons a.btn-download-notebook-button")]
        assert links and menu and set(menu) <= set(links)
        for link in links:
            notebook = nb.read_notebook((built[3] / page).parent / link)
            assert nb.check_notebook(notebook, link), "the runnable notebook, not a page"
    commands = [c.get_text() for c in soup(built[3], "intro.html").select(".ek-command")]
    assert "editkit run studies/default.yaml --only demo --force" in commands


@pytest.mark.parametrize(
    "mine, reference, expected",
    [
        ((0.5, 0.4, 0.6), (0.5, 0.1, 0.9), "overlap"),
        ((0.5, 0.4, 0.6), (0.5001, 0.4001, 0.6), "equal"),
        ((0.5, 0.4, 0.6), (0.7, 0.61, 0.8), "apart"),
        ((0.5, None, None), (0.7, 0.4, 0.8), "differs"),
        ((None, None, None), (None, None, None), "equal"),
    ],
)
def test_agreement_of_two_executions(mine, reference, expected):
    records = [
        dict(zip(("value", "lo", "hi"), ends), n=None, unit="", note="", fmt=".2f") for ends in (mine, reference)
    ]
    assert agreement(*records) == expected
    run, copy = {"started": "2026-01-01"}, {"started": "2026-01-01"}
    assert not other_execution({"run": run, "reference": copy}) and not other_execution({"run": run})
    assert other_execution({"run": run, "reference": {"started": "2026-01-02"}})


def test_a_graph_can_be_explored_without_network(built):
    page = soup(built[3], "intro.html")
    [script] = page.select("script[data-explorer]")
    assert page.find(id=script["data-explorer"], class_="ek-explorer").noscript
    code = (built[3] / script["src"]).read_text(encoding="utf-8")
    data = json.loads(code[code.rindex("exploreGraph(") + len("exploreGraph(") : code.rindex(");")])
    assert data["subjects"] == ["A </script>", "C", "D"] and data["answers"] == ["b", "é"]
    assert [s["name"] for s in data["scores"]] == ["E"] and data["note"] == "Facts: nobody's, no licence."
    assert "runs/demo/graph.data.csv" in {a["href"] for a in page.select("p.ek-explorer-source a")}
    assert "made from the full results of the run" in page.select_one("div.admonition.note").get_text()
    assert "fetch(" not in code and "http" not in code


def test_every_local_link_and_anchor_resolves(built):
    html = built[3]
    pages = {path: soup(html, path) for path in html.rglob("*.html") if "_static" not in path.parts}
    for path, page in pages.items():
        for link in page.select("a[href]"):
            url = urlsplit(link["href"])
            if url.scheme or url.netloc or link["href"] == "#":
                continue
            target = (path.parent / unquote(url.path)).resolve() if url.path else path
            assert target.exists(), f"{path.name} links to {link['href']}"
            if url.fragment and target in pages:
                assert pages[target].find(id=url.fragment), f"{path.name}: no anchor {link['href']}"


def test_nothing_is_loaded_from_other_hosts(built):
    html = built[3]
    for path in html.rglob("*.html"):
        if "_static" in path.parts:
            continue
        for tag in soup(html, path).select("script[src], link[href], img[src], iframe[src], source[src]"):
            address = tag.get("src") or tag.get("href")
            assert not urlsplit(address).netloc, f"{path.name} loads {address}"
            local = (path.parent / unquote(urlsplit(address).path)).resolve()
            assert local.exists(), f"{path.name} loads {address}, which is not there"
    for style in html.rglob("*.css"):
        assert not re.findall(r"url\(\s*['\"]?(?:https?:)?//[^)]*", style.read_text(errors="replace")), (
            style.name
        )


def test_mathematics_needs_no_network(built):
    script = built[3] / "_static" / "mathjax" / "tex-svg-full.js"
    assert script.stat().st_size > 10**6
    assert any(
        "mathjax/tex-svg-full.js" in s["src"] for s in soup(built[3], "intro.html").select("script[src]")
    )


def test_a_second_build_does_nothing_and_a_changed_number_is_never_stale(built):
    layout, study, run, html = built
    before = (html / "intro.html").stat().st_mtime_ns
    assert book.build(study, layout) == (html / "index.html", False, {})
    assert (html / "intro.html").stat().st_mtime_ns == before
    path = layout.run_dir(run.run_id) / "run.json"
    text = path.read_text()
    try:
        changed = json.loads(text)
        changed["values"]["score"]["value"] = 0.123
        path.write_text(json.dumps(changed))
        assert book.build(study, layout)[1]
        assert soup(html, "intro.html").select_one("a.ek-val").get_text().startswith("12.3\u202f%")
    finally:
        path.write_text(text)
        book.build(study, layout)


# -------------------------------------------------------------------- what is refused


def test_a_number_nobody_recorded_stops_the_build(tmp_path, capfd):
    layout, study, _ = make_project(tmp_path)
    with (layout.root / "book" / "intro.md").open("a") as page:
        page.write("\n{val}`demo:scroe` and {val}`dmeo:score`\n\n```{run-figure} demo:curves\n```\n")
    with pytest.raises(ConfigError, match="not built"):
        book.build(study, layout)
    printed = capfd.readouterr().err
    for message in ("no value 'scroe'; it has: score", "no run 'dmeo'", "no figure 'curves'"):
        assert message in printed


def test_a_failed_notebook_stops_the_build(tmp_path):
    layout, study, run = make_project(tmp_path)
    path = layout.notebook(run.run_id)
    broken = nbformat.read(path, as_version=4)
    broken.cells[3].outputs = [new_output("error", ename="ValueError", evalue="no", traceback=[])]
    nbformat.write(broken, path)
    with pytest.raises(DataError, match="must not be published: cell 3 raised ValueError"):
        book.build(study, layout)


def test_a_run_without_any_result_is_a_page_that_says_why(tmp_path, capfd):
    """The book can be opened all the same, is built anew the next time, and the command says what is missing."""
    layout, study, run = make_project(tmp_path)
    shutil.rmtree(layout.run_dir(run.run_id))
    assert set(book.gather(study, layout)[0]["demo"]) == {"reference", "reference_folder", "why"}
    shutil.rmtree(layout.results / "demo")
    layout.outcome(run.run_id).parent.mkdir(parents=True)
    layout.outcome(run.run_id).write_text(json.dumps({"status": "failed", "message": "ZeroDivisionError: oh"}))
    command = ["book", "studies/default.yaml", "--root", str(tmp_path)]
    assert main(command) == 1
    printed = capfd.readouterr()
    assert "Open" in printed.out and "missing page: runs/demo (failed: ZeroDivisionError: oh)" in printed.err
    html = layout.root / "book" / "_build" / "html"
    assert "ZeroDivisionError: oh" in soup(html, "runs/demo.html").get_text()
    assert "[missing: demo:score]" in soup(html, "intro.html").get_text()
    assert soup(html, "intro.html").select_one("a.ek-val").get_text().startswith("12.3")  # of another run
    layout.outcome(run.run_id).write_text(json.dumps({"status": "unavailable", "message": "needs a GPU"}))
    assert main(command) == 0 and "unavailable: needs a GPU" in soup(html, "runs/demo.html").get_text()


def test_a_run_that_is_not_available_shows_its_reference_and_says_so(tmp_path):
    layout, study, run = make_project(tmp_path)
    shutil.rmtree(layout.run_dir(run.run_id))
    layout.outcome(run.run_id).parent.mkdir(parents=True)
    layout.outcome(run.run_id).write_text(json.dumps({"status": "unavailable", "message": "needs data:x"}))
    assert book.stage(study, layout, tmp_path / "source") == {}
    page = (tmp_path / "source" / "runs" / "demo.md").read_text()
    assert "not executed for this copy of the book (needs data:x). Shown are the committed reference results." in page


def make_stale(folder):
    path = folder / "run.json"
    content = json.loads(path.read_text())
    content["inputs"]["files"] = {"editkit/models/facts.py": "old"}
    path.write_text(json.dumps(content))


def test_stale_results_give_way_to_others_and_are_marked_wherever_they_stand(tmp_path):
    layout, study, run = make_project(tmp_path)
    make_stale(layout.run_dir(run.run_id))
    found = book.gather(study, layout)[0]["demo"]
    assert found["run"]["stale"] == ["editkit/models/facts.py changed"] and not found["reference"]["stale"]
    runs = Runs({"demo": found})
    assert runs.find("demo")[1] == "reference" and runs.find("demo", page="demo")[1] == "run"
    assert runs.item("demo@run:score", "values")[3] == "run"
    make_stale(layout.results / "demo")
    make_stale(layout.results / "elsewhere")
    index, _, _ = book.build(study, layout)
    page = soup(index.parent, "intro.html")
    for quoted in page.select("a.ek-val"):
        following = [mark.get_text() for mark in quoted.find_next_siblings("sup", limit=2)]
        assert "stale" in following and "STALE: editkit/models/facts.py changed" in quoted["title"]
    assert len(page.select("figcaption sup.ek-stale, caption sup.ek-stale")) == 2


def test_a_reworded_notebook_gives_a_reworded_page(tmp_path):
    layout, study, run = make_project(tmp_path)
    path = layout.root / run.spec.notebook
    path.write_text(path.read_text().replace("Own number", "Our number"))
    book.stage(study, layout, tmp_path / "source")
    page = nbformat.read(tmp_path / "source" / "runs" / "demo.ipynb", as_version=4)
    assert "Our number" in page.cells[0].source and page.cells[3].outputs[0].text == "hello\n"


def test_pages_that_are_not_there_are_named(tmp_path):
    layout, study, _ = make_project(tmp_path)
    toc = {"format": "jb-book", "root": "intro", "chapters": [{"file": "runs/dmeo"}]}
    (layout.root / "book" / "_toc.yml").write_text(yaml.safe_dump(toc))
    with pytest.raises(DataError, match=r"runs/dmeo.*demo"):
        book.stage(study, layout, tmp_path / "source")


def test_runs_can_be_placed_in_chapters_and_the_rest_is_appended(tmp_path):
    layout, study, _ = make_project(tmp_path)
    toc = {
        "format": "jb-book",
        "root": "intro",
        "parts": [{"caption": "A", "chapters": [{"file": "runs/demo"}]}],
    }
    (layout.root / "book" / "_toc.yml").write_text(yaml.safe_dump(toc))
    book.stage(study, layout, tmp_path / "source")
    staged = yaml.safe_load((tmp_path / "source" / "_toc.yml").read_text())
    appendix = staged["parts"][-1]["chapters"]
    assert appendix == [{"file": "runs/index", "sections": [{"file": "runs/elsewhere"}]}]


def test_labels_in_a_notebook_that_makes_several_pages_are_refused(tmp_path):
    layout, _, _ = make_project(tmp_path)
    path = layout.root / "notebooks" / "demo.ipynb"
    notebook = nbformat.read(path, as_version=4)
    notebook.cells.append(new_markdown_cell("(sec-here)=\n## Here"))
    nbformat.write(notebook, path)
    (layout.root / "studies" / "default.yaml").write_text(
        "runs: [{notebook: notebooks/demo.ipynb, grid: {n: [1, 2]}}]"
    )
    with pytest.raises(ConfigError, match="sec-here"):
        book.gather(load_study(layout.root / "studies" / "default.yaml"), layout)


# -------------------------------------------------------------------- in a browser


CHROMIUMS_OWN = re.compile(r"(clients\d*|accounts|update|optimizationguide-pa)\.(google|googleapis)\.com")


@pytest.fixture(scope="module")
def chromium():
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    return found or pytest.skip("no Chromium or Chrome was found: browser checks are left out")


def test_a_browser_sets_the_mathematics_and_asks_nobody(built, chromium, tmp_path):
    log = tmp_path / "net.json"
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync"]
    options += [
        "--disable-background-networking",
        "--disable-component-update",
        "--virtual-time-budget=10000",
    ]
    options += [f"--user-data-dir={tmp_path / 'profile'}", f"--log-net-log={log}", "--dump-dom"]
    address = (built[3] / "intro.html").as_uri()
    done = subprocess.run([chromium, *options, address], capture_output=True, text=True, timeout=240)
    page = BeautifulSoup(done.stdout, "html.parser")
    assert page.select("mjx-container svg"), "MathJax did not run"
    assert not page.select("mjx-merror, [data-mjx-error]"), "a formula is wrong"
    hosts = {urlsplit(url).hostname for url in re.findall(r'"url":"(https?://[^"]+)"', log.read_text())}
    foreign = {host for host in hosts if not CHROMIUMS_OWN.fullmatch(host)}
    assert not foreign, f"requests to {foreign}"


@pytest.fixture(scope="module")
def window(chromium):
    made = Browser(chromium)
    yield made
    made.close()


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_figures_of_an_executed_notebook_can_be_read_in_both_themes(built, window, dark):
    window.open(built[3] / "runs" / "demo.html", dark=dark)
    assert window.evaluate("document.querySelectorAll('.cell_output figure svg text').length") == 1
    assert not window.evaluate(CONTRAST)


def test_the_explorer_answers_a_click(built, window):
    window.open(built[3] / "intro.html")
    head = "document.querySelector('.ek-explorer-head').textContent"
    before = window.evaluate(head)
    window.evaluate("document.querySelector('.ek-explorer-columns button').click()")
    assert before and window.evaluate(head) != before
    assert not window.console and all(url.startswith(("file:", "data:")) for url in window.requests)


# -------------------------------------------------------------------- this repository


STUDIES = sorted((ROOT / "studies").glob("*.yaml"))
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", STUDIES, ids=lambda p: p.stem)
def test_studies_fit_their_notebooks(path):
    assert prepare(load_study(path).runs, ROOT)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebooks_declare_typed_and_commented_parameters(path):
    notebook = nb.read_notebook(path)
    for parameter in nb.check_notebook(notebook, path.name).values():
        assert parameter.type and parameter.help, f"{path.name}: {parameter.name} needs a type and a comment"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebooks_are_stored_without_outputs_and_run_anywhere(path):
    notebook = nbformat.read(path, as_version=4)
    cells = notebook.cells
    assert notebook.metadata.kernelspec.name == "python3", "plain papermill needs to know the kernel"
    assert not [i for i, c in enumerate(cells) if c.get("outputs") or c.get("execution_count")]


def test_the_table_of_contents_lists_pages_that_exist():
    known = {run.alias for path in STUDIES for run in load_study(path).runs}
    for file in book._files(yaml.safe_load((ROOT / "book" / "_toc.yml").read_text())):
        run = file.removeprefix("runs/")
        assert (run in known) if file.startswith("runs/") else any(
            (ROOT / "book" / f"{file}{suffix}").is_file() for suffix in (".md", ".ipynb")
        ), f"_toc.yml lists {file}"  # fmt: skip


def test_quoted_numbers_agree_with_the_formatter():
    """The book and the notebooks print through the same function."""
    record = {"value": 0.5, "lo": None, "hi": None, "n": None, "unit": "", "note": "", "fmt": None}
    runs = Runs({"a": {"run": {"values": {"k": record}}}})
    assert format_value(runs.item("a:k", "values")[0]) == "0.5"
    for target in ("a", "a:", ":k", "a@reference:k", "b:k"):
        with pytest.raises(Lookup):
            runs.item(target, "values")


# References made before the runner silenced tqdm's note about widgets. A new reference leaves this list.
NOISY = {
    "clare-applications", "clare-graph", "compare-methods", "horse-ablation", "horse-cost", "horse-main",
    "horse-main-1280", "horse-training", "labyrinth-ability", "labyrinth-ability-long", "labyrinth-ablation",
    "labyrinth-conflicts", "labyrinth-exactness", "labyrinth-tables", "labyrinth-tables-2000",
}  # fmt: skip


def test_reference_runs_wrote_nothing_to_stderr():
    noisy = {
        sidecar["alias"]: sidecar["stderr_cells"]
        for sidecar, _ in references(Layout(ROOT)).values()
        if sidecar["stderr_cells"]
    }
    assert not set(noisy) - NOISY, "the cells of these notebooks print warnings or progress bars"
