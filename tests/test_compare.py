"""The comparison of all methods: what is not run twice is equal, and the statistics by hand."""

import re
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch

from editkit.base.errors import ConfigError, DataError
from editkit.locate.contexts import ContextTemplates
from editkit.locate.moments import Covariance
from editkit.methods import make_editor
from editkit.models.facts import Probe
from editkit.press.plotting import NEUTRAL
from editkit.scoring import Baseline
from editkit.studies.arms import ARMS, arm_named, check_arms
from editkit.studies.bench import Bench
from editkit.studies.compare import analysis, lineage, measure
from editkit.studies.compare.measure import METHODS, make_method
from editkit.studies.testbed import CorpusTestbed

OPTIONS = {"layers": (0, 1), "token": "last", "lam": 5.0, "z_steps": 3, "z_lr": 0.5, "z_clamp_factor": 4.0}
TEXTS = ["the weather was fine today", "you can see the old house", "near the river", "she works and speaks"]
MEMORIES = {
    "grace": {"layer": 0, "steps": 3, "value_init": "warm"},
    "defer": {"layer": 0, "steps": 3, "lr": 0.05},
    "wise": {"layer": 0, "steps": 3, "n_contexts": 1, "beta": 1.0, "act_ratio": 0.5},
    "memoir": {"layer": 0, "steps": 3, "n_contexts": 1, "threshold": 0.7},
    "in-context": {},
    "retrieval": {"layer": 0},
    "retrieval-tokens": {"layer": 0},
}


@pytest.fixture
def bench(tiny_lm, facts) -> Bench:
    lm, draw, statistics = tiny_lm("llama"), torch.Generator().manual_seed(0), {}
    for layer in (0, 1):
        X = torch.randn(24, 200, generator=draw, dtype=torch.float64)
        statistics[layer] = Covariance.from_array(X @ X.T / 200)
    probe = (Probe("The weather in Paris is", "fine"),)
    facts = [f.replace(paraphrases=(f"Today {f.text}",), neighborhood=probe) for f in facts]
    return Bench(
        CorpusTestbed(lm, "own", "", tuple(facts)), facts, {**OPTIONS, "threshold": 10.0}, statistics,
        ContextTemplates((("{}",),)), lm.fingerprint(),
        bystanders=[("The old city of {} is", "Vienna", "fine"), ("{} is near", "Rome", "the river")],
    )  # fmt: skip


def exam_of(bench, axes=("efficacy", "paraphrase", "neighborhood")):
    baseline = Baseline.of(bench.lm, bench.facts, axes, protocols=("easyedit",))
    return measure.Examination(
        bench, bench.facts, axes, TEXTS, bench.bystanders, TEXTS, measure.filled(bench.bystanders), TEXTS, baseline,
    )  # fmt: skip


def test_every_arm_is_drawn_and_equals_what_it_says():
    for name, arm in ARMS.items():
        assert arm.at_once in ("", "stream") or ARMS[arm.at_once].at_once == ""
        assert arm.look.label == arm.label and (name == "unedited" or arm.look.color != NEUTRAL), name
    assert len({arm.label for arm in ARMS.values()}) == len(ARMS) and set(METHODS) <= set(ARMS)


@pytest.mark.parametrize(
    "name", [m for m in METHODS if ARMS[m].at_once and ARMS[m].needs == "moments" and m != "rome"]
)
def test_in_one_batch_two_variants_are_the_same(bench, name):
    weights = []
    for method in (name, ARMS[name].at_once):
        editor = make_method(bench, method, TEXTS, {}, {})
        editor.edit(bench.facts)
        weights.append({k: bench.lm.parameter(k).detach().clone() for k in editor.parameter_names()})
        editor.restore()
    assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])


def test_history_matters_in_the_second_batch(bench):
    found = []
    for method in ("memit", "memit-seq"):
        editor = make_method(bench, method, TEXTS, {}, {})
        editor.edit(bench.facts[:2])
        editor.edit(bench.facts[2:])
        found.append(bench.lm.get_matrix(0).clone())
        editor.restore()
    assert not torch.equal(*found)


