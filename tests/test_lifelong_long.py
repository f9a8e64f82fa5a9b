"""Long streams and settings: increments against the predicted decay, calibrated thresholds, options while reading."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from editkit.base.errors import ConfigError
from editkit.methods import make_editor
from editkit.models.facts import Probe
from editkit.studies import arms
from editkit.studies.memoir import settings, streams
from editkit.studies.memoir.data import Streams
from editkit.studies.memoir.long_run import Diary, look_up_seconds, prompt_overlaps
from editkit.studies.streams import Keep

TEXTS = ["the weather was fine today", "you can see the old house", "near the river", "she works and speaks"]
FAST = {"layer": 0, "threshold": 0.9, "steps": 4, "stop_loss": 0.0, "n_contexts": 1}


def probed(facts):
    other = (Probe("the river is near the", "house"), Probe("you can see the", "river"))
    return [f.replace(paraphrases=("you know that " + f.text,), locality=other) for f in facts]


@pytest.mark.parametrize("decay", [0.0, 0.05])
def test_increments_decay_as_predicted(tiny_lm, facts, tmp_path, decay):
    """The memory is the sum of what edits wrote, each shrunk by the steps made after it."""
    lm = tiny_lm("llama")
    editor = make_editor("memoir", lm, background=TEXTS, weight_decay=decay, **FAST)
    diary = Diary(editor, tmp_path, sampled=range(len(facts)))
    for fact in facts:
        diary.edit([fact])
    kept = diary.kept()
    shrink = 1 - editor.config.lr * decay
    assert kept["predicted"].tolist() == pytest.approx([shrink**n for n in kept["steps_after"]])
    assert kept["steps_after"].iloc[-1] == 0 and kept["steps_after"].iloc[0] == 4 * (len(facts) - 1)
    total = torch.zeros_like(editor.weight)
    for row in kept.itertuples():
        found = load_file(tmp_path / f"{row.position}.safetensors")
        total[:, found["columns"]] += row.predicted * found["wrote"]
    assert torch.allclose(total, editor.weight, atol=1e-5)
    assert kept["measured"].iloc[-1] == pytest.approx(1.0, abs=0.5)
    editor.restore()
    early = Diary(
        make_editor("memoir", lm, background=TEXTS, **{**FAST, "stop_loss": 1e9, "stop_change": None}),
        tmp_path,
    )
    early.edit(facts[:1])
    assert early.steps == [0]  # the loss was evaluated once, and no step taken
    early.restore()


def test_a_diary_goes_on_where_the_stream_was_saved(tiny_lm, facts, tmp_path):
    lm = tiny_lm("llama")

    def diary():
        return Diary(make_editor("memoir", lm, background=TEXTS, **FAST), tmp_path / "d", sampled=[0, 2])

    whole = diary()
    for fact in facts:
        whole.edit([fact])
    expected = whole.kept()
    whole.restore()
    half = diary()
    for fact in facts[:2]:
        half.edit([fact])
    half.save(tmp_path / "half.safetensors")
    half.edit([facts[2]])  # lost with the process
    half.restore()
    again = diary()
    again.load(tmp_path / "half.safetensors")
    for fact in facts[2:]:
        again.edit([fact])
    assert again.kept().equals(expected) and again.steps == [4] * len(facts)
    again.restore()


def test_calibration_keeps_its_rate_and_grows_with_the_memory(tiny_lm, facts):
    lm = tiny_lm("llama")
    facts = probed(facts)
    few = settings.calibrate(lm, facts, TEXTS, n=1, rate=0.0, layer=0)
    all_ = settings.calibrate(lm, facts, TEXTS, rate=0.0, layer=0)
    assert few.threshold <= all_.threshold and few.n_unrelated == all_.n_unrelated and few.n_rephrases == 1
    memory = make_editor("memoir", lm, background=TEXTS, **{**FAST, "threshold": all_.threshold})
    memory.edit(facts)
    assert not memory.look_up([p.prompt for f in facts for p in f.locality]).active.any()
    found = prompt_overlaps(memory, facts)
    assert set(found) == {"rephrase", "unrelated fact"} and (found["unrelated fact"] < all_.threshold).all()
    assert look_up_seconds(memory, torch.randn(3, memory.d)) > 0
    memory.restore()
    with pytest.raises(ConfigError, match="locality prompts"):
        settings.calibrate(lm, [f.replace(locality=()) for f in facts], TEXTS, layer=0)


def test_other_options_hold_while_reading_only(tiny_lm, facts, tmp_path):
    lm = tiny_lm("llama")
    editor = make_editor("memoir", lm, background=TEXTS, **FAST)
    rows, _ = streams.stream_scores(lm, editor, probed(facts[:2]), [1, 2], reading={2: {"threshold": 1.5}},
                                    keep=Keep(tmp_path, "m", forget=False))  # fmt: skip
    said = rows[rows["axis"] == "locality"].groupby("edits")["success"].mean()
    assert said[2] == 1.0  # nothing reaches 1.5: the unedited model answers
    assert editor.config.threshold == FAST["threshold"]
    editor.load(tmp_path / "m-2.safetensors")  # saved with its own options
    editor.restore()


def test_the_best_average_is_chosen_and_reported_seeds_are_refused(tiny_lm, facts):
    lm = tiny_lm("llama")
    data = Streams({100: probed(facts)}, {100: TEXTS})
    grid = [{"layer": 0, "threshold": t} for t in (0.0, 0.99, 0.995)]
    found = settings.sweep(lm, data, 100, {"retrieval": grid})
    assert found["chosen"].sum() == 1
    best = found.loc[found["chosen"], "average"].iloc[0]
    assert best == found["average"].max() and found["average"].eq(best).idxmax() == found["chosen"].idxmax()
    assert np.allclose(found["average"], found[["reliability", "generalisation", "locality"]].mean(axis=1))
    with pytest.raises(ConfigError, match="one of the reported seeds"):
        settings.with_threshold(None, 2, {}, [1, settings.SEED])
    assert set(settings.ORIGINS) <= set(arms.ARMS)
    assert set(settings.CANDIDATES) <= set(arms.ARMS)
