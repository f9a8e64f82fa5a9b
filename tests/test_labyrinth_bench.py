"""Arms, shared targets, streams and scores on a tiny random model."""

import numpy as np
import pandas as pd
import pytest
import torch
from filelock import FileLock, Timeout

from editkit.base import cached
from editkit.base.errors import ConfigError, DataError
from editkit.corpora.world.records import changes, edit_facts
from editkit.corpora.world.world import World
from editkit.locate.contexts import ContextTemplates
from editkit.locate.moments import Covariance
from editkit.models.facts import Fact, Probe
from editkit.studies.arms import ARMS
from editkit.studies.bench import Bench
from editkit.studies.labyrinth.health import Checkup, states, watch
from editkit.studies.labyrinth.revisions import state_gap
from editkit.studies.labyrinth.scores import paired_gain, paper_row, pipeline_gap, scores_now
from editkit.studies.streams import Keep, edit_stream, kept_stream, spread
from editkit.studies.testbed import CorpusTestbed, TableTestbed

OPTIONS = {"layers": (0, 1), "token": "last", "lam": 5.0, "z_steps": 4, "z_lr": 0.5, "z_clamp_factor": 4.0}


@pytest.fixture
def bench(tiny_lm, facts) -> Bench:
    lm = tiny_lm("llama")
    generator = torch.Generator().manual_seed(0)
    statistics = {}
    for layer in (0, 1):
        X = torch.randn(24, 200, generator=generator, dtype=torch.float64)
        statistics[layer] = Covariance.from_array(X @ X.T / 200)
    probes = (Probe("The weather in Paris is", "fine"),)
    facts = [f.replace(paraphrases=(f"Today {f.text}",), neighborhood=probes) for f in facts]
    return Bench(
        CorpusTestbed(lm, "own", "", tuple(facts)), facts, {**OPTIONS, "threshold": 10.0}, statistics,
        ContextTemplates((("{}",), ("You can see. {}",))), lm.fingerprint(),
        bystanders=[("The old city of {} is", "Vienna", "fine"), ("{} is near", "Rome", "the river")],
    )  # fmt: skip


LOCATE = [
    name for name, arm in ARMS.items() if arm.family == "locate" and name != "rome"
]  # rome takes one fact a time


@pytest.mark.parametrize("arm", LOCATE)
def test_every_arm_edits_and_restores(bench, arm):
    bench.prepare()
    editor = bench.editor(arm)
    edit_stream(editor, bench.facts, 2)
    assert bench.lm.fingerprint() != bench.fingerprint
    editor.restore()
    assert bench.lm.fingerprint() == bench.fingerprint


def test_shared_targets_are_those_of_the_unedited_model(bench):
    bench.prepare()
    editor = bench.editor("memit-seq")
    before = editor.targets(bench.facts)
    editor.edit(bench.facts[:2])
    assert torch.equal(editor.targets(bench.facts), before)
    with pytest.raises(ConfigError, match="carries an edit"):
        bench.prepare([bench.facts[0].replace(target="piano")])
    with pytest.raises(ConfigError, match="call prepare"):
        editor.targets([bench.facts[0].replace(target="piano")])


def test_targets_are_found_again_in_the_cache(bench, tmp_path):
    bench.cache_dir = tmp_path
    bench.prepare()
    files = list(tmp_path.glob("*.safetensors"))
    first, bench.given = bench.given, {}
    bench.prepare()
    assert list(tmp_path.glob("*.safetensors")) == files and len(files) == 1
    assert all(torch.equal(first[k], bench.given[k]) for k in first)


def test_one_layer_bare_prompt_and_fixed_targets_equal_one_time_editing(bench):
    bench.prepare()
    gaps, drift = pipeline_gap(bench, 1)
    exact = gaps[gaps["setting"] == "one layer, bare prompt, fixed targets"]
    assert exact["distance"].max() < 1e-5  # float32 weights
    others = gaps[gaps["setting"] == "all layers, mean keys, re-optimised targets"]
    assert others["distance"].max() > 1e-3
    moved = (
        drift[drift["setting"] == "all layers, bare prompt, fixed targets"].groupby("layer")["drift"].max()
    )
    assert moved[0] == 0.0 and moved[1] > 1e-4  # the lowest edited layer sees no change
    assert bench.lm.fingerprint() == bench.fingerprint