@pytest.mark.parametrize("name", [m for m, x in ARMS.items() if x.at_once == "stream" and x.kind == "memory"])
def test_memories_write_one_fact_after_the_other(tiny_lm, facts, name):
    lm, states = tiny_lm("llama"), []
    arm = ARMS[name]
    for size in (1, 4):
        options = {**MEMORIES.get(name, MEMORIES.get(arm.editor)), **arm.options}
        editor = make_editor(arm.editor, lm, background=TEXTS, **options)
        for i in range(0, 4, size):
            editor.edit(facts[i : i + size])
        states.append(editor.state_dict())
        editor.restore()
    assert states[0].keys() == states[1].keys()
    for key in states[0]:
        assert torch.allclose(states[0][key].double(), states[1][key].double(), atol=1e-6), key


def test_rome_writes_one_fact_after_the_other(bench):
    found = []
    for size in (1, 4):
        editor = make_editor(
            "rome",
            bench.lm,
            statistics=bench.statistics,
            contexts=bench.contexts,
            layers=(1,),
            token="last",
            z_steps=2,
        )
        for i in range(0, 4, size):
            editor.edit(bench.facts[i : i + size])
        found.append(bench.lm.get_matrix(1).clone())
        editor.restore()
    assert torch.equal(*found)


def test_run_all_measures_copies_and_resumes(bench, tmp_path, monkeypatch):
    exam, names = exam_of(bench), ["unedited", "memit", "memit-seq"]
    said = []
    rows, costs = measure.run_all(exam, names, 3, batch=2, folder=tmp_path, say=said.append)
    assert (
        len(said) == 4 and bench.lm.fingerprint() == bench.fingerprint
    )  # 2 x 3 cells, two of them equal others
    assert set(rows["protocol"]) == {*measure.PROTOCOLS, "ability"} and set(rows["seed"]) == {3}
    once = costs.set_index(["regime", "method"]).loc["once"]
    assert (
        once.loc["memit-seq", "equals"] == "memit once"
        and once.loc["unedited", "equals"] == "unedited stream"
    )
    kept = costs.set_index(["regime", "method"]).loc["stream"]["kept"]
    assert kept["memit-seq"] > 0 == kept["memit"]
    monkeypatch.setattr(measure, "run_method", lambda *a, **k: pytest.fail("measured again"))
    again, _ = measure.run_all(exam, names, 3, batch=2, folder=tmp_path)
    pd.testing.assert_frame_equal(rows, again)
    with pytest.raises(ConfigError, match="regime"):
        monkeypatch.undo()
        measure.run_method(exam, "memit", "twice", batch=1, make=lambda: None)


def test_calibration_keeps_the_wanted_rate(tiny_lm, facts):
    editor = make_editor(
        "memoir", tiny_lm("llama"), background=TEXTS, layer=0, steps=1, n_contexts=0, threshold=0.5
    )
    editor.edit(facts[:2])
    prompts = [
        f"{a} {b}" for a in ("the old", "near the", "she was") for b in ("house", "river", "city", "day")
    ]
    threshold = measure.calibrate(editor, prompts, 0.25)
    assert editor.config.threshold == threshold
    assert editor.look_up(prompts).active.float().mean() <= 0.25
    assert editor.look_up([facts[0].text]).active.all()
    editor.restore()


def table(values, method, axis="efficacy", protocol="generate", regime="stream"):
    return pd.DataFrame([
        {"seed": s, "unit": str(u), "success": x} for (s, u), x in values.items()
    ]).assign(method=method, regime=regime, protocol=protocol, axis=axis)  # fmt: skip


