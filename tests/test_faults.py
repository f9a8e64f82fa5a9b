"""What went wrong in use, one test a kind: requests, order of restores, provenance, gradients, edited models."""

from __future__ import annotations

import dataclasses
import warnings

import pandas as pd
import pytest
import torch
from conftest import make_lm

from editkit.base.errors import ModelError, NumericsError, RequestError
from editkit.linear.normal import null_projector
from editkit.locate.keys import compute_keys
from editkit.locate.moments import Covariance, second_moment
from editkit.locate.targets import optimize_targets
from editkit.methods import make_editor
from editkit.models.facts import Fact, conflicts, validate_facts
from editkit.models.lm import LM
from editkit.scoring.engine import next_tokens
from editkit.scoring.evaluate import evaluate
from editkit.scoring.protocols import Baseline, score
from editkit.scoring.text import perplexity

TEXTS = ["Ana Silva speaks French.", "The weather was fine today.", "Li plays the violin in Rome."]
WEIGHTS = ("rome", "memit", "alphaedit", "ft", "lora")


def quick_editor(name: str, lm: LM, layers=(1,), moments=None, **more):
    """A weight editor that does little."""
    moments = second_moment(lm, layers, TEXTS) if moments is None else moments
    options = {
        "rome": {"layers": layers, "z_steps": 3}, "memit": {"layers": layers, "z_steps": 3, "lam": 10.0},
        "alphaedit": {"layers": layers, "z_steps": 3, "threshold": 1.0}, "ft": {"layers": layers, "steps": 2},
        "lora": {"steps": 2},
    }[name]  # fmt: skip
    return make_editor(name, lm, statistics=moments, contexts=["{}"], **{**options, **more})


# --- requests -----------------------------------------------------------------------------------------------


def test_one_fact_and_any_iterable_are_edited(facts):
    lm = make_lm()
    for given, n in ((facts[0], 1), ((f for f in facts[:2]), 2), (tuple(facts[:2]), 2)):
        editor = quick_editor("ft", lm)
        assert len(editor.edit(given).facts) == n
        editor.restore()
        memory = make_editor("in_context", lm)
        if n == 1:
            assert len(memory.edit(given).facts) == 1
        memory.restore()
    assert optimize_targets(lm, facts[0], 1).z.shape[1] == 1
    assert len(score(lm, facts[0])) == 1


@pytest.mark.parametrize("given", [
    None, 5, "a fact", {"prompt": "{} is"}, pd.Series({"prompt": "{} is", "subject": "Li", "target": "x"}), [3], [None],
    pd.DataFrame({"prompt": ["{} is"], "subject": ["Li"], "target": ["x"]}), [{"prompt": "{} is"}],
], ids=repr)  # fmt: skip
def test_anything_else_is_refused(given):
    lm = make_lm()
    for editor in (quick_editor("ft", lm), make_editor("in_context", lm)):
        with pytest.raises(RequestError, match=r"editkit.Fact"):
            editor.edit(given)
    for use in (lambda: score(lm, given), lambda: optimize_targets(lm, given, 1), lambda: Baseline.of(lm, given)):
        with pytest.raises(RequestError, match=r"editkit.Fact"):
            use()


def test_one_text_cut_in_two_ways_is_one_question():
    a = Fact("{} plays the", "Hugo Castro", "violin", case_id="first", meta=(("row", "3"),))
    b = Fact("Hugo {} plays the ", "Castro", "piano", case_id="second", meta=(("row", "8"),))
    with pytest.raises(RequestError, match=r"facts 0 \(first, row 3\) and 1 \(second, row 8\) conflict"):
        validate_facts([a, b])
    with pytest.raises(RequestError, match="duplicates"):
        validate_facts([a, b.replace(target=" violin")])
    assert conflicts([a, b, b.replace(subject="Silva")]) == [(0, 1)]


def test_a_text_where_texts_belong_is_refused():
    lm = make_lm()
    for use in (lambda: second_moment(lm, [0], "one text"), lambda: perplexity(lm, "one text")):
        with pytest.raises(RequestError, match="give a list"):
            use()


# --- order of edits and restores ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", WEIGHTS)
def test_restoring_in_another_order_is_refused(name, facts):
    lm = make_lm("llama")
    start = lm.fingerprint()
    first = quick_editor(name, lm)
    first.edit(facts[:1])
    second = quick_editor(name, lm)  # what a notebook does whose cell is run twice
    second.edit(facts[1:2])
    both = lm.fingerprint()
    with pytest.raises(ModelError, match=r"newest first.*force=True"):
        first.restore()
    assert lm.fingerprint() == both
    second.restore()
    first.restore()
    assert lm.fingerprint() == start and lm.edited() == []
    first.edit(facts[:1])
    second.edit(facts[1:2])
    first.restore(force=True)
    assert lm.fingerprint() == start


def test_a_restore_after_the_weights_are_back_only_forgets(facts):
    lm = make_lm()
    start, editor = lm.fingerprint(), quick_editor("ft", lm)
    delta = editor.edit(facts[:1])
    delta.restore(lm)
    editor.restore()
    assert lm.fingerprint() == start and editor.n_facts == 0


