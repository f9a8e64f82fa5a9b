"""Protocols on the recorded tiny model, which knows its facts, before and after recorded fine-tuning."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from editkit.base.errors import ConfigError, DataError, RequestError
from editkit.models.facts import Fact, Probe
from editkit.models.lm import load_lm
from editkit.scoring import Baseline, evaluate, expand, generation_gap, says, score, score_targets
from editkit.scoring.protocols import candidate_pools

SUBSET = Path(__file__).parent / "data" / "golden_subset"
LANGUAGE, PLAYS = "The mother tongue of {} is", "{} plays the"


@pytest.fixture
def lm():
    return load_lm(str(SUBSET / "models" / "gpt2"))


@pytest.fixture
def facts():
    """Edits of facts the model knows: Anna Keller: Russian, writer, Berlin; Clara Quinn: steel guitar."""
    return [
        Fact(
            LANGUAGE, "Anna Keller", "French", "Russian", case_id="a", relation="language",
            paraphrases=("The native language of Anna Keller is",),
            neighborhood=(Probe(LANGUAGE.format("Lucas Hansen"), "Russian"),
                          Probe(LANGUAGE.format("Greta Lopez"), "Italian")),
            same_subject=(Probe("Anna Keller works in the city of", "Berlin", kind="city"),),
            locality=(Probe("Anna Keller is a", "writer", kind="job"),),
            consequences=(Probe("Anna Keller always speaks in", "French", kind="one_hop", before="Russian"),
                          Probe("The old", "house", kind="two_hop")),
        ),
        Fact(
            PLAYS, "Felix Rossi", "harp", "piano", case_id="b", relation="instrument",
            neighborhood=(Probe(PLAYS.format("Clara Quinn"), "steel guitar"),),
            same_subject=(Probe("Felix Rossi works in the city of", "Hong Kong", kind="city"),),
        ),
    ]  # fmt: skip


def edit(lm):
    """The recorded fine-tuning of five facts, among them those of the fixture."""
    with np.load(SUBSET / "ft_free" / "arrays.npz") as arrays, torch.no_grad():
        for name in arrays.files:
            if name.startswith("W1:"):
                lm.parameter(name[3:]).copy_(torch.from_numpy(arrays[name]))


def rows(table, axis):
    return table[table["axis"] == axis].reset_index(drop=True)


def test_every_probe_has_its_row(lm, facts):
    table = score(lm, facts, "rome")
    assert table["axis"].value_counts().to_dict() == {
        "neighborhood": 3, "same_subject": 2, "consequence": 2, "efficacy": 2, "paraphrase": 1, "locality": 1,
    }  # fmt: skip
    assert table["fact_id"].tolist() == ["a"] * 8 + ["b"] * 3
    assert set(table["protocol"]) == {"rome"}
    assert rows(table, "consequence")["kind"].tolist() == ["one_hop", "two_hop"]


def test_rome_before_and_after(lm, facts):
    before = score(lm, facts, "rome")
    assert rows(before, "efficacy")["success"].tolist() == [0, 0]
    assert rows(before, "efficacy")["acc"].tolist() == [0, 0]
    assert (rows(before, "efficacy")["magnitude"] < -0.9).all()
    assert rows(before, "neighborhood")["success"].all() and rows(before, "same_subject")["success"].all()
    edit(lm)
    after = rows(score(lm, facts, "rome"), "efficacy")
    assert after["success"].tolist() == [1, 1] and after["acc"].tolist() == [1, 1]


def test_rome_columns_are_the_definitions(lm, facts):
    table = score(lm, facts, "rome")
    for _, row in table.iterrows():
        fact = facts["ab".index(row["fact_id"])]
        keep = row["axis"] in ("neighborhood", "same_subject", "locality")
        new, true = (fact.target, row["answer"]) if keep else (row["answer"], row["contrast"])
        if not isinstance(true, str):  # pandas shows a missing text as NaN
            assert np.isnan(row["success"]) and np.isnan(row["nll_true"])
            continue
        nll_new, nll_true = (s.nll for s in score_targets(lm, [(row["prompt"], new), (row["prompt"], true)]))
        sign = -1 if keep else 1
        assert row["nll_new"] == pytest.approx(nll_new, abs=1e-5)
        assert row["nll_true"] == pytest.approx(nll_true, abs=1e-5)
        assert row["success"] == float(sign * nll_true > sign * nll_new)
        assert row["magnitude"] == pytest.approx(sign * (np.exp(-nll_new) - np.exp(-nll_true)), abs=1e-6)


def test_rome_needs_an_old_object(lm, facts):
    with pytest.raises(RequestError, match=r"target_true.*rome_zsre"):
        score(lm, [facts[0].replace(target_true=None)], "rome")


def test_rome_leaves_equal_objects_undefined(lm, facts):
    probe = Probe(LANGUAGE.format("Greta Lopez"), "French")
    table = score(lm, [facts[0].replace(neighborhood=(probe,))], "rome", ["neighborhood"])
    assert np.isnan(table["success"]).all()


def test_easyedit_compares_locality_with_the_unedited_model(lm, facts):
    with pytest.raises(ConfigError, match=r"Baseline\.of"):
        score(lm, facts, "easyedit")
    # A wrong locality answer: agreement is about change, token accuracy about truth.
    facts = [facts[0].replace(locality=(Probe("Anna Keller is a", "pilot"),))]
    baseline = Baseline.of(lm, facts)
    before = score(lm, facts, "easyedit", baseline=baseline)
    assert rows(before, "locality")[["success", "agreement", "token_acc"]].to_numpy().tolist() == [[1, 1, 0]]
    assert rows(before, "efficacy")["success"].tolist() == [0]
    edit(lm)
    after = score(lm, facts, "easyedit", baseline=baseline)
    assert rows(after, "efficacy")["success"].tolist() == [1]
    says_writer = score_targets(lm, [("Anna Keller is a", "writer")])[0].token_accuracy
    assert rows(after, "locality")["success"].tolist() == [says_writer]


def test_easyedit_without_baseline_on_axes_that_need_none(lm, facts):
    table = score(lm, facts, "easyedit", ["efficacy"])
    assert table["success"].equals(table["token_acc"]) and table["agreement"].isna().all()


def test_zsre_counts_tokens_against_the_truth(lm, facts):
    table = rows(score(lm, facts, "rome_zsre"), "neighborhood")
    assert table["success"].tolist() == [1, 1, 1]
    half = [facts[1].replace(neighborhood=(Probe(PLAYS.format("Clara Quinn"), "steel house"),))]
    assert score(lm, half, "rome_zsre", ["neighborhood"])["success"].tolist() == [0.5]
    released = rows(score(lm, facts, "rome_zsre", released=True), "neighborhood")
    assert released["success"].tolist() == [1, 1, 1]


def test_generation(lm, facts):
    baseline = Baseline.of(lm, facts, protocols=("generate",))
    before = score(lm, facts, "generate", baseline=baseline)
    assert rows(before, "neighborhood")["success"].tolist() == [1, 1, 1]  # "steel guitar ." among them
    assert rows(before, "efficacy")["success"].tolist() == [0, 0]
    assert before["unchanged"].tolist() == [1] * len(before)
    edit(lm)
    after = score(lm, facts, "generate", baseline=baseline)
    assert rows(after, "efficacy")["prefix"].tolist() == [1, 1]
    assert rows(after, "efficacy")["unchanged"].tolist() == [0, 0]
    assert (after["success"] == after["exact"]).all()
    loose = score(lm, facts, "generate", match="prefix")
    assert (loose["success"] == loose["prefix"]).all()


@pytest.mark.parametrize("text, exact, prefix", [
    ("New York", True, True), (" New York .", True, True), ("New York. He", True, True),
    ("New York\nA", True, True),
    ("New York City", False, True), ("New York, where", False, True), ("New Yorker", False, False),
    ("New York's", False, False), ("in New York", False, False), ("new york", False, False),
    ("", False, False),
])  # fmt: skip
def test_says(text, exact, prefix):
    assert says(text, "New York") is exact
    assert says(text, "New York", "prefix") is prefix


def test_multiple_choice(lm, facts):
    table = score(lm, facts, "multiple_choice", candidates={"language": ["Dutch", "Polish", "French"]})
    first = rows(table, "efficacy").iloc[0]
    options = ["French", "Russian", "Dutch", "Polish"]
    nll = {
        o: s.nll
        for o, s in zip(options, score_targets(lm, [(facts[0].text, o) for o in options]), strict=True)
    }
    assert first["n_candidates"] == 4
    assert first["rank"] == sorted(nll, key=nll.get).index("French") + 1 and first["success"] == 0
    assert first["margin"] == pytest.approx(nll["Russian"] - nll["French"], abs=1e-5)
    assert rows(table, "neighborhood")["success"].all()
    assert rows(table, "same_subject")["n_candidates"].tolist() == [2, 2]
    assert np.isnan(rows(table, "locality").iloc[0]["success"])  # a single candidate decides nothing


def test_candidates_are_limited_and_drawn_by_seed(lm, facts):
    many = {"language": [f"{w}" for w in ("Dutch", "Polish", "German", "Greek", "Italian")]}
    tables = [score(lm, facts, "multiple_choice", ["efficacy"], candidates=many, max_candidates=3, seed=s)
              for s in (0, 0, 1, 2, 3)]  # fmt: skip
    assert all(t.iloc[0]["n_candidates"] == 3 for t in tables)
    assert tables[0].equals(tables[1])


def test_pools_do_not_mix_types(facts):
    pools = candidate_pools(expand(facts))
    assert pools["language"] == ["French", "Italian", "Russian"]
    assert pools["city"] == ["Berlin", "Hong Kong"]


@pytest.mark.parametrize("protocol", ["rome", "rome_zsre", "easyedit", "multiple_choice", "generate"])
def test_padding_and_batching_do_not_matter(lm, facts, protocol):
    baseline = Baseline.of(lm, facts, protocols=("easyedit", "generate"))
    tables = [score(lm, facts, protocol, baseline=baseline, **options) for options in (
        {}, {"padding_side": "right"}, {"batch_size": 1}, {"whole_texts": True, "token_budget": 20},
    )]  # fmt: skip
    for table in tables[1:]:
        for column in table.columns:
            if table[column].dtype == float:
                np.testing.assert_allclose(table[column], tables[0][column], atol=2e-5)
            else:
                assert table[column].equals(tables[0][column])


@pytest.mark.parametrize("call, error, message", [
    (lambda f: score(None, f, "likelihood"), ConfigError, "choose from"),
    (lambda f: score(None, f, "rome", ["generality"]), ConfigError, "generality"),
    (lambda f: score(None, f, "rome", "efficacy"), ConfigError, "give a list"),
    (lambda f: score(None, f[1:], "rome", ["paraphrase"]), DataError, "no fact has probes on paraphrase"),
    (lambda f: score(None, [f[0], f[0]], "rome"), RequestError, "same id"),
    (lambda f: score(None, [], "rome"), RequestError, "empty"),
    (lambda f: score(None, f, "generate", match="fuzzy"), ConfigError, "fuzzy"),
    (lambda f: score(None, [f[0].replace(locality=(Probe("x", " "),))]), RequestError, "empty answer"),
])  # fmt: skip
def test_unusable_requests_are_refused_before_the_model_runs(facts, call, error, message):
    with pytest.raises(error, match=message):
        call(facts)


def test_gap_between_teacher_forcing_and_generation(lm, facts):
    # The second half of the answer is right only if the first is given: half its tokens, never generated.
    probe = Probe(PLAYS.format("Felix Rossi"), "steel guitar")
    facts = [facts[1].replace(consequences=(probe,))]
    scores = evaluate(
        lm, NoEditor(), facts, protocols=("easyedit", "generate"), axes=["consequence"], before=False
    )
    gap = generation_gap(scores)
    expected = score_targets(lm, [(probe.prompt, probe.answer)])[0].token_accuracy
    assert expected == 0.5
    assert gap[["teacher_forced", "generated", "gap"]].to_numpy().tolist() == [[0.5, 0.0, 0.5]]


class NoEditor:
    def edit(self, facts): ...

    def restore(self): ...


class Recorder:
    """An editor that notes what happens and fine-tunes for real at its first edit."""

    def __init__(self, lm, fail_at=None):
        self.lm, self.log, self.fail_at, self.saved = lm, [], fail_at, None

    def edit(self, facts):
        self.log.append([f.case_id for f in facts])
        if len(self.log) == self.fail_at:
            raise RuntimeError("out of luck")
        if self.saved is None:
            self.saved = {k: v.clone() for k, v in self.lm.model.state_dict().items()}
            edit(self.lm)

    def restore(self):
        self.log.append("restore")
        if self.saved:
            self.lm.model.load_state_dict(self.saved)
            self.saved = None


def test_after_all(lm, facts):
    editor, print_ = Recorder(lm), lm.fingerprint()
    table = evaluate(lm, editor, facts, "after_all", ("rome", "easyedit"), facts_per_edit=1)
    assert editor.log == [["a"], ["b"], "restore"] and lm.fingerprint() == print_
    assert table.groupby(["when", "step", "protocol"]).size().to_dict() == {
        ("before", 0, "rome"): 11, ("before", 0, "easyedit"): 11,
        ("after_all", 2, "rome"): 11, ("after_all", 2, "easyedit"): 11,
    }  # fmt: skip
    efficacy = table[(table["axis"] == "efficacy") & (table["protocol"] == "rome")]
    assert efficacy.groupby("when")["success"].mean().to_dict() == {"before": 0, "after_all": 1}
    agreement = table[(table["protocol"] == "easyedit") & (table["when"] == "before")]["agreement"]
    assert (agreement == 1).all()


def test_after_each_scores_a_chunk_right_after_its_own_edit(lm, facts):
    editor = Recorder(lm)
    table = evaluate(lm, editor, facts, "after_each", facts_per_edit=1, before=False)
    assert editor.log == [["a"], ["b"], "restore"]
    assert table.groupby("step")["fact_id"].unique().map(list).to_dict() == {1: ["a"], 2: ["b"]}
    assert set(table["when"]) == {"after_each"}


def test_after_each_with_restored_chunks(lm, facts):
    editor = Recorder(lm)
    axes = ["efficacy", "paraphrase"]
    table = evaluate(lm, editor, facts, "after_each", axes=axes, facts_per_edit=1, restore="each")
    assert editor.log == [["a"], "restore", ["b"], "restore", "restore"]
    assert set(table[table["when"] == "after_each"]["step"]) == {1}
    assert len(table) == 6  # only the first fact has a paraphrase


def test_never_restored(lm, facts):
    editor = Recorder(lm)
    evaluate(lm, editor, facts, restore="never", before=False)
    assert editor.log == [["a", "b"]]


def test_a_failing_edit_restores_the_model(lm, facts):
    editor, print_ = Recorder(lm, fail_at=2), lm.fingerprint()
    with pytest.raises(RuntimeError, match="luck"):
        evaluate(lm, editor, facts, facts_per_edit=1)
    assert editor.log[-1] == "restore" and lm.fingerprint() == print_


@pytest.mark.parametrize("options, message", [
    ({"when": "always"}, "after_each"), ({"restore": "each"}, "nothing to score"),
    ({"restore": "x"}, "never"), ({"protocols": "rome"}, "list"), ({"protocols": ["rouge"]}, "rouge"),
    ({"facts_per_edit": 0}, "at least 1"), ({"baseline": None}, "itself"),
])  # fmt: skip
def test_unusable_evaluations_edit_nothing(lm, facts, options, message):
    editor = Recorder(lm)
    with pytest.raises(ConfigError, match=message):
        evaluate(lm, editor, facts, **options)
    assert editor.log == []
