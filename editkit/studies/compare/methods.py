"""The methods of the comparison: where each comes from, and how an editor of it is made.

Nothing is set here: weight editors of the MEMIT family are arms of `labyrinth.bench`, memories and other weight
editors arms of `lifelong.arms`, hypernetworks those of `hypernet.bench`; each brings its options for the model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from ...base.config import check_known
from ...base.errors import ConfigError
from ...methods import EDITORS, make_editor
from ...methods.hypernet.network import Hypernetwork
from ...press.plotting import Look, look
from ..labyrinth.bench import Bench
from ..memoir import arms

Family = Literal["none", "gradient", "locate", "hypernetwork", "memory", "prompt"]
FAMILIES: dict[str, str] = {
    "none": "no edit",
    "gradient": "fine-tuning",
    "locate": "locate-then-edit",
    "hypernetwork": "hypernetwork",
    "memory": "memory beside the weights",
    "prompt": "retrieval and prompting",
}


@dataclasses.dataclass(frozen=True)
class Method:
    """A row of the comparison.

    source: whose arm it is ("bench", "lifelong", "hypernet", "preset", or "" for the unedited model).   arm: its
    name there.   at_once: what one call with all facts equals, exactly: "" (nothing else here; it is run), "stream"
    (facts of a call are written one after the other) or another method (they differ from the second batch on).
    needs: what has to be there before the first edit: "moments", "training", "background" or "".
    """

    label: str
    family: Family
    source: Literal["", "bench", "lifelong", "hypernet", "preset"]
    arm: str
    at_once: str = ""
    needs: Literal["", "moments", "training", "background"] = ""
    drawn: str = ""

    @property
    def look(self) -> Look:
        """Color and marker of the method's family, under this label."""
        return dataclasses.replace(look(self.drawn or self.arm), label=self.label)


def _locate(label: str, arm: str, drawn: str, at_once: str = "") -> Method:
    return Method(label, "locate", "bench", arm, at_once, "moments", drawn)


METHODS: dict[str, Method] = {
    "unedited": Method("unedited", "none", "", "unedited"),
    "ft-l": Method("FT-L", "gradient", "preset", "ft-l"),
    "ft-m": Method("FT-M", "gradient", "preset", "ft-m"),
    "lora": Method("LoRA", "gradient", "lifelong", "lora"),
    "rome": Method("ROME", "locate", "lifelong", "rome", "stream", "moments"),
    "memit": _locate("MEMIT", "memit", "memit"),
    "memit-seq": _locate("MEMIT + history", "memit-seq", "memit-seq", "memit"),
    "alphaedit-naive": _locate("AlphaEdit, no history", "alphaedit-naive", "alphaedit"),
    "alphaedit": _locate("AlphaEdit", "alphaedit", "alphaedit", "alphaedit-naive"),
    "rect": _locate("RECT", "rect", "rect"),
    "rect-compensated": _locate("RECT, history, compensated", "rect-compensated", "rect", "rect"),
    "prune": _locate("PRUNE", "prune-total", "prune"),
    "prune-compensated": _locate("PRUNE, history, compensated", "prune-compensated", "prune"),
    "nse": _locate("NSE", "nse", "nse"),
    "nse-compensated": _locate("NSE, compensated", "nse-compensated", "nse", "nse"),
    "mend": Method("MEND", "hypernetwork", "hypernet", "mend", needs="training"),
    "malmen": Method("MALMEN", "hypernetwork", "hypernet", "malmen", needs="training"),
    "rledit": Method("RLEdit", "hypernetwork", "hypernet", "rledit", needs="training"),
    "horse": Method("HORSE", "hypernetwork", "hypernet", "horse", needs="training"),
    "grace": Method("GRACE", "memory", "lifelong", "grace", "stream"),
    "defer": Method("Defer", "memory", "lifelong", "defer", "stream"),
    "wise": Method("WISE", "memory", "lifelong", "wise", "stream", "background"),
    "loka": Method("LOKA", "memory", "lifelong", "loka", needs="background"),
    "memoir": Method("MEMOIR, calibrated", "memory", "lifelong", "memoir", "stream", "background"),
    "memoir-0.4": Method("MEMOIR, threshold 0.4", "memory", "lifelong", "memoir", "stream", "background"),
    "in-context": Method("in context", "prompt", "lifelong", "in-context", "stream"),
    "retrieval": Method("retrieval (states)", "prompt", "lifelong", "retrieval", "stream", "background"),
    "retrieval-tokens": Method("retrieval (TF-IDF)", "prompt", "lifelong", "retrieval-tokens", "stream"),
}


def check_methods(names: Sequence[str]) -> list[str]:
    """The names, in the order of the table. Raises ConfigError for an unknown or repeated one."""
    check_known(names, METHODS, "method")
    if len(set(names)) != len(names):
        raise ConfigError(f"methods = {list(names)} names a method twice; give each once")
    return [m for m in METHODS if m in names]


def hypernetworks(names: Sequence[str]) -> list[str]:
    """Those of the methods that have to be trained first."""
    return [m for m in names if METHODS[m].source == "hypernet"]


def make_method(
    bench: Bench,
    name: str,
    *,
    background: Sequence[str],
    networks: Mapping[str, Hypernetwork],
    options: Mapping[str, Mapping[str, Any]] | None = None,
):
    """A fresh editor of a method on the bench's model (unedited).

    background: texts unrelated to the edits.   networks: trained hypernetworks by method.   options: method ->
    options over its own. Raises ConfigError for an unknown method, the unedited model, or a missing network.
    """
    check_known([name], METHODS, "method")
    method, more = METHODS[name], dict((options or {}).get(name, {}))
    if method.source == "bench":  # targets are optimised on the model as it is: no sharing between arms
        return bench.editor(method.arm, shared=False, **more)
    if method.source == "lifelong":
        given = {method.arm: more}
        return arms.make_arm(
            bench.lm, method.arm, options=given, background=background, statistics=bench.statistics
        )
    if method.source == "preset":
        from .. import testbed

        editor, own = testbed.METHODS[method.arm]
        return make_editor(editor, bench.lm, **{**testbed.preset(bench.lm, method.arm), **own, **more})
    if method.source == "hypernet":
        if name not in networks:
            raise ConfigError(f"{name} needs its trained hypernetwork in networks")
        return EDITORS[method.arm](bench.lm, more, hypernetwork=networks[name])
    raise ConfigError("the unedited model has no editor")