def test_paired_difference_by_hand():
    a = table({(0, 0): 1.0, (0, 1): 0.0, (1, 0): 1.0, (1, 1): 1.0}, "a")
    b = table({(0, 0): 0.0, (0, 1): 0.0, (1, 0): 1.0, (1, 1): 0.0}, "b")
    x = analysis.difference(a, b)
    assert x.mean == 0.5 and x.lo <= 0.5 <= x.hi and x.n == 4
    same = analysis.difference(a, a)
    assert same.mean == 0 and same.lo == -same.hi < 0
    ones, zeros = (table({(0, u): v for u in range(10)}, "x") for v in (1.0, 0.0))
    full = analysis.difference(ones, zeros)
    assert full.mean == 1 and 0.6 < full.lo < 1 and full.hi == 1
    with pytest.raises(DataError, match="same units"):
        analysis.difference(a, b[:2])
    gains = analysis.against(pd.concat([a, b]), "b", "generate")
    assert list(gains["method"]) == ["a"] and gains["mean"].iloc[0] == 0.5
    with pytest.raises(ConfigError, match="method"):
        analysis.against(a, "c", "generate")


def test_agreement_and_balance_by_hand():
    rows = []
    for i, method in enumerate("abcd"):
        rows.append(table({(0, 0): i / 3}, method))
        rows.append(table({(0, 0): 1 - i / 3}, method, protocol="rome"))
        rows.append(table({(0, 0): 1.0}, method, protocol="easyedit"))
    summary = analysis.means(pd.concat(rows))
    found = analysis.agreement(summary).set_index(["first", "second"])["rho"]
    assert found["generate", "rome"] == pytest.approx(-1.0)
    assert np.isnan(found["easyedit", "generate"])  # one scorer cannot rank them
    two = pd.concat([table({(0, 0): 0.5}, "a"), table({(0, 0): 1.0}, "a", "locality"), table({(0, 0): 0.0}, "b"),
                     table({(0, 0): 1.0}, "b", "locality")])  # fmt: skip
    score = analysis.balance(analysis.means(two), "generate", ["efficacy", "locality"])
    assert score["stream", "a"] == pytest.approx(2 / 3) and score["stream", "b"] == 0
    with pytest.raises(DataError, match="paraphrase"):
        analysis.balance(analysis.means(two), "generate")


def test_unknown_and_repeated_methods_are_refused(bench):
    assert check_arms(["memit", "ft-l", "unedited"]) == ["unedited", "ft-l", "memit"]
    assert [m for m in ("horse", "memit") if arm_named(m).needs == "training"] == ["horse"]
    with pytest.raises(ConfigError, match="twice"):
        check_arms(["memit", "memit"])
    with pytest.raises(ConfigError, match="memit"):
        check_arms(["memitt"])
    for name in ("horse", "unedited"):
        with pytest.raises(ConfigError):
            make_method(bench, name, TEXTS, {}, {})


def test_lineage_is_consistent_and_drawn(tmp_path):
    found = lineage.load_lineage()
    bib = Path(__file__).parents[1] / "book" / "references.bib"
    if bib.is_file():
        keys = re.findall(r"^@\w+\{(\S+),$", bib.read_text(encoding="utf-8"), re.M)
        assert len(keys) == len(set(keys))
        assert {w["cite"] for w in found["works"]} <= set(keys)
    assert {w["run"] for w in found["works"]} - {""} <= set(METHODS)
    here = {w["run"] for w in found["works"]}
    alike = {"unedited", "ft-m", "retrieval", "retrieval-tokens", "memoir-paper"}  # not a work of their own
    variants = {m for m in METHODS if m.endswith(("-naive", "-compensated"))}
    assert set(METHODS) - here <= alike | variants
    spots = lineage.places(found)
    assert len(set(spots.values())) == len(found["works"]) == len(lineage.table(found))
    fig, axes = plt.subplots(2)
    lineage.draw_lineage(axes[0], found)
    lineage.draw_map(axes[1])
    drawn = {t.get_text() for t in axes[0].texts}
    plt.close(fig)
    assert {w["id"] for w in found["works"]} <= drawn
    broken = {**found, "works": [{**found["works"][0], "from": ["nobody"]}]}
    with pytest.raises(DataError, match="nobody"):
        lineage.check_lineage(broken)
