"""Lifelong streams: records, scores by hand, resuming, the contract of every memory baseline, published figures."""

from __future__ import annotations

import json
import math

import numpy as np
import pandas as pd
import pytest
import torch

from editkit.base.errors import ConfigError, DataError, RequestError
from editkit.corpora import selfcheck, temporal
from editkit.corpora.world import World
from editkit.methods import make_editor
from editkit.methods.contract import check_memory_editor
from editkit.models.facts import Probe
from editkit.studies import published
from editkit.studies.memoir import arms, articles, data, streams

TEXTS = ["the weather was fine today", "you can see the old house", "near the river", "she works and speaks"]
SMALL = {
    "grace": {"layer": 0, "steps": 3, "value_init": "warm"},
    "defer": {"layer": 0, "steps": 3, "lr": 0.05},
    "wise": {"layer": 0, "steps": 3, "n_contexts": 1, "beta": 1.0, "act_ratio": 0.5},
    "loka": {"layer": 0, "steps": 3, "n_contexts": 2},
    "retrieval": {"layer": 0},
    "in_context": {},
}


@pytest.fixture(scope="module")
def world():
    return World(seed=3, n_people=40, n_companies=8)


@pytest.mark.parametrize("name", list(SMALL))
def test_contract_of_memories(tiny_lm, facts, name):
    def make(lm, **changes):
        if "layer" not in SMALL[name]:
            changes.pop("layer", None)
        return make_editor(name, lm, background=TEXTS, **{**SMALL[name], **changes})

    check_memory_editor(make, tiny_lm("llama"), facts[:2] + facts[3:])


def test_hallucination_records(world, tmp_path):
    records = articles.hallucination_records(world, 7, seed=2)
    assert records == articles.hallucination_records(world, 7, seed=2)
    assert [r["subject"] for r in records[:2]] == [records[0]["subject"]] * 2
    assert len({r["subject"] for r in records}) == 4
    first, second = records[:2]
    # the second prompt tells the first correction, so a stream of them is consistent
    assert second["prompt"].startswith(f"{first['prompt']} {first['target_new']}")
    for r in records:
        assert r["subject"] in r["prompt"] and r["prompt"].endswith(".") and r["target_new"].endswith(".")
        true = {v for q in world.relations_of_subject("born_in") if (v := world.value(q.id, r["subject"]))}
        new = r["target_new"].rstrip(".")
        assert not any(new.endswith(value) for value in true), (r, true)
    facts = articles.as_facts(records, selfcheck.load, tmp_path, "x-")
    assert [f.text for f in facts] == [r["prompt"] for r in records] and facts[0].case_id.startswith("x-")
    with pytest.raises(RequestError, match="people"):
        articles.hallucination_records(world, 500)


def test_temporal_records(world, tmp_path):
    records = articles.temporal_records(world, 5, seed=1)
    facts = articles.as_facts(records, temporal.load, tmp_path)
    for fact in facts:
        before, value = articles.answer_in_text(fact)
        assert value == fact.target and fact.subject in before
        assert f"{before} {value}" == fact.reference[0].rstrip(".") or fact.reference[0].startswith(before)
        assert fact.target not in before.split(". ")[-1]


def test_background_is_about_nothing_that_is_edited(world):
    made = data._generated(world, lambda s: articles_facts(world, s), [1], 30)
    facts, texts = made[1]
    assert (
        len(texts) == 30
        and texts == data._generated(world, lambda s: articles_facts(world, s), [1], 30)[1][1]
    )
    assert not any(f.subject in t for f in facts for t in texts if t.startswith(f.subject))


def articles_facts(world, seed):
    from editkit.corpora.world.records import edit_facts

    return edit_facts(world, 4, seed, n_paraphrases=1, n_neighbors=1, n_locality=2, n_same_subject=0)


def test_summary_averages_the_axes_of_each_fact():
    rows = pd.DataFrame(
        [("m", 0, f, a, v) for f, vs in {"x": (1, 0, 1), "y": (1, 1, 0.5)}.items()
         for a, v in zip(streams.PAPER_AXES, vs, strict=True)],
        columns=["method", "seed", "fact_id", "axis", "success"],
    )  # fmt: skip
    found = streams.summary(rows, ["method"], n_boot=50).set_index("axis")["mean"]
    assert found["paraphrase"] == 0.5 and found["average"] == pytest.approx((2 / 3 + 2.5 / 3) / 2)


def stream_facts(facts):
    probe = Probe("You can see the old house near", "the river")
    return [f.replace(paraphrases=(f"She said: {f.text}",), locality=(probe,)) for f in facts]


