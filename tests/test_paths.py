"""Paths as users have them: `~`, links, folders, spaces, permissions, for everything that reads or writes files."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
import torch
from conftest import make_lm, make_tokenizer

from editkit.base.errors import DataError, ModelError
from editkit.base.paths import file_to_write, to_folder, user_path, written
from editkit.corpora import counterfact
from editkit.entanglement.graph import EntanglementGraph
from editkit.locate.moments import Covariance, second_moment
from editkit.methods import Delta, make_editor
from editkit.methods.memory.base import open_memory
from editkit.models.lm import load_lm


class Given:
    """An os.PathLike that is no Path."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __fspath__(self) -> str:
        return str(self.path)


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def savers(lm, facts):
    """(write to a path, read it back) of every kind of file that one saves by hand."""
    moment = Covariance.from_array(torch.eye(3), 5)
    editor = make_editor("ft", lm, layers=[1], steps=1)
    delta = editor.edit(facts[:1])
    editor.restore()
    memory = make_editor("in_context", lm)
    return {
        "moment": (moment.save, Covariance.load),
        "delta": (delta.save, Delta.load),
        "editor": (editor.save, editor.load),
        "memory": (memory.save, lambda path: open_memory(path, lm).restore()),
    }


@pytest.mark.parametrize("kind", ["moment", "delta", "editor", "memory"])
def test_files_go_where_every_program_would_put_them(kind, home, facts):
    save, load = savers(make_lm(), facts)[kind]
    path = home / "deep" / "with space.safetensors"
    assert save("~/deep/with space.safetensors") == path and path.is_file()
    assert not (Path.cwd() / "~").exists()
    load("~/deep/with space.safetensors")
    link = home / "link.safetensors"
    link.symlink_to(path)
    path.write_bytes(b"old")
    save(Given(link))
    assert link.is_symlink() and path.read_bytes() != b"old"  # written through the link, not over it
    load(Given(link))
    (home / "dangling").symlink_to(home / "new.safetensors")
    save(home / "dangling")
    assert (home / "new.safetensors").is_file() and (home / "dangling").is_symlink()
    for bad in (home / "deep", f"{home}/none/"):
        with pytest.raises(DataError, match="is a folder; add the name"):
            save(bad)
    with pytest.raises(DataError, match="is a file"):
        save(path / "below.safetensors")
    with pytest.raises(DataError, match="no such file"):
        load(home / "missing.safetensors")
    with pytest.raises(DataError, match="it is a folder"):
        load(home / "deep")
    assert sorted(p.name for p in (home / "deep").iterdir()) == ["with space.safetensors"]  # no parts left


def test_new_files_have_the_usual_permissions_and_old_ones_keep_theirs(tmp_path):
    before = os.umask(0o027)
    try:
        with written(tmp_path / "new") as part:
            part.write_text("1")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o640
    (tmp_path / "new").chmod(0o600)
    with written(tmp_path / "new") as part:
        part.write_text("2")
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o600


def test_a_failed_writing_leaves_the_old_file(tmp_path):
    (tmp_path / "old").write_text("old")
    with pytest.raises(ZeroDivisionError), written(tmp_path / "old") as part:
        part.write_text("new")
        raise ZeroDivisionError
    assert (tmp_path / "old").read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_folders_and_models(home, facts):
    lm = make_lm()
    make_editor("ft", lm, layers=[1], steps=1).edit(facts[:1]).merge(lm, "~/my model")
    for where in ("~/my model", Given(home / "my model"), home / "my model"):
        assert load_lm(where, where).fingerprint() == lm.fingerprint()
    second_moment(lm, [0], ["Ana Silva speaks French"], cache_dir="~/cache")
    assert list((home / "cache").glob("second_moment_*")) and not (Path.cwd() / "~").exists()
    (home / "taken").write_text("")
    with pytest.raises(DataError, match="taken is a file"):
        second_moment(lm, [0], ["Ana Silva speaks French"], cache_dir=home / "taken")
    with pytest.raises(ModelError, match=r"config\.json"):
        load_lm("~/cache")
    with pytest.raises(DataError):
        EntanglementGraph.open("~/none")
    with pytest.raises(DataError, match="no such file"):
        counterfact.load("~/none.json")
    make_tokenizer("bytelevel").save_pretrained(home / "tok")
    assert load_lm(lm.model, Given(home / "tok")).tokenizer("Li")["input_ids"]


def test_plain_functions(home):
    assert user_path("~/a") == home / "a" and user_path(Given(home)) == home and user_path("a~b") == Path("a~b")
    assert to_folder("~/x/y").is_dir() and file_to_write("~/z/f").parent == home / "z"
