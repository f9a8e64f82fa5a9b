"""Target optimisation: batching equals one at a time, and both equal a plain loop with torch's Adam."""

from __future__ import annotations

import pytest
import torch

from editkit.base.errors import ConfigError, ModelError, NumericsError, RequestError
from editkit.locate.contexts import ContextTemplates
from editkit.locate.targets import TargetConfig, encode_targets, optimize_targets
from editkit.models.facts import Fact
from editkit.models.hooks import trace
from editkit.models.lookup import find_positions

CONTEXTS = [["{}"], ["The weather was fine today. {}", "Because it was old. {}"]]
CFG = TargetConfig(lr=0.3, steps=4, clamp_factor=0.9)


def plain_loop(lm, fact, layer, cfg, contexts, *, module="block", token="subject_last"):
    """The released loop for one fact, written down anew: padded rows, full logits, torch.optim.Adam."""
    tok = lm.tokenizer
    answer = tok(f" {fact.target}", add_special_tokens=False)["input_ids"]
    templates = [*ContextTemplates.of(contexts).fill(fact.prompt)]
    prompts = [(t, fact.subject) for t in templates] + [("{} is a", fact.subject)]
    where = [token] * len(templates) + ["subject_last" if token == "last" else token]
    positions = [int(find_positions(lm, [p], w)[1][0]) for p, w in zip(prompts, where, strict=True)]
    rows = [tok(t.replace("{}", s))["input_ids"] for t, s in prompts]
    full = [row + answer[:-1] for row in rows[:-1]] + [rows[-1]]
    width = max(map(len, full))
    ids = torch.tensor([row + [tok.pad_token_id] * (width - len(row)) for row in full])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in full])
    name = lm.block_name(layer) if module == "block" else lm.mlp_name(layer)
    read = lm.block_name(max(layer, lm.n_layers - 1 if cfg.loss_layer is None else cfg.loss_layer))
    delta = torch.zeros(lm.d_model, requires_grad=True)
    optimizer = torch.optim.Adam([delta], lr=cfg.lr)
    start, losses = {}, []

    def add(out):
        start.setdefault("h", out[0, positions[0]].detach().clone())
        new = out.clone()
        for i, p in enumerate(positions):
            new[i, p] = new[i, p] + delta
        return new

    for step in range(cfg.steps):
        with trace(lm.model, [read], edit={name: add}) as seen:
            logits = lm.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        said = lm.head(seen.output[read]).log_softmax(-1)
        nll = 0
        for i, row in enumerate(rows[:-1]):
            nll = nll - sum(said[i, len(row) - 1 + j, a] for j, a in enumerate(answer)) / len(answer)
        nll = nll / len(templates)
        now = logits[-1, positions[-1]].log_softmax(-1)
        then = start.setdefault("kl", now.detach())
        kl = cfg.kl_factor * (now.exp() * (now - then)).sum()
        decay = cfg.weight_decay * delta.norm() / start["h"].norm() ** 2
        loss = nll + kl + decay
        losses.append([float(x.detach()) for x in (loss, nll, kl, decay)])
        if loss < cfg.loss_threshold or step == cfg.steps - 1:
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        limit = cfg.clamp_factor * start["h"].norm()
        if delta.norm() > limit:
            with torch.no_grad():
                delta.mul_(limit / delta.norm())
    for p in lm.model.parameters():
        p.grad = None
    return (start["h"] + delta).detach().double(), torch.tensor(losses, dtype=torch.float64)


@pytest.mark.parametrize("module", ["block", "mlp"])
def test_batched_equals_single_and_plain_loop(any_lm, facts, module):
    together = optimize_targets(any_lm, facts, 0, CFG, contexts=CONTEXTS, module=module)
    for i, fact in enumerate(facts):
        alone = optimize_targets(any_lm, [fact], 0, CFG, contexts=CONTEXTS, module=module)
        assert (together.z[:, i] - alone.z[:, 0]).abs().max() < 1e-5
        z, losses = plain_loop(any_lm, fact, 0, CFG, CONTEXTS, module=module)
        assert (together.z[:, i] - z).abs().max() < 2e-5
        assert (together.losses[i, : len(losses)] - losses).abs().max() < 1e-4
    assert (together.z - together.init).norm(dim=0).min() > 0.01


