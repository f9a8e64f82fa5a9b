"""The methods of a lifelong comparison: registry names, variants, and options for the companion."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from ...base.errors import DataError
from ...methods import make_editor
from ...models.facts import Fact
from ...models.lm import LM


@dataclasses.dataclass(frozen=True)
class Arm:
    """One method. editor: registry name.   options: what makes the variant.   kind: "weights" or "memory"."""

    editor: str
    options: Mapping[str, Any]
    kind: str
    label: str


ARMS: dict[str, Arm] = {
    "ft": Arm("ft", {}, "weights", "FT"),
    "lora": Arm("lora", {}, "weights", "LoRA"),
    "rome": Arm("rome", {}, "weights", "ROME"),
    "memit": Arm("memit", {}, "weights", "MEMIT"),
    "memit-seq": Arm("memit_seq", {}, "weights", "MEMIT + history"),
    "alphaedit": Arm("alphaedit", {}, "weights", "AlphaEdit"),
    "grace": Arm("grace", {}, "memory", "GRACE"),
    "defer": Arm("defer", {}, "memory", "Defer"),
    "wise": Arm("wise", {"retrieve": True}, "memory", "WISE retrieve"),
    "wise-merge": Arm("wise", {"retrieve": False}, "memory", "WISE merge"),
    "loka": Arm("loka", {}, "memory", "LOKA"),
    "memoir": Arm("memoir", {}, "memory", "MEMOIR"),
    "memoir-paper": Arm("memoir", {"threshold": 0.4}, "memory", "MEMOIR, threshold of the paper"),
    "in-context": Arm("in_context", {}, "memory", "in context"),
    "retrieval": Arm("retrieval", {"by": "states"}, "memory", "retrieval (states)"),
    "retrieval-tokens": Arm("retrieval", {"by": "tokens"}, "memory", "retrieval (TF-IDF)"),
}

# For the six-layer companion. Chosen by one rule on a seed that no page reports (lifelong.settings, page "Settings");
# fewer steps than the papers for pages that run in minutes, ended by the loss where the method has such an end. Weight
# editors take the companion's presets. MEMOIR's threshold is calibrated by the pages (lifelong.settings.thresholds).
COMPANION: dict[str, dict[str, Any]] = {
    "lora": {"steps": 40, "lr": 3e-5, "loss_threshold": 0.02},
    "grace": {"layer": 4, "radius": 96.0, "steps": 30, "loss_threshold": 0.05},
    "defer": {"layer": 4, "steps": 30, "lr": 5e-4, "loss_threshold": 0.05},
    "wise": {"layer": 4, "steps": 20, "lr": 0.1, "n_contexts": 2, "alpha": 1.0, "beta": 4.0, "gamma": 2.0,
             "save_every": 5, "merge_every": 10},
    "loka": {"layer": 4, "n_contexts": 2},
    "memoir": {"layer": 3, "n_contexts": 2, "stop_change": None},
    "retrieval": {"layer": 3},
    "in_context": {},
}  # fmt: skip
VARIANTS: dict[str, dict[str, Any]] = {  # the same for arms that share an editor
    "retrieval": {"threshold": 0.8}, "retrieval-tokens": {"threshold": 0.4}, "in-context": {"threshold": 0.3},
}  # fmt: skip


def arm_named(name: str) -> Arm:
    """The arm; raises DataError with the list for an unknown name."""
    if name not in ARMS:
        raise DataError(f"unknown method {name!r}; choose from {', '.join(ARMS)}")
    return ARMS[name]


def arm_options(lm: LM, name: str, given: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Options of a method on this model: given ones over the companion's (only on companions).

    Weight editors take the model's own presets (`world.testbed.preset`) there. On other models everything has to be
    given, e.g. from `editkit.methods.presets`.
    """
    from .. import testbed

    arm = arm_named(name)
    try:
        testbed.preset(lm, "memit")
    except DataError:
        return {**arm.options, **(given or {})}
    if arm.editor in COMPANION:
        own = {**COMPANION[arm.editor], **VARIANTS.get(name, {})}
    else:
        own = testbed.preset(lm, arm.editor if arm.editor != "ft" else "ft-m")
    return {**own, **arm.options, **(given or {})}


def make_arm(
    lm: LM,
    name: str,
    *,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    background: Sequence[str] | None = None,
    statistics: Mapping | None = None,
):
    """An editor for a method of `ARMS`.

    options: per method name, over the defaults of `arm_options`.   background: texts unrelated to the edits, for
    memories that use any.   statistics: second moments, for weight editors.
    """
    arm = arm_named(name)
    settings = arm_options(lm, name, (options or {}).get(name))
    more: dict[str, Any] = {}
    if arm.kind == "weights":
        more["statistics"] = statistics
    elif background is not None:
        more["background"] = background
    return make_editor(arm.editor, lm, **more, **settings)


def needs_statistics(lm: LM, names: Sequence[str]) -> list[int]:
    """Layers whose second moments the methods need."""
    layers: set[int] = set()
    for name in names:
        if ARMS[name].kind == "weights" and ARMS[name].editor not in ("ft", "lora"):
            layers |= set(arm_options(lm, name).get("layers", ()))
    return sorted(layers)


def world_background(world, facts: Sequence[Fact], n: int, seed: int) -> list[str]:
    """n true statements (prompt and answer) about subjects that no edit and no probe of these facts is about."""
    import numpy as np

    taken = {f.subject for f in facts}
    seen = {f.text for f in facts} | {p for f in facts for p in f.paraphrases}
    seen |= {
        p.prompt for f in facts for p in (*f.neighborhood, *f.locality, *f.same_subject, *f.consequences)
    }
    pool = [s for s in world.statements() if s.subject not in taken and s.prompt not in seen]
    rng = np.random.default_rng([seed, 77])
    return [pool[i].text for i in rng.choice(len(pool), min(n, len(pool)), replace=False)]
