"""The key of a run: everything that can change a number counts, nothing else does."""

from __future__ import annotations

import json
import os
import subprocess
import time

import nbformat
import pytest
from test_runs_execute import load, make_project, write_notebook

from editkit.base.errors import DataError
from editkit.base.sources import PACKAGE
from editkit.press import execute, inputs
from editkit.press.execute import CURRENT, FAILED, OK, run_all
from editkit.press.inputs import changes
from editkit.press.layout import finished, read_sidecar
from editkit.press.reference import collect

pytestmark = pytest.mark.xdist_group("kernels")

AUTHOR = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
BODY = """\
import os, sys
from pathlib import Path
root = Path(os.environ["EK_ROOT"])
sys.path.insert(0, str(root / "notebooks"))
import helper
import yaml
from editkit.methods.presets import presets
presets()
level = os.environ.get("EK_LEVEL", "0")
config = (root / "models" / "m" / "config.json").read_text()
run.value("a", helper.twice(n) + int(level))"""


def git(root, *arguments):
    subprocess.run(["git", *AUTHOR, *arguments], cwd=root, check=True, capture_output=True)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A run that reads a helper, a preset, a model and a variable, executed once on a commit."""
    root = tmp_path_factory.mktemp("key")
    layout = make_project(root, good=BODY)
    (root / "notebooks" / "helper.py").write_text("def twice(x):\n    return 2 * x\n")
    (root / "models" / "m").mkdir(parents=True)
    (root / "models" / "m" / "config.json").write_text("{}")
    (root / "models" / "m" / "model.safetensors").write_bytes(b"weights")
    (root / ".gitignore").write_text(".editkit\nbook/runs\nmodels\n")
    git(root, "init", "-q")
    git(root, "add", ".")
    git(root, "commit", "-q", "-m", "all")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EK_ROOT", str(root))
        patch.setenv("EK_LEVEL", "1")
        [run] = load(layout)
        assert [o.status for o in run_all([run], layout)] == [OK]
        yield layout


def test_what_was_read_is_in_the_key(done):
    [run] = load(done)
    key = read_sidecar(done.run_dir(run.run_id))["inputs"]
    assert {"notebooks/helper.py", "models/m/config.json", "models/m/model.safetensors"} <= key["files"].keys()
    assert {"editkit/methods/presets/*", "editkit/methods/presets/__init__.py"} <= key["files"].keys()
    assert "PyYAML" in key["packages"] and {"EK_ROOT", "EK_LEVEL"} <= key["environment"].keys()
    foreign = ("/", "module:", "path:", ".editkit")
    assert not [name for name in key["files"] if "site-packages" in name or name.startswith(foreign)]
    assert changes(run, done) == [] and run_all([run], done)[0].status == CURRENT


@pytest.mark.parametrize(
    ("file", "text", "reason"),
    [
        ("notebooks/helper.py", "def twice(x):\n    return 3 * x\n", ["notebooks/helper.py changed"]),
        ("notebooks/helper.py", '"""Words."""\ndef twice(x):  # words\n    return 2 * x\n', []),
        ("models/m/model.safetensors", "doubled", ["models/m/model.safetensors changed"]),
        ("models/m/config.json", None, ["models/m/config.json changed"]),
    ],
)
def test_files_outside_the_package_count_by_what_they_say(done, file, text, reason):
    path = done.root / file
    before = path.read_bytes()
    path.unlink() if text is None else path.write_text(text)
    try:
        assert changes(load(done)[0], done) == reason
    finally:
        path.write_bytes(before)


def test_a_time_in_the_future_is_no_change(done):
    path = done.root / "notebooks" / "helper.py"
    os.utime(path, (time.time() + 1e6,) * 2)
    assert run_all(load(done), done)[0].status == CURRENT


def test_package_data_packages_and_variables_count(done, monkeypatch):
    [run] = load(done)
    monkeypatch.setenv("EK_LEVEL", "2")
    assert changes(run, done) == ["$EK_LEVEL changed"]
    monkeypatch.undo()
    monkeypatch.setenv("EK_ROOT", str(done.root))
    monkeypatch.setenv("EK_LEVEL", "1")
    monkeypatch.setattr(inputs, "_installed", lambda name: "0.1")
    assert "PyYAML changed" in changes(run, done)
    monkeypatch.setattr(inputs, "_installed", {**read_sidecar(done.run_dir(run.run_id))["inputs"]["packages"]}.get)
    path = PACKAGE / "methods" / "presets" / "gpt2-xl.toml"
    real = inputs.file_hash
    monkeypatch.setattr(inputs, "file_hash", lambda p: "another" if p == path else real(p))
    assert changes(run, done) == ["editkit/methods/presets/* changed"]


def test_checkpoints_are_dropped_when_the_package_has_changed(done, monkeypatch):
    [run] = load(done)
    before = execute._work_dir(run, done)
    (before / "checkpoint").write_text("half way")
    assert execute._work_dir(run, done) == before and (before / "checkpoint").exists()
    real = inputs.tree_hash
    monkeypatch.setattr(inputs, "tree_hash", lambda p: "another" if p == PACKAGE else real(p))
    assert execute._work_dir(run, done) != before and not before.exists()


def test_dirty_is_judged_by_what_was_read_and_never_turns_clean_by_itself(done):
    [run] = load(done)
    sidecar = read_sidecar(done.run_dir(run.run_id))
    assert sidecar["git"]["dirty"] is False and len(sidecar["git"]["commit"]) == 40
    path = done.root / "notebooks" / "good.ipynb"
    before = path.read_text()
    try:
        write_notebook(path, BODY + "\nrun.value('b', 1)")
        (done.root / "studies" / "other.yaml").write_text("runs: []")  # never read
        [run] = load(done)
        assert run_all([run], done)[0].status == OK
        assert read_sidecar(done.run_dir(run.run_id))["git"]["dirty"] is True
        git(done.root, "add", ".")
        git(done.root, "commit", "-q", "-m", "more")
        assert run_all([run], done)[0].status == CURRENT
        assert read_sidecar(done.run_dir(run.run_id))["git"]["dirty"] is True
        with pytest.raises(DataError, match="uncommitted"):
            collect([run.spec], done)
        assert run_all([run], done, force=True)[0].status == OK
        collect([run.spec], done)
    finally:
        path.write_text(before)
    with pytest.raises(DataError, match=r"stale .*notebook changed"):
        collect([run.spec], done)


@pytest.mark.parametrize("what", ["package", "notebook", "helper"])
def test_code_edited_during_the_run_is_refused(tmp_path, monkeypatch, what):
    """Whatever was read: nobody knows whether it was read before or after."""
    body = "import sys\nsys.path.insert(0, {!r})\nimport helper\nrun.value('a', 1)".format(str(tmp_path / "notebooks"))
    layout = make_project(tmp_path, good=body)
    (tmp_path / "notebooks" / "helper.py").write_text("x = 1\n")
    os.utime(tmp_path / "notebooks" / "helper.py", (1, 1))
    real, path = execute.call_worker, layout.root / "notebooks" / "good.ipynb"
    files = inputs.package_files()

    def edit(*arguments):
        found = real(*arguments)
        if what == "package":
            monkeypatch.setattr(inputs, "package_files", lambda: {**files, "editkit/press/report.py": "edited"})
        elif what == "helper":
            (tmp_path / "notebooks" / "helper.py").write_text("x = 2\n")
        else:
            write_notebook(path, "run.value('a', 2)")
        return found

    monkeypatch.setattr(execute, "call_worker", edit)
    [outcome] = run_all(load(layout), layout)
    names = {"package": "editkit/press/report.py", "notebook": "notebooks/good.ipynb", "helper": "notebooks/helper.py"}
    assert outcome.status == FAILED and outcome.message == f"{names[what]} edited during the run; run again"


def test_a_commit_during_the_run_is_not_credited(tmp_path, monkeypatch):
    layout = make_project(tmp_path, good="run.value('a', 1)")
    (tmp_path / ".gitignore").write_text(".editkit\nbook\n")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", "studies")
    git(tmp_path, "commit", "-q", "-m", "without the notebook")
    real = execute.call_worker

    def commit(*arguments):
        git(tmp_path, "add", ".")
        git(tmp_path, "commit", "-q", "-m", "with the notebook")
        return real(*arguments)

    monkeypatch.setattr(execute, "call_worker", commit)
    [run] = load(layout)
    assert run_all([run], layout)[0].status == OK
    state = read_sidecar(layout.run_dir(run.run_id))["git"]
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=tmp_path, capture_output=True, text=True).stdout.strip()
    assert state["dirty"] is True and state["commit"] != head


def test_a_changed_notebook_is_executed_and_a_reworded_one_is_not(tmp_path):
    layout = make_project(tmp_path, good="run.value('a', n)")
    [run] = load(layout)
    assert run_all([run], layout)[0].status == OK
    path = layout.root / "notebooks" / "good.ipynb"
    notebook = nbformat.read(path, as_version=4)
    notebook.cells[0].source = "# Other words"
    notebook.cells[3].source += "  # a comment"
    nbformat.write(notebook, path)
    assert run_all(load(layout), layout)[0].status == CURRENT
    write_notebook(path, "run.value('a', n + 1)")
    assert changes(load(layout)[0], layout) == ["notebook changed"]
    assert run_all(load(layout), layout)[0].status == OK
    assert finished(layout, run.run_id)[0]["values"]["a"]["value"] == 3
    assert sorted(p.name for p in layout.runs.iterdir()) == [run.run_id]


def test_a_result_of_before_is_stale(done):
    [run] = load(done)
    path = done.run_dir(run.run_id) / "run.json"
    text = path.read_text()
    sidecar = json.loads(text)
    del sidecar["inputs"]["files"]
    path.write_text(json.dumps(sidecar))
    try:
        assert changes(run, done) == [inputs.OLDER]
    finally:
        path.write_text(text)


def test_a_hub_model_counts_by_its_weights_and_by_what_main_is(tmp_path, monkeypatch):
    """Weights are opened by a library that Python does not hear of; a new revision moves `refs/main`."""
    import huggingface_hub.constants

    (tmp_path / "p").mkdir()
    layout = make_project(tmp_path / "p", good="run.value('a', 1)")
    hub = tmp_path / "hub"
    model = hub / "models--a--b"
    for folder in ("refs", "blobs", "snapshots/r1"):
        (model / folder).mkdir(parents=True)
    (model / "refs" / "main").write_text("r1")
    for name, blob in (("config.json", "c1"), ("model.safetensors", "w1")):
        (model / "blobs" / blob).write_text(blob)
        (model / "snapshots" / "r1" / name).symlink_to(model / "blobs" / blob)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(hub))
    [run] = load(layout)
    opened = [str(model / "refs" / "main"), str(model / "snapshots" / "r1" / "config.json")]
    key = inputs.key(run, layout.root, {"opened": opened, "modules": {}, "packages": {}})
    base = "hub:models--a--b/"
    assert key["files"][f"{base}snapshots/r1/model.safetensors"] == "w1"  # named by content, not read
    assert inputs.stale(key, run.template, run.parameters, layout.root) == []
    (model / "refs" / "main").write_text("r2")
    assert inputs.stale(key, run.template, run.parameters, layout.root) == [f"{base}refs/main changed"]
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "elsewhere"))
    assert len(inputs.stale(key, run.template, run.parameters, layout.root)) == 3
    assert inputs.stale(key, run.template, None, layout.root) == []  # a reference, on a machine without the model