@pytest.mark.parametrize("kind", ["wordlevel", "bos", "eos", "metaspace"])
def test_tokenizers_with_special_tokens(tiny_lm, facts, kind):
    lm = tiny_lm("llama", kind)
    rows = encode_targets(lm, facts, ContextTemplates.of(CONTEXTS), kl_prompt="{} is a")
    for i, fact in enumerate(facts):
        encoding, positions, places = rows.take([i])
        expected = lm.tokenizer(f"x {fact.target}", return_offsets_mapping=True)
        answer = [
            t
            for t, (a, b) in zip(expected["input_ids"], expected["offset_mapping"], strict=True)
            if b > a and b > 1
        ]
        for row in range(rows.per_fact - 1):
            found = places[places[:, 1] == row]
            assert found[:, 3].tolist() == answer
            # The token before a target token is fed, the last target token is not.
            last = int(encoding.last[row])
            assert int(found[-1, 2]) == last
            assert encoding.input_ids[row, found[1:, 2]].tolist() == answer[:-1]
        assert (positions <= encoding.last).all()


def test_padding_of_longer_facts_does_not_matter(tiny_lm, facts):
    lm = tiny_lm("gpt2", "bos")
    long = Fact(
        "In the old city near the river I think that {} can see the", "Karin Ann Fischer", "old house"
    )
    alone = optimize_targets(lm, facts[:1], 0, CFG)
    padded = optimize_targets(lm, [*facts[:1], long], 0, CFG)
    split = optimize_targets(lm, [*facts[:1], long], 0, CFG.replace(tokens_per_batch=1))
    assert (alone.z[:, 0] - padded.z[:, 0]).abs().max() < 1e-5
    assert (padded.z - split.z).abs().max() < 1e-5


def test_lookup_at_the_last_prompt_token(tiny_lm, facts):
    lm = tiny_lm("qwen2")
    found = optimize_targets(lm, facts, 0, CFG, contexts=CONTEXTS, token="last")
    for i, fact in enumerate(facts):
        z, losses = plain_loop(lm, fact, 0, CFG, CONTEXTS, token="last")
        assert (found.z[:, i] - z).abs().max() < 2e-5
        assert (found.losses[i, : len(losses)] - losses).abs().max() < 1e-4
        with trace(lm.model, [lm.block_name(0)]) as seen, torch.no_grad():
            lm.forward(lm.encode([fact.text]))
        assert (seen.output[lm.block_name(0)][0, -1].double() - found.init[:, i]).abs().max() < 1e-5


def test_target_makes_the_model_say_it(tiny_lm, facts):
    """z, put in place of the state at the lookup token, gives the loss that the last iteration reported."""
    lm = tiny_lm("llama", n_layers=3)
    cfg = TargetConfig(lr=0.5, steps=30, clamp_factor=None, kl_factor=0.0, weight_decay=0.0)
    found = optimize_targets(lm, facts, 1, cfg)
    for i, fact in enumerate(facts):
        n = int(found.iterations[i])
        assert found.losses[i, :n, 1].min() < found.losses[i, 0, 1]
        encoding, position = find_positions(lm, [(f"{fact.prompt} {fact.target}", fact.subject)])
        start = len(lm.encode([fact.text]).input_ids[0])

        def put(out, i=i, position=position):
            new = out.clone()
            new[0, position[0]] = found.z[:, i].float()
            return new

        with trace(lm.model, edit={lm.block_name(1): put}), torch.no_grad():
            said = lm.logits(encoding)[0].log_softmax(-1)
        ids = encoding.input_ids[0]
        nll = -sum(said[t - 1, ids[t]] for t in range(start, len(ids))) / (len(ids) - start)
        assert abs(float(nll) - float(found.losses[i, n - 1, 1])) < 1e-4


def test_a_fact_below_the_threshold_stops_and_the_others_go_on(tiny_lm, facts):
    lm = tiny_lm("gpt2")
    free = optimize_targets(lm, facts, 0, CFG.replace(steps=6, loss_threshold=0.0))
    first = free.losses[:, :, 0]
    threshold = float(first[0, 2]) + 1e-4  # fact 0 gets below it after two steps
    found = optimize_targets(lm, facts, 0, CFG.replace(steps=6, loss_threshold=threshold))
    for i in range(len(facts)):
        below = (first[i] < threshold).nonzero().flatten()
        expected = int(below[0]) + 1 if len(below) else 6
        assert int(found.iterations[i]) == expected
        alone = optimize_targets(lm, [facts[i]], 0, CFG.replace(steps=6, loss_threshold=threshold))
        assert (found.z[:, i] - alone.z[:, 0]).abs().max() < 1e-5
    assert int(found.iterations[0]) <= 3
    everything = optimize_targets(lm, facts, 0, CFG.replace(loss_threshold=100.0))
    assert torch.equal(everything.z, everything.init)