@pytest.mark.parametrize("name", ["retrieval", "ft"])
def test_stream_scores(tiny_lm, facts, name):
    lm = tiny_lm("llama")
    options = SMALL.get(name, {"layers": [1], "steps": 3})
    before = {n: p.detach().clone() for n, p in lm.model.named_parameters()}
    editor = make_editor(name, lm, **options, **({"background": TEXTS} if name == "retrieval" else {}))
    rows, cost = streams.stream_scores(lm, editor, stream_facts(facts), [1, 3])
    assert rows.groupby("edits")["fact_id"].nunique().to_dict() == {1: 1, 3: 3}
    assert cost["seconds_per_edit"] > 0 and (cost["bytes"] > 0) == (name == "retrieval")
    if name == "retrieval":
        assert (rows[rows["axis"] == "efficacy"]["success"] == 1).all()
        assert (rows[rows["axis"] == "locality"]["success"] == 1).all()
    assert all(torch.equal(before[n], p) for n, p in lm.model.named_parameters())


@pytest.mark.parametrize("name", ["loka", "grace"])
def test_a_killed_stream_goes_on(tiny_lm, facts, tmp_path, name):
    lm, path = tiny_lm("llama"), tmp_path / "stream.safetensors"

    def make():
        return make_editor(name, lm, background=TEXTS, **SMALL[name])

    whole = make()
    streams.edit_one_by_one(whole, facts, [4], lambda n: None)
    expected = whole.state_dict()
    whole.restore()

    def die(n):
        raise KeyboardInterrupt

    killed = make()
    with pytest.raises(KeyboardInterrupt):
        streams.edit_one_by_one(killed, facts, [2, 4], die, checkpoint=path, every=1)
    killed.restore()
    seen: list[int] = []
    again = make()
    streams.edit_one_by_one(again, facts, [2, 4], seen.append, checkpoint=path)
    assert seen == [2, 4]
    assert all(torch.equal(again.state_dict()[k], v) for k, v in expected.items())
    again.restore()


def test_a_finished_stream_is_not_edited_again(tiny_lm, facts, tmp_path):
    lm, path = tiny_lm("llama"), tmp_path / "retrieval-1.safetensors"

    def scores():
        editor = make_editor("retrieval", lm, background=TEXTS, layer=0)
        return streams.stream_scores(lm, editor, stream_facts(facts), [1, 3], checkpoint=path)

    (first, cost), (again, later) = scores(), scores()
    assert list(first.columns) == list(again.columns)
    for column in ("edits", "fact_id", "axis", "kind", "prompt", "answer", "success"):
        assert first[column].tolist() == again[column].tolist(), column
    assert cost["bytes"] == later["bytes"] > 0


@pytest.mark.parametrize("counts", [[], [0], [2, 1], [1, 9]])
def test_impossible_counts(tiny_lm, facts, counts):
    with pytest.raises(ConfigError, match="must increase"):
        streams.edit_one_by_one(None, facts, counts, lambda n: None)


def test_arms():
    assert set(arms.COMPANION) >= {a.editor for a in arms.ARMS.values() if a.kind == "memory"}
    with pytest.raises(DataError, match="choose from"):
        arms.arm_named("memoire")
    with pytest.raises(ConfigError, match="'world' or 'zsre'"):
        data.question_streams("zsre2", 1, [0])


def test_options_need_no_companion(tiny_lm):
    assert arms.arm_options(tiny_lm("llama"), "wise-merge", {"layer": 1}) == {"retrieve": False, "layer": 1}


def test_published_figures_have_a_source():
    for name in ("zsre", "zsre_1000", "long_run", "ripple"):
        table = published.table("memoir", name).drop(columns="method")
        assert published.source("memoir", name)
        values = table.to_numpy(dtype=float)
        assert ((values >= 0) & (values <= 1) | np.isnan(values)).all()
    memoir = published.table("memoir", "zsre").set_index("method").loc["memoir"]
    assert memoir.tolist() == [1.0, 0.95, 0.93]
    # the single scores of the ablation table average to the printed average
    single = published.table("memoir", "zsre_1000").set_index("method").loc["memoir"]
    assert math.isclose(float(np.mean(single.tolist())), 0.93, abs_tol=0.005)


def test_records_file_is_in_the_real_schema(world, tmp_path):
    articles.as_facts(articles.hallucination_records(world, 2), selfcheck.load, tmp_path)
    [first, _] = json.loads((tmp_path / "records.json").read_text())
    assert set(first) == {"prompt", "subject", "target_new", "locality_prompt", "locality_ground_truth"}
