"""Adapter for RLEdit: one training sequence from the recorded network, then the editing with the trained one.

Every batch starts from the recorded rows, weights and accumulated gradient, so that rounding of one batch does
not reach the next; its rows are also collected on the model as the sequence left it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ...methods.hypernet.cache import EditRows, collect, join
from ...methods.hypernet.data import answer_logits, cross_entropy
from ...methods.hypernet.network import Hypernetwork, make_hypernetwork
from ...methods.hypernet.rledit import RELEASED, Walk
from ...methods.hypernet.sites import oriented
from ...methods.hypernet.training import Trainer
from .case import CannotHandle, Case, Comparison, adapter, compare, compare_equal
from .hypernet import put_network, recorded_batches, recorded_net, shape_key

Near = Callable[..., None]


@adapter("rledit")
def rledit(case: Case) -> list[Comparison]:
    if "editor" not in case.data.get("config", {}) or "edit_modules" not in case.data:
        raise CannotHandle("the case does not describe a hypernetwork (config.editor, edit_modules)")
    told, half = case.data["config"]["editor"], bool(case.data["config"].get("model", {}).get("half"))
    lm = case.load_model(torch.bfloat16 if half else None)
    net = make_hypernetwork(
        "rledit", lm, modules=case.data["edit_modules"], rank=told["rank"], n_blocks=told["n_blocks"],
        lr=told["lr"], tokens="answer" if told["token"] == "ans" else "all", rows_per_chunk=told["batch_size"],
        depth=told["back_depth"], decay=told["time_decay"], reg=told["reg_coef"], **RELEASED,
    )  # fmt: skip
    config = {k: told[k] for k in ("meta_lr", "max_grad_norm", "loc_coef")}
    trainer = Trainer(lm, net, [], config | {"locality": "kl"})
    put_network(net, recorded_net(case, "net0:"))
    shapes = {shape_key(k) for k in case.data["net_key"].values()}
    out = [compare_equal("networks", sorted(net.nets), sorted(shapes))]
    for i, site in enumerate(net.sites):
        out.append(compare(f"W0_m{i}", lm.parameter(site.weight_name), case.arrays[f"W0_m{i}"], 0.0))
    out += _train(case, trainer)
    out += _edit(case, trainer)
    return out


def _count(case: Case, phase: str) -> int:
    return len({k.split("_")[0] for k in case.arrays if k.startswith(phase) and k.endswith("_m0_keys")})


def _train(case: Case, trainer: Trainer) -> list[Comparison]:
    """Phase s: batches of the sequence, and the one step of Adam."""
    lm, net, out = trainer.lm, trainer.net, []
    device, n = lm.device(), _count(case, "s")
    asked = [
        tuple(recorded_batches(case, f"s{t}", k, device, "") for k in ("equiv", "unrel")) for t in range(n)
    ]
    with Walk(trainer, asked) as walk:
        for t in range(n):
            step = f"s{t}"
            near = _near(out, step, lm.dtype)
            found = walk.batch(_rows(case, net, step, lm, near))
            _planned(case, net, step, found.plan, near)
            near("equiv_losses", found.generalization, case.arrays[f"{step}_equiv_losses"], 1e-4, True)
            near("unrel_kl", found.locality, case.arrays[f"{step}_unrel_kl"], 1e-3, True)
            for i, site in enumerate(net.sites):
                name = f"m{i}_weight_grad"
                near(name, oriented(lm, site, found.grads[i]), case.arrays[f"{step}_{name}"], 1e-3, True)
            if lm.dtype == torch.float32:
                out += _gradients(case, net, f"{step}_netgrad_postclip:", 1e-3, "end to end ")
            # The way back through the network alone: recorded gradients of the weights, recorded start.
            trainer.optimizer.zero_grad(set_to_none=True)
            if t:
                _set_gradients(case, net, f"s{t - 1}_netgrad_postclip:")
            grads = [torch.from_numpy(case.arrays[f"{step}_m{i}_weight_grad"]) for i in range(len(net.sites))]
            found.plan.backward([oriented(lm, s, G) for s, G in zip(net.sites, grads, strict=True)])
            out += _gradients(case, net, f"{step}_netgrad_preclip:", 5e-4)
            _set_gradients(case, net, f"{step}_netgrad_preclip:")
            near("netgrad_norm_preclip", trainer.clip(), case.arrays[f"{step}_netgrad_norm_preclip"], 1e-5)
            out += _gradients(case, net, f"{step}_netgrad_postclip:", 1e-5)
            _set_gradients(case, net, f"{step}_netgrad_postclip:")
            _write(case, net, lm, step, near)
    trainer.optimizer.step()
    after, own = recorded_net(case, "net1:"), dict(net.named_parameters())
    out += [compare(f"after {k}", own[k].detach(), v, 2e-6) for k, v in after.items() if k in own]
    put_network(net, after)
    return out


def _edit(case: Case, trainer: Trainer) -> list[Comparison]:
    """Phase v: the trained network edits a fresh model. As published, its normaliser takes these facts too."""
    lm, net, out = trainer.lm, trainer.net, []
    for t in range(_count(case, "v")):
        step = f"v{t}"
        near = _near(out, step, lm.dtype)
        rows = _rows(case, net, step, lm, near)
        net.observe(rows)
        plan = net.plan(rows)
        _planned(case, net, step, plan, near)
        _write(case, net, lm, step, near, plan.shifts)
    return out + _asked_afterwards(case, lm)


@torch.no_grad()
def _asked_afterwards(case: Case, lm) -> list[Comparison]:
    """Logits of all prompts, and the share of answer tokens that are the argmax, after the last batch."""
    prompts = [r[k] for turn in case.data["turns"] for r in turn for k in ("prompt", "rephrase", "loc")]
    rows = [lm.tokenizer(p, return_tensors="pt").to(lm.device()) for p in prompts]
    ours = torch.stack([lm.model(**row).logits[0, -1].float() for row in rows])
    near = 2e-5 if lm.dtype == torch.float32 else 8 * torch.finfo(lm.dtype).eps
    out = [compare("probe_logits_after", ours, case.arrays["probe_logits_after"], near, relative=True)]
    ratios = []
    for kind in ("edit", "equiv", "unrel"):
        for t in range(_count(case, "v")):
            for b in recorded_batches(case, f"v{t}", kind, lm.device(), ""):
                hits = (answer_logits(lm, b).argmax(-1) == b.targets).float()
                ratios.append([float(x.mean()) for x in hits.split(b.asked.sum(-1).tolist())])
    if lm.dtype == torch.float32:  # in a coarser type two tokens tie, and either is the argmax
        out.append(compare_equal("succ_ratios", ratios, case.data["succ_ratios_in_call_order"]))
    return out


def _near(out: list[Comparison], step: str, dtype: torch.dtype) -> Near:
    """Comparison relative to the recorded size. on_model: what the model computes, in its dtype."""
    coarse = 8 * torch.finfo(dtype).eps if dtype in (torch.bfloat16, torch.float16) else 0.0

    def near(name: str, ours, recorded, tolerance: float, on_model: bool = False) -> None:
        allowed = max(tolerance, coarse) if on_model else tolerance
        out.append(compare(f"{step}_{name}", ours, recorded, allowed, relative=True))

    return near


@torch.no_grad()
def _rows(case: Case, net: Hypernetwork, step: str, lm, near: Near) -> EditRows:
    """Our rows and losses compared; the recorded rows to go on from."""
    edits = recorded_batches(case, step, "edit", lm.device(), "")
    losses = [float(cross_entropy(lm, b)) for b in edits]
    near("edit_losses", losses, case.arrays[f"{step}_edit_losses"], 1e-4, True)
    ours = join([collect(lm, net.sites, b, net.config.tokens) for b in edits])
    keys, grads = (
        [torch.from_numpy(case.arrays[f"{step}_m{i}_{part}"]) for i in range(len(net.sites))]
        for part in ("keys", "values_grad")
    )
    for i in range(len(net.sites)):
        near(f"m{i}_keys", ours.keys[i], keys[i], 2e-5, True)
        near(f"m{i}_values_grad", ours.grads[i], grads[i], 1e-4, True)
    return EditRows(keys, grads, ours.parts)


def _planned(case: Case, net: Hypernetwork, step: str, plan, near: Near) -> None:
    """Normaliser, value differences and shifts of a batch."""
    for part in ("n", "mean", "var", "std"):
        head = f"{step}_norm_{part}:"
        for name in (k for k in case.arrays if k.startswith(head)):
            own = net.nets[shape_key(name.removeprefix(head))].normalizer
            ours = getattr(own, "m2" if part == "var" else part)
            near(name.removeprefix(f"{step}_"), ours.reshape(-1), case.arrays[name].reshape(-1), 1e-5)
    for i in range(len(net.sites)):
        near(f"m{i}_value_diffs", plan.residuals[i], case.arrays[f"{step}_m{i}_value_diffs"], 2e-5)
        near(
            f"m{i}_param_shift",
            plan.shifts[i].T,
            case.arrays[f"{step}_m{i}_param_shift"],
            max(1e-4, 8 * _loss(plan.systems[i])),
        )
    total = sum(float(s.square().sum()) for s in plan.shifts)
    near("l2_unscaled", total, case.arrays[f"{step}_l2_unscaled"], 1e-5)


def _loss(system) -> float:
    """What a float32 solve of this system loses: its condition number times the rounding."""
    largest = float(torch.linalg.matrix_norm(system.U, 2)) ** 2
    return (largest + system.ridge) / system.ridge * torch.finfo(torch.float32).eps


def _write(case: Case, net: Hypernetwork, lm, step: str, near: Near, shifts=None) -> None:
    """The weights after a batch: ours compared (with `shifts` still to be added), the recorded ones written."""
    for i, site in enumerate(net.sites):
        W = lm.parameter(site.weight_name).detach()
        ours = W if shifts is None else W + oriented(lm, site, shifts[i]).to(W.dtype)
        recorded = case.arrays[f"{step}_m{i}_W"]
        near(f"m{i}_W", ours, recorded, 1e-4, True)  # as its shift
        with torch.no_grad():
            lm.write({site.weight_name: torch.from_numpy(recorded).to(W)})


def _set_gradients(case: Case, net: Hypernetwork, prefix: str) -> None:
    own = dict(net.named_parameters())
    for name, value in recorded_net(case, prefix).items():
        own[name].grad = value.to(own[name]).clone()


def _gradients(
    case: Case, net: Hypernetwork, prefix: str, tolerance: float, what: str = ""
) -> list[Comparison]:
    """Gradients accumulated so far, parameter by parameter."""
    own, step = dict(net.named_parameters()), prefix.rstrip(":")
    return [
        compare(f"{what}{step} {k}", own[k].grad, v, tolerance, relative=True)
        for k, v in recorded_net(case, prefix).items()
    ]
