"""bfloat16 products: only the products of the blocks are rounded, and afterwards the model is what it was."""

from __future__ import annotations

import pytest
import torch
from conftest import make_lm

from editkit.base.errors import ConfigError
from editkit.locate.targets import TargetConfig, optimize_targets
from editkit.models.hooks import trace
from editkit.models.products import products

CONTEXTS = [["{}"], ["The weather was fine today. {}"]]


@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
def test_products_are_those_of_rounded_factors(model_type):
    lm = make_lm(model_type, n_layers=2)
    batch = lm.encode(["The old house near the river"])
    name = lm.down_name(1)
    before, bits = lm.logits(batch).detach(), lm.fingerprint()
    with products(lm, "model"):
        assert torch.equal(lm.logits(batch), before)
    with torch.no_grad(), products(lm), trace(lm.model, [name, lm.block_name(1)], inputs=True) as seen:
        logits = lm.logits(batch)
    k, v = seen.input[name], seen.output[name]
    assert k.dtype == v.dtype == seen.output[lm.block_name(1)].dtype == logits.dtype == torch.float32
    W = lm.get_matrix(1).float().bfloat16().float()
    expected = k.bfloat16().float() @ W.T
    bias = getattr(lm.model.get_submodule(name), "bias", None)
    expected = (expected.bfloat16().float() + (0 if bias is None else bias)).detach()
    assert torch.allclose(v, expected, rtol=1e-2, atol=1e-4)
    assert torch.equal(lm.head(seen.output[lm.block_name(1)]), logits)  # the head is exact
    assert 0 < float((logits - before).abs().max()) < 0.1 * float(before.abs().max())
    assert lm.fingerprint() == bits and torch.equal(lm.logits(batch), before)


def test_left_as_it_was_after_an_error_and_for_other_dtypes():
    lm = make_lm("llama")
    down = lm.model.get_submodule(lm.down_name(0))
    with pytest.raises(RuntimeError, match="inside"), products(lm):
        assert "forward" in down.__dict__
        raise RuntimeError("inside")
    assert "forward" not in down.__dict__
    with pytest.raises(ConfigError, match="did you mean 'bfloat16'"), products(lm, "bfloat"):
        pass
    lm.model.double()
    with products(lm):
        assert "forward" not in down.__dict__


@pytest.mark.parametrize(("module", "reuse"), [("block", True), ("block", False), ("mlp", True)])
def test_targets_stay_near_and_start_from_the_exact_state(facts, module, reuse):
    """h is exact, so the difference between z and the states that editors read is not blurred by rounding."""
    lm = make_lm("llama", n_layers=3)
    cfg = TargetConfig(lr=0.1, steps=6, reuse_prefix=reuse, loss_threshold=0.0)
    exact = optimize_targets(lm, facts, 1, cfg, contexts=CONTEXTS, module=module)
    close = optimize_targets(lm, facts, 1, cfg.replace(products="bfloat16"), contexts=CONTEXTS, module=module)
    assert torch.allclose(close.init, exact.init, atol=1e-6)
    gap = (close.z - exact.z).norm(dim=0) / (exact.z - exact.init).norm(dim=0)
    assert 0 < float(gap.max()) < 0.1
