"""Edits as objects, and the configurations they carry."""

from __future__ import annotations

import dataclasses
import json
from typing import Literal

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from editkit.base.config import Config, option
from editkit.base.errors import ConfigError, DataError, ModelError
from editkit.methods.delta import Delta, cast_loss, describe_facts
from editkit.models.lm import LM


def make_delta(lm, layers=(0, 1), seed=0, facts=()):
    """A small random change of some down projections, made on the current weights."""
    generator = torch.Generator().manual_seed(seed)
    names = [lm.weight_name(layer) for layer in layers]
    before = {n: lm.parameter(n).detach().clone() for n in names}
    after = {n: v.float() + 0.1 * torch.randn(v.shape, generator=generator) for n, v in before.items()}
    base = lm.fingerprint(exclude=names)
    return Delta(before, after, "test", {"layers": list(layers)}, describe_facts(facts), base, {"note": 1})


def test_apply_and_restore_are_bit_exact(any_lm):
    before = any_lm.fingerprint()
    delta = make_delta(any_lm)
    for _ in range(2):
        assert delta.apply(any_lm) is delta
        with pytest.raises(ModelError, match=r"carries this test edit already; restore.*on_top=True"):
            delta.apply(any_lm)
        for name in delta.names:
            assert torch.equal(any_lm.parameter(name), delta.after[name])
        delta.restore(any_lm)
        delta.restore(any_lm)
        assert any_lm.fingerprint() == before
    with delta.applied(any_lm) as same:
        assert same is any_lm and any_lm.fingerprint() != before
    assert any_lm.fingerprint() == before
    assert torch.allclose(
        delta.update(delta.names[0]), delta.after[delta.names[0]].double() - delta.before[delta.names[0]]
    )