def test_options(tiny_lm, facts):
    lm = tiny_lm("gpt2", n_layers=3)

    def run(**changes):
        return optimize_targets(lm, facts, 0, CFG.replace(**changes), contexts=CONTEXTS)

    base = run()
    for changes in (
        {"kl_direction": "original_edited"},
        {"decay_form": "norm2_over_norm2"},
        {"loss_layer": 1},
    ):
        other = run(**changes)
        assert (other.z - base.z).abs().max() > 1e-6, changes
        assert torch.allclose(other.init, base.init)
    z, losses = plain_loop(lm, facts[0], 0, CFG.replace(loss_layer=1), CONTEXTS)
    early = run(loss_layer=1)
    assert (early.z[:, 0] - z).abs().max() < 2e-5
    assert (early.losses[0, : len(losses)] - losses).abs().max() < 1e-4
    # One more Adam step after the last evaluation is what one more evaluation would have started from.
    assert (run(final_step=True).z - run(steps=CFG.steps + 1).z).abs().max() < 1e-6
    assert torch.equal(run(steps=1).z, base.init)
    tight = run(clamp_factor=0.05, lr=5.0)
    assert ((tight.z - tight.init).norm(dim=0) <= 0.05001 * tight.init.norm(dim=0)).all()
    assert run(kl_factor=0.0).losses[..., 2].nan_to_num().abs().max() == 0
    assert float(base.losses[0, 1, 3]) == pytest.approx(
        0.5 * CFG.lr * lm.d_model**0.5 / float(base.init[:, 0].norm()) ** 2, rel=0.05
    )  # after one Adam step every entry of delta has moved by lr, unless the clamp was active


def test_gradients_and_hooks_are_left_as_they_were(tiny_lm, facts):
    lm = tiny_lm("llama")
    lm.weight(0).requires_grad_(False)
    before = [p.requires_grad for p in lm.model.parameters()]
    with torch.no_grad():
        optimize_targets(lm, facts, 0, CFG)
    assert before == [p.requires_grad for p in lm.model.parameters()]
    assert all(p.grad is None for p in lm.model.parameters())
    assert not any(m._forward_hooks for m in lm.model.modules())


def test_bfloat16_models_get_float32_deltas(tiny_lm, facts):
    lm = tiny_lm("llama")
    lm.model.to(torch.bfloat16)
    found = optimize_targets(lm, facts, 0, CFG)
    assert torch.equal(found.init, found.init.bfloat16().double())
    assert not torch.equal(found.z, found.z.bfloat16().double())
    assert torch.isfinite(found.losses[:, 0]).all()


def test_bad_requests(tiny_lm, facts):
    lm = tiny_lm("gpt2")
    with pytest.raises(RequestError, match="empty"):
        optimize_targets(lm, [], 0)
    with pytest.raises(RequestError, match="empty target"):
        optimize_targets(lm, [facts[0].replace(target=" ")], 0)
    with pytest.raises(RequestError, match="slot"):
        optimize_targets(lm, [facts[0].replace(prompt="Ana Silva is")], 0)
    with pytest.raises(RequestError, match="nothing follows"):
        optimize_targets(lm, [Fact("He is {}", "Ana Silva", "old")], 0, token="subject_first_after")
    with pytest.raises(RequestError, match="subject_last"):
        optimize_targets(lm, facts, 0, token="subject")
    with pytest.raises(ModelError, match="layer 7"):
        optimize_targets(lm, facts, 7)
    with pytest.raises(ModelError, match="layer 9"):
        optimize_targets(lm, facts, 0, CFG.replace(loss_layer=9))
    with pytest.raises(ConfigError, match="did you mean 'steps'"):
        TargetConfig.make(step=3)
    with pytest.raises(ConfigError, match="greater than 0"):
        TargetConfig(lr=0.0)
    with pytest.raises(ConfigError, match="integer"):
        TargetConfig(steps=2.5)
    with pytest.raises(NumericsError, match="step size"), torch.no_grad():
        lm.weight(1)[0, 0] = torch.nan
        optimize_targets(lm, facts, 0)
