"""Set-up: pins, metadata, package data, light imports, the Makefile."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import editkit
from editkit import cli

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def test_environment_yml_equals_the_constraints():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    [pip] = [entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict)]
    assert pip[-1] == "-e .[book,test,real]"
    assert dict(line.split("==") for line in pip[:-1]) == pins()
    [python] = [entry for entry in environment["dependencies"] if str(entry).startswith("python=")]
    assert Requirement(f"python{PROJECT['requires-python']}").specifier.contains(python.split("=")[1])


def test_every_direct_dependency_is_pinned_to_a_version_it_allows():
    pinned = {canonicalize_name(name): version for name, version in pins().items()}
    for text in [
        *PROJECT["dependencies"],
        *(t for e in ("book", "test", "real") for t in PROJECT["optional-dependencies"][e]),
    ]:
        requirement = Requirement(text)
        version = pinned.get(canonicalize_name(requirement.name))
        assert version, f"{requirement.name} is not pinned: run `make pins`"
        assert requirement.specifier.contains(version, prereleases=True), f"{text}, but {version} is pinned"


def test_pins_have_no_local_versions():
    """A suffix such as +cpu exists on one index only; the plain version installs everywhere."""
    assert not [pin for pin in pins().items() if "+" in pin[1]]


def test_jupyter_book_stays_below_two():
    assert pins()["jupyter-book"].startswith("1.")


def test_the_companion_ships_with_the_package():
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"][
        "editkit"
    ]
    assert "corpora/world/companion/*" in patterns


@pytest.mark.parametrize("name", editkit.__all__)
def test_public_names_are_there(name):
    assert name in dir(editkit) and getattr(editkit, name) is not None


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = editkit.nothing


def test_importing_editkit_is_light():
    """The command line answers quickly: torch and the rest are imported when used."""
    code = (
        "import sys, editkit.cli; print(sorted({'torch', 'transformers', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_subcommand_registers_itself():
    parser = cli.make_parser()
    [action] = [a for a in parser._actions if a.dest == "command"]
    assert set(cli.COMMANDS) <= set(action.choices)
    for name, module in cli.COMMANDS.items():
        [alone] = [a for a in cli.make_parser([name])._actions if a.dest == "command"]
        assert name in alone.choices, f"{module} does not register {name!r}"


def test_mistakes_end_in_one_line(capsys, tmp_path):
    assert cli.main(["run", str(tmp_path / "none.yaml"), "--root", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("editkit run: cannot read the study") and error.count("\n") == 1


# What a plain `pip install editkit` gives: the modules of the extras are not there.
WITHOUT_EXTRAS = """
import sys
class Without:
    def __init__(self, finders):
        self.finders = finders
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in {blocked!r}:
            return next(filter(None, (f.find_spec(name, path, target) for f in self.finders)), None)
    def find_distributions(self, *of):
        return [d for f in self.finders if hasattr(f, "find_distributions") for d in f.find_distributions(*of)]
