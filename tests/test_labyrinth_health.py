"""Recall, drift and streams of revisions; the paper's own figures."""

import numpy as np
import pytest
import torch

from editkit.base.errors import ConfigError, NumericsError, RequestError
from editkit.corpora.world.world import World
from editkit.models.facts import Fact
from editkit.scoring import generate
from editkit.studies import published
from editkit.studies.labyrinth.health import (
    downstream,
    drift,
    first_metric,
    recall,
    text_perplexity,
)
from editkit.studies.labyrinth.revisions import read_back, revision_stream, write_round
from editkit.studies.testbed import TableTestbed


def test_drift_of_a_moved_and_of_a_turned_cloud():
    X = torch.randn(6, 400, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    same = drift(X, X)
    assert same["shift"] == 0 and same["frechet"] == pytest.approx(0, abs=1e-10)
    assert same["cosine"] == pytest.approx(1)
    moved = drift(X, X + 3.0)
    total = float(((X - X.mean(1, keepdim=True)) ** 2).sum() / 400)
    assert moved["shift"] == pytest.approx((54.0 / total) ** 0.5)
    assert moved["frechet"] == pytest.approx(54.0 / total)
    scaled = drift(X - X.mean(1, keepdim=True), 2 * (X - X.mean(1, keepdim=True)))
    assert scaled["frechet"] == pytest.approx(1.0)  # (2 - 1)^2 of every variance
    turned = drift(X, -X)
    assert turned["cosine"] == pytest.approx(-1)


def test_drift_needs_two_equal_clouds():
    with pytest.raises(NumericsError, match="two clouds"):
        drift(torch.zeros(3, 4), torch.zeros(3, 5))
    with pytest.raises(NumericsError, match="all states are equal"):
        drift(torch.ones(3, 4), torch.ones(3, 4))


def test_recall_agrees_with_greedy_generation(tiny_lm):
    lm = tiny_lm("llama", "wordlevel")
    subjects = ("weather", "river", "old house", "violin", "city")
    said = [g.text.strip() for g in generate(lm, [f"The {s} is" for s in subjects], max_new_tokens=1)]
    words = [(s, w) for s, w in zip(subjects, said, strict=True) if w]
    assert words, "the random model says special tokens only; take another seed"
    right = [("The {} is", s, w) for s, w in words]
    wrong = [("The {} is", s, "Paris" if w != "Paris" else "Rome") for s, w in words]
    assert recall(lm, right, stop="").tolist() == [1.0] * len(words)
    assert recall(lm, wrong, stop="").tolist() == [0.0] * len(words)


def test_held_out_people_are_not_in_the_world():
    world = World(seed=0, n_people=20, n_companies=4)
    texts = TableTestbed(None, "world", ".", world).held_out(7)
    assert len(texts) == 7
    assert not any(name in text for name in world.people for text in texts)


def test_text_perplexity_is_in_logarithms(tiny_lm):
    values = text_perplexity(tiny_lm("llama"), ["The weather is fine today.", "You can see the river."])
    assert values.shape == (2,) and np.all(values > 0) and np.all(values < 20)


def test_downstream_tasks_need_the_extra(tiny_lm, monkeypatch):
    assert downstream(tiny_lm("llama"), []) == {}
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    with pytest.raises(ConfigError, match=r"editkit\[eval\]"):
        downstream(tiny_lm("llama"), ["sst2"])


def test_first_metric_prefers_accuracy():
    assert first_metric({"alias": "x", "f1,none": 0.4, "acc,none": 0.7, "acc_stderr,none": 0.1}) == 0.7
    assert first_metric({"mcc,none": 0.2, "mcc_stderr,none": 0.1}) == 0.2
    with pytest.raises(ConfigError, match="no number"):
        first_metric({"alias": "x"})


@pytest.fixture
def stream():
    facts = [
        Fact("{} lives in", f"S{i}", "Rome", "Paris", relation="lives", case_id=str(i)) for i in range(6)
    ]
    return revision_stream(facts, 2, 3, {"lives": ["Paris", "Rome", "Bonn", "Oslo", "Lima"]}, seed=0)


def test_a_revision_never_repeats_a_value(stream):
    for fact in stream.revised:
        values = stream.values(fact)
        assert len(values) == 3 == len(set(values)) and "Paris" not in values
        assert stream.values(fact, 1) == values[:1]
    assert [len(r) for r in stream.rounds] == [4, 3, 3]
    assert len({f.case_id for f in stream.facts}) == 10
    assert sorted(f.subject for r in stream.rounds for f in r if f.subject in ("S2", "S3", "S4", "S5")) == [
        "S2", "S3", "S4", "S5"
    ]  # fmt: skip


def test_bad_streams_are_refused():
    facts = [Fact("{} lives in", f"S{i}", "Rome", "Paris", relation="lives") for i in range(3)]
    with pytest.raises(RequestError, match="second round"):
        revision_stream(facts, 2, 1, {"lives": ["Bonn"]}, 0)
    with pytest.raises(RequestError, match="more objects"):
        revision_stream(facts, 2, 3, {"lives": ["Bonn"]}, 0)


class Refusing:
    """An editor that knows what it has written and refuses to write it again."""

    def __init__(self):
        self.known, self.batches = set(), []

    def edit(self, facts):
        if self.known & {f.subject for f in facts}:
            raise RequestError("already written")
        self.known |= {f.subject for f in facts}
        self.batches.append([f.subject for f in facts])


def test_refused_facts_are_dropped_and_counted(stream):
    editor, written = Refusing(), set()
    assert [write_round(editor, r, written) for r in stream.rounds] == [0, 2, 2]
    assert editor.batches == [["S0", "S1", "S2", "S5"], ["S3"], ["S4"]]


def test_other_refusals_pass_through(stream):
    class Broken:
        def edit(self, facts):
            raise RequestError("malformed")

    with pytest.raises(RequestError, match="malformed"):
        write_round(Broken(), stream.rounds[0], set())


def test_read_back_of_an_unedited_model(tiny_lm, stream):
    table = read_back(tiny_lm("llama"), stream, 2)
    assert (table["kind"] == "revised").sum() == 2 and (table["kind"] == "control").sum() == 3
    assert table[table["kind"] == "control"]["p_old"].isna().all()
    assert table["p_latest"].between(0, 1).all() and set(table["says"]) <= {
        "latest",
        "old",
        "original",
        "other",
    }


def test_published_figures_are_complete():
    main = published.table("labyrinth", "main")
    assert len(main) == 64  # 2 data sets x 2 batchings x 4 models x 4 methods
    assert main.groupby(["dataset", "edits", "model"]).size().eq(4).all()
    row = main[(main["dataset"] == "MultiCounterFact") & (main["edits"] == "1 x 2000")]
    row = row[(row["model"] == "Llama-3-8B-Instruct") & (row["method"] == "MEMIT_seq_rect_err")].iloc[0]
    assert (row["Eff"], row["Gen"], row["Con_std"]) == (83.23, 59.41, 0.20)
    assert main[main["dataset"] == "ZsRE"]["Flu"].isna().all()
    assert [len(published.table("labyrinth", name)) for name in ("ablation", "latest")] == [6, 3]
    assert all("2605.26670" in published.source("labyrinth", t) for t in ("main", "ablation", "latest"))