def test_save_and_load(tiny_lm, facts, tmp_path):
    lm = tiny_lm("llama")
    delta = make_delta(lm, facts=facts)
    path = delta.save(tmp_path / "deep" / "edit.safetensors")
    loaded = Delta.load(path)
    assert loaded.editor == "test" and loaded.config == {"layers": [0, 1]} and loaded.metadata == {"note": 1}
    assert [f["subject"] for f in loaded.facts] == [f.subject for f in facts]
    assert loaded.base == delta.base and loaded.names == delta.names
    for name in delta.names:
        assert torch.equal(loaded.after[name], delta.after[name])
        assert loaded.before[name].dtype == lm.dtype
    with safe_open(str(path), framework="pt") as file:
        assert json.loads(file.metadata()["delta"])["editor"] == "test"
    with pytest.raises(DataError, match="cannot read"):
        Delta.load(tmp_path / "none.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(b"no")
    with pytest.raises(DataError, match=r"bad\.safetensors"):
        Delta.load(tmp_path / "bad.safetensors")


def test_another_base_model_is_refused(tiny_lm):
    lm, other = tiny_lm("gpt2"), tiny_lm("gpt2", seed=1)
    delta = make_delta(lm)
    with pytest.raises(ModelError, match="another base model"):
        delta.apply(other)
    with pytest.raises(ModelError, match="made on"):
        delta.apply(_wider(tiny_lm("gpt2")))
    with torch.no_grad():
        lm.weight(0)[0, 0] += 1
    with pytest.raises(ModelError, match="in their order"):
        delta.apply(lm)
    with pytest.raises(ModelError, match="restore the later edits first"):
        delta.restore(lm)


def test_on_top_adds_the_difference_and_can_be_taken_back(tiny_lm):
    lm = tiny_lm("llama")
    start, name = lm.fingerprint(), lm.weight_name(0)
    delta = make_delta(lm, layers=(0,))
    delta.apply(lm)
    once = lm.parameter(name).clone()
    again = delta.apply(lm, on_top=True)
    torch.testing.assert_close(lm.parameter(name).double(), once.double() + delta.update(name))
    with pytest.raises(ModelError, match="restore the later edits first"):
        delta.restore(lm)
    again.restore(lm)
    assert torch.equal(lm.parameter(name), once)
    other = make_delta(lm, layers=(1,), seed=3)
    other.apply(lm)  # another layer is edited too: the model's hash is not that of the base any more
    delta.restore(lm)
    with pytest.raises(ModelError, match="another base model"):
        delta.apply(lm)
    delta.apply(lm, on_top=True).restore(lm)
    other.restore(lm)
    assert lm.fingerprint() == start
    with pytest.raises(ModelError, match="another base model"):
        delta.apply(tiny_lm("llama", seed=1), on_top=True)


def test_a_model_with_adapter_layers_is_not_merged(tiny_lm, tmp_path):
    plain = tiny_lm("llama")
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(plain.model, peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    lm = LM(adapted.base_model.model, plain.tokenizer)
    delta = make_delta(lm)
    with pytest.raises(ModelError, match=r"merge_and_unload\(\)"):
        delta.merge(lm, tmp_path / "out")
    assert not (tmp_path / "out" / "model.safetensors").exists()
    merged = LM(adapted.merge_and_unload(), plain.tokenizer)
    make_delta(merged).merge(merged, tmp_path / "out")


def test_the_model_knows_whether_it_is_edited(tiny_lm):
    lm = tiny_lm("gpt2")
    delta = make_delta(lm)
    assert lm.edited() == []
    delta.apply(lm)
    assert lm.edited() == delta.names
    delta.restore(lm)
    assert lm.edited() == []


def _wider(lm):
    """The same model with a down projection of another shape."""
    weight = lm.weight(0)
    lm.model.get_submodule(lm.down_name(0)).weight = torch.nn.Parameter(torch.cat([weight, weight]).detach())
    return lm


def test_edits_in_a_row(tiny_lm):
    lm = tiny_lm("qwen2")
    start = lm.fingerprint()
    first = make_delta(lm, seed=1)
    first.apply(lm)
    second = make_delta(lm, seed=2)
    second.apply(lm)
    end = lm.fingerprint()
    with pytest.raises(ModelError):
        first.restore(lm)
    second.restore(lm)
    first.restore(lm)
    assert lm.fingerprint() == start
    with pytest.raises(ModelError):
        second.apply(lm)
    both = first.then(second)
    both.apply(lm)
    assert lm.fingerprint() == end
    both.restore(lm)
    assert lm.fingerprint() == start
    with pytest.raises(ModelError, match="in order"):
        second.then(first)
    with pytest.raises(ConfigError, match="different parameters"):
        first.then(make_delta(lm, layers=(1,)))


def test_bfloat16_keeps_masters_and_reports_the_cast(tiny_lm):
    lm = tiny_lm("llama")
    lm.model.to(torch.bfloat16)
    start = lm.fingerprint()
    delta = make_delta(lm)
    name = delta.names[0]
    assert delta.before[name].dtype == torch.bfloat16 and delta.after[name].dtype == torch.float32
    delta.apply(lm)
    assert torch.equal(lm.parameter(name), delta.after[name].bfloat16())
    delta.restore(lm)
    assert lm.fingerprint() == start
    loss = cast_loss(delta.before[name], delta.after[name], torch.bfloat16)
    lost = (delta.after[name].bfloat16().double() - delta.after[name].double()).norm() / delta.update(
        name
    ).norm()
    assert loss == pytest.approx(float(lost)) and 1e-4 < loss < 0.1
    assert cast_loss(delta.before[name], delta.after[name], torch.float32) == 0


def test_merge_writes_an_ordinary_checkpoint(tiny_lm, tmp_path):
    lm = tiny_lm("gpt2")
    start = lm.fingerprint()
    delta = make_delta(lm)
    out = delta.merge(lm, tmp_path / "edited")
    assert lm.fingerprint() == start
    model = AutoModelForCausalLM.from_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    params = dict(model.named_parameters())
    for name in delta.names:
        assert torch.equal(params[name], delta.after[name])
    assert tokenizer("Ana Silva is")["input_ids"] == lm.tokenizer("Ana Silva is")["input_ids"]


def test_a_delta_needs_parameters():
    with pytest.raises(ConfigError):
        Delta({}, {})
    with pytest.raises(ConfigError):
        Delta({"a": torch.zeros(1)}, {"b": torch.zeros(1)})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Demo(Config):
    rate: float = option(0.5, "a rate", source="here", above=0, high=1)
    layers: tuple[int, ...] = option((), "layers", low=0)
    mode: Literal["a", "b"] = option("a", "a mode")
    top: int | None = option(None, "a number", low=1)
    on: bool = option(False, "a switch")


def test_config_checks():
    made = Demo.make({"layers": [1, 2]}, rate=1, mode="b")
    assert made.layers == (1, 2) and made.rate == 1.0 and isinstance(made.rate, float)
    assert Demo.make(made) == made and made.replace(top=3).top == 3
    assert Demo.make(json.loads(json.dumps(made.to_dict()))) == made
    assert [row["name"] for row in Demo.describe()] == ["rate", "layers", "mode", "top", "on"]
    for values, word in (
        ({"rte": 1}, "did you mean 'rate'"),
        ({"zzz": 1}, "choose from rate"),
        ({"rate": 0}, "greater than 0"),
        ({"rate": 2}, "at most 1"),
        ({"rate": "0.1"}, "a number"),
        ({"rate": True}, "a number"),
        ({"rate": float("nan")}, "finite"),
        ({"layers": 3}, "a list"),
        ({"layers": "12"}, "a list"),
        ({"layers": [1, -1]}, "at least 0"),
        ({"layers": [1.5]}, "an integer"),
        ({"mode": "c"}, "one of 'a', 'b'"),
        ({"top": 0}, "at least 1"),
        ({"on": 1}, "true or false"),
    ):
        with pytest.raises(ConfigError, match=word):
            Demo.make(values)
    with pytest.raises(ConfigError, match="expected a Demo"):
        Demo.make(Config())
    flat = Config.with_fields("Flat", Demo, "d_")
    assert flat(d_rate=1).d_rate == 1.0
    with pytest.raises(ConfigError, match="d_rate"):
        flat(d_rate=-1)
