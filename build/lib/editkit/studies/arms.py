"""The rows of every comparison, once: which editor, which options make the variant, how it is drawn.

An arm is a registered editor with options. What it needs of the model (layers, step sizes) comes from the model's own
settings: `options_of`. A registered editor that is not in the table is an arm under its own name, so that a reader's
editor can be named wherever arms can.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from ..base.config import check_known
from ..base.errors import ConfigError, DataError
from ..methods import EDITORS, Editor, make_editor
from ..methods.memory import MemoryEditor
from ..methods.presets import find_for
from ..models.lm import LM
from ..press.plotting import Look, look

Family = Literal["none", "gradient", "locate", "hypernetwork", "memory", "prompt"]
FAMILIES: dict[str, str] = {
    "none": "no edit",
    "gradient": "fine-tuning",
    "locate": "locate-then-edit",
    "hypernetwork": "hypernetwork",
    "memory": "memory beside the weights",
    "prompt": "retrieval and prompting",
}
SETTINGS_FILE = "editing.json"  # beside the weights of a companion


@dataclasses.dataclass(frozen=True)
class Arm:
    """A row of a comparison.

    drawn: whose colour and marker it takes ("": the arm's own name).   single: only the last layer is edited.
    own: options of this arm on a model whose settings speak of the editor, not of the variant.
    at_once: what one call with all facts equals, exactly: "" (nothing else; it is run), "stream" (facts of a call are
        written one after the other) or another arm (they differ from the second batch on).
    """

    label: str
    editor: str
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    family: Family = "locate"
    drawn: str = ""
    linestyle: str | None = None
    single: bool = False
    own: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    at_once: str = ""

    @property
    def kind(self) -> str:
        """ "memory" beside the model, or "weights"."""
        return "memory" if self.family in ("memory", "prompt") else "weights"

    @property
    def needs(self) -> str:
        """What has to be there before the first edit: "moments", "training", "background" or ""."""
        if self.editor in ("wise", "loka", "memoir", "retrieval"):
            return "" if self.options.get("by") == "tokens" else "background"
        return {"locate": "moments", "hypernetwork": "training"}.get(self.family, "")

    @property
    def look(self) -> Look:
        """Colour and marker, this arm's label and dash."""
        base = look(self.drawn or self.editor)
        return dataclasses.replace(base, label=self.label, linestyle=self.linestyle or base.linestyle)


_ALIGNED = {"history": True, "compensate": True}
_STEP = {"when": "step"}
_ONE_PASS = {"alpha": 0.0, "upper_bound": 1e9, "passes": 1}  # NSE: every fact once, like the others
ARMS: dict[str, Arm] = {
    "unedited": Arm("unedited", "", {}, "none", "unedited", at_once="stream"),
    "ft": Arm("FT", "ft", {"objective": "target"}, "gradient"),
    "ft-l": Arm("FT-L", "ft", {"objective": "prompt_last"}, "gradient", "ft-l"),
    "ft-m": Arm("FT-M", "ft", {"objective": "target"}, "gradient", "ft-m"),
    "lora": Arm("LoRA", "lora", {}, "gradient"),
    "rome": Arm("ROME", "rome", at_once="stream"),
    "memit": Arm("MEMIT", "memit", linestyle=":"),
    "memit-1": Arm("MEMIT, one layer", "memit", single=True, linestyle=":"),
    "memit-seq": Arm("MEMIT + history", "memit_seq", linestyle="-", at_once="memit"),
    "alphaedit-naive": Arm("AlphaEdit, no history", "alphaedit", {"history": False}, linestyle=":"),
    "alphaedit": Arm("AlphaEdit", "alphaedit", linestyle="-", at_once="alphaedit-naive"),
    "alphaedit-1": Arm("AlphaEdit, one layer", "alphaedit", single=True, linestyle="-"),
    "rect": Arm("RECT, naive", "rect", linestyle=":"),
    "rect-history": Arm("RECT + history", "rect", {"history": True}, linestyle="--"),
    "rect-compensated": Arm(
        "RECT + history + compensation", "rect", _ALIGNED, linestyle="-", at_once="rect"
    ),
    "prune-total": Arm("PRUNE, as published", "prune", {"when": "total"}, linestyle="-."),
    "prune": Arm("PRUNE, naive", "prune", _STEP, linestyle=":"),
    "prune-history": Arm("PRUNE + history", "prune", {**_STEP, "history": True}, linestyle="--"),
    "prune-compensated": Arm("PRUNE + history + compensation", "prune", {**_STEP, **_ALIGNED}, linestyle="-"),
    "nse": Arm("NSE", "nse", _ONE_PASS, linestyle=":"),
    "nse-compensated": Arm(
        "NSE + compensation", "nse", {**_ONE_PASS, "compensate": True}, linestyle="-", at_once="nse"
    ),
    "latest-full": Arm("latest batch only, full", "memorize_latest", drawn="memit", linestyle="--"),
    "latest-null": Arm(
        "latest batch only, null space", "memorize_latest", {"simplified": True}, drawn="alphaedit", linestyle="--"
    ),
    **{
        name: Arm(label, name, {}, "hypernetwork")
        for name, label in (("mend", "MEND"), ("malmen", "MALMEN"), ("rledit", "RLEdit"), ("horse", "HORSE"))
    },
    "grace": Arm("GRACE", "grace", {}, "memory", at_once="stream"),
    "defer": Arm("Defer", "defer", {}, "memory", at_once="stream"),
    "wise": Arm("WISE retrieve", "wise", {"retrieve": True}, "memory", at_once="stream"),
    "wise-merge": Arm("WISE merge", "wise", {"retrieve": False}, "memory", at_once="stream"),
    "loka": Arm("LOKA", "loka", {}, "memory"),
    "memoir": Arm("MEMOIR", "memoir", {}, "memory", at_once="stream"),
    "memoir-paper": Arm(
        "MEMOIR, threshold of the paper", "memoir", {"threshold": 0.4}, "memory", at_once="stream"
    ),
    "in-context": Arm("in context", "in_context", {}, "prompt", own={"threshold": 0.3}, at_once="stream"),
    "retrieval": Arm(
        "retrieval (states)", "retrieval", {"by": "states"}, "prompt", own={"threshold": 0.8}, at_once="stream"
    ),
    "retrieval-tokens": Arm(
        "retrieval (TF-IDF)", "retrieval", {"by": "tokens"}, "prompt", own={"threshold": 0.4}, at_once="stream"
    ),
}  # fmt: skip

# The six-layer companion's options of editors that are not of the locate-then-edit kind. Chosen by one rule on a seed
# that no page reports (memoir.settings, page "Settings"); fewer steps than the papers, ended by the loss where the
# method has such an end. MEMOIR's threshold is calibrated by the pages (memoir.settings.thresholds).
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


def arm_named(name: str) -> Arm:
    """The arm of that name, or a registered editor as an arm of its own. Raises ConfigError with the nearest name."""
    if name not in ARMS and name in EDITORS:
        memory = issubclass(EDITORS[name], MemoryEditor)
        return Arm(name, name, {}, "memory" if memory else "locate", name)
    check_known([name], ARMS, "arm")
    return ARMS[name]


def check_arms(names: Sequence[str]) -> list[str]:
    """The names, in the order of the table, own editors last. Raises ConfigError for an unknown or repeated one."""
    for name in names:
        arm_named(name)
    if len(set(names)) != len(names):
        raise ConfigError(f"methods = {list(names)} names a method twice; give each once")
    return [m for m in ARMS if m in names] + [m for m in names if m not in ARMS]


def settings(lm: LM, editor: str) -> dict[str, Any]:
    """The model's own options of an editor, a fresh dictionary.

    From the file editing.json of a companion (the site from interchange interventions, step sizes and lam from a sweep
    on seeds that no results page uses), else from the preset of the model's shape (`methods.presets`). Raises
    DataError if there is neither.
    """
    path = Path(getattr(lm.model.config, "_name_or_path", "") or "") / SETTINGS_FILE
    if path.exists():
        if editor in COMPANION:
            return dict(COMPANION[editor])
        table = json.loads(path.read_text())
        family = table["methods"].get(editor, table["methods"]["memit"])
        place = (
            {"layers": table["site"]["layers"][-1:]} if editor == "ft" else table["site"] | table["targets"]
        )
        return {**place, **family}
    try:
        return find_for(lm).options(editor)
    except ConfigError as error:
        raise DataError(
            f"{lm.name} has no {SETTINGS_FILE} and no preset; run the page 'The world and the model' on it, then pass "
            "layers=, token=, lam= and z_* to make_editor"
        ) from error


def options_of(lm: LM, name: str, given: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Options of an arm on a model: the model's settings of the editor, the arm's own, then the given ones.

    A model without settings takes the arm's and the given ones alone. Raises ConfigError for an unknown arm.
    """
    arm = arm_named(name)
    given = dict(given or {})
    try:
        found = {**settings(lm, arm.editor), **arm.own}
    except DataError:
        return {**arm.options, **given}
    if name == "latest-null":  # the null space and ridge of AlphaEdit
        found |= {k: v for k, v in settings(lm, "alphaedit").items() if k in ("threshold", "ridge")}
    known = {f.name for f in dataclasses.fields(EDITORS[arm.editor].Config)}
    found = {k: v for k, v in found.items() if k in known}
    if arm.single:
        found["layers"] = found["layers"][-1:]
    return {**found, **arm.options, **given}


def make_arm(
    lm: LM,
    name: str,
    *,
    given: Mapping[str, Any] | None = None,
    statistics: Mapping | None = None,
    contexts=None,
    background: Sequence[str] | None = None,
    networks: Mapping[str, Any] | None = None,
    record=None,
) -> Editor:
    """A fresh editor of an arm.

    given: options over `options_of`.   statistics, contexts: of weight editors.   background: texts unrelated to the
    edits, for memories that use any.   networks: trained hypernetworks by arm.   record: of the editor.
    Raises ConfigError for an unknown arm, the unedited model, or a missing network.
    """
    arm = arm_named(name)
    if arm.family == "none":
        raise ConfigError("the unedited model has no editor")
    if arm.family == "hypernetwork":
        if name not in (networks or {}):
            raise ConfigError(f"{name} needs its trained hypernetwork in networks")
        return EDITORS[arm.editor](lm, dict(given or {}), hypernetwork=networks[name])
    more: dict[str, Any] = {} if record is None else {"record": record}
    if arm.kind == "weights" and arm.family != "gradient":
        more |= {"statistics": statistics, "contexts": contexts}
    elif arm.kind == "memory" and background is not None:
        more["background"] = background
    return make_editor(arm.editor, lm, **more, **options_of(lm, name, given))


def needed_layers(lm: LM, names: Sequence[str]) -> list[int]:
    """Layers whose second moments the arms need."""
    chosen = [n for n in names if arm_named(n).needs == "moments"]
    return sorted({layer for n in chosen for layer in options_of(lm, n).get("layers", ())})
