"""Hypernetworks: caches, training, checkpoints, editors under the contract, errors."""

from __future__ import annotations

import copy
import dataclasses
import json
import time

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import MODEL_TYPES, make_lm

from editkit.base.errors import ConfigError, DataError, ModelError, RequestError
from editkit.methods import make_editor
from editkit.methods.contract import check_editor
from editkit.methods.hypernet import (
    RowFiles,
    RowMemory,
    Trainer,
    disjoint,
    encode_pairs,
    make_hypernetwork,
    records_of,
)
from editkit.methods.hypernet.cache import bytes_needed, check_memory
from editkit.methods.hypernet.data import answer_logits, draw
from editkit.methods.hypernet.editor import HORSE
from editkit.methods.hypernet.horse import HORSE as HorseNet
from editkit.methods.hypernet.horse import RELEASED
from editkit.methods.hypernet.network import load_hypernetwork
from editkit.methods.hypernet.prefix import StateMemory, entering
from editkit.methods.hypernet.sites import edited, find_sites
from editkit.models.facts import Probe
from editkit.models.hooks import submodule
from editkit.studies.horse.costs import KINDS, PublishedHORSE, peak_memory, speed_up, step_times

NAMES = ["mend", "malmen", "rledit", "horse"]
SMALL = {"rank": 3, "n_blocks": 1, "lr": 0.05}
STEP = {"n_edits": 2, "meta_lr": 1e-3, "batch_size": 2, "length": 2}


@pytest.fixture
def records(facts):
    far = Probe("The weather is", "fine", "weather")
    near = Probe("The mother tongue of Mary is", "French", "tongue")
    rich = [
        f.replace(paraphrases=(f"I see {f.subject} and",), locality=(far,), neighborhood=(near,))
        for f in facts
    ]
    return records_of(rich)


def trainer_of(lm, name, records, folder=None, **config):
    net = make_hypernetwork(name, lm, layers=[0, 1], **SMALL)
    return Trainer(lm, net, records, {**STEP, **config}, folder=folder)


