"""One vector per fact, from a forward pass that stops at the layer (CLaRE section 3; clare.md 3.2).

The paper does not say at which token or module the state is read, nor whether the answer is part of the text;
all are options here. Default: output of the block at the last token of the prompt, without the answer.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal, get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..base.config import check_known
from ..base.errors import ConfigError, DataError, NumericsError, RequestError
from ..base.paths import to_folder, written
from ..base.progress import bar
from ..locate.keys import TOKENS_PER_BATCH, as_pairs
from ..locate.moments import tokenizer_hash
from ..models.batching import by_length
from ..models.facts import Fact, validate_fact
from ..models.hooks import pick, trace
from ..models.lm import LM
from ..models.lookup import Where, find_positions, find_spans, subject_characters

Token = Where | Literal["mean"]
Module = Literal["block_output", "mlp_output", "attn_output", "down_input"]
TOKENS: tuple[str, ...] = (*get_args(Where), "mean")
MODULES: tuple[str, ...] = get_args(Module)
FACTS_PER_BLOCK = 1024
_FORMAT = "editkit-representations-1"


def check_facts(facts: Iterable[Fact | tuple[str, str]]) -> list[Fact | tuple[str, str]]:
    """The facts, or (template, subject) pairs, as a list; several answers to one prompt are allowed.

    Raises RequestError for an empty list, a missing slot, subject or target, or a fact given twice.
    """
    facts = [facts] if isinstance(facts, Fact) else list(facts)
    if not facts:
        raise RequestError("no facts: the list is empty")
    seen: dict[tuple, int] = {}
    for i, fact in enumerate(facts):
        if isinstance(fact, Fact):
            validate_fact(fact, i)
            key = (fact.prompt, fact.subject, fact.target)
        else:
            if isinstance(fact, str) or len(fact) != 2 or not all(isinstance(x, str) for x in fact):
                raise RequestError(
                    f"fact {i}: expected editkit.Fact or a (template, subject) pair, got {fact!r}"
                )
            subject_characters(*fact)
            key = tuple(fact)
        if seen.setdefault(key, i) != i:
            raise RequestError(f"facts {seen[key]} and {i} are the same: {' | '.join(key)}; drop one")
    return facts


def _prompts(facts: Sequence[Fact | tuple[str, str]], token: str, with_answer: bool) -> list[tuple[str, str]]:
    if not with_answer:
        return as_pairs(facts)
    if token not in ("last", "mean"):
        raise ConfigError(
            f"with_answer changes nothing at token={token!r}, which comes before the answer; "
            "use 'last' or 'mean'"
        )
    without = [i for i, f in enumerate(facts) if not isinstance(f, Fact)]
    if without:
        raise RequestError(f"fact {without[0]} has no answer: with_answer needs editkit.Fact objects")
    return [(f.located[0] + f.target_text, f.located[1]) for f in facts]


def _module(lm: LM, layer: int, module: str) -> tuple[str, bool]:
    """Module path, and whether its input (not its output) is read."""
    if module == "down_input":
        return lm.down_name(layer), True
    name = {"block_output": lm.block_name, "mlp_output": lm.mlp_name, "attn_output": lm.attn_name}[module]
    return name(layer), False


@torch.no_grad()
def _read(
    lm: LM,
    prompts: Sequence[tuple[str, str]],
    sites: Sequence[tuple[int, str]],
    token: str,
    tokens_per_batch: int,
    early_stop: bool,
) -> dict[tuple[int, str], Tensor]:
    """Site -> (n, width) float32 on the CPU, for one block of prompts."""
    if token == "mean":
        encoding, _, _ = find_spans(lm, prompts)
        begin, end = encoding.offsets.unbind(-1)
        weights = ((end > begin) & encoding.attention_mask.bool()).float()
        positions = weights / weights.sum(-1, keepdim=True)
    else:
        encoding, positions = find_positions(lm, prompts, token)
    where = {site: _module(lm, *site) for site in sites}
    result: dict[tuple[int, str], Tensor] = {}
    for rows in by_length(encoding.lengths.tolist(), tokens_per_batch):
        batch, cut = encoding.take(rows)
        names = {name for name, _ in where.values()}
        with trace(lm.model, names, inputs=any(i for _, i in where.values()), stop_early=early_stop) as seen:
            lm.forward(batch)
        for site, (name, reads_input) in where.items():
            states = (seen.input if reads_input else seen.output)[name].float()
            if token == "mean":
                w = positions[rows, cut : cut + states.shape[1]].to(states.device)
                value = (states * w[..., None]).sum(1)
            else:
                value = pick(states, positions[rows] - cut)
            found = result.setdefault(site, torch.empty(len(prompts), value.shape[1]))
            found[rows] = value.cpu()
    for (layer, module), value in result.items():
        if not torch.isfinite(value).all():
            bad = int((~torch.isfinite(value).all(-1)).nonzero()[0])
            raise NumericsError(
                f"the {module} of layer {layer} has NaN or Inf for the prompt {prompts[bad][0]!r}; "
                "check that the model's weights are finite and try float32"
            )
    return result


def represent_many(
    lm: LM,
    facts: Sequence[Fact | tuple[str, str]],
    layers: Sequence[int],
    modules: Sequence[Module] = ("block_output",),
    *,
    token: Token = "last",
    with_answer: bool = False,
    tokens_per_batch: int = TOKENS_PER_BATCH,
    facts_per_block: int = FACTS_PER_BLOCK,
    folder: str | os.PathLike | None = None,
    early_stop: bool = True,
) -> dict[tuple[int, str], Tensor]:
    """Representations at several layers and modules from one pass: (layer, module) -> (n, width) float32.

    facts:  facts, or (template, subject) pairs.
    token:  a lookup name of `editkit.models.lookup`, or "mean" over the tokens of the text.
    with_answer: read after "prompt answer" instead of the prompt (tokens "last" and "mean").
    folder: blocks of facts are kept there; a killed run continues from them and returns the same bits as one
            that was not interrupted. A folder of another model, other facts or options is refused.
    early_stop: end the forward pass after the last module that is read. The result does not depend on it.

    A block of facts is computed by itself, so the result depends neither on `folder` nor on where a run was
    interrupted. Raises RequestError, ConfigError, ModelError, DataError (folder), NumericsError.
    """
    check_known([token], TOKENS, "token")
    check_known(modules, MODULES, "module")
    facts = check_facts(facts)
    if not layers or not modules:
        raise ConfigError("name at least one layer and one module")
    if facts_per_block < 1:
        raise ConfigError(f"facts_per_block must be at least 1, got {facts_per_block}")
    sites = [(lm.check_layer(layer), module) for layer in layers for module in modules]
    prompts = _prompts(facts, token, with_answer)
    store = None
    if folder is not None:
        options = {"sites": sites, "token": token, "with_answer": with_answer,
                   "tokens_per_batch": tokens_per_batch, "facts_per_block": facts_per_block}  # fmt: skip
        store = _Store(folder, lm, prompts, options)
    starts = range(0, len(prompts), facts_per_block)
    parts: dict[tuple[int, str], list[Tensor]] = {site: [] for site in sites}
    for start in bar(starts, f"representations of {len(prompts)} facts", unit="block"):
        block = store.get(start, sites) if store else None
        if block is None:
            chosen = prompts[start : start + facts_per_block]
            block = _read(lm, chosen, sites, token, tokens_per_batch, early_stop)
            if store:
                store.put(start, block)
        for site in sites:
            parts[site].append(block[site])
    return {site: torch.cat(found) for site, found in parts.items()}


def represent(
    lm: LM,
    facts: Sequence[Fact | tuple[str, str]],
    layer: int,
    *,
    token: Token = "last",
    module: Module = "block_output",
    with_answer: bool = False,
    tokens_per_batch: int = TOKENS_PER_BATCH,
    facts_per_block: int = FACTS_PER_BLOCK,
    folder: str | os.PathLike | None = None,
    early_stop: bool = True,
) -> Tensor:
    """Representations of facts at one layer, (n, width) float32 on the CPU; options as in `represent_many`.

    module: "block_output" (hidden state h, width m), "mlp_output", "attn_output" (m), or "down_input" (the
            key k of ROME and MEMIT, width d).
    """
    found = represent_many(
        lm, facts, [layer], [module], token=token, with_answer=with_answer, tokens_per_batch=tokens_per_batch,
        facts_per_block=facts_per_block, folder=folder, early_stop=early_stop,
    )  # fmt: skip
    return found[layer, module]


class _Store:
    """Finished blocks of a run in a folder; each file carries what its content depends on."""

    def __init__(self, folder: str | os.PathLike, lm: LM, prompts: Sequence[tuple[str, str]], options: dict):
        digest = hashlib.sha256(json.dumps([prompts, options], ensure_ascii=False).encode())
        digest.update(lm.fingerprint().encode() + tokenizer_hash(lm).encode())
        self.key, self.folder = digest.hexdigest(), to_folder(folder)

    def _path(self, start: int) -> Path:
        return self.folder / f"block_{start:09d}.safetensors"

    def get(self, start: int, sites: Sequence[tuple[int, str]]) -> dict[tuple[int, str], Tensor] | None:
        path = self._path(start)
        if not path.exists():
            return None
        try:
            with safe_open(str(path), framework="pt") as file:
                meta = file.metadata() or {}
                if meta.get("format") != _FORMAT or meta.get("key") != self.key:
                    raise DataError(
                        f"{path} belongs to another model, other facts or other options; "
                        "give each run its own folder"
                    )
                return {site: file.get_tensor(_name(site)) for site in sites}
        except (OSError, SafetensorError) as error:
            raise DataError(f"cannot read {path}: {error}; delete the file to compute it again") from error

    def put(self, start: int, block: dict[tuple[int, str], Tensor]) -> None:
        with written(self._path(start)) as part:
            save_file(
                {_name(site): value.contiguous() for site, value in block.items()},
                part,
                metadata={"format": _FORMAT, "key": self.key},
            )


def _name(site: tuple[int, str]) -> str:
    return f"{site[0]}.{site[1]}"
