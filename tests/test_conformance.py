"""The conformance command on the committed figures, on all recordings where present, on broken cases."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from editkit.press import conformance
from editkit.press.conformance import CannotHandle, Case, Comparison, command, compare, compare_equal

SUBSET = Path(__file__).parent / "data" / "golden_subset"


def run(folder, *options, capsys):
    """Exit code and printed lines of `editkit conformance FOLDER`."""
    parser = argparse.ArgumentParser()
    command.add_parser(parser.add_subparsers())
    args = parser.parse_args(["conformance", str(folder), *options])
    code = args.func(args)
    return code, capsys.readouterr().out.splitlines()


def handled(folder):
    """Number of case folders whose method has an adapter, and of those without."""
    conformance.discover()
    methods = [Case(path).method for path in conformance.find_cases(folder)]
    known = sum(m in conformance.registered() for m in methods)
    return known, len(methods) - known


@pytest.mark.parametrize("where", ["subset", "golden"])
def test_all_recorded_cases_pass(where, request, capsys):
    folder = SUBSET if where == "subset" else request.getfixturevalue("golden_dir")
    code, lines = run(folder, capsys=capsys)
    known, unknown = handled(folder)
    assert lines[-1] == f"{known} passed, 0 failed, {unknown} skipped", "\n".join(lines)
    assert code == 0 and known > 0
    assert all("no adapter for method" in line for line in lines if " skipped " in line)


@pytest.mark.parametrize("method", ["linear_solves", "memit", "rome", "ft", "metrics"])
def test_the_committed_figures_cover_the_methods(method):
    conformance.discover()
    assert method in conformance.registered()
    assert method in {Case(path).method for path in conformance.find_cases(SUBSET)}


@pytest.fixture
def copy(tmp_path):
    """A copy of the committed cases under names that say nothing, to be broken by a test."""
    shutil.copytree(SUBSET / "models", tmp_path / "models")
    for i, name in enumerate(("scores", "ft_free")):
        shutil.copytree(SUBSET / name, tmp_path / "deep" / f"x{i}")
    return tmp_path


def change(folder, edit):
    path = folder / "case.json"
    data = json.loads(path.read_text())
    edit(data)
    path.write_text(json.dumps(data))


def test_one_case_alone_finds_the_models_up_the_tree(copy, capsys):
    code, lines = run(copy / "deep" / "x0", capsys=capsys)
    assert code == 0 and lines[-1] == "1 passed, 0 failed, 0 skipped"
    assert lines[1].startswith("x0 ")
    closing = [line.split()[:3] for line in lines[-4:-1]]
    assert closing[0][:2] == ["agreed", "1"] and "farthest: x0" in lines[-4]
    assert closing[1] == ["not", "compared", "0"] and closing[2] == ["failed", "0"]


def test_a_changed_figure_fails_and_is_named(copy, capsys):
    def bend(data):
        data["counterfact"][1]["out"]["rewrite_prompts_probs"][0]["target_true"] += 1e-3

    change(copy / "deep" / "x0", bend)
    code, lines = run(copy / "deep" / "x0", capsys=capsys)
    assert code == 1 and lines[-1] == "0 passed, 1 failed, 0 skipped"
    assert "failed" in lines[1] and "counterfact 1 rewrite_prompts probs" in lines[1]


def test_a_changed_array_fails(copy, capsys):
    path = copy / "deep" / "x1" / "arrays.npz"
    with np.load(path) as file:
        arrays = dict(file)
    name = next(k for k in arrays if k.startswith("W1:") and arrays[k].ndim == 2)
    arrays[name] = arrays[name].copy()
    arrays[name][3, 3] += 0.01
    np.savez(path, **arrays)
    code, lines = run(copy / "deep" / "x1", capsys=capsys)
    assert code == 1 and lines[-1] == "0 passed, 1 failed, 0 skipped"


def test_a_broken_case_is_named_and_the_others_still_run(copy, capsys):
    change(copy / "deep" / "x1", lambda data: data.update(method="telepathy"))
    (copy / "half").mkdir()
    shutil.copy(copy / "deep" / "x0" / "arrays.npz", copy / "half")
    (copy / "torn").mkdir()
    (copy / "torn" / "case.json").write_text("{")
    shutil.copytree(copy / "deep" / "x0", copy / "no_arrays")
    (copy / "no_arrays" / "arrays.npz").unlink()
    shutil.copytree(copy / "deep" / "x0", copy / "no_model")
    change(copy / "no_model", lambda data: data.update(model="gpt9"))
    shutil.copytree(copy / "deep" / "x0", copy / "raises")
    change(copy / "raises", lambda data: data["perplexity"][0].pop("ppl"))
    code, lines = run(copy, capsys=capsys)
    line = {text.split()[0]: text for text in lines}
    assert "no adapter for method 'telepathy'" in line["deep/x1"]
    assert "missing file case.json" in line["half"]
    assert "case.json cannot be read" in line["torn"]
    assert "missing file arrays.npz" in line["no_arrays"]
    assert "model 'gpt9' not found" in line["no_model"]
    assert "failed" in line["raises"] and "KeyError: 'ppl'" in line["raises"]
    assert " passed " in line["deep/x0"]
    assert code == 1 and lines[-1] == "1 passed, 1 failed, 5 skipped"


def test_edited_weights_are_found_by_content(copy, capsys):
    """Scores recorded on an edited model take its weights from the case that `weights` names."""
    edited = copy / "deep" / "x0"
    change(edited, lambda data: data.update(weights="ft/gpt2_unconstrained"))
    code, lines = run(edited, capsys=capsys)
    assert code == 1 and "failed" in lines[1]  # the figures are those of the unedited model
    shutil.rmtree(copy / "deep" / "x1")
    code, lines = run(edited, capsys=capsys)
    assert code == 0 and "edited weights (ft/gpt2_unconstrained) is not here" in lines[1]


def test_verbose_lists_every_comparison(copy, capsys):
    _, lines = run(copy / "deep" / "x0", "-v", capsys=capsys)
    assert sum(line.startswith("    ok ") for line in lines) > 50


def test_a_missing_folder_is_an_error_of_its_own(tmp_path, capsys):
    assert run(tmp_path / "nothing", capsys=capsys)[0] == 2
    code, lines = run(tmp_path, capsys=capsys)
    assert code == 0 and lines[-1] == "0 passed, 0 failed, 0 skipped"
    assert [line.split()[0] for line in lines[1:-1]] == ["agreed", "not", "failed"]


@pytest.mark.parametrize("ours, recorded, passed", [
    ([1.0, 2.0], [1.0, 2.0 + 5e-7], True),
    ([1.0, 2.0], [1.0, 2.0 + 5e-6], False),
    ([1.0], [1.0, 1.0], False),
    ([np.nan], [1.0], False),
    ([1.0], [np.nan], False),
    ([np.nan], [np.nan], True),
    ([np.inf], [np.inf], True),
    ([np.inf], [1.0], False),
    ([], [], True),
])  # fmt: skip
def test_compare(ours, recorded, passed):
    assert compare("x", ours, recorded, 1e-6).passed is passed


def test_compare_relative():
    assert compare("x", [1000.1], [1000.0], 1e-3, relative=True).deviation == pytest.approx(1e-4)
    assert not compare("x", [np.nan], [1.0], 1e9, relative=True).passed


def test_rounding_of_a_quantity_is_not_compared_with_itself():
    """PRUNE's error cache where nothing was pruned: 1e-16 on both sides, from an update of size 1."""
    ours, recorded = [1e-16, -2e-16], [-2e-16, 1e-16]
    assert not compare("x", ours, recorded, 1e-4, relative=True).passed
    assert compare("x", ours, recorded, 1e-4, relative=True, scale=1.0).passed
    assert not compare("x", [1e-9], [2e-9], 1e-4, relative=True, scale=1.0).passed
    assert compare("x", [1.1], [1.0], 1e-4, relative=True, scale=1.0).deviation == pytest.approx(0.1)


