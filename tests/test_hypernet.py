"""Hypernetworks: the mathematics. Solve and adjoint, normaliser, gradients against end-to-end autograd."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from conftest import make_lm
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import functional_call
from torch.nn.functional import log_softmax

from editkit.base.errors import ConfigError, ModelError, NumericsError
from editkit.linear.spread import spread
from editkit.methods.hypernet import RidgeSystem, RowMemory, Trainer, encode_pairs, make_hypernetwork
from editkit.methods.hypernet.data import Draw, answer_logits
from editkit.methods.hypernet.normalizer import RunningMoments
from editkit.methods.hypernet.rledit import Walk
from editkit.methods.hypernet.sites import edited, find_sites, oriented
from editkit.models.hooks import submodule

EDITS = [
    ("The mother tongue of Ana Silva is", "French German"),
    ("Hugo Castro plays the", "violin"),
    ("The profession of Li is", "farmer"),
]
OTHERS = [("Ana Silva speaks", "French"), ("Hugo Castro can see the old", "piano guitar")]
FAR = [("Karin Ann Fischer lives in", "Rome"), ("The weather is", "fine today")]


def randomised(net, seed=0):
    """A network away from its start, where most gradients vanish."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in net.named_parameters():
            noise = torch.randn(p.shape, generator=g, dtype=torch.float64).to(p)
            p.copy_(0.3 + 0.05 * noise if name.endswith("lr") else p + 0.1 * noise)
    return net


def rows_of(lm, net, edits=EDITS, batch_size=2):
    return RowMemory(lm, net.sites, batch_size, net.config.tokens).take(edits)


def trained_start(lm, name, **config):
    """(network, trainer, rows): a random double network whose normaliser has seen the rows."""
    where = {"modules": config.pop("modules")} if "modules" in config else {"layers": [0, 1]}
    training = {k: config.pop(k) for k in ("locality", "loc_coef") if k in config}
    net = randomised(make_hypernetwork(name, lm, **where, rank=3, **config)).to(lm.dtype)
    trainer = Trainer(lm, net, [], {"batch_size": 2, **training})
    return net, trainer, rows_of(lm, net)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 9), st.integers(1, 7), st.integers(1, 4), st.floats(-2, 2), st.integers(0, 10**6))
def test_ridge_and_its_adjoint_agree_with_autograd(n, d, m, log_ridge, seed):
    g = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    U, R, G = normal(n, d), normal(n, m).requires_grad_(), normal(m, d)
    lam = torch.tensor(log_ridge, dtype=torch.float64, requires_grad=True)
    S = torch.linalg.solve(U.T @ U + lam.exp() * torch.eye(d, dtype=torch.float64), U.T @ R)
    dR, dlam = torch.autograd.grad((S * G.T).sum(), [R, lam])
    system = RidgeSystem(U, log_ridge)
    assert system.dual == (n < d)
    torch.testing.assert_close(system.shift(R), S.T.detach(), rtol=0, atol=1e-9)
    ours, scalar = system.adjoint(G, R)
    torch.testing.assert_close(ours, dR, rtol=0, atol=1e-9)
    assert scalar == pytest.approx(float(dlam), abs=1e-9)


def test_ridge_refuses_what_it_cannot_solve():
    with pytest.raises(NumericsError, match="NaN"):
        RidgeSystem(torch.full((2, 3), torch.nan), 0.0)
    with pytest.raises(NumericsError, match="meta_lr"):
        RidgeSystem(torch.ones(2, 3), 1e4)
    with pytest.raises(NumericsError, match="no rows"):
        RidgeSystem(torch.ones(0, 3), 0.0)
    with pytest.raises(NumericsError, match="singular"):
        RidgeSystem(torch.ones(3, 3), -200.0)


