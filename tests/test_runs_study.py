"""Study files, declared parameters, and the hashes that decide what is executed: all before any kernel."""

from __future__ import annotations

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from editkit.base.errors import ConfigError
from editkit.base.sources import code_hash, digest, environment_names, source_hash, tree_hash
from editkit.press import notebook as nb
from editkit.press.command import parse_override
from editkit.press.inputs import prepare
from editkit.press.study import load_study, missing_files, parse_yaml

BODY = ("from editkit.press import start", "run = start(globals(), style=False)", "run.finish()")


def code(source, *tags):
    cell = new_code_cell(source)
    cell.metadata["tags"] = list(tags)
    return cell


def template(
    parameters="n: int = 3  # how many\nrate: float = 0.5  # speed [0..1]\nname: str = 'memit'  # method\n"
    "sizes: list = []  # sizes\nmore: dict = {}  # options",
    body=BODY,
):
    cells = [new_markdown_cell("# Title"), code(parameters, "parameters"), *(code(line) for line in body)]
    return new_notebook(cells=cells)


@pytest.fixture
def project(tmp_path):
    """A project folder with one notebook, and a function that loads a study written as text."""
    (tmp_path / "studies").mkdir()
    (tmp_path / "notebooks").mkdir()
    nbformat.write(template(), tmp_path / "notebooks" / "demo.ipynb")

    def load(text, overrides=None):
        path = tmp_path / "studies" / "default.yaml"
        path.write_text(text)
        return load_study(path, overrides)

    load.root = tmp_path
    return load


ENTRY = "runs:\n  - notebook: notebooks/demo.ipynb\n"


def test_a_grid_becomes_one_run_per_combination(project):
    study = project(
        "title: A study\n" + ENTRY + "    alias: demo-{name}-s{n}\n    title: Demo with {name}\n"
        "    parameters: {rate: 1e-3}\n    grid: {name: [memit, rome], n: [0, 1]}\n    tags: [labyrinth]\n"
    )
    assert [r.alias for r in study.runs] == ["demo-memit-s0", "demo-memit-s1", "demo-rome-s0", "demo-rome-s1"]
    assert study.runs[3].parameters == {"rate": 0.001, "name": "rome", "n": 1}
    assert study.runs[3].title == "Demo with rome"
    ids = [r.run_id for r in study.runs]
    assert len(set(ids)) == 4 and all(i.startswith(r.alias) for i, r in zip(ids, study.runs, strict=True))
    assert study.select(["labyrinth"]) == list(study.runs) == study.select(["demo"]) == study.select()
    assert study.select(["demo-rome-s1", ids[0]]) == [study.runs[0], study.runs[3]]
    assert study.find("demo-rome-s1") is study.find(ids[3]) is study.runs[3]


def test_run_ids_depend_on_parameters_and_not_on_their_order(project):
    def run_id(text):
        return project(ENTRY + f"    parameters: {text}\n").runs[0].run_id

    assert run_id("{n: 1, rate: 2.0}") == run_id("{rate: 2.0, n: 1}") != run_id("{n: 2, rate: 2.0}")


