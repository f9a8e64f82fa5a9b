"""The shipped companion, and a tiny one trained end to end."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from editkit.base.errors import ConfigError, DataError
from editkit.corpora.world import load_companion, load_world
from editkit.corpora.world.companion import (
    SHIPPED,
    CompanionConfig,
    as_llama,
    build,
    file_hash,
    make_world,
    training_examples,
)
from editkit.corpora.world.corpus import Sampler, encode_examples, statement_example, train_tokenizer
from editkit.corpora.world.train import Muon, TrainConfig, build_model, greedy_recall, train
from editkit.studies import testbed

TINY = TrainConfig(
    layers=2,
    width=32,
    mlp=64,
    heads=2,
    vocab_size=400,
    length=32,
    batch_tokens=256,
    steps=12,
    warmup=2,
    threads=1,
)


@pytest.fixture(scope="module")
def shipped():
    return load_companion(), load_world()


def test_shipped_model_recalls_a_sample_of_its_world(shipped):
    lm, world = shipped
    statements = world.statements()
    some = [statements[i] for i in np.random.default_rng(5).choice(len(statements), 300, replace=False)]
    hit = greedy_recall(lm.model, lm.tokenizer, [s.prompt for s in some], [s.answer for s in some])
    assert hit.mean() >= 0.98


def test_shipped_report_meets_the_bar():
    report = json.loads((SHIPPED / "recall.json").read_text())
    assert report["world"] >= 0.98 and report["corpus_unique"] >= 0.95


def test_auto_classes_open_it_and_cut_names_alike_everywhere(shipped):
    lm, world = shipped
    tokenizer = AutoTokenizer.from_pretrained(SHIPPED)
    model = AutoModelForCausalLM.from_pretrained(SHIPPED)
    assert (
        model.dtype == torch.float32
        and sum((SHIPPED / f).stat().st_size for f in ("model.safetensors",)) < 25e6
    )
    name = world.people[0]
    inside = tokenizer(f"Here is {name}")["input_ids"]
    alone = tokenizer(name)["input_ids"]
    assert inside[-len(alone) :] == alone  # a name has the same pieces at the start of a text and inside it
    assert torch.equal(model.state_dict()["model.norm.weight"], lm.model.state_dict()["model.norm.weight"])


def test_altered_file_is_refused(tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(SHIPPED, folder)
    (folder / "config.json").write_text((folder / "config.json").read_text() + " ")
    with pytest.raises(DataError, match=r"config\.json differs from its recorded hash"):
        load_companion(folder)
    with pytest.raises(DataError, match="editkit train"):
        load_companion(tmp_path)


def test_hashes_and_preset(shipped):
    lm, _ = shipped
    for name, digest in json.loads((SHIPPED / "sha256.json").read_text()).items():
        assert file_hash(SHIPPED / name) == digest
    options = testbed.preset(lm, "memit")
    assert set(options["layers"]) <= set(range(lm.n_layers)) and options["token"] in ("last", "subject_last")
    assert "token" not in testbed.preset(lm, "ft-m")


def test_one_edit_on_the_shipped_model(shipped):
    """The README's example: the fact changes, and the model comes back bit for bit."""
    from editkit import make_editor
    from editkit.corpora.world import records
    from editkit.scoring import generate

    lm, world = shipped
    fact = records.edit_facts(world, 1, seed=7)[0]
    before = {k: v.clone() for k, v in lm.model.state_dict().items()}
    preset = testbed.preset(lm, "memit")
    moments = testbed.statistics(lm, world, preset["layers"], max_texts=1500)
    editor = make_editor("memit", lm, statistics=moments, **preset)

    def says():
        return generate(lm, [fact.text], max_new_tokens=8)[0].text.strip()

    assert says().startswith(fact.target_true)
    editor.edit([fact])
    assert says().startswith(fact.target)
    editor.restore()
    assert all(torch.equal(v, before[k]) for k, v in lm.model.state_dict().items())


