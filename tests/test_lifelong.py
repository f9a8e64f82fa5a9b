"""Lifelong streams: records, scores by hand, resuming, the contract of every memory baseline, published figures."""

from __future__ import annotations

import json
import math

import numpy as np
import pandas as pd
import pytest
import torch

from editkit.base.errors import ConfigError, RequestError
from editkit.corpora import selfcheck, temporal
from editkit.corpora.world import World
from editkit.methods import make_editor
from editkit.methods.contract import check_memory_editor
from editkit.models.facts import Probe
from editkit.studies import arms, published, testbed
from editkit.studies.memoir import articles, data, streams
from editkit.studies.streams import Keep, edit_stream

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
        true = set(world.attributes("born_in", r["subject"]).values())
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
    bed = testbed.TableTestbed(None, "world", ".", world)
    facts, texts = data.question_streams(bed, 4, [1], n_background=30)[1]
    assert len(texts) == 30 and texts == data.question_streams(bed, 4, [1], n_background=30)[1][1]
    assert not any(f.subject in t for f in facts for t in texts if t.startswith(f.subject))


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
    lm, keep = tiny_lm("llama"), Keep(tmp_path, "stream", seconds=0)

    def make():
        return make_editor(name, lm, background=TEXTS, **SMALL[name])

    whole = make()
    edit_stream(whole, facts[:4])
    expected = whole.state_dict()
    whole.restore()

    def die(n):
        raise KeyboardInterrupt

    killed = make()
    with pytest.raises(KeyboardInterrupt):
        edit_stream(killed, facts[:4], checkpoint=die, at=[2, 4], keep=keep)
    killed.restore()
    seen: list[int] = []
    again = make()
    edit_stream(again, facts[:4], checkpoint=seen.append, at=[2, 4], keep=keep)
    assert seen == [2, 4]
    assert all(torch.equal(again.state_dict()[k], v) for k, v in expected.items())
    again.restore()


def test_a_finished_stream_is_not_edited_again(tiny_lm, facts, tmp_path):
    lm, keep = tiny_lm("llama"), Keep(tmp_path, "retrieval-1", forget=False)

    def scores():
        editor = make_editor("retrieval", lm, background=TEXTS, layer=0)
        return streams.stream_scores(lm, editor, stream_facts(facts), [1, 3], keep=keep)

    (first, cost), (again, later) = scores(), scores()
    assert list(first.columns) == list(again.columns)
    for column in ("edits", "fact_id", "axis", "kind", "prompt", "answer", "success"):
        assert first[column].tolist() == again[column].tolist(), column
    assert cost["bytes"] == later["bytes"] > 0


@pytest.mark.parametrize("counts", [[], [0], [2, 1], [1, 9]])
def test_impossible_counts(tiny_lm, facts, counts):
    with pytest.raises(ConfigError, match="must increase"):
        streams.stream_scores(tiny_lm("llama"), None, facts, counts)


def test_arms():
    assert set(arms.COMPANION) >= {a.editor for a in arms.ARMS.values() if a.kind == "memory"}
    with pytest.raises(ConfigError, match="did you mean"):
        arms.arm_named("memoire")
    assert arms.arm_named("gpm").editor == "gpm"
    with pytest.raises(ConfigError, match="zsre"):
        testbed.open_testbed("companion", "zsre2")
    with pytest.raises(ConfigError, match="choose a real file"):
        data.hallucination_streams(testbed.CorpusTestbed(None, "zsre"), "world", 1, [0], None)


def test_options_need_no_companion(tiny_lm):
    assert arms.options_of(tiny_lm("llama"), "wise-merge", {"layer": 1}) == {"retrieve": False, "layer": 1}


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