def test_an_alias_is_made_from_notebook_and_grid(project):
    assert [r.alias for r in project(ENTRY + "    grid: {n: [1, 2]}\n").runs] == ["demo-n-1", "demo-n-2"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("runs: 3\n", "list 'runs'"),
        ("runs: [\n", "not valid YAML"),
        ("run:\n  - x\n", "list 'runs'"),
        ("runs: []\nprofile: x\n", "unknown keys"),
        ("runs:\n  - alias: a\n", "at least 'notebook'"),
        (ENTRY + "    paramters: {n: 1}\n", "paramters"),
        (ENTRY + "    parameters: [n]\n", "wrong type"),
        (ENTRY + "    gpus: true\n", "wrong type"),
        (ENTRY + "    grid: {n: 3}\n", "non-empty lists"),
        (ENTRY + "    parameters: {n: 1}\n    grid: {n: [1, 2]}\n", "in 'parameters' and in 'grid'"),
        (ENTRY + "    alias: demo\n    grid: {n: [1, 2]}\n", "share the alias 'demo'"),
        (ENTRY + "    alias: demo-{seed}\n", "not a parameter"),
        (ENTRY + "    alias: ../up\n", "lower case"),
        (ENTRY + "include: other.yaml\n", "list of study files"),
        (ENTRY + "include: [default.yaml]\n", "includes itself"),
        (ENTRY + "include: [absent.yaml]\n", "cannot read the study"),
        (ENTRY + "    alias: a\n    alias: b\n", "(?s)'alias' stands twice.*line 4"),
        (ENTRY + "    parameters: {n: !!binary aGk=}\n", "(?s)tag .*binary.*line 3, column 21"),
        (ENTRY + "    tags: !!set {a, b}\n", "(?s)tag .*set.*line 3"),
        (ENTRY + "    title: !!timestamp 2024-01-01\n", "(?s)tag .*timestamp.*line 3"),
        (ENTRY + "    title: !mine x\n", "(?s)tag !mine.*line 3"),
        (ENTRY + "    parameters: &p {n: *p}\n", "(?s)anchors.*line 3"),
        (ENTRY + "    parameters: {n: " + 5000 * "9" + "}\n", "(?s)more than 30 signs.*line 3, column 21"),
        (ENTRY + "    parameters: {1: 2}\n", "(?s)a key must be a text.*line 3"),
        (ENTRY + "    parameters: {? [n] : 2}\n", "(?s)a key must be a text.*line 3"),
        (ENTRY + "    title: " + 2000 * "[" + 2000 * "]" + "\n", "nested too deeply"),
        (ENTRY + "    title: \0\n", "not valid YAML"),
    ],
)
def test_mistakes_in_study_files_are_named(project, text, message):
    with pytest.raises(ConfigError, match=message):
        project(text)


def test_included_studies_lend_their_runs(project):
    folder = project.root / "studies"
    (folder / "other.yaml").write_text(ENTRY + "    alias: other\n    parameters: {n: 5}\n")
    study = project(ENTRY + "    alias: own\ninclude: [other.yaml]\n", {"rate": 0.1})
    assert [(r.alias, r.study, r.parameters) for r in study.runs] == [
        ("own", "default", {"rate": 0.1}), ("other", "default", {"n": 5, "rate": 0.1}),
    ]  # fmt: skip
    alone = load_study(folder / "other.yaml", {"rate": 0.1})
    assert alone.runs[0].run_id == study.runs[1].run_id  # the same run, found again from either study
    with pytest.raises(ConfigError, match="share the alias 'other'"):
        project(ENTRY + "    alias: other\ninclude: [other.yaml]\n")
    (folder / "other.yaml").write_text("include: [default.yaml]\n")
    with pytest.raises(ConfigError, match="includes itself"):
        project(ENTRY + "include: [other.yaml]\n")


def test_a_name_that_selects_nothing_is_refused(project):
    with pytest.raises(ConfigError, match="no run 'dmeo'"):
        project(ENTRY).select(["demo", "dmeo"])


def test_yaml_means_what_people_write():
    text = "{a: 1e-5, b: 1E3, c: 1.5, d: 3, e: no, f: true, g: 2024-01-01, h: '1e-5', i: 1_0, j: -.5, k: 1e5x, l: }"
    assert parse_yaml(text) == {
        "a": 1e-5, "b": 1000.0, "c": 1.5, "d": 3, "e": "no", "f": True, "g": "2024-01-01", "h": "1e-5",
        "i": "1_0", "j": -0.5, "k": "1e5x", "l": None,
    }  # fmt: skip
    assert parse_yaml("[010, 12:30, 0x1F, .inf, .nan, 0, -3]") == ["010", "12:30", "0x1F", ".inf", ".nan", 0, -3]


def test_a_study_that_is_no_text_is_named(project):
    path = project.root / "studies" / "default.yaml"
    path.write_bytes(b"runs: \xff")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_study(path)


def test_overrides_replace_parameters_and_grid_axes(project):
    study = project(
        ENTRY + "    grid: {n: [1, 2]}\n    parameters: {rate: 0.1}\n", dict([parse_override("n=7")])
    )
    assert [r.parameters for r in study.runs] == [{"rate": 0.1, "n": 7}]
    assert parse_override("layers=[0, 1]") == ("layers", [0, 1])
    for text, message in (("n", "NAME=VALUE"), ("n=[", "-p n="), ("n=!!set {}", "tag")):
        with pytest.raises(ConfigError, match=message):
            parse_override(text)