def test_readme_example_runs_as_printed(tmp_path, monkeypatch, capsys):
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    code = readme.split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(testbed.statistics, "__kwdefaults__", {"max_texts": 1500})
    exec(compile(code, "README.md", "exec"), {})
    said = [line.split("->")[1].strip() for line in capsys.readouterr().out.splitlines() if "->" in line]
    assert len(said) == 3 and said[0] == said[2] != said[1]
    assert (tmp_path / "edit.safetensors").exists()


def tiny_setup():
    config = CompanionConfig(people=8, companies=3, biographies=2)
    world = make_world(config)
    examples = [
        e for e in training_examples(world, [("The sky is", "blue")], config) if "person" not in e.group
    ][:400]
    return examples, train_tokenizer((e.text for e in examples), TINY.vocab_size)


def test_training_learns_and_resumes_to_the_same_bits(tmp_path):
    examples, tokenizer = tiny_setup()
    whole, log = train(examples, tokenizer, TINY, every=4, log=lambda s: None)
    assert log[-1]["loss"] < log[0]["loss"]
    train(examples, tokenizer, TINY, every=4, log=lambda s: None, out_dir=tmp_path, stop_after=8)
    resumed, records = train(examples, tokenizer, TINY, every=4, log=lambda s: None, out_dir=tmp_path)
    assert [r["step"] for r in records] == [4, 8, 12]
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    with pytest.raises(ConfigError, match="another recipe"):
        train(examples, tokenizer, dataclasses.replace(TINY, lr=1e-4), out_dir=tmp_path, log=lambda s: None)
    with pytest.raises(ConfigError, match="another world"):  # not its finished weights under this world's name
        train(examples[1:], tokenizer, TINY, out_dir=tmp_path, log=lambda s: None)


def test_build_writes_a_folder_that_opens(tmp_path):
    recipe = dataclasses.replace(TINY, steps=3, warmup=1)
    report = build(
        tmp_path / "c", CompanionConfig(people=4, companies=2, biographies=1), recipe, log=lambda s: None
    )
    assert 0 <= report["world"] <= 1 and report["n_world"] > 1000
    lm = load_companion(tmp_path / "c")
    assert lm.n_layers == 2 and (tmp_path / "c" / "README.md").read_text().startswith("# Companion model")
    assert load_world(tmp_path / "c").size()["people"] == 4


def test_llama_twin_computes_the_same():
    _, tokenizer = tiny_setup()
    model = build_model(TINY, tokenizer).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(3))
    ids = torch.arange(1, 13)[None]
    with torch.no_grad():
        assert torch.allclose(model(ids).logits, as_llama(model)(ids).logits, atol=1e-6)


def test_sampler_scores_answers_only_and_prefers_hard_examples():
    texts = [statement_example(f"Number {i} is", "one" if i % 2 else "two", "world") for i in range(20)]
    tokenizer = train_tokenizer((e.text for e in texts), 300)
    encoded = encode_examples(tokenizer, texts)
    ids, mask = encoded[0]
    assert tokenizer.decode(ids[mask]).strip() == "two."
    sampler = Sampler(encoded, 0, length=24, seed=0)
    sampler.loss[:] = 0.0
    sampler.loss[3] = 50.0
    _, _, owner = sampler.draw(24 * 200)
    counts = np.bincount(owner[owner >= 0], minlength=20)
    assert counts.argmax() == 3 and counts[3] > 5 * np.delete(counts, 3).mean()


def test_orthogonalised_update_has_flat_spectrum():
    g = torch.randn(16, 40, generator=torch.Generator().manual_seed(0))
    s = torch.linalg.svdvals(Muon.orthogonalise(g, 5))
    assert float(s.min()) > 0.6 and float(s.max()) < 1.3


@pytest.mark.parametrize("bad", [{"width": 30, "heads": 4}, {"steps": 10, "warmup": 10}])
def test_bad_recipes_are_refused(bad):
    with pytest.raises(ConfigError):
        TrainConfig(**bad)
