"""Interchange interventions and the rule that turns them into an editing site."""

import numpy as np
import pytest
import torch
from conftest import make_lm

from editkit.base.errors import ConfigError, RequestError
from editkit.locate.interchange import PATCHED, Interchange, choose_site, interchange, make_pairs
from editkit.models.facts import Fact
from editkit.models.hooks import trace

G = {name: i for i, name in enumerate(PATCHED)}
NAMES = ("Ana Silva", "Hugo Castro", "Élise Noël", "Li", "Karin Ann Fischer", "Mary")
TEMPLATES = ("The mother tongue of {} is", "{} plays the old")
FACTS = [
    Fact(t, s, "x", str((i + j) % 5), case_id=f"{i}.{j}")
    for i, t in enumerate(TEMPLATES)
    for j, s in enumerate(NAMES)
]


@pytest.fixture
def lm(any_lm):
    return make_lm(any_lm.model.config.model_type, "wordlevel", n_layers=3)


def test_pairs_share_template_and_differ_in_subject_and_answer():
    pairs = make_pairs(FACTS, 1000)
    assert (
        len(pairs) == len(set(pairs)) == 2 * (6 * 5 - 2)
    )  # all but one unordered pair of equal answers each
    for source, base in pairs:
        assert source.prompt == base.prompt and source.subject != base.subject
        assert source.target_true != base.target_true
    assert make_pairs(FACTS, 10, seed=1) == make_pairs(FACTS, 10, seed=1) != make_pairs(FACTS, 10, seed=2)
    assert len(make_pairs(FACTS, 10)) == 10
    with pytest.raises(RequestError, match="no two facts"):
        make_pairs(FACTS[:1], 5)


def test_last_token_of_the_last_block_always_flips(lm):
    result = interchange(lm, make_pairs(FACTS, 40))
    last = result.flips[:, G["last"], -1]
    usable = result.source_answers != result.base_answers
    assert usable.any()
    assert (last[usable] == 1).all() and np.isnan(last[~usable]).all()
    # No other position reaches the prediction after the last block.
    rates = result.rates()[:, -1]
    assert np.nan_to_num(rates[[G[g] for g in PATCHED if g != "last"]]).max() == 0


def test_answers_are_those_of_the_clean_runs(lm):
    pairs = make_pairs(FACTS, 8)
    result = interchange(lm, pairs)
    for i, (source, base) in enumerate(pairs):
        for fact, found in ((source, result.source_answers[i]), (base, result.base_answers[i])):
            assert found == int(lm.logits(lm.encode([fact.text]))[0, -1].argmax())


def test_one_flip_against_direct_patching():
    """Subjects of one and of two words: the patched column differs from the source column."""
    lm = make_lm("llama", "wordlevel", n_layers=3, seed=3)
    pairs = [(a, b) for a, b in make_pairs(FACTS, 60) if {a.subject, b.subject} & {"Li", "Mary"}]
    result = interchange(lm, pairs, layers=[1], groups=["subject_last"])
    checked = 0
    for i, (source, base) in enumerate(pairs):
        offset = 4 if source.prompt == TEMPLATES[0] else 0
        of, to = (offset + len(f.subject.split()) - 1 for f in (source, base))
        name = lm.block_name(1)

        def patch(h, of=of, to=to, name=name, source=source):
            with torch.no_grad(), trace(lm.model, [name], stop_early=True) as seen:
                lm.forward(lm.encode([source.text]))
            h = h.clone()
            h[0, to] = seen.output[name][0, of]
            return h

        state = {}
        with torch.no_grad():
            state["value"] = patch(torch.zeros(1, 12, lm.d_model))[0, to]
            replace = put_at(to, state["value"])
            with trace(lm.model, edit={name: replace}):
                got = int(lm.logits(lm.encode([base.text]))[0, -1].argmax())
        if result.source_answers[i] == result.base_answers[i]:
            assert np.isnan(result.flips[i, 0, 0])
        else:
            assert result.flips[i, 0, 0] == (got == result.source_answers[i])
            checked += 1
    assert checked > 5


def put_at(column, value):
    def edit(h):
        h = h.clone()
        h[0, column] = value
        return h

    return edit