# -------------------------------------------------------------------- parameters


def test_defaults_are_filled_in_and_types_checked(project):
    [run] = prepare(project(ENTRY + "    parameters: {rate: 1, more: {lam: -1}}\n").runs, project.root)
    assert run.parameters == {"n": 3, "rate": 1, "name": "memit", "sizes": [], "more": {"lam": -1}}
    assert run.declared["n"] == nb.Declared("n", "int", 3, "how many")


@pytest.mark.parametrize(
    ("given", "message"),
    [("{nn: 1}", "unknown parameter .*'nn'; did you mean 'n'"), ("{n: 1.5}", "declared as int"),
     ("{n: true}", "as int"), ("{name: 3}", "declared as str"), ("{n: 010}", "as int, got '010'"),
     ("{rate: .inf}", "declared as float"), ("{n: 0}", "n = 0; give a number above 0"), ("{n: -2}", "above 0"),
     ("{rate: 1.5}", r"rate = 1.5; give a number in \[0..1\]"), ("{rate: 1e999}", "finite"),
     ("{name: no, sizes: [1, 0]}", "sizes = 0; give a number above 0"), ("{sizes: [.5, x, [-1]]}", "sizes = -1"),
     ("{more: {lam: 1e999}}", "finite")],
)  # fmt: skip
def test_misspelt_and_mistyped_parameters_are_refused(project, given, message):
    """papermill would only warn, and run with the defaults."""
    with pytest.raises(ConfigError, match=message):
        prepare(project(ENTRY + f"    parameters: {given}\n").runs, project.root)


@pytest.mark.parametrize(
    ("notebook", "message"),
    [
        (new_notebook(cells=[code("n = 1"), *map(code, BODY)]), "exactly one code cell"),
        (new_notebook(cells=[code("n: int = 1", "parameters"), code("m: int = 1", "parameters")]), "found 2"),
        (template(parameters="n: int = 1 + 1  # not a literal"), "literal"),
        (template(parameters="n, m = 1, 2"), "cannot read the declaration 'n, m"),
        (template(parameters="n = 1"), "cannot read the declaration 'n = 1'"),
        (template(body=(*BODY, "n = n or 3")), r"a later cell assigns the parameter \['n'\]"),
        (template(body=(*BODY, "for n in [1]: pass")), r"assigns the parameter \['n'\]"),
        (template(body=BODY[:2]), r"the call .finish\(\)"),
        (template(body=BODY[2:]), "the call start"),
    ],
)
def test_unusable_notebooks_are_refused(notebook, message):
    notebook.metadata["kernelspec"] = {"display_name": "Python 3", "language": "python", "name": "python3"}
    with pytest.raises(ConfigError, match=message):
        nb.check_notebook(notebook, "demo.ipynb")


def test_names_of_inner_scopes_are_free():
    body = "[n for n in [1]]\ndef f(n):\n    n = 2\nx = lambda n: n"
    assert nb.check_notebook(template(body=(*BODY, body)), "demo.ipynb")


def test_unreadable_notebooks_are_named(tmp_path):
    with pytest.raises(ConfigError, match=r"no notebook .*gone\.ipynb"):
        nb.read_notebook(tmp_path / "gone.ipynb")
    (tmp_path / "bad.ipynb").write_text("{}")
    with pytest.raises(ConfigError, match="not a readable notebook"):
        nb.read_notebook(tmp_path / "bad.ipynb")


# -------------------------------------------------------------------- hashes


def test_prose_and_looks_do_not_count_as_code():
    base = template()
    reworded, tagged, edited, moved = (nbformat.from_dict(base) for _ in range(4))
    reworded.cells[0].source = "# Another title"
    tagged.cells[2].metadata["tags"] = ["hide-input"]
    tagged.cells[3].source += "  # a comment"
    edited.cells[3].source += "; x = 1"
    moved.cells[2].metadata["tags"] = ["parameters"]
    assert nb.code_hash(reworded) == nb.code_hash(tagged) == nb.code_hash(base)
    assert nb.code_hash(base) not in (nb.code_hash(edited), nb.code_hash(moved))


