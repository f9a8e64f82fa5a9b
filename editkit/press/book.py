"""Building the book: stage the pages with the runs they quote, refuse what is not whole, build strictly."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import nbformat
import yaml

from ..base.errors import ConfigError, DataError
from ..base.sources import PACKAGE, digest, tree_hash
from . import benchmarks
from . import notebook as nb
from .inputs import prepare, stale
from .layout import SIDECAR, Layout, finished, sidecar_files
from .reference import references
from .study import RunSpec, Study

MANIFEST = "_runs.json"
PAGES = "runs"
LONG = 16  # lines of code; a longer cell is folded on the page of a run
_LABEL = re.compile(r"^\(([\w:.-]+)\)=\s*$|^:(?:name|label):\s*(\S+)\s*$", re.M)


def build(study: Study, layout: Layout, *, force: bool = False) -> tuple[Path, bool, dict[str, dict]]:
    """Build the HTML book from finished runs; returns (index.html, whether it had to be built, missing runs).

    Always from scratch: an incremental build would keep stale numbers on pages that quote other pages.
    Runs without a result and without a reference get a page that says why; the book is built nevertheless, and what
    quotes them says that it is missing. Without such runs every warning counts as an error.
    Raises DataError when a failed notebook lies among the finished, ConfigError when the build has warnings.
    """
    target = layout.root / "book" / "_build"
    source, html, stamp = target / "source", target / "html", target / "stamp"
    index = html / "index.html"
    missing = stage(study, layout, source)
    state = digest(
        tree_hash(source),
        tree_hash(layout.root / "_config.yml"),
        *(path.read_text(encoding="utf-8") for path in sorted(PACKAGE.rglob("*.py"))),
        *(
            f"{name} {metadata.version(name)}"
            for name in ("jupyter-book", "sphinx", "sphinx-book-theme", "myst-nb")
        ),
    )
    if not force and index.is_file() and stamp.is_file() and stamp.read_text() == state:
        return index, False, missing
    stamp.unlink(missing_ok=True)
    for old in (html, target / ".doctrees"):
        shutil.rmtree(old, ignore_errors=True)
    command = "import sys; from jupyter_book.cli.main import main; sys.exit(main())"
    arguments = ["build", str(source), "--path-output", str(target.parent), "--all", "-q"]
    arguments += [] if missing else ["-W", "-n", "--keep-going"]
    arguments += ["--toc", str(source / "_toc.yml")]
    arguments += ["--config", str(layout.root / "_config.yml")]
    done = subprocess.run([sys.executable, "-c", command, *arguments], stdin=subprocess.DEVNULL)
    if done.returncode != 0 or not index.is_file():
        raise ConfigError("the book was not built: see the warnings above (every warning counts as an error)")
    stamp.write_text(state)
    return index, True, missing


# -------------------------------------------------------------------- staging


def stage(study: Study, layout: Layout, source: Path) -> dict[str, dict]:
    """Write the whole source tree of the book to `source`; returns {alias: {"status", "message"}} of missing runs."""
    pages = layout.root / "book"
    manifest, missing = gather(study, layout)
    shutil.rmtree(source, ignore_errors=True)
    shutil.copytree(pages, source, ignore=lambda folder, names: _ignored(pages, folder, names))
    for alias, entry in manifest.items():
        _stage_run(alias, entry, layout, source)
    public = {
        alias: {k: v for k, v in entry.items() if k in ("run", "reference")}
        for alias, entry in manifest.items()
    }
    (source / MANIFEST).write_text(json.dumps(public), encoding="utf-8")
    if (layout.root / benchmarks.FOLDER).is_dir():
        shutil.copytree(layout.root / benchmarks.FOLDER, source / benchmarks.STAGED)
    (source / PAGES).mkdir(exist_ok=True)
    (source / PAGES / "index.md").write_text(_INDEX, encoding="utf-8")
    for alias, why in missing.items():
        (source / PAGES / f"{alias}.md").write_text(
            _MISSING_PAGE.format(alias=alias, **why), encoding="utf-8"
        )
    _write_toc(pages / "_toc.yml", source, [*manifest, *missing])
    return missing


def _ignored(pages: Path, folder: str, names: list[str]) -> set[str]:
    top = {"_build", "runs"} if Path(folder) == pages else set()
    return {n for n in names if n in top or n in ("__pycache__", ".ipynb_checkpoints")}


def gather(study: Study, layout: Layout) -> tuple[dict[str, dict], dict[str, dict]]:
    """({alias: {"run": this study's sidecar, "reference": committed sidecar, ...}}, {alias of a missing run: why}).

    Sidecars get "stale": why they would be executed again (empty when nothing has changed); entries get "why": what
    became of the last attempt, where there was one. Raises DataError for failed notebooks among the finished.
    """
    manifest: dict[str, dict] = {}
    why: dict[str, dict] = {}
    templates: dict[str, nbformat.NotebookNode | None] = {}
    _refuse_shared_labels(study, layout.root)
    for run in prepare(study.runs, layout.root):
        spec, outcome = run.spec, layout.outcome(run.run_id)
        templates[spec.notebook] = run.template
        known = outcome.is_file()
        why[spec.alias] = (
            json.loads(outcome.read_text()) if known else {"status": "failed", "message": "not executed yet"}
        )
        done = finished(layout, run.run_id)
        if done is not None:
            sidecar, notebook = done
            sidecar |= {"title": spec.title, "study": spec.study, "tags": spec.tags}
            sidecar["stale"] = stale(sidecar["inputs"], run.template, run.parameters, layout.root)
            if sidecar["inputs"]["notebook"] == nb.code_hash(run.template):
                notebook = nb.with_prose(notebook, run.template)
            manifest[spec.alias] = {
                "run": sidecar,
                "notebook": notebook,
                "folder": layout.run_dir(run.run_id),
            }
    for alias, (sidecar, folder) in references(layout).items():
        name = sidecar["notebook"]
        if name not in templates:
            templates[name] = nb.read_notebook(layout.root / name) if (layout.root / name).is_file() else None
        sidecar["stale"] = stale(sidecar["inputs"], templates[name], None, layout.root)
        manifest.setdefault(alias, {}).update(reference=sidecar, reference_folder=folder, why=why.get(alias))
    missing = {run.alias: why[run.alias] for run in study.runs if run.alias not in manifest}
    return dict(sorted(manifest.items())), missing


def _refuse_shared_labels(study: Study, root: Path) -> None:
    """Labels in a notebook that makes several pages would point to an arbitrary one of them."""
    users: dict[str, list[RunSpec]] = {}
    for run in study.runs:
        users.setdefault(run.notebook, []).append(run)
    for name, runs in users.items():
        if len(runs) > 1 and (root / name).is_file():
            cells = nbformat.read(root / name, as_version=4).cells
            text = "\n".join(c.source for c in cells if c.cell_type == "markdown")
            if labels := [a or b for a, b in _LABEL.findall(text)]:
                raise ConfigError(
                    f"{name} makes {len(runs)} pages, so it must not define the labels {labels}; "
                    "put labels on hand-written pages"
                )


def _stage_run(alias: str, entry: dict, layout: Layout, source: Path) -> None:
    files = source / PAGES / alias
    files.mkdir(parents=True, exist_ok=True)
    if "reference" in entry:
        shutil.copytree(entry["reference_folder"], files / "reference")
    template = layout.root / entry.get("run", entry.get("reference"))["notebook"]
    if template.is_file():  # a reference may be of a notebook that is no longer there
        shutil.copy2(template, files / template.name)
    if "run" not in entry:
        why = entry.get("why")
        reason = f" ({why['message']})" if why else ""
        text = _REFERENCE_PAGE.format(alias=alias, title=entry["reference"]["title"] or alias, reason=reason)
        (source / PAGES / f"{alias}.md").write_text(text, encoding="utf-8")
        return
    sidecar, folder = entry["run"], entry["folder"]
    for file in (SIDECAR, f"{sidecar['run_id']}.ipynb", *sidecar_files(sidecar)):
        shutil.copy2(folder / file, files / file)
    made = page(entry["notebook"], alias, sidecar["title"], sidecar.get("says", ()))
    nbformat.write(made, source / PAGES / f"{alias}.ipynb")


def page(
    notebook: nbformat.NotebookNode, alias: str, title: str, says: Sequence[str] = ()
) -> nbformat.NotebookNode:
    """The executed notebook as a page: title and question, what came out (`says`), the injected parameters, long code
    folded, provenance.
    """
    new = nbformat.from_dict(json.loads(json.dumps(notebook)))
    cells = []
    for cell in new.cells:
        tags = cell.metadata.get("tags", [])
        if "injected-parameters" in tags:
            cells.append(_text("parameters", f"```{{run-parameters}} {alias}\n```"))
            continue
        long = cell.cell_type == "code" and cell.source.count("\n") >= LONG
        if ("parameters" in tags or long) and not any(tag.startswith(("hide-", "remove-")) for tag in tags):
            cell.metadata["tags"] = [*tags, "hide-input"]
        cells.append(cell)
    heading = next((c for c in cells if c.cell_type == "markdown" and re.match(r"#\s", c.source)), None)
    if heading is None:
        cells.insert(0, _text("title", f"# {title or alias}"))
    elif title:
        heading.source = re.sub(r"^#\s.*", lambda _: f"# {title}", heading.source, count=1)
    if says:
        cells.insert(1, _text("says", f"**What came out.** {' '.join(says)}"))
    cells.append(_text("provenance", f"```{{provenance}} {alias}\n```"))
    new.cells = cells
    new.metadata.pop("papermill", None)
    return new


def _text(name: str, source: str) -> nbformat.NotebookNode:
    """A text cell with a fixed id, so that equal inputs give equal pages."""
    return nbformat.v4.new_markdown_cell(source, id=f"companion-{name}")


def _write_toc(path: Path, source: Path, manifest: Sequence[str]) -> None:
    toc = yaml.safe_load(path.read_text(encoding="utf-8"))
    placed = set(_files(toc))
    absent = [
        file
        for file in sorted(placed)
        if not any((source / f"{file}{suffix}").is_file() for suffix in ("", ".md", ".ipynb", ".rst"))
    ]
    if absent:
        raise DataError(
            f"{path.name} lists pages that are not there: {absent}; runs/<alias> are pages of runs, "
            f"the known ones are {sorted(manifest)}"
        )
    rest = [{"file": f"{PAGES}/{alias}"} for alias in manifest if f"{PAGES}/{alias}" not in placed]
    appendix = {"file": f"{PAGES}/index"} | ({"sections": rest} if rest else {})
    if "parts" in toc:
        toc["parts"].append({"caption": "Appendix", "chapters": [appendix]})
    else:
        toc.setdefault("chapters", []).append(appendix)
    (source / "_toc.yml").write_text(yaml.safe_dump(toc, sort_keys=False), encoding="utf-8")


def _files(node) -> list[str]:
    """All files named in a table of contents."""
    if isinstance(node, list):
        return [file for item in node for file in _files(item)]
    if not isinstance(node, dict):
        return []
    own = [re.sub(r"\.(md|ipynb|rst)$", "", node[key]) for key in ("root", "file") if key in node]
    return own + [file for value in node.values() for file in _files(value)]


_INDEX = """# All runs

Every number, table and figure of this book comes from one of these runs.

```{run-list}
```
"""

_MISSING_PAGE = """# {alias}

```{{warning}}
This run has no result ({status}: {message}) and no committed reference, so its numbers are missing on other pages.
```
"""

_REFERENCE_PAGE = """# {title}

```{{note}}
This run was not executed for this copy of the book{reason}. Shown are the committed reference results.
```

```{{run-parameters}} {alias}
```

```{{run-results}} {alias}
```

```{{provenance}} {alias}
```
"""