def test_the_worst_comparison_is_the_one_farthest_beyond_its_tolerance():
    far, near, exact = (
        Comparison("far", 1e-3, 1e-4),
        Comparison("near", 1.0, 10.0),
        compare_equal("same", 1, 1),
    )
    outcome = conformance.Outcome("case", "failed", (near, far, exact))
    assert outcome.worst is far
    assert conformance.Outcome("case", "failed", (far, compare_equal("text", "a", "b"))).worst.name == "text"


def test_arrays_remember_what_was_read():
    case = Case(SUBSET / "scores")
    assert "tfidf_idf" in case.unused_arrays()
    case.arrays["tfidf_idf"]
    assert "tfidf_idf" not in case.unused_arrays()
    with pytest.raises(KeyError, match="no array 'x'"):
        case.arrays["x"]


def test_case_model_and_covariance():
    case = Case(SUBSET / "memit_one_layer", SUBSET / "models")
    lm = case.load_model()
    assert lm.n_layers == 4 and lm.tokenizer.pad_token == lm.tokenizer.eos_token
    C = case.covariance(1)
    assert C.shape == (lm.d_key, lm.d_key)
    np.testing.assert_allclose(C, C.T)
    with pytest.raises(CannotHandle, match="not found"):
        Case(SUBSET / "memit_one_layer", SUBSET / "solves").load_model()
