"""The critical layer L*: the one layer whose representation CLaRE compares (clare.md 3.1).

The paper picks it by causal analysis, as the deepest layer at which a fact is still local, and does not print the
index. Here it is the last layer of a site, found by causal tracing or by interchange, or taken from a table of the
papers' models or from the companion's preset; the rule is recorded with the result.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

from ...base.config import check_known
from ...base.errors import ConfigError, DataError
from ...locate.sites import Site
from ...locate.tracing import causal_trace, choose_site, critical_layers, interchange, make_pairs
from ...models.facts import Fact
from ...models.lm import LM

Rule = Literal["preset", "tracing", "interchange"]
RULES: tuple[str, ...] = ("preset", "tracing", "interchange")


@dataclasses.dataclass(frozen=True)
class Preset:
    """Edited layers of a model in an editor's released hyper-parameters."""

    names: tuple[str, ...]
    n_layers: int
    layers: tuple[int, ...]
    source: str
    token: str = "subject_last"


# The CLaRE paper prints no indices. These are the ranges in which the editors' own causal tracing found the facts;
# L* is the last layer of a range. Note that hidden_states[k] of transformers is the output of block k - 1.
PRESETS = (
    Preset(("gpt2-xl",), 48, (13, 14, 15, 16, 17), "MEMIT, hparams/MEMIT/gpt2-xl.json"),
    Preset(("gpt-j-6b",), 28, (3, 4, 5, 6, 7, 8), "MEMIT, hparams/MEMIT/EleutherAI_gpt-j-6B.json"),
    Preset(
        ("llama-3-8b", "llama-3-8b-instruct", "meta-llama-3-8b", "meta-llama-3-8b-instruct"),
        32, (4, 5, 6, 7, 8), "AlphaEdit, hparams/AlphaEdit/Llama3-8B.json",
    ),
    Preset(
        ("qwen2.5-7b", "qwen2.5-7b-instruct"), 28, (4, 5, 6, 7, 8), "EasyEdit, hparams/MEMIT/qwen2.5-7b.yaml"
    ),
    Preset(
        ("mistral-7b-v0.1", "mistral-7b-v0.2", "mistral-7b-v0.3", "mistral-7b-instruct-v0.1",
         "mistral-7b-instruct-v0.2"),
        32, (4, 5, 6, 7, 8), "EasyEdit, hparams/MEMIT/mistral-7b.yaml",
    ),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class CriticalLayer:
    """layer: L*, a block index.   token: where facts sit.   layers: the site it is the last layer of.   rule: how it
    was found."""

    layer: int
    token: str
    layers: tuple[int, ...]
    rule: str


def from_site(site: Site) -> CriticalLayer:
    """The deepest layer of a site. Raises ConfigError for a site without layers."""
    if not site.layers:
        raise ConfigError(f"the site has no layers ({site.rule}); trace facts that the model knows")
    return CriticalLayer(max(site.layers), site.token, tuple(sorted(site.layers)), f"deepest of: {site.rule}")


def critical_layer(
    lm: LM,
    facts: Sequence[Fact] = (),
    *,
    rule: Rule = "preset",
    group: str = "subject_last",
    share: float = 0.9,
    samples: int = 5,
    n_pairs: int = 50,
    seed: int = 0,
) -> CriticalLayer:
    """Find L*.

    rule: "preset"       table of the papers' models, or the file editing.json of a companion; needs no facts.
          "tracing"      deepest layer whose average indirect effect of the MLP output at the position `group` is at
                         least `share` of the maximum (ROME; `locate.causal_trace`), over facts the model knows.
          "interchange"  last layer of the site that `locate.choose_site` derives from patched pairs of facts.
    facts: true facts (target or target_true is the answer) for the last two.
    Raises ConfigError (rule, facts missing), DataError (no preset), RequestError.
    """
    check_known([rule], RULES, "rule")
    if rule == "preset":
        return from_site(_preset(lm))
    facts = list(facts)
    if not facts:
        raise ConfigError(f"rule={rule!r} needs facts that the model knows; pass some, or use rule='preset'")
    if rule == "interchange":
        return from_site(choose_site(interchange(lm, make_pairs(facts, n_pairs, seed))))
    trace = causal_trace(lm, facts, kind="mlp", samples=samples, seed=seed)
    return from_site(critical_layers(trace, group, share))


def _preset(lm: LM) -> Site:
    from ..arms import settings

    try:
        found = settings(lm, "memit")
    except DataError:
        pass
    else:
        return Site(found["token"], tuple(found["layers"]), "the model's editing.json")
    name = lm.name.rsplit("/", 1)[-1].lower()
    for row in PRESETS:
        if name in row.names:
            if lm.n_layers != row.n_layers:
                raise DataError(
                    f"{lm.name} has {lm.n_layers} layers, the table's {name} has {row.n_layers}; "
                    "use rule='tracing'"
                )
            return Site(row.token, row.layers, row.source)
    known = ", ".join(row.names[0] for row in PRESETS)
    raise DataError(
        f"no preset for {lm.name} (known: {known}); use rule='tracing' with facts the model knows"
    )