@pytest.mark.parametrize("name", [*WEIGHTS, "in_context", "grace"])
def test_inference_mode_is_refused_with_the_way_out(name, facts):
    lm = make_lm("llama")
    editor = quick_editor(name, lm) if name in WEIGHTS else make_editor(name, lm)
    with torch.inference_mode(), pytest.raises(ModelError, match="leave that block"):
        editor.edit(facts[:1])
    with torch.no_grad():
        editor.edit(facts[:1])
    editor.restore()
    with torch.inference_mode():
        inside = make_lm("llama")
    with pytest.raises(ModelError, match="load it outside"):
        optimize_targets(inside, facts[:1], 1)


def test_scores_before_on_an_edited_model_are_noted(facts):
    lm = make_lm()
    first, second = quick_editor("ft", lm), quick_editor("ft", lm)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        evaluate(lm, first, facts[:2], protocols=["rome"], restore="never")
    for use in (lambda: evaluate(lm, second, facts[2:], protocols=["easyedit"]), lambda: Baseline.of(lm, facts),
                lambda: evaluate(lm, second, facts[2:], protocols=["rome"])):  # fmt: skip
        with pytest.warns(UserWarning, match="carries edited weights .*restore\\(\\) first"):
            use()
    first.restore()
    memory = make_editor("in_context", lm)
    memory.edit(facts[0])
    with pytest.warns(UserWarning, match="an attached memory"):
        Baseline.of(lm, facts)
    memory.restore()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Baseline.of(lm, facts)


# --- where statistics come from -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["rome", "memit", "alphaedit"])
def test_second_moments_of_another_model_are_refused(name, facts):
    lm, other = make_lm("llama"), make_lm("llama", seed=1)
    foreign = second_moment(other, [1], TEXTS)
    with pytest.raises(ModelError, match=r"weights [0-9a-f]{12}, these are [0-9a-f]{12}.*force=True"):
        quick_editor(name, lm, moments=foreign).edit(facts[:1])
    with pytest.warns(UserWarning, match="computed on"):
        quick_editor(name, lm, moments=foreign, force=True).edit(facts[:1])


def test_second_moments_of_another_layer_tokenizer_or_texts_are_refused():
    lm = make_lm("llama")
    both = second_moment(lm, [0, 1], TEXTS)
    with pytest.raises(ModelError, match="that of layer 0"):
        quick_editor("memit", lm, moments={1: both[0]})
    with pytest.raises(ModelError, match="texts are not those of layer"):
        quick_editor("memit", lm, layers=(0, 1), moments={0: both[0], 1: second_moment(lm, [1], TEXTS[:2])[1]})
    about = {**both[1].provenance, "tokenizer": "another"}
    with pytest.raises(ModelError, match="another tokenizer"):
        quick_editor("memit", lm, moments={1: dataclasses.replace(both[1], provenance=about)})
    quick_editor("memit", lm, moments={1: Covariance.from_array(both[1].C)})  # says nothing, so nothing is checked


def test_the_second_moment_of_the_unedited_model_serves_the_edited_one(facts):
    lm = make_lm("llama")
    moments = second_moment(lm, [0, 1], TEXTS)
    quick_editor("memit", lm, layers=(0,), moments=moments).edit(facts[:1])
    quick_editor("memit", lm, layers=(1,), moments=moments).edit(facts[1:2])


def test_a_stream_goes_on_with_the_second_moments_it_began_with(facts, tmp_path):
    lm = make_lm("llama")
    editor = quick_editor("memit", lm)
    editor.edit(facts[:1])
    path = editor.save(tmp_path / "stream.safetensors")
    other = second_moment(lm, [1], TEXTS[:2])
    editor.restore()
    with pytest.raises(ModelError, match="other second moments: that of layer 1"):
        quick_editor("memit", lm, moments=other).load(path)
    with pytest.warns(UserWarning, match="that of layer 1 differs"):
        quick_editor("memit", lm, moments=other, force=True).load(path)


# --- the null space -----------------------------------------------------------------------------------------


def test_a_null_space_of_everything_or_nothing_is_told_with_the_spectrum():
    C0 = torch.diag(torch.logspace(-4, 0, 1000, dtype=torch.float64))
    for threshold, what in ((2.0, "nothing is protected"), (1.02e-4, r"0\.[0-4]% of them")):
        with pytest.warns(UserWarning, match=f"{what}.*eigenvalues go from 0.0001 over 0.01.* to 1;.*for 10%") as seen:
            null_projector(C0, threshold)
        text = str(seen[0].message)
        for share, d in (("1%", 10), ("5%", 50), ("10%", 100)):
            kept = float(text.partition(f" for {share}")[0].rsplit(" ", 1)[-1])
            assert null_projector(C0, kept).rank == pytest.approx(d, rel=0.15)
    with pytest.raises(NumericsError, match="raise the null-space threshold: its eigenvalues"):
        null_projector(C0, 1e-9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        null_projector(C0, 0.01)


def test_alphaedit_and_latest_say_so(facts):
    lm = make_lm("llama")
    with pytest.warns(UserWarning, match="nothing is protected"):
        quick_editor("alphaedit", lm, threshold=1e9).edit(facts[:1])


def test_prompts_and_candidates_are_checked_too(facts):
    lm = make_lm()
    assert compute_keys(lm, facts[0], 1).shape == (24, 1)
    for given in ("The {} is", [("The {} is",)], [3], 3):
        with pytest.raises(RequestError, match="pair"):
            compute_keys(lm, given, 1)
    with pytest.raises(RequestError, match="give a list"):
        score(lm, facts, "multiple_choice", candidates={"(efficacy)": "French"})
    with pytest.raises(RequestError, match="give a list"):
        next_tokens(lm, "one prompt")
