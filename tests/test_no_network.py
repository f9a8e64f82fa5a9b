"""A tiny study and its pages with the network cut, as on a machine behind a firewall."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from test_runs_execute import write_notebook

pytestmark = pytest.mark.xdist_group("kernels")

ROOT = Path(__file__).resolve().parents[1]
STUDY = """\
runs:
  - notebook: notebooks/clare_corpus.ipynb
    alias: corpus
    parameters: {vocab_size: 500}
  - notebook: notebooks/one_edit.ipynb
    alias: edit
    parameters: {n_protected: 2}
  - notebook: notebooks/lifelong_hallucination.ipynb
    alias: elsewhere
    requires: [data:selfcheck/hallucination-edit.json]
  - notebook: notebooks/far.ipynb
    alias: far
"""
PAGE = "# A tiny book\n\nThe corpus has {val}`corpus:clare.facts bare` facts; the edit took {val}`edit:new`.\n"


def without_network() -> tuple[list[str], dict[str, str]]:
    """(command in front, environment): no interfaces where the system lets us, a proxy that refuses everywhere."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("EDITKIT_", "HF_")) and k.lower() != "no_proxy"}
    proxies = ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
    env |= dict.fromkeys(proxies, "http://127.0.0.1:9")
    cut = ["unshare", "--map-root-user", "--net"]
    allowed = shutil.which("unshare") and subprocess.run([*cut, "true"], capture_output=True).returncode == 0
    return cut if allowed else [], env


def test_a_study_and_its_pages_without_network(tmp_path):
    project = tmp_path / "project"
    for folder in ("book/_ext", "book/_static"):
        shutil.copytree(ROOT / folder, project / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for folder in ("studies", "notebooks"):
        (project / folder).mkdir()
    for name in ("clare_corpus", "one_edit", "lifelong_hallucination"):
        shutil.copy2(ROOT / "notebooks" / f"{name}.ipynb", project / "notebooks")
    write_notebook(project / "notebooks" / "far.ipynb", "from editkit.corpora import temporal\ntemporal.load()")
    shutil.copy2(ROOT / "_config.yml", project)
    (project / "studies" / "default.yaml").write_text(STUDY)
    (project / "book" / "references.bib").write_text("@misc{a, title={A}, author={B}, year={2020}}\n")
    (project / "book" / "_toc.yml").write_text(yaml.safe_dump({"format": "jb-book", "root": "intro"}))
    (project / "book" / "intro.md").write_text(PAGE)
    cut, env = without_network()
    env |= {"HOME": str(tmp_path / "home"), "EDITKIT_DOWNLOADS": str(tmp_path / "downloads"), "OMP_NUM_THREADS": "1"}
    for command in (["run", "--jobs", "2"], ["book"]):
        call = [*cut, sys.executable, "-m", "editkit.cli", command[0], "studies/default.yaml", *command[1:]]
        done = subprocess.run(call, cwd=project, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        if command[0] == "run":
            assert "2 executed, 0 unchanged, 2 not available here, 0 failed" in done.stdout
    html = project / "book" / "_build" / "html"
    assert "11,427" in (html / "intro.html").read_text()
    for alias, reason in (("elsewhere", "set EDITKIT_DATA"), ("far", "temporal_edit")):
        page = (html / "runs" / f"{alias}.html").read_text()
        assert "unavailable" in page and reason in page
