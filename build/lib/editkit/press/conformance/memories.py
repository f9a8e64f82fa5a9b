"""What the adapters of memory editors share: sites, requests, probes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...models.facts import SLOT, Fact
from ...models.lm import LM
from ...models.prompts import prompts
from .case import CannotHandle, Case, Comparison, compare, compare_equal


def site(case: Case, lm: LM) -> dict[str, Any]:
    """Options layer and module from the recorded `inner_params`, e.g. "transformer.h[2].mlp.c_fc.weight"."""
    path = re.sub(r"\[(\d+)\]", r".\1", case.hparams["inner_params"][0])
    path = re.sub(r"\.(weight|bias)$", "", path)
    found = re.fullmatch(re.escape(lm.spec.blocks) + r"\.(\d+)\.(.+)", path)
    if not found:
        raise CannotHandle(f"{path} is not inside a block of {lm.spec.blocks}")
    return {"layer": int(found[1]), "module": found[2]}


def fact_of(request: Mapping[str, Any], index: int) -> Fact:
    """Fact of a recorded request whose prompt is a full text."""
    prompt, subject = request["prompt"], request["subject"]
    if subject not in prompt:  # the slot may be anywhere: memories look at the whole prompt
        subject = prompt.split()[0]
    return Fact(prompt.replace(subject, SLOT, 1), subject, request["target_new"].strip(), case_id=str(index))


class Log(dict):
    """Collects what an editor records, one list entry per call and name."""

    def __bool__(self) -> bool:
        return True  # an empty log is a recorder too

    def __call__(self, name: str, value: Tensor) -> None:
        self.setdefault(name, []).append(value)


@torch.no_grad()
def probe_logits(lm: LM, probe: Mapping[str, Any], *, routed: bool = True) -> Tensor:
    """Logits of a probe from the prompt's last token on, (tokens, vocabulary).

    routed: tell the memory where the prompt ends; else the whole text counts as prompt.
    """
    encoding = lm.encode([probe["text"]])
    n = len(encoding.input_ids[0])
    start = n
    if probe.get("mode") == "prompt_target":
        start = n - len(lm.tokenizer(" " + probe["target"], add_special_tokens=False)["input_ids"])
    with prompts(lm, [start if routed else n]):
        return lm.logits(encoding)[0, start - 1 :]


def compare_probes(case: Case, lm: LM, tol: float, *, routed: bool = True) -> list[Comparison]:
    """Logits of every probe, and the recorded most likely token where the probe looks."""
    out = []
    for probe in case.data["probes"]:
        name = f"p{probe['index']}_{probe['mode']}_logits" if "mode" in probe else f"p{probe['index']}_logits"
        recorded = torch.from_numpy(case.arrays[name]).reshape(-1, case.arrays[name].shape[-1])
        logits = probe_logits(lm, probe, routed=routed)
        out.append(compare(name, logits, recorded, tol))
        said = probe.get("argmax_at_loc", probe.get("argmax"))
        if said is not None:
            best = lm.tokenizer.decode([int(logits[0].argmax())]).strip()
            out.append(compare_equal(f"{name} argmax", best, said.strip()))
    return out