def state_of(lm):
    return {k: v.clone() for k, v in lm.model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("tokens", ["answer", "all"])
def test_memory_and_shards_give_the_same_rows(tokens, tmp_path, records):
    lm = make_lm()
    sites, pairs = find_sites(lm, [0, 1]), [r.edit for r in records]
    files = RowFiles(lm, sites, 3, tokens, folder=tmp_path / "rows").take(pairs)
    memory = RowMemory(lm, sites, 3, tokens)
    memory.take(pairs[1:2])  # a fact that was met before, alone
    rows = memory.take(pairs)
    assert files.parts == rows.parts and len(files) == len(rows)
    for i in range(2):
        for a, b in zip(files.site(i), rows.site(i), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)
    assert len(list((tmp_path / "rows").iterdir())) == 2
    next((tmp_path / "rows").iterdir()).write_bytes(b"broken")
    with pytest.raises(DataError, match="collect them again"):
        files.site(0)


def test_shards_never_touch_other_files(tmp_path):
    lm = make_lm()
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(DataError, match="empty folder"):
        RowFiles(lm, find_sites(lm, [0]), 2, folder=tmp_path)


def test_known_facts_cost_no_pass_of_the_model(records):
    lm, passes = make_lm(), []
    hook = lm.model.register_forward_hook(lambda *_: passes.append(1))
    memory = RowMemory(lm, find_sites(lm, [0]), 2)
    pairs = [r.edit for r in records]
    count = []
    for _ in range(2):
        memory.take(pairs)
        count.append(len(passes))
    hook.remove()
    assert len(memory) == len(pairs) and count[0] == count[1]


def test_gradients_are_those_of_the_mean_over_the_batch(records):
    lm = make_lm()
    sites, pairs = find_sites(lm, [1]), [r.edit for r in records[:2]]
    one, two = (RowMemory(lm, sites, size).take(pairs) for size in (1, 2))
    scale = [len(one) / n for n in one.parts for _ in range(n)]
    torch.testing.assert_close(one.grads[0], torch.tensor(scale)[:, None] * two.grads[0])


@pytest.mark.parametrize(("name", "on_disk"), [*((n, False) for n in NAMES), ("horse", True)])
def test_training_resumes_to_the_same_bits(name, on_disk, records, tmp_path):
    lm = make_lm()
    before = state_of(lm)
    folder = tmp_path / "rows" if on_disk else None
    whole = trainer_of(lm, name, records, folder)
    whole.train(3)
    part = trainer_of(lm, name, records, folder)
    part.train(2)
    path = part.save(tmp_path / "training.safetensors")
    resumed = trainer_of(lm, name, records, folder)
    resumed.load(path)
    assert [e.step for e in resumed.train(1)] == [2]
    assert same(whole.net.state_dict(), resumed.net.state_dict())
    assert [e.generalization for e in whole.log] == [e.generalization for e in resumed.log]
    assert same(before, state_of(lm)), "training changed the model"
    assert all(p.grad is None and p.requires_grad for p in lm.model.parameters())
    with pytest.raises(ConfigError, match="meta_lr"):
        trainer_of(lm, name, records, meta_lr=0.5).load(path)
    with pytest.raises(ConfigError, match="base"):
        trainer_of(make_lm(seed=1), name, records).load(path)
    with pytest.raises(DataError, match="checkpoint"):
        whole.load(whole.net.save(tmp_path / "net.safetensors"))


def test_training_lowers_the_loss_of_its_facts(records):
    lm = make_lm()
    same_prompt = [dataclasses.replace(r, paraphrases=(r.edit,)) for r in records]
    net = make_hypernetwork("malmen", lm, layers=[0, 1], rank=3, n_blocks=1, lr=1.0)
    log = Trainer(lm, net, same_prompt, {**STEP, "n_edits": 4, "meta_lr": 0.1}).train(15)
    assert log[-1].generalization < 0.8 * log[0].generalization


def test_evaluation_never_reaches_the_normaliser(records, facts):
    lm = make_lm()
    trainer = trainer_of(lm, "horse", records)
    trainer.train(1)
    before = {k: v.clone() for k, v in trainer.net.state_dict().items()}
    found = trainer.validate(records)
    assert set(found) == {"edits", "paraphrases", "unrelated"} and all(0 <= v <= 1 for v in found.values())
    editor = HORSE(lm, hypernetwork=trainer.net)
    editor.edit(facts[:1])
    editor.restore()
    assert same(before, trainer.net.state_dict())


def test_changed_model_empties_the_memory(records):
    lm = make_lm()
    trainer = trainer_of(lm, "malmen", records)
    trainer.train(1)
    assert len(trainer.rows)
    with torch.no_grad():
        lm.weight(0).add_(0.1)
    fresh = trainer_of(lm, "malmen", records)
    fresh.net.load_state_dict(trainer.net.state_dict())
    fresh.optimizer.load_state_dict(copy.deepcopy(trainer.optimizer.state_dict()))
    fresh.log = list(trainer.log)
    fresh.train(1)
    trainer.train(1)
    assert same(trainer.net.state_dict(), fresh.net.state_dict())
    with torch.no_grad():
        lm.embeddings().add_(1.0)
    with pytest.raises(ModelError, match="another model"):
        trainer.train(1)


def test_rledit_of_one_batch_is_malmen(records):
    lm = make_lm()
    nets = []
    for name, more in (("malmen", {}), ("rledit", {"reg": 0.0})):
        net = make_hypernetwork(name, lm, layers=[0, 1], **SMALL, **more)
        trainer = Trainer(lm, net, records, {**STEP, "length": 1})
        trainer.train(1)
        nets.append(net.state_dict())
    assert same(*nets)


def test_rledit_keeps_earlier_shifts_and_feels_its_penalty(records):
    lm = make_lm()
    gradients = []
    for reg in (0.0, 1e6):
        net = make_hypernetwork("rledit", lm, layers=[0, 1], **SMALL, reg=reg)
        trainer = Trainer(lm, net, records, STEP)
        seen = [trainer._draw(0, t) for t in range(2)]
        trainer.sequence(seen)
        gradients.append(torch.cat([p.grad.flatten() for p in net.parameters()]).norm())
    assert gradients[1] > 10 * gradients[0]
    # The second batch was planned on the model that carries the first.
    rows = RowMemory(lm, net.sites, 2)
    first = net.plan(rows.take(seen[0].edits)).shifts
    alone = rows.take(seen[1].edits)
    rows.clear()
    with edited(lm, net.sites, first):
        later = rows.take(seen[1].edits)
    assert not torch.equal(alone.keys[1], later.keys[1])


def test_draws_depend_on_seed_and_step_only(records):
    assert draw(records, 3, 0, 5) == draw(records, 3, 0, 5) != draw(records, 3, 0, 6)
    twice = [*records, *records]
    assert len({p for p, _ in draw(twice, 4, 0, 0).edits}) == 4
    with pytest.raises(DataError, match="lower n_edits"):
        draw(twice, 5, 0, 0)


def test_a_step_may_ask_about_some_of_its_facts(records):
    """The same edits, and of their probes a random part, so that the mean over steps asks about all alike."""
    whole, part = draw(records, 4, 0, 5), draw(records, 4, 0, 5, 2)
    assert part.edits == whole.edits and part.paraphrases == whole.paraphrases[:2]
    assert len(part.unrelated) == 2
    asked = {p for step in range(20) for p, _ in draw(records, 4, 0, step, 1).paraphrases}
    assert len(asked) == len(records)
    lm = make_lm()
    trainer = trainer_of(lm, "malmen", records, n_edits=4, n_probes=1)
    trainer.step()
    assert len(trainer.rows) == 4 and len(trainer.states) == 0
    full = trainer_of(lm, "malmen", records, n_edits=4, n_probes=4)
    plain = trainer_of(lm, "malmen", records, n_edits=4)
    assert dataclasses.astuple(full.step())[:4] == dataclasses.astuple(plain.step())[:4]


def test_training_facts_share_nothing_with_the_test(facts, records):
    test = [facts[0].replace(locality=(Probe("The weather is", "fine"),))]
    kept = disjoint(records, test)
    assert [r.subject for r in kept] == [f.subject for f in facts[1:]]
    assert all(p != "The weather is" for r in kept for p, _ in r.unrelated)
    with pytest.raises(DataError, match="no training record"):
        disjoint(records[:1], test)
    other = dataclasses.replace(
        records[0], edit=("Ana Silva plays the", "violin"), paraphrases=(("Ana Silva can", "violin"),)
    )
    assert len(disjoint([other, *records], test, by="fact")) == len(records)
    protects = [facts[0].replace(locality=(Probe(records[1].edit[0], "German"),))]
    assert len(disjoint(records, protects, by="fact")) == len(disjoint(records, protects, by="edit")) - 1
    assert records[0] not in disjoint(records, protects, by="edit")
    with pytest.raises(ConfigError, match="by"):
        disjoint(records, test, by="moon")


def test_released_target_field_is_the_true_object(facts):
    rich = [facts[0].replace(paraphrases=("Ana Silva speaks",), locality=(Probe("The weather is", "fine"),))]
    assert records_of(rich)[0].edit[1] == "French"
    assert records_of(rich, "ground_truth")[0].edit[1] == "German"
    with pytest.raises(DataError, match="target_true"):
        records_of([rich[0].replace(target_true=None)], "ground_truth")
    with pytest.raises(DataError, match="paraphrases"):
        records_of(facts)


@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
@pytest.mark.parametrize("name", NAMES)
def test_contract(name, model_type, records, facts, tmp_path):
    lm = make_lm(model_type)
    trainer = trainer_of(lm, name, records)
    trainer.train(1)
    path = str(trainer.net.save(tmp_path / "net.safetensors"))

    def make(lm, **changes):
        return make_editor(name, lm, **{"hypernetwork": path, **changes})

    check_editor(make, lm, facts[:3])


def test_editor_from_object_file_and_shards_write_the_same(records, facts, tmp_path):
    lm = make_lm("llama")
    trainer = trainer_of(lm, "horse", records)
    trainer.train(2)
    path = str(trainer.net.save(tmp_path / "net.safetensors"))
    seen = {}
    editors = [
        HORSE(lm, hypernetwork=trainer.net, record=seen.__setitem__),
        make_editor("horse", lm, hypernetwork=path),
        make_editor("horse", lm, hypernetwork=path, folder=str(tmp_path / "rows")),
    ]
    deltas = []
    for editor in editors:
        deltas.append(editor.edit(facts))
        editor.restore()
    assert same(deltas[0].after, deltas[1].after)
    for name, value in deltas[0].after.items():
        torch.testing.assert_close(value, deltas[2].after[name])
    for i, site in enumerate(trainer.net.sites):
        torch.testing.assert_close(
            deltas[0].update(site.weight_name), seen[f"shift_{i}"], rtol=1e-4, atol=1e-6
        )
    half = load_hypernetwork(trainer.net.save(tmp_path / "half.safetensors", torch.float16), lm)
    assert half.digest() != trainer.net.digest()
    assert torch.equal(half.nets["24x16"].normalizer.m2, trainer.net.nets["24x16"].normalizer.m2)


def test_models_below_float32_keep_masters(records, facts):
    lm = make_lm()
    lm.model.to(torch.bfloat16)
    before = state_of(lm)
    trainer = trainer_of(lm, "malmen", records)
    trainer.train(1)
    assert same(before, state_of(lm))
    editor = make_editor_of(trainer)
    delta = editor.edit(facts)
    assert all(v.dtype == torch.float32 for v in delta.after.values()) and delta.metadata["cast_loss"]
    editor.restore()
    assert same(before, state_of(lm))


def make_editor_of(trainer):
    from editkit.methods.hypernet.editor import MALMEN

    return MALMEN(trainer.lm, hypernetwork=trainer.net)


def test_hypernetwork_of_another_model_is_refused(records, tmp_path):
    lm = make_lm()
    trainer = trainer_of(lm, "malmen", records)
    path = str(trainer.net.save(tmp_path / "net.safetensors"))
    for other in (make_lm(seed=1), make_lm("llama"), make_lm(n_layers=1)):
        with pytest.raises(ModelError, match="another model"):
            make_editor("malmen", other, hypernetwork=path)
    with pytest.raises(ConfigError, match="malmen"):
        make_editor("horse", lm, hypernetwork=path)
    with pytest.raises(ConfigError, match="train one"):
        make_editor("horse", lm)
    (tmp_path / "text").write_text(json.dumps({}))
    with pytest.raises(DataError, match="cannot read"):
        make_editor("malmen", lm, hypernetwork=str(tmp_path / "text"))
    with pytest.raises(DataError, match="not a hypernetwork"):
        make_editor("malmen", lm, hypernetwork=str(trainer.save(tmp_path / "training")))


def test_untrained_networks_say_so(facts):
    lm = make_lm()
    editor = HORSE(lm, hypernetwork=make_hypernetwork("horse", lm, layers=[0], **SMALL))
    with pytest.raises(ValueError, match="train the hypernetwork"):
        editor.edit(facts)


def test_too_many_edits_say_how_many_fit(records, facts):
    lm = make_lm()
    trainer = trainer_of(lm, "malmen", records)
    trainer.train(1)
    sites = trainer.net.sites
    limit = bytes_needed(50, sites)
    with pytest.raises(RequestError, match="about 25 edits would fit") as raised:
        check_memory(1000, 2000, sites, limit)
    assert "on disk" in str(raised.value)
    check_memory(25, 50, sites, limit)
    assert bytes_needed(50, sites, on_disk=True) < limit
    with pytest.raises(RequestError, match="would fit"):
        trainer_of(lm, "malmen", records, memory_limit=100.0).train(1)
    with pytest.raises(RequestError, match="would fit"):
        make_editor_of(trainer).__class__(lm, {"memory_limit": 100}, hypernetwork=trainer.net).edit(facts)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_states_below_the_edits_give_the_same_losses(model_type, records):
    lm = make_lm(model_type, n_layers=3)
    sites = find_sites(lm, [2])
    states, batch = StateMemory(lm, sites), encode_pairs(lm, [r.edit for r in records], 4)[0]
    states.take(encode_pairs(lm, [records[0].edit], 1)[0])  # alone, padded differently
    with edited(
        lm, sites, [torch.randn(s.m, s.d, generator=torch.Generator().manual_seed(0)) for s in sites]
    ):
        expected = answer_logits(lm, batch)
        ran = []
        hook = lm.model.get_submodule(lm.attn_name(1)).register_forward_hook(lambda *_: ran.append(1))
        with entering(lm, states.block, states.take(batch)):
            count = len(ran)
            found = answer_logits(lm, batch)
        assert states.block == 2 and len(states) == 4 and len(ran) == count
        hook.remove()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert torch.isfinite(answer_logits(lm, batch)).all() and "forward" not in vars(
        submodule(lm.model, lm.block_name(0))
    )
    assert StateMemory(lm, find_sites(lm, [0])).take(batch) is None


@pytest.mark.parametrize("name", ["horse", "rledit"])
def test_upper_layers_resume_to_the_same_bits_too(name, records, tmp_path):
    lm = make_lm(n_layers=3)

    def fresh():
        net = make_hypernetwork(name, lm, layers=[1, 2], **SMALL)
        return Trainer(lm, net, records, {**STEP, "locality": "kl"})

    whole, part = fresh(), fresh()
    whole.train(4)
    part.train(3)
    resumed = fresh()
    resumed.load(part.save(tmp_path / "training.safetensors"))
    resumed.train(1)
    assert len(resumed.states) and same(whole.net.state_dict(), resumed.net.state_dict())


def test_unrelated_answers_are_read_once_before_the_edit(records):
    lm = make_lm()
    trainer = trainer_of(lm, "malmen", records)
    batch = encode_pairs(lm, [r.unrelated[0] for r in records[:1]], 2)[0]
    first = trainer._unedited(batch)
    with edited(lm, trainer.net.sites, [torch.ones(s.m, s.d) for s in trainer.net.sites]):
        assert torch.equal(first, trainer._unedited(batch))


def test_gain_is_paired_by_fact():
    from editkit.studies import published
    from editkit.studies.horse.bench import gain, units

    rows = pd.DataFrame(
        [
            {"editor": m, "seed": s, "fact_id": f, "protocol": "rome_zsre", "axis": a, "success": v}
            for s in (0, 1)
            for f in "abc"
            for m, v in (("horse", 0.9), ("mend", 0.5), ("malmen", 0.7))
            for a in ("efficacy", "paraphrase", "locality")
        ]
    )
    assert units(rows, "rome_zsre")["average"].tolist() == pytest.approx([0.9] * 6 + [0.7] * 6 + [0.5] * 6)
    assert gain(rows, "rome_zsre", "horse", ["mend", "malmen"], "locality").mean == pytest.approx(0.3)
    with pytest.raises(ConfigError, match="memit"):
        gain(rows, "rome_zsre", "horse", ["memit"], "average")
    assert list(published.table("horse", "gains")["points"]) == [6.26, 10.12]
    tie = gain(rows.assign(success=0.5), "rome_zsre", "horse", ["mend"], "average")
    assert tie.mean == 0 and tie.lo == -tie.hi < 0


def test_published_order_of_work_computes_the_same(records):
    lm = make_lm("llama")
    options = {"rank": 3, "lr": 0.05, **RELEASED}
    trained = []
    for cls in (HorseNet, PublishedHORSE):
        trainer = Trainer(lm, cls(lm, options, layers=[0, 1]), records, {**STEP, "n_edits": 3})
        trainer.optimizer.zero_grad(set_to_none=True)
        seen = trainer._draw(0)
        batches = [encode_pairs(lm, p, 2) for p in (seen.paraphrases, seen.unrelated)]
        trainer.accumulate(trainer.rows.take(seen.edits), *batches)
        trained.append({k: p.grad for k, p in trainer.net.named_parameters() if p.grad is not None})
    assert trained[0].keys() == trained[1].keys()
    for name, grad in trained[0].items():
        torch.testing.assert_close(trained[1][name], grad, rtol=1e-3, atol=1e-4 * float(grad.abs().max()))


def test_step_times_cover_every_kind(records):
    lm = make_lm(n_layers=3)
    before = state_of(lm)
    times = step_times(lm, records, [1, 2], 2, rounds=1, network={"rank": 2})
    assert list(times["kind"]) == list(KINDS) and (times[["seconds", "processor"]] > 0).all().all()
    held = times.set_index("kind")["held"]
    assert held["files"] == held["published"] == 0 < held["memory, known facts"]
    assert speed_up(times, "files", "files") == 1.0 and same(before, state_of(lm))
    with pytest.raises(ConfigError, match="kind"):
        step_times(lm, records, [1], 2, kinds=["tape"])


def test_peak_memory_sees_a_large_tensor():
    found = {}
    with peak_memory(found):
        kept = torch.ones(4_000_000, dtype=torch.float64)
        time.sleep(0.02)
    assert np.isnan(found["peak"]) or found["peak"] > 0.8 * 8 * len(kept)
