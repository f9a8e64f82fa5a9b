"""Adapter for MEND, MALMEN and HORSE: every recorded training step from the recorded network.

Each step is compared in three ways: rows, losses and gradients end to end on the model; shifts from the
recorded rows; and the optimiser's step. Names of networks, modules and steps are read from the case.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...methods.hypernet.cache import EditRows, collect, join
from ...methods.hypernet.data import TupleBatch
from ...methods.hypernet.horse import RELEASED
from ...methods.hypernet.network import Hypernetwork, make_hypernetwork
from ...methods.hypernet.sites import oriented
from ...methods.hypernet.training import Trainer
from .case import CannotHandle, Case, Comparison, adapter, compare, compare_equal

_RENAMED = {"lamda.weight": "log_ridge", "lr.weight": "lr"}


def shape_key(name: str) -> str:
    """ "(128, 32)" -> "128x32"."""
    return "x".join(part.strip() for part in name.strip("()").split(","))


def renamed(name: str) -> str:
    """ "(128, 32).lamda.weight" -> "nets.128x32.log_ridge"."""
    shape, _, rest = name.partition(".")
    return f"nets.{shape_key(shape)}.{_RENAMED.get(rest, rest.removesuffix('.weight'))}"


def recorded_net(case: Case, prefix: str) -> dict[str, Tensor]:
    """A recorded state dictionary under the names of `Hypernetwork`."""
    out = {}
    for name in (k for k in case.arrays if k.startswith(prefix)):
        own, value = renamed(name.removeprefix(prefix)), torch.from_numpy(case.arrays[name])
        out[own] = value[:, 0] if own.endswith((".lr", ".log_ridge")) else value
    return out


def put_network(net: Hypernetwork, found: dict[str, Tensor]) -> None:
    """Load a recorded state; the recorded normaliser has var (the sum of squares), std and n."""
    own = net.state_dict()
    for name, value in found.items():
        name = name.replace("normalizer.var", "normalizer.m2")
        if not name.endswith("normalizer.std"):
            own[name] = value.reshape(own[name].shape).to(own[name].dtype)
    net.load_state_dict(own)


def recorded_batches(case: Case, step: str, kind: str, device, infix: str = "tuples_") -> list[TupleBatch]:
    """Recorded batches of one kind ("edit", "equiv", "unrel")."""
    out: list[TupleBatch] = []
    while f"{step}_{kind}_{infix}{len(out)}_input_ids" in case.arrays:
        name = f"{step}_{kind}_{infix}{len(out)}_"
        ids, mask, labels = (
            torch.from_numpy(case.arrays[name + part]).to(device)
            for part in ("input_ids", "attention_mask", "labels")
        )
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        out.append(TupleBatch({"input_ids": ids, "attention_mask": mask, "position_ids": positions}, labels))
    return out


def _network(case: Case, lm) -> Hypernetwork:
    editor = case.data["config"]["editor"]
    options = {
        "rank": editor["rank"], "n_blocks": editor["n_blocks"], "lr": editor["lr"], "moments": "released",
        "tokens": "answer" if editor["token"] == "ans" else "all", "rows_per_chunk": editor["batch_size"],
    }  # fmt: skip
    if case.method == "horse":
        options |= RELEASED
    return make_hypernetwork(case.method, lm, modules=case.data["edit_modules"], **options)


@adapter("malmen", "horse", "mend")
def hypernetwork(case: Case) -> list[Comparison]:
    if "editor" not in case.data.get("config", {}) or "edit_modules" not in case.data:
        raise CannotHandle("the case does not describe a hypernetwork (config.editor, edit_modules)")
    lm = case.load_model()
    editor = case.data["config"]["editor"]
    net = _network(case, lm)
    put_network(net, recorded_net(case, "net0:"))
    horse = case.method == "horse"
    config = {
        "meta_lr": editor["meta_lr"], "max_grad_norm": editor["max_grad_norm"],
        "loc_coef": 1.0 if horse else editor["loc_coef"], "locality": "cross_entropy" if horse else "kl",
    }  # fmt: skip
    trainer = Trainer(lm, net, [], config)
    out = [compare_equal("networks", sorted(net.nets), sorted(shape_key(k) for k in case.data["net_keys"]))]
    number = 0
    while f"step{number}" in case.data:
        out += _compare_step(case, lm, net, trainer, number)
        number += 1
    return out


def _compare_step(case: Case, lm, net: Hypernetwork, trainer: Trainer, number: int) -> list[Comparison]:
    step, told = f"s{number}", case.data[f"step{number}"]
    device = lm.device()
    out: list[Comparison] = []

    def near(name: str, ours, recorded, tolerance: float) -> None:
        out.append(compare(f"{step}_{name}", ours, recorded, tolerance, relative=True))

    edits = recorded_batches(case, step, "edit", device)
    rows = join([collect(lm, net.sites, batch, net.config.tokens) for batch in edits])
    recorded: list[tuple[Tensor, Tensor]] = []
    for i in range(len(net.sites)):
        pair = tuple(torch.from_numpy(case.arrays[f"{step}_m{i}_{part}"]) for part in ("keys", "values_grad"))
        recorded.append(pair)
        out.append(
            compare_equal(
                f"{step}_m{i}_rows", list(rows.parts), case.arrays[f"{step}_m{i}_rows_per_batch"].tolist()
            )
        )
        near(f"m{i}_keys", rows.keys[i], pair[0], 2e-5)
        near(f"m{i}_values_grad", rows.grads[i], pair[1], 1e-4)
    # Further on from the recorded rows, so that rounding of the language model is not counted twice.
    rows = EditRows([k for k, _ in recorded], [g for _, g in recorded], rows.parts)
    trainer.optimizer.zero_grad(set_to_none=True)
    unrelated = recorded_batches(case, step, "unrel", device)
    found = trainer.accumulate(rows, recorded_batches(case, step, "equiv", device), unrelated)
    for name, value in recorded_net(case, f"{step}_after_cache:").items():
        shape, _, part = name.removeprefix("nets.").partition(".normalizer.")
        own = net.nets[shape].normalizer
        near(
            f"after_cache {name}",
            (own.m2 if part == "var" else getattr(own, part)).reshape(value.shape),
            value,
            1e-5,
        )
    plan = found.plan
    for i, site in enumerate(net.sites):
        near(f"m{i}_param_shift", plan.shifts[i].T, case.arrays[f"{step}_m{i}_param_shift"], 1e-4)
        near(
            f"m{i}_weight_grad",
            oriented(lm, site, found.grads[i]),
            case.arrays[f"{step}_m{i}_weight_grad"],
            1e-3,
        )
        for kind, attribute in (
            ("value_diffs", "written"), ("value_diffs_before", "residuals"), ("value_diffs_after", "written"),
        ):  # fmt: skip
            if f"{step}_m{i}_{kind}" in case.arrays:
                near(f"m{i}_{kind}", getattr(plan, attribute)[i], case.arrays[f"{step}_m{i}_{kind}"], 2e-5)
        if f"{step}_m{i}_projection_coeff" in case.arrays:
            R, P = plan.residuals[i], plan.residuals[i - 1]
            near(
                f"m{i}_projection_coeff",
                (R * P).sum() / (P * P).sum(),
                case.arrays[f"{step}_m{i}_projection_coeff"],
                2e-5,
            )
    losses = [value for _, value in told["losses"]]
    near("losses", found.generalization + found.locality, losses[len(edits) :], 1e-4)
    out += _compare_gradients(case, net, step, "end to end ", 1e-3)

    # Phase 2 alone, from the recorded gradients of the weights.
    trainer.optimizer.zero_grad(set_to_none=True)
    grads = [torch.from_numpy(case.arrays[f"{step}_m{i}_weight_grad"]) for i in range(len(net.sites))]
    plan.backward([oriented(lm, site, G) for site, G in zip(net.sites, grads, strict=True)])
    out += _compare_gradients(case, net, step, "", 5e-4)

    # The optimiser alone, from the recorded gradients: Adam's first steps amplify rounding without limit.
    parameters = dict(net.named_parameters())
    without = {renamed(name) for name in told["params_without_grad"]}
    found_without = {k for k, p in parameters.items() if p.grad is None}
    out.append(compare_equal(f"{step} without gradient", found_without, without))
    for name, value in recorded_net(case, f"{step}_netgrad_preclip:").items():
        parameters[name].grad = value.to(parameters[name])
    near("grad_norm_preclip", trainer.update(), told["grad_norm_preclip"], 1e-5)
    after = recorded_net(case, f"{step}_net_after:")
    out += [compare(f"{step} after {k}", parameters[k].detach(), v, 2e-6) for k, v in after.items()]
    put_network(net, after)
    return out


def _compare_gradients(
    case: Case, net: Hypernetwork, step: str, what: str, tolerance: float
) -> list[Comparison]:
    parameters = dict(net.named_parameters())
    return [
        compare(f"{step} {what}gradient {k}", parameters[k].grad, v, tolerance, relative=True)
        for k, v in recorded_net(case, f"{step}_netgrad_preclip:").items()
    ]