def test_scores_in_the_papers_form(bench):
    bench.prepare()
    editor = bench.editor("memit-seq")
    edit_stream(editor, bench.facts, 2)
    rows, text = scores_now(bench, bench.facts)
    editor.restore()
    before, _ = scores_now(bench, bench.facts)
    row = paper_row(rows, text, "rome", n_boot=50)
    assert set(row) == {"Eff", "Gen", "Spe"}
    assert row["Eff"]["n"] == 4 and 0 <= row["Eff"]["lo"] <= row["Eff"]["mean"] <= row["Eff"]["hi"] <= 1
    assert set(before["protocol"]) == {"rome", "generate"}
    assert bench.lm.fingerprint() == bench.fingerprint
    text = pd.DataFrame({"fluency": [5.0, 6.0], "consistency": [0.2, 0.4]})
    assert paper_row(rows, text, "rome", n_boot=50)["Flu"]["mean"] == pytest.approx(5.5)


def test_checkpoints_lie_between_batches(bench):
    bench.prepare()
    editor, seen = bench.editor("memit"), []
    edit_stream(editor, bench.facts, 1, checkpoint=seen.append, every=3)
    editor.restore()
    assert seen == [0, 3, 4]
    with pytest.raises(ConfigError, match="no multiple"):
        edit_stream(editor, bench.facts, 2, checkpoint=seen.append, every=3)


@pytest.mark.parametrize("arm", ["memit-seq", "rect-compensated"])
def test_interrupted_stream_resumes_to_the_same_weights(bench, tmp_path, arm):
    bench.prepare()
    whole = bench.editor(arm)
    notes = edit_stream(whole, bench.facts, 1, checkpoint=lambda done: {"edits": done}, every=1)
    expected = [bench.lm.get_matrix(layer) for layer in bench.layers]
    whole.restore()

    class Killed(BaseException):
        pass

    def fragile(done):
        if done == 3:
            raise Killed
        return {"edits": done}

    editor = bench.editor(arm)
    keep = Keep(tmp_path / "streams", "s", seconds=0)
    with pytest.raises(Killed):
        edit_stream(editor, bench.facts, 1, checkpoint=fragile, every=1, keep=keep)
    editor.restore()
    asked = []
    fresh = bench.editor(arm)
    found = edit_stream(
        fresh,
        bench.facts,
        1,
        checkpoint=lambda done: asked.append(done) or {"edits": done},
        every=1,
        keep=keep,
    )
    assert asked == [3, 4] and found == notes
    for layer, W in zip(bench.layers, expected, strict=True):
        assert torch.equal(bench.lm.get_matrix(layer), W)
    assert [p.name for p in (tmp_path / "streams").iterdir()] == ["locks"]
    fresh.restore()


def test_kept_streams_differ_by_all_that_decides_them(bench, tmp_path):
    editor = bench.editor("memit-seq")
    assert kept_stream(bench, editor, 2, True) is None
    bench.cache_dir = tmp_path
    names = [
        kept_stream(bench, editor, 2, True).name,
        kept_stream(bench, editor, 1, True).name,
        kept_stream(bench, editor, 2, False).name,
        kept_stream(bench, editor, 2, True, ["a text"]).name,
        kept_stream(bench, bench.editor("memit-seq", lam=7.0), 2, True).name,
        kept_stream(bench, bench.editor("memit"), 2, True).name,
    ]
    assert len(set(names)) == len(names)
    assert kept_stream(bench, bench.editor("memit-seq"), 2, True).name == names[0]


def test_state_gap_closes_when_a_fact_is_written(bench):
    bench.over = {**OPTIONS, "lam": 1e-3}
    bench.prepare()
    pairs = [(f.prompt, f.subject, f.target) for f in bench.facts]
    before = states(bench, pairs)
    assert state_gap(bench, bench.facts, before) == pytest.approx(np.ones(4))
    editor = bench.editor("memit-seq", contexts=ContextTemplates())
    editor.edit(bench.facts)
    assert state_gap(bench, bench.facts, before).max() < 0.1
    editor.restore()


