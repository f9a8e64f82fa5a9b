"""Hooks: tensor or tuple outputs, edits, early stop, clean removal."""

from collections import OrderedDict

import pytest
import torch
from torch import nn

from editkit.base.errors import ModelError
from editkit.models.hooks import frozen, hidden, pick, trace, with_hidden

TEXTS = ["Ana Silva is", "The mother tongue of Li is"]


def count_hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) for m in model.modules())


def test_hidden_of_tensor_tuple_and_mapping():
    h = torch.zeros(3, 5, 2)
    assert hidden(h) is h
    assert hidden((h, None)) is h
    assert hidden(OrderedDict(last_hidden_state=h, cache=None)) is h
    for bad in (None, (), (None, h), "text"):
        with pytest.raises(ModelError, match="expected a tensor"):
            hidden(bad)


def test_with_hidden_keeps_the_form():
    h, new = torch.zeros(1), torch.ones(1)
    assert with_hidden(h, new) is new
    assert with_hidden((h, "cache"), new) == (new, "cache")
    assert with_hidden(OrderedDict(a=h, b=2), new) == OrderedDict(a=new, b=2)


def test_records_whole_batch(any_lm):
    """The trap of `output[0]`: a block that returns a tensor must not be cut to sequence 0."""
    lm = any_lm
    batch = lm.encode(TEXTS)
    with torch.no_grad(), trace(lm.model, [lm.block_name(0), lm.attn_name(0)]) as seen:
        lm.logits(batch)
    for name in (lm.block_name(0), lm.attn_name(0)):
        assert seen.output[name].shape == (*batch.input_ids.shape, lm.d_model)
    assert count_hooks(lm.model) == 0


def test_records_equal_hidden_states_of_transformers(any_lm):
    lm = any_lm
    batch = lm.encode(TEXTS)
    with torch.no_grad(), trace(lm.model, [lm.block_name(0)]) as seen:
        reference = lm.forward(batch, output_hidden_states=True).hidden_states
    assert torch.equal(seen.output[lm.block_name(0)], reference[1])


@pytest.mark.parametrize("part", ["block_name", "attn_name", "mlp_name", "down_name"])
def test_edits_take_effect_and_are_recorded(any_lm, part):
    lm = any_lm
    batch, name = lm.encode(TEXTS), getattr(any_lm, part)(0)
    with torch.no_grad():
        before = lm.logits(batch)
        with trace(lm.model, [name], edit={name: lambda h: 2 * h}) as seen:
            edited = lm.logits(batch)
        with trace(lm.model, [name]) as plain:
            after = lm.logits(batch)
    assert torch.allclose(seen.output[name], 2 * plain.output[name])
    assert not torch.allclose(edited, before, atol=1e-3)
    assert torch.equal(after, before)


def test_gradient_flows_through_an_edit(any_lm):
    lm = any_lm
    name, delta = lm.block_name(0), torch.zeros(any_lm.d_model, requires_grad=True)
    with frozen(lm.model):
        assert not any(p.requires_grad for p in lm.model.parameters())
        with trace(lm.model, edit={name: lambda h: h + delta}):
            loss = lm.logits(lm.encode(TEXTS)).log_softmax(-1)[..., 0].sum()
        loss.backward()
    assert delta.grad.abs().sum() > 0
    assert all(p.requires_grad and p.grad is None for p in lm.model.parameters())


def test_shape_changing_edit_is_refused(tiny_lm):
    lm = tiny_lm("gptj")
    with (
        pytest.raises(ModelError, match="changed the shape"),
        trace(lm.model, edit={lm.block_name(0): lambda h: h[0]}),
    ):
        lm.logits(lm.encode(TEXTS))
    assert count_hooks(lm.model) == 0


def test_early_stop_skips_the_rest(any_lm):
    lm = any_lm
    ran = []
    handle = lm.model.get_submodule(lm.block_name(1)).register_forward_hook(lambda *_: ran.append(1))
    with torch.no_grad():
        with trace(lm.model, [lm.down_name(0)], inputs=True, stop_at=lm.down_name(0)) as first:
            lm.logits(lm.encode(TEXTS))
        with trace(lm.model, [lm.down_name(0), lm.block_name(0)], stop_early=True) as second:
            lm.logits(lm.encode(TEXTS))
        assert not ran
        with trace(lm.model, [lm.down_name(0), lm.block_name(0)]) as whole:
            lm.logits(lm.encode(TEXTS))
    handle.remove()
    assert ran
    assert first.input[lm.down_name(0)].shape[-1] == lm.d_key
    for name in (lm.down_name(0), lm.block_name(0)):
        assert torch.equal(second.output[name], whole.output[name])


def test_nested_traces_stop_only_their_own(tiny_lm):
    lm = tiny_lm()
    reached = []
    with trace(lm.model, [lm.block_name(1)]) as outer:
        with trace(lm.model, [lm.block_name(0)], stop_early=True) as inner:
            lm.logits(lm.encode(TEXTS))
        reached.append("after inner")
    assert reached == ["after inner"]
    assert lm.block_name(0) in inner.output and not outer.output
    with trace(lm.model, [lm.block_name(0)], stop_early=True) as outer:
        with trace(lm.model, [lm.block_name(1)]):
            lm.logits(lm.encode(TEXTS))
        reached.append("never: the stop belongs to the outer trace")
    assert reached == ["after inner"] and lm.block_name(0) in outer.output


def test_hooks_are_removed_after_an_error(tiny_lm):
    lm = tiny_lm()
    with pytest.raises(ZeroDivisionError), trace(lm.model, edit={lm.block_name(0): lambda h: h * (1 / 0)}):
        lm.logits(lm.encode(TEXTS))
    assert count_hooks(lm.model) == 0
    with (
        pytest.raises(ModelError, match="did you mean"),
        trace(lm.model, [lm.block_name(0), "transformer.h.9"]),
    ):
        pass
    assert count_hooks(lm.model) == 0


def test_frozen_restores_flags_after_an_error(tiny_lm):
    lm = tiny_lm()
    weight = lm.weight(0)
    weight.requires_grad_(False)
    with pytest.raises(RuntimeError), frozen(lm.model):
        raise RuntimeError
    flags = {n: p.requires_grad for n, p in lm.model.named_parameters()}
    assert not flags.pop(lm.weight_name(0)) and all(flags.values())


def test_pick():
    states = torch.arange(12.0).reshape(2, 3, 2)
    assert pick(states, torch.tensor([2, 0])).tolist() == [[4.0, 5.0], [6.0, 7.0]]