def test_words_do_not_change_a_source_hash(tmp_path):
    path = tmp_path / "m.py"
    path.write_text("def f():\n    return 1\n")
    old = source_hash(path)
    path.write_text('"""Module."""\n# a comment\ndef f():\n    """Words."""\n    return  1\n')
    assert source_hash(path) == old
    path.write_text("def f():\n    return 2\n")
    assert source_hash(path) != old
    assert source_hash(tmp_path / "gone.py") == "absent"
    read = 'def f():\n    """{}"""\nprint(f.__doc__)'
    assert code_hash(read.format("a")) != code_hash(read.format("b"))  # somebody reads the words
    assert code_hash("!ls") != code_hash("!pwd")


def test_environment_variables_are_found_by_name():
    text = "import os\nos.environ['A'], os.getenv('B', 1), os.environ.get('C'), 'D' in os.environ, os.environ[x]"
    assert environment_names(text) == {"A", "B", "C", "D"} and environment_names("!x") == set()


def test_tree_hash_sees_names_and_contents(tmp_path):
    assert tree_hash(tmp_path / "gone") == tree_hash(tmp_path) == "absent"
    (tmp_path / "a").write_text("1")
    one = tree_hash(tmp_path)
    (tmp_path / "a").rename(tmp_path / "b")
    two = tree_hash(tmp_path)
    (tmp_path / "b").write_text("22")
    assert len({one, two, tree_hash(tmp_path)}) == 3
    assert digest("ab", "c") != digest("a", "bc")


def test_required_data_is_found(project, monkeypatch, tmp_path_factory):
    data = tmp_path_factory.mktemp("data")
    monkeypatch.setenv("EDITKIT_DATA", str(data))
    [run] = project(ENTRY + "    inputs: [notebooks]\n    requires: ['data:clare/data.json']\n").runs
    assert missing_files(run, project.root) == ["data:clare/data.json"]
    (data / "clare").mkdir()
    (data / "clare" / "data.json").write_text("[]")
    assert missing_files(run, project.root) == []


# -------------------------------------------------------------------- the gate


def executed(*, outputs=(), count=1, exception=None):
    notebook = template()
    for cell in notebook.cells[1:]:
        cell.execution_count = 1
    notebook.cells[2].outputs, notebook.cells[2].execution_count = list(outputs), count
    notebook.metadata["papermill"] = {"exception": exception}
    return notebook


def test_the_gate_passes_whole_notebooks_only():
    raised = new_output("error", ename="ZeroDivisionError", evalue="division by zero", traceback=[])
    assert nb.failure(executed()) is None
    assert "ZeroDivisionError" in nb.failure(executed(outputs=[raised]))
    assert "exception" in nb.failure(executed(exception=True))
    assert "not executed" in nb.failure(executed(count=None))
    assert "papermill" in nb.failure(template())


def test_stderr_is_noticed():
    noise = new_output("stream", name="stderr", text="UserWarning: hm")
    assert nb.stderr_cells(executed(outputs=[noise])) == [2]
    assert nb.stderr_cells(executed(outputs=[new_output("stream", name="stdout", text="fine")])) == []


def test_refreshed_prose_keeps_outputs():
    old = executed(outputs=[new_output("stream", name="stdout", text="42")])
    injected = code("n = 5", "injected-parameters")
    injected.execution_count = 2
    old.cells.insert(2, injected)
    new = template()
    new.cells[0].source = "# New title"
    new.cells.insert(3, new_markdown_cell("A new paragraph."))
    new.cells[2].metadata["tags"] = ["hide-input"]
    fresh = nb.with_prose(old, new)
    kinds = [(c.cell_type, c.source) for c in fresh.cells]
    assert kinds[0] == ("markdown", "# New title") and kinds[2] == ("code", "n = 5")
    assert kinds[4] == ("markdown", "A new paragraph.")
    assert fresh.cells[3].outputs[0].text == "42" and fresh.cells[3].metadata["tags"] == ["hide-input"]
    assert nb.failure(fresh) is None