def test_groups_of_unequal_length_are_not_patched():
    lm = make_lm("gpt2", "wordlevel")
    by_name = {(f.prompt, f.subject): f for f in FACTS}
    one, two, also_two = (by_name[TEMPLATES[0], s] for s in ("Li", "Ana Silva", "Hugo Castro"))
    result = interchange(lm, [(one, two), (two, also_two)])
    usable = result.source_answers != result.base_answers
    flips = result.flips
    assert np.isnan(flips[0, G["subject"]]).all() and np.isnan(flips[0, G["subject_first"]]).all()
    if usable[1]:
        assert not np.isnan(flips[1, [G["subject"], G["subject_first"], G["subject_last"]]]).any()
    assert np.isnan(flips[:, G["subject_middle"]]).all()
    assert usable[1]


def test_batching_does_not_matter(lm):
    pairs = make_pairs(FACTS, 12)
    whole, small = interchange(lm, pairs), interchange(lm, pairs, tokens_per_batch=1)
    assert np.array_equal(whole.flips, small.flips, equal_nan=True)


def test_layers_and_frame():
    lm = make_lm("gpt2", "wordlevel", n_layers=3)
    pairs = make_pairs(FACTS, 20)
    whole = interchange(lm, pairs)
    some = interchange(lm, pairs, layers=[2, 0], groups=["last"])
    assert some.layers == (2, 0)
    assert np.array_equal(some.flips[:, 0], whole.flips[:, G["last"]][:, [2, 0]], equal_nan=True)
    assert np.array_equal(some.rate("last"), some.rates()[0])
    frame = some.to_frame()
    assert frame.columns.tolist() == ["group", "layer", "rate", "n"]
    assert frame.n.iloc[0] == (whole.source_answers != whole.base_answers).sum()
    with pytest.raises(ConfigError, match="unknown position group"):
        some.rate("subject_last")


def test_bad_input_is_refused():
    lm = make_lm("gpt2", "wordlevel")
    with pytest.raises(RequestError, match="no pairs"):
        interchange(lm, [])
    with pytest.raises(RequestError, match="make_pairs"):
        interchange(lm, [(FACTS[0], FACTS[-1])])
    with pytest.raises(ConfigError, match="unknown position groups"):
        interchange(lm, make_pairs(FACTS, 2), groups=["middle"])


def made_up(subject_last, last, kind="block") -> Interchange:
    flips = np.full((1, len(PATCHED), len(last)), np.nan)
    flips[0, G["subject_last"]], flips[0, G["last"]] = subject_last, last
    ids = np.zeros(1, dtype=int)
    return Interchange(flips, ids, ids, tuple(range(len(last))), kind)


def test_site_of_a_model_that_reads_the_fact_at_the_subject():
    site = choose_site(made_up([0.4, 0.9, 1.0, 0.95, 0.3, 0.0], [0.0, 0.0, 0.1, 0.6, 1.0, 1.0]))
    assert site.token == "subject_last" and site.layers == (1, 2, 3)
    assert "top layer 3 is the last" in site.rule


def test_site_of_a_model_that_reads_the_fact_at_the_end():
    result = made_up([0.5, 0.2, 0.0, 0.0, 0.0, 0.0], [0.3, 0.7, 0.95, 1.0, 1.0, 1.0])
    site = choose_site(result)
    assert site.token == "last" and site.layers == (0, 1, 2)
    assert "0.500" in site.rule and "top layer 2 is the first" in site.rule
    assert choose_site(result, width=2).layers == (1, 2)
    assert choose_site(result, enough=0.5).token == "subject_last"
    assert choose_site(result, enough=0.5, width=5).layers == (0,)


def test_site_needs_block_patches_that_flip():
    with pytest.raises(ConfigError, match="kind 'block'"):
        choose_site(made_up([1.0], [1.0], kind="mlp"))
    with pytest.raises(RequestError, match="no patch flips"):
        choose_site(made_up([0.0, 0.0], [0.0, 0.0]))
    with pytest.raises(ConfigError, match="width"):
        choose_site(made_up([1.0], [1.0]), width=0)