def test_a_gain_is_paired_by_fact_and_seed():
    rows = pd.DataFrame({
        "fact_id": ["a", "a", "b", "b"], "axis": "efficacy", "protocol": "rome", "seed": 0,
        "arm": ["x", "y", "x", "y"], "success": [1.0, 0.0, 1.0, 1.0],
    })  # fmt: skip
    gain = paired_gain(rows[rows["arm"] == "x"], rows[rows["arm"] == "y"], "efficacy", "rome", n_boot=50)
    assert gain.mean == 0.5 and gain.n == 2
    none = paired_gain(rows[rows["arm"] == "x"], rows[rows["arm"] == "x"], "efficacy", "rome", n_boot=50)
    assert none.mean == 0 and none.lo == -none.hi < 0
    with pytest.raises(DataError, match="not the same facts"):
        paired_gain(rows[rows["arm"] == "x"], rows[:2], "efficacy", "rome")


def test_checkups_along_a_stream(bench):
    bench.prepare()
    checkup = Checkup.of(bench, ["The weather is fine today."])
    rows, scalars = watch(checkup, "memit", 2, 2, start=checkup.take())
    assert scalars["edits"].tolist() == [0, 2, 4]
    assert scalars["shift"].iloc[0] == 0 < scalars["shift"].iloc[1]
    assert rows.groupby(["metric", "edits"]).size().to_dict() == {
        ("kept", 2): 2, ("kept", 4): 4, ("recall", 0): 2, ("recall", 2): 2, ("recall", 4): 2,
        ("log_perplexity", 0): 1, ("log_perplexity", 2): 1, ("log_perplexity", 4): 1,
    }  # fmt: skip
    assert bench.lm.fingerprint() == bench.fingerprint


def test_a_spread_sample_covers_the_stream():
    assert spread(list(range(10)), 4) == [0, 3, 6, 9]
    assert spread([1, 2], None) == spread([1, 2], 5) == [1, 2]


def test_unknown_arms_are_refused(bench):
    with pytest.raises(ConfigError, match="memit-seq"):
        bench.editor("memit-sq")


def test_bystanders_of_a_corpus_have_other_subjects():
    facts = [Fact("{} lives in", f"S{i // 2}", "A", "B", case_id=str(i)) for i in range(8)]
    facts += [Fact("{} works in", f"S{i}", "A", "B", case_id=f"w{i}") for i in range(4)]
    bed = CorpusTestbed(None, "own", "", tuple(facts))
    chosen = bed.edits(2, 0)
    rest = bed.untouched(chosen, 10, 0)
    assert len({(f.prompt, f.subject) for f in chosen}) == 2
    assert rest and not {s for _, s, _ in rest} & {f.subject for f in chosen}
    with pytest.raises(DataError, match="8 usable facts"):
        bed.edits(9, 0)


def test_no_edit_touches_a_bystander():
    world = World(seed=0, n_people=20, n_companies=4)
    facts = edit_facts(world, 12, 0)
    touched = {c.key for f in facts for c in changes(world, f.relation, f.subject, f.target)}
    rows = TableTestbed(None, "world", ".", world).untouched(facts, 100, 0)
    assert len(rows) == 100
    asked = {(t, s) for t, s, _ in rows}
    for relation, subject in touched:
        for template in world.relation(relation).templates:
            assert (template.text, subject) not in asked


def test_one_process_at_a_time_runs_a_stream(bench, tmp_path):
    """Another that wants the same stream waits for its end instead of writing over its state."""
    keep = Keep(tmp_path, "s", seconds=0)
    held = FileLock(tmp_path / "locks" / "s.lock")
    seen = []

    def look(done):
        with pytest.raises(Timeout):
            held.acquire(timeout=0)
        seen.append(done)

    bench.prepare()
    editor = bench.editor("memit-seq")
    edit_stream(editor, bench.facts[:2], 1, checkpoint=look, every=1, keep=keep)
    editor.restore()
    assert seen == [0, 1, 2]
    with held.acquire(timeout=0):
        pass


def test_a_changed_source_is_another_stream(bench, tmp_path, monkeypatch):
    bench.cache_dir = tmp_path
    editor = bench.editor("memit-seq")
    before = kept_stream(bench, editor, 2, True).name
    monkeypatch.setattr(cached, "closure_hash", lambda *files: "another source")
    assert kept_stream(bench, editor, 2, True).name != before