sys.meta_path = [Without(sys.meta_path)]
"""
LIBRARY = ("base", "linear", "models", "locate", "scoring", "corpora", "methods", "entanglement")


def closure(*texts: str) -> set[str]:
    """Names of the distributions of these requirements and of all that they need."""
    found, queue = set(), [Requirement(text) for text in texts]
    while queue:
        requirement = queue.pop()
        name = canonicalize_name(requirement.name)
        if name not in found and (not requirement.marker or requirement.marker.evaluate({"extra": ""})):
            found.add(name)
            queue += map(Requirement, metadata.requires(name) or ()) if name in INSTALLED else ()
    return found


INSTALLED = {canonicalize_name(d.metadata["Name"]) for d in metadata.distributions() if d.metadata["Name"]}


def modules(distributions: set[str]) -> set[str]:
    """Modules that these distributions provide."""
    provided = metadata.packages_distributions()
    return {m for m, found in provided.items() if distributions & {canonicalize_name(d) for d in found}}


def names_of(*texts: str) -> set[str]:
    return modules({canonicalize_name(Requirement(text).name) for text in texts})


def imports(room: str) -> set[str]:
    """Third-party modules that a room imports anywhere, also inside functions."""
    found = set()
    for path in (ROOT / "editkit" / room).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                found.add(node.module.partition(".")[0])
    return found - set(sys.stdlib_module_names) - {"editkit"}


def test_the_library_needs_its_own_dependencies_and_no_others():
    used, core = set().union(*map(imports, LIBRARY)), names_of(*PROJECT["dependencies"])
    optional = names_of(*PROJECT["optional-dependencies"]["real"])
    assert used <= core | optional, f"not among the dependencies: {used - core - optional}"
    for text in PROJECT["dependencies"]:
        assert names_of(text) & used, f"no room of the library imports {text}"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel's content, unpacked far from the repository."""
    copy, unpacked = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("site")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy2(ROOT / name, copy)
    shutil.copytree(ROOT / "editkit", copy / "editkit", ignore=shutil.ignore_patterns("__pycache__"))
    build = "from setuptools import build_meta; print(build_meta.build_wheel('.'))"
    done = subprocess.run([sys.executable, "-c", build], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    zipfile.ZipFile(copy / done.stdout.split()[-1]).extractall(unpacked)
    return unpacked


def run_wheel(wheel: Path, code: str, *command: str) -> subprocess.CompletedProcess:
    """Run in an empty folder with the wheel's package and without what the extras bring."""
    extras = PROJECT["optional-dependencies"]
    core = closure(*PROJECT["dependencies"])
    blocked = modules(closure(*extras["book"], *extras["real"]) - core) - modules(core)
    assert {"papermill", "matplotlib", "sphinx", "nbformat"} <= blocked
    code = WITHOUT_EXTRAS.format(blocked=blocked) + code
    environment = {k: v for k, v in os.environ.items() if not k.startswith("EDITKIT")} | {
        "PYTHONPATH": str(wheel), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    (wheel / "empty").mkdir(exist_ok=True)
    return subprocess.run([sys.executable, "-c", code, *command], cwd=wheel / "empty", env=environment,
                          capture_output=True, text=True)  # fmt: skip


def test_the_wheel_edits_a_fact_without_repository_and_extras(wheel):
    code = """
import editkit
from editkit.corpora import real
from editkit.corpora.world import load_companion, load_world, records
from editkit.scoring import generate
from editkit.methods import presets
from editkit.studies import published
lm, fact = load_companion(), records.edit_facts(load_world(), 1, seed=7)[0]
editor = editkit.make_editor("ft", lm, layers=[3], steps=30)
editor.edit([fact])
assert fact.target in generate(lm, [fact.text], max_new_tokens=8)[0].text
editor.restore()
assert len(real.load().statements()) > 1000 and len(published.table("labyrinth", "main"))
print(editkit.__file__)
"""
    done = run_wheel(wheel, code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(wheel / "editkit" / "__init__.py")
    assert list(wheel.glob("editkit-*.dist-info/licenses/LICENSE"))


def test_a_command_that_lacks_an_extra_names_it(wheel):
    (wheel / "empty").mkdir(exist_ok=True)
    (wheel / "empty" / "s.yaml").write_text("title: T\nruns: [{notebook: n.ipynb, alias: a}]\n")
    code = "import runpy; sys.argv[0] = 'editkit'; runpy.run_module('editkit', run_name='__main__')"
    assert "COMMAND" in run_wheel(wheel, code, "--help").stdout
    done = run_wheel(wheel, code, "run", "s.yaml")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "editkit[book]" in done.stderr, (
        done.stderr
    )


def test_the_project_says_licence_citation_and_changes():
    assert "MIT License" in (ROOT / "LICENSE").read_text() and PROJECT["license"] == "MIT"
    assert (ROOT / "CHANGELOG.md").read_text().startswith("# Changelog")
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert (
        citation["version"] == PROJECT["version"] == editkit.__version__ and len(citation["references"]) == 4
    )
    bibliography = " ".join(
        (ROOT / "book" / "references.bib").read_text().replace("{", "").replace("}", "").split()
    )
    for paper in citation["references"]:
        [number] = [i["value"] for i in paper["identifiers"]]
        assert paper["title"] in bibliography and number in bibliography
        assert all(a["family-names"] in bibliography for a in paper["authors"])


def test_packed_data_has_its_licence_beside_it():
    packed = ROOT / "editkit" / "corpora" / "packed"
    data = [path for path in packed.iterdir() if path.suffix in (".xz", ".gz")]
    assert data
    for path in data:
        assert "Permission is hereby granted" in (packed / f"{path.name.partition('.')[0]}.LICENSE").read_text()
    assert "Licence: MIT" in (ROOT / "editkit" / "corpora" / "world" / "companion" / "README.md").read_text()


def make(*arguments: str) -> str:
    command = ["make", "--no-print-directory", "-n", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


def test_make_book_installs_runs_and_builds(tmp_path):
    plan = make("book", f"VENV={tmp_path / 'venv'}", "PROFILE=full")
    order = [
        "-m venv",
        "pip install",
        "-c constraints.txt",
        "run studies/full.yaml",
        "book studies/full.yaml",
    ]
    places = [plan.index(text) for text in order]
    assert places == sorted(places)


def test_make_test_runs_pytest_after_the_same_setup(tmp_path):
    plan = make("test", f"VENV={tmp_path / 'venv'}")
    assert plan.index("pip install") < plan.index("-m pytest")


def test_make_installs_again_only_when_the_requirements_change(tmp_path):
    plan = make("setup", f"VENV={tmp_path}")
    stamp = re.search(
        rf"{re.escape(str(tmp_path))}/\.installed-\d+", make("-p", "setup", f"VENV={tmp_path}")
    ).group()
    assert "pip install" in plan
    Path(stamp).touch()
    assert "pip install" not in make("setup", f"VENV={tmp_path}")


def test_make_names_the_missing_python(tmp_path):
    done = subprocess.run(
        ["make", "setup", "PYTHON=", f"VENV={tmp_path / 'venv'}"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode != 0 and "Python 3.11 or newer" in done.stdout


def test_ci_calls_make_test():
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & 0o111 and script.read_text().rstrip().endswith("exec make test")
