"""Set-up: pins, metadata, package data, light imports, the Makefile."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
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
    assert pip[-1] == "-e .[test,real]"
    assert dict(line.split("==") for line in pip[:-1]) == pins()
    [python] = [entry for entry in environment["dependencies"] if str(entry).startswith("python=")]
    assert Requirement(f"python{PROJECT['requires-python']}").specifier.contains(python.split("=")[1])


def test_every_direct_dependency_is_pinned_to_a_version_it_allows():
    pinned = {canonicalize_name(name): version for name, version in pins().items()}
    for text in [*PROJECT["dependencies"], *(t for e in ("test", "real") for t in PROJECT["optional-dependencies"][e])]:
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
    code = "import sys, editkit.cli; print(sorted({'torch', 'transformers', 'matplotlib'} & set(sys.modules)))"
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