@pytest.mark.parametrize("sizes", [(5, 1, 3), (1, 1, 7), (9,)])
def test_moments_do_not_depend_on_the_batches(sizes):
    x = torch.randn(9, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 1e-6 + 3
    moments = RunningMoments(4)
    for part in x.split(sizes):
        moments.update(part)
    np.testing.assert_allclose(moments.mean, x.numpy().mean(0), rtol=1e-12)
    np.testing.assert_allclose(moments.std, x.numpy().std(0, ddof=1), rtol=1e-8)
    assert moments.half().mean.dtype == torch.float64


def test_released_moments_and_undefined_variance():
    moments = RunningMoments(2, "released")
    with pytest.raises(NumericsError, match="one row"):
        moments.update(torch.ones(1, 2))
    moments.update(torch.tensor([[0.0, 1.0], [2.0, 1.0]]))
    assert float(moments.m2[0]) == 4.0  # 2 times the unbiased variance of 2; exact would be 2
    fresh = RunningMoments(2)
    fresh.update(torch.ones(1, 2))
    with pytest.raises(NumericsError, match="variance is undefined"):
        fresh(torch.ones(1, 2))
    fresh.update(torch.tensor([[1.0, 2.0]]))
    out = fresh(torch.tensor([[5.0, 1.0]]))
    assert out[0, 0] == 0 and torch.isfinite(out).all()  # a coordinate that never varied says nothing
    with pytest.raises(NumericsError, match="NaN"):
        fresh.update(torch.tensor([[torch.nan, 1.0]]))


def meta_loss(lm, net, rows, trainer):
    """The meta loss as one differentiable function of the hypernetwork, written down a second time."""
    R, shifts = [], []
    for i in range(len(net.sites)):
        part, k = net.net(i)
        keys, grads = rows.site(i)
        if net.name == "mend":
            u, g = part(keys, grads, k)
            shifts.append(-part.lr[k] * u.T @ g)
        else:
            R.append(part.value_differences(keys, grads, k))
    if R:
        strategy = getattr(net.config, "spread", "uniform")
        raw = [rows.site(i)[1] for i in range(len(R))]
        if strategy != "uniform":
            R = spread(R, strategy, gradients=raw, detach=net.config.detach)
        for i, r in enumerate(R):
            U = rows.site(i)[0]
            A = U.T @ U + net.log_ridge(i).exp() * torch.eye(U.shape[1], dtype=U.dtype)
            shifts.append(torch.linalg.solve(A, U.T @ r))
    weights = {}
    for site, S in zip(net.sites, shifts, strict=True):
        W = lm.parameter(site.weight_name).detach()
        weights[site.weight_name] = W + oriented(lm, site, S.T)
    total = 0.0
    for pairs, far in ((OTHERS, False), (FAR, True)):
        for batch in encode_pairs(lm, pairs, 2):
            logits = functional_call(lm.model, weights, kwargs=dict(batch.inputs)).logits[batch.asked]
            said = log_softmax(logits, -1)
            if far and trainer.config.locality == "kl":
                before = log_softmax(lm.model(**batch.inputs).logits[batch.asked], -1).detach()
                loss = (before.exp() * (before - said)).sum(-1).mean()
            else:
                loss = -said.gather(-1, batch.targets[:, None]).mean()
            total = total + (trainer.config.loc_coef if far else 1.0) * loss
    return total


METHODS = [
    ("mend", {}),
    ("malmen", {"loc_coef": 0.5}),
    ("malmen", {"tokens": "all", "rows_per_chunk": 2}),
    ("rledit", {"n_blocks": 1}),
    ("horse", {"locality": "cross_entropy"}),
    ("horse", {"spread": "gram_schmidt", "rows_per_chunk": 3}),
    ("horse", {"spread": "linear_decay"}),
    ("horse", {"spread": "released", "detach": True}),
]


@pytest.mark.parametrize(("name", "config"), METHODS)
@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
def test_gradients_agree_with_autograd_through_the_solve(name, config, model_type):
    lm = make_lm(model_type)
    lm.model.double()
    net, trainer, rows = trained_start(lm, name, **config)
    found = trainer.accumulate(rows, encode_pairs(lm, OTHERS, 2), encode_pairs(lm, FAR, 2))
    ours = {k: p.grad for k, p in net.named_parameters()}
    names = [k for k, g in ours.items() if g is not None]
    loss = meta_loss(lm, net, rows, trainer)
    weighted = sum(found.generalization) + trainer.config.loc_coef * sum(found.locality)
    assert weighted == pytest.approx(float(loss.detach()), rel=1e-12)
    expected = torch.autograd.grad(loss, [p for k, p in net.named_parameters() if k in names])
    for key, grad in zip(names, expected, strict=True):
        size = float(grad.abs().max())
        assert size > 1e-9, f"{key} has no gradient to compare"
        assert float((ours[key] - grad).abs().max()) <= 1e-8 * size, key
    without = {k.rpartition(".")[2] for k, g in ours.items() if g is None}
    assert without == ({"log_ridge"} if name == "mend" else set())


def test_rledit_sequence_agrees_with_autograd():
    """Two batches, the losses written down a second time: looking back, penalty, locality against the start."""
    lm = make_lm()
    lm.model.double()
    net, _, _ = trained_start(lm, "rledit", n_blocks=1)
    net = type(net)(lm, net.config.replace(depth=2, decay=0.7, reg=0.03), layers=[0, 1]).to(lm.dtype)
    randomised(net)
    trainer = Trainer(lm, net, [], {"batch_size": 2, "loc_coef": 0.6})
    draws = [Draw(tuple(EDITS[:2]), tuple(OTHERS), tuple(FAR)), Draw((EDITS[2],), (OTHERS[1],), (FAR[1],))]
    twin = copy.deepcopy(net)
    trainer.sequence(draws)

    names = [site.weight_name for site in net.sites]
    start = {name: lm.parameter(name).detach().clone() for name in names}
    carried = {name: torch.zeros_like(W) for name, W in start.items()}

    def said(batch, weights):
        return log_softmax(
            functional_call(lm.model, weights, kwargs=dict(batch.inputs)).logits[batch.asked], -1
        )

    def entropy(pairs, weights):
        return sum(
            -said(b, weights).gather(-1, b.targets[:, None]).mean() for b in encode_pairs(lm, pairs, 2)
        )

    for t, seen in enumerate(draws):
        with edited(
            lm, net.sites, [oriented(lm, s, carried[n]) for s, n in zip(net.sites, names, strict=True)]
        ):
            rows = rows_of(lm, twin, list(seen.edits))
        twin.observe(rows)
        now, penalty = {}, 0.0
        for i, (site, name) in enumerate(zip(net.sites, names, strict=True)):
            part, k = twin.net(i)
            keys, grads = rows.site(i)
            R = part.value_differences(keys, grads, k)
            A = keys.T @ keys + twin.log_ridge(i).exp() * torch.eye(keys.shape[1], dtype=keys.dtype)
            S = oriented(lm, site, torch.linalg.solve(A, keys.T @ R).T)
            penalty = penalty + S.square().sum()
            now[name] = start[name] + carried[name] + S
            carried[name] = carried[name] + S.detach()
        loss = entropy(seen.paraphrases, now) + 0.03 * penalty
        if t:
            loss = loss + 0.7 * entropy(draws[0].paraphrases, now)
        for batch in encode_pairs(lm, seen.unrelated, 2):
            before = said(batch, start).detach()
            loss = loss + 0.6 * (before.exp() * (before - said(batch, now))).sum(-1).mean()
        loss.backward()
    for (key, ours), theirs in zip(net.named_parameters(), twin.parameters(), strict=True):
        size = float(theirs.grad.abs().max())
        assert size > 1e-9 and float((ours.grad - theirs.grad).abs().max()) <= 1e-8 * size, key


def test_ridge_is_left_alone_when_asked():
    lm = make_lm()
    net, trainer, rows = trained_start(lm, "malmen", learn_ridge=False)
    trainer.accumulate(rows, encode_pairs(lm, OTHERS, 2), encode_pairs(lm, FAR, 2))
    assert {k for k, p in net.named_parameters() if p.grad is None} == {
        k for k, _ in net.named_parameters() if k.endswith("log_ridge")
    }


def test_plans_make_the_value_differences():
    lm = make_lm()
    net, _, rows = trained_start(lm, "malmen")
    net.observe(rows)
    with torch.no_grad():
        for part in net.nets.values():
            part.log_ridge.fill_(-18.0)  # no ridge: with fewer rows than key width they are met exactly
    plan = net.plan(rows)
    for i in range(2):
        keys, _ = rows.site(i)
        torch.testing.assert_close(keys.double() @ plan.shifts[i].T, plan.residuals[i], rtol=1e-4, atol=1e-6)


def test_orthogonal_spread_reaches_the_plan():
    lm = make_lm()
    net, _, rows = trained_start(lm, "horse")
    net.observe(rows)
    plan = net.plan(rows)
    assert float((plan.written[1] * plan.residuals[0]).sum()) == pytest.approx(0.0, abs=1e-9)
    torch.testing.assert_close(plan.written[0], plan.residuals[0])


def test_modules_of_unequal_shapes():
    lm = make_lm()
    modules = ["transformer.h.0.mlp.c_fc", "transformer.h.0.mlp.c_proj", "transformer.h.1.mlp.c_proj"]
    with pytest.raises(ConfigError, match="malmen"):
        make_hypernetwork("horse", lm, modules=modules)
    net, trainer, rows = trained_start(lm, "malmen", modules=modules)
    assert sorted(net.nets) == ["16x24", "24x16"]
    trainer.accumulate(rows, encode_pairs(lm, OTHERS, 2), encode_pairs(lm, FAR, 2))
    assert all(p.grad is not None for p in net.parameters())
    assert make_hypernetwork("horse", lm, modules=modules, spread="uniform").config.spread == "uniform"


def test_sites_are_checked():
    lm = make_lm()
    with pytest.raises(ConfigError, match="layers"):
        find_sites(lm)
    with pytest.raises(ConfigError, match="twice"):
        find_sites(lm, [0, 0])
    with pytest.raises(ModelError, match="layer"):
        find_sites(lm, [7])
    with pytest.raises(ModelError, match="linear layers"):
        find_sites(lm, modules=["transformer.h.0.mlp"])
    with pytest.raises(ModelError, match="did you mean"):
        find_sites(lm, modules=["transformer.h.0.mlp.c_prj"])


def test_edited_puts_the_bits_back_after_an_error():
    lm = make_lm()
    sites = find_sites(lm, [0, 1])
    before = [lm.get_matrix(0), lm.get_matrix(1)]
    with pytest.raises(KeyError), edited(lm, sites, [torch.full((s.m, s.d), 1 / 3.0) for s in sites]):
        assert not torch.equal(lm.get_matrix(0), before[0])
        raise KeyError
    assert torch.equal(lm.get_matrix(0), before[0]) and torch.equal(lm.get_matrix(1), before[1])


def test_labels_are_what_the_scorer_reads():
    from editkit.scoring import score_targets

    lm = make_lm()
    for batch in encode_pairs(lm, EDITS, 3):
        said = log_softmax(answer_logits(lm, batch), -1).gather(-1, batch.targets[:, None])[:, 0]
        scored = score_targets(lm, list(batch.pairs))
        expected = np.concatenate([s.logprobs for s in scored])
        np.testing.assert_allclose(said.detach().numpy(), expected, atol=1e-5)


class _OtherBackward(torch.autograd.Function):
    """x W_now^T whose gradient in x goes through W_then."""

    @staticmethod
    def forward(ctx, x, now, then):
        ctx.save_for_backward(x, then)
        return x @ now.T

    @staticmethod
    def backward(ctx, g):
        x, then = ctx.saved_tensors
        return g @ then, g.flatten(0, -2).T @ x.flatten(0, -2), None


def test_the_released_locality_goes_back_through_the_unedited_weights():
    """As published: KL against the model before the batch, its gradient behind the shift's removal."""
    lm = make_lm("llama")
    lm.model.double()
    net, trainer, _ = trained_start(lm, "rledit", n_blocks=1, loc_coef=0.6, training="released", reg=5.0)
    start = {s.weight_name: lm.parameter(s.weight_name).detach().clone() for s in net.sites}
    far = encode_pairs(lm, FAR, 2)
    with Walk(trainer, [(encode_pairs(lm, OTHERS, 2), far)]) as walk:
        found = walk.batch(rows_of(lm, net))
    assert all(torch.equal(lm.parameter(k), W) for k, W in start.items())
    now = {
        s.path: (start[s.weight_name] + oriented(lm, s, S)).requires_grad_()
        for s, S in zip(net.sites, found.plan.shifts, strict=True)
    }

    def loss(behind):
        """CE on the edited weights + 0.6 KL with the backward weights `behind`, by hooks on the edited modules."""
        total = 0.0
        for batches, then in ((encode_pairs(lm, OTHERS, 2), now), (far, behind)):
            for b in batches:
                before = log_softmax(lm.model(**b.inputs).logits[b.asked], -1).detach()
                hooks = [
                    submodule(lm.model, path).register_forward_hook(
                        lambda _, args, out, W=W, path=path, then=then: _OtherBackward.apply(
                            args[0], W, then[path].detach()
                        )
                    )
                    for path, W in now.items()
                ]
                said = log_softmax(lm.model(**b.inputs).logits[b.asked], -1)
                for hook in hooks:
                    hook.remove()
                if batches is far:
                    total = total + 0.6 * (before.exp() * (before - said)).sum(-1).mean()
                else:
                    total = total - said.gather(-1, b.targets[:, None]).mean()
        return torch.autograd.grad(total, list(now.values()))

    published = loss({s.path: start[s.weight_name] for s in net.sites})
    for G, theirs in zip(found.grads, published, strict=True):
        assert float((G - theirs).abs().max()) <= 1e-6 * float(theirs.abs().max())  # its RMSNorm is float32
    true = loss(now)
    assert float((true[0] - published[0]).abs().max()) > 1e-4 * float(true[0].abs().max())
    norm = sum(float(p.grad.square().sum()) for p in net.parameters()) ** 0.5
    assert norm <= trainer.config.max_grad_norm * (1 + 1e-6)  # clipped after the batch, not at the end


@pytest.mark.parametrize(("training", "learns"), [("exact", set()), ("released", {"B", "bias"})])
def test_a_fresh_block_learns_only_with_a_slope_at_zero(training, learns):
    """B and bias start at 0, so that every pre-activation is exactly 0: the slope there decides."""
    lm = make_lm()
    net = make_hypernetwork("rledit", lm, layers=[0, 1], rank=3, n_blocks=1, lr=0.05, training=training)
    trainer = Trainer(lm, net, [], {"batch_size": 2})
    with Walk(trainer, [(encode_pairs(lm, OTHERS, 2), encode_pairs(lm, FAR, 2))]) as walk:
        walk.batch(rows_of(lm, net))
    moved = {k.rpartition(".")[2] for k, p in net.named_parameters() if p.grad is not None and p.grad.any()}
    assert moved == {"lr", "log_ridge", "shift"} | learns
