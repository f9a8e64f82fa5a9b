"""The predictors that are compared, each a table (edits, probes) made before anything is written.

`shared_scores` do not depend on the editor, `editor_scores` follow what the editor would inject.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ..base.config import check_known
from ..methods.weights.locate_then_edit import LocateEditor
from ..models.facts import Fact
from ..models.lm import LM
from .gradsim import Sketch, gradients, gradsim
from .plans import plan_edits, probe_representations
from .representations import represent_many
from .similarity import centered_cosine, cosine, whitened

Needs = Literal["nothing", "forward", "backward per fact", "backward per edit", "targets", "update"]


@dataclasses.dataclass(frozen=True)
class Predictor:
    """label: on pages.   needs: what one has to compute.   per_editor: whether it follows an editor's update."""

    label: str
    needs: Needs
    per_editor: bool = False


PREDICTORS: dict[str, Predictor] = {
    "random": Predictor("random", "nothing"),
    "gradsim": Predictor("GradSim, all parameters", "backward per fact"),
    "gradsim-layer": Predictor("GradSim, edited matrix", "backward per fact"),
    "gradsim-sketch": Predictor("GradSim, sketched", "backward per fact"),
    "clare": Predictor("CLaRE", "forward"),
    "clare-centered": Predictor("CLaRE, centered", "forward"),
    "key-cosine": Predictor("key cosine", "forward"),
    "whitened-last": Predictor("whitened keys, last layer", "forward", True),
    "whitened": Predictor("whitened keys, all layers", "forward", True),
    "whitened-readout": Predictor("whitened + read-out", "forward", True),
    "whitened-gradient": Predictor("whitened + one gradient", "backward per edit", True),
    "whitened-targets": Predictor("whitened + targets", "targets", True),
    "written": Predictor("solved update", "update", True),
}


def shared_scores(
    lm: LM,
    edits: Sequence[Fact],
    probes: Sequence[Fact],
    layer: int,
    names: Sequence[str],
    *,
    token: str = "last",
    seed: int = 0,
    sketch: int = 4096,
) -> dict[str, np.ndarray]:
    """Tables of the predictors in `names` that do not depend on an editor; others are passed over.

    layer, token: where representations are read. sketch: width of the sketched GradSim.
    """
    check_known(names, PREDICTORS, "predictor")
    wanted = [name for name in names if not PREDICTORS[name].per_editor]
    found: dict[str, np.ndarray] = {}
    if {"clare", "clare-centered", "key-cosine"} & set(wanted):
        modules = ["block_output", "down_input"]
        a, b = (represent_many(lm, facts, [layer], modules, token=token) for facts in (edits, probes))
        h, k = ((a[layer, m], b[layer, m]) for m in modules)
        made = {"clare": lambda: cosine(*h), "clare-centered": lambda: centered_cosine(*h),
                "key-cosine": lambda: cosine(*k)}  # fmt: skip
        found |= {name: made[name]().matrix().double().numpy() for name in made if name in wanted}
    for name in wanted:
        if name == "random":
            found[name] = np.random.default_rng([seed, 31]).random((len(edits), len(probes)))
        elif name == "gradsim":
            found[name] = gradsim(lm, edits, probes)
        elif name == "gradsim-layer":
            found[name] = gradsim(lm, edits, probes, params="down", layer=layer)
        elif name == "gradsim-sketch":
            true = [f.replace(target=f.target_true) if f.target_true else f for f in edits]
            plan = Sketch(sketch, seed)
            found[name] = (
                cosine(*(gradients(lm, facts, sketch=plan) for facts in (true, probes))).matrix().numpy()
            )
    return found


def editor_scores(
    editor: LocateEditor,
    edits: Sequence[Fact],
    probes: Sequence[Fact],
    names: Sequence[str],
    *,
    residuals: Tensor | None = None,
    representations: tuple[Mapping[int, Tensor], Tensor] | None = None,
) -> dict[str, np.ndarray]:
    """Tables of the predictors in `names` that follow an editor; others are passed over,
    also "written", which needs the updates themselves (`plans.delta_shift`).

    residuals: (m, n) z - h of the edits, needed by "whitened-targets" (passed over without them).
    representations: `probe_representations` of the probes at the editor's layers, if at hand.
    """
    check_known(names, PREDICTORS, "predictor")
    wanted = [name for name in names if PREDICTORS[name].per_editor and name != "written"]
    lm, cfg = editor.lm, editor.config
    found: dict[str, np.ndarray] = {}
    if not wanted:
        return found
    keys, scale = representations or probe_representations(lm, probes, cfg.layers, cfg.token)
    for name in wanted:
        if name == "whitened-last":
            last = cfg.layers[-1]
            own = represent_many(lm, edits, [last], ["down_input"], token=cfg.token)[last, "down_input"]
            C = editor.second_moment(last)
            found[name] = whitened(own, C, keys[last]).matrix().numpy()
            continue
        direction: str | Tensor = {"whitened": "keys", "whitened-readout": "readout",
                                   "whitened-gradient": "gradient"}.get(name, "")  # fmt: skip
        if name == "whitened-targets":
            if residuals is None:
                continue
            direction = residuals
        found[name] = plan_edits(editor, edits, direction=direction).shift(keys, scale)
    return {name: np.asarray(torch.as_tensor(table).double()) for name, table in found.items()}
