"""Replay: the part of a forward pass that an edit changes, alone, gives what the whole pass gives."""

from __future__ import annotations

import pytest
import torch

from editkit.locate.replay import Replay
from editkit.locate.targets import TargetConfig, optimize_targets
from editkit.models.hooks import submodule, trace

CONTEXTS = [["{}"], ["The weather was fine today. {}"]]
CFG = TargetConfig(lr=0.3, steps=4, clamp_factor=0.9)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("layer", [0, 1])
def test_suffix_equals_whole_pass(any_lm, side, layer):
    encoding = any_lm.encode(["The old house near the river", "Karin can see it", "It"], side)
    columns = encoding.first + torch.tensor([2, 1, 0])
    last = any_lm.block_name(any_lm.n_layers - 1)
    shift = torch.linspace(-1, 1, any_lm.d_model)

    def add(out, at):
        rows = torch.arange(len(out))
        return out.index_put((rows, at), out[rows, at] + shift)

    name = any_lm.block_name(layer)
    with torch.no_grad():
        with trace(any_lm.model, [last], edit={name: lambda out: add(out, columns)}) as whole:
            any_lm.forward(encoding)
        replay = Replay.of(any_lm, encoding, columns, layer, last)
        zero = torch.zeros_like(columns)
        for part, rows in ((replay, [0, 1, 2]), (replay.take([2, 0]), [2, 0])):
            for _ in range(2):  # a pass must leave the stored prefix as it was
                edit = {name: lambda out: add(out, zero[: len(out)])}
                with trace(any_lm.model, [last], edit=edit) as seen:
                    part.forward(any_lm)
                for i, row in enumerate(rows):
                    n = int(encoding.last[row] - columns[row]) + 1
                    expected = whole.output[last][row, columns[row] : columns[row] + n]
                    assert (seen.output[last][i, :n] - expected).abs().max() < 1e-5
    for i in range(any_lm.n_layers):
        assert "forward" not in submodule(any_lm.model, any_lm.block_name(i)).__dict__


@pytest.mark.parametrize("token", ["last", "subject_last", "subject_first"])
@pytest.mark.parametrize("module", ["block", "mlp"])
def test_targets_do_not_depend_on_it(tiny_lm, facts, token, module):
    lm = tiny_lm("qwen2", n_layers=3)
    found = [
        optimize_targets(
            lm, facts, 1, CFG.replace(reuse_prefix=reuse), contexts=CONTEXTS, token=token, module=module
        )
        for reuse in (True, False)
    ]
    assert (found[0].z - found[1].z).abs().max() < 1e-5
    assert torch.allclose(found[0].losses, found[1].losses, atol=1e-5, equal_nan=True)


def test_no_replay_through_a_short_sliding_window(tiny_lm):
    lm = tiny_lm("mistral")
    encoding = lm.encode(["The old house near the river"])
    assert Replay.possible(lm, encoding)
    lm.model.config.sliding_window = 4
    assert not Replay.possible(lm, encoding)
