"""editkit doctor MODEL: is this model ready to be edited here? Answered in a minute, from the configuration alone.

Nothing is loaded but configuration and tokenizer. Module paths and sizes are read from the model on the meta
device; what a forward pass shows (output types, padding) from a narrow two-layer model of the same class; lookup of
tokens from the real tokenizer. Every finding says what to change.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from transformers import AutoTokenizer, PretrainedConfig

from ..base.errors import ConfigError, EditkitError, ModelError
from ..locate.contexts import ContextTemplates
from ..locate.target_rows import encode_targets
from ..models.architectures import ArchSpec
from ..models.batching import Encoding
from ..models.capacity import memory_plan, savings
from ..models.facts import Fact
from ..models.gguf import is_gguf
from ..models.hooks import hidden, submodule, trace
from ..models.lm import LM
from ..models.lookup import find_positions
from ..models.preflight import (
    check_config,
    check_fits,
    empty_model,
    free_memory,
    gib,
    read_config,
    tiny_model,
    weight_bytes,
)
from ..models.pretrained import source_of
from . import EDITORS
from .presets import find_for

Status = Literal["ok", "note", "change"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SAMPLES = (
    ("The mother tongue of {} is", "Danielle Darrieux"),
    ("{} was born in", "Édith Piaf"),
    ("In the north of Italy, {} lives and", "J. R. R. O'Brien-Smith"),
    ("{}, a citizen of", "Li"),
)


@dataclasses.dataclass(frozen=True)
class Finding:
    """One line of the report. status: "ok", "note" (good to know), "change" (do something before editing)."""

    check: str
    status: Status
    text: str
    fix: str = ""

    def __str__(self) -> str:
        mark = {"ok": "ok    ", "note": "note  ", "change": "CHANGE"}[self.status]
        return f"{mark}  {self.check:<12}{self.text}" + (f"\n{'':20}-> {self.fix}" if self.fix else "")


def examine(
    source: str,
    *,
    method: str = "memit",
    layers: Sequence[int] | None = None,
    dtype: torch.dtype | None = None,
    memory: Mapping[str, int] | None = None,
    tokens_per_batch: int = 8192,
    tokenizer=None,
    spec: ArchSpec | None = None,
    **kwargs: Any,
) -> list[Finding]:
    """All findings about a model by Hub name or folder.

    dtype: of the forward pass; None: bfloat16 where an accelerator is planned for and float32 does not fit it.
    memory: free bytes by place, for another machine; None: this one's.   layers: edited ones; None: the preset's.
    kwargs: revision and the like, for the Hub.
    Raises ModelError for what cannot be edited at all: no such model, encoder-decoder, quantised, unknown class,
    weights that fit nowhere; ConfigError for an unknown method.
    """
    if method not in EDITORS:
        raise ConfigError(f"unknown method {method!r}; choose from {', '.join(sorted(EDITORS))}")
    config = read_config(source, **kwargs)
    spec = check_config(config, source, spec)
    if tokenizer is None:
        tokenizer = _tokenizer(source, **kwargs)
    memory = dict(free_memory() if memory is None else memory)
    full = LM(empty_model(config), tokenizer, spec, name=source)
    chosen, about = _layers(full, method, layers)
    dtype = dtype or _choose_dtype(full, chosen, method, tokens_per_batch, memory)
    check_fits(weight_bytes(full.model, dtype), dtype, full.name, memory)
    tiny = LM(tiny_model(config), tokenizer, spec, name=source)
    found = [*_modules(full, config)]
    size = submodule(full.model, full.spec.embed).weight.shape[0]
    if len(full.tokenizer) > size:  # a forward pass would end in an index error
        found.append(
            Finding(
                "vocabulary",
                "change",
                f"the tokenizer has {len(full.tokenizer)} tokens, the embedding {size}",
                "use the tokenizer of this model (--tokenizer), or resize the embedding",
            )
        )
    else:
        found += [*_outputs(tiny), *_tokens(tiny), *_padding(tiny)]
    return [*found, about, *_memory(full, chosen, dtype, method, memory, tokens_per_batch)]


def _tokenizer(source: str, **kwargs: Any):
    try:
        return AutoTokenizer.from_pretrained(source, **kwargs)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"cannot load the tokenizer of {source!r}: {error}; pass --tokenizer with one that fits"
        ) from error


def _accelerators(memory: Mapping[str, int]) -> dict[str, int]:
    return {k: v for k, v in memory.items() if k != "host"}


def _choose_dtype(
    full: LM, layers: list[int], method: str, tokens_per_batch: int, memory: Mapping[str, int]
) -> torch.dtype:
    """float32 without an accelerator, or where all of the plan fits the largest one; else bfloat16."""
    best = max(_accelerators(memory).values(), default=None)
    if best is None or memory_plan(full, layers, torch.float32, method, tokens_per_batch).peak <= best:
        return torch.float32
    return torch.bfloat16


# --- modules ------------------------------------------------------------------------------------------------


def _modules(full: LM, config: PretrainedConfig) -> Iterator[Finding]:
    n = sum(p.numel() for p in full.model.parameters())
    yield Finding(
        "model",
        "ok",
        f"{full.name}: {config.model_type}, {n / 1e9:.2f} billion parameters, {full.n_layers} layers, width "
        f"{full.d_model}, MLP {full.d_key}",
    )
    for layer in range(full.n_layers):  # the table's paths in every block, not in the first only
        submodule(full.model, full.down_name(layer))
    stored = "in x out (transposed at the boundary)" if full.spec.orientation == "conv1d" else "out x in"
    yield Finding("modules", "ok", f"{full.down_name(0)} ... {full.n_layers} of them, stored {stored}")


def _outputs(tiny: LM) -> Iterator[Finding]:
    encoding = tiny.encode(["Rome is", "The weather was fine today"])
    names = [tiny.block_name(0), tiny.mlp_name(0), tiny.attn_name(0)]
    kinds: dict[str, str] = {}
    handles = [
        submodule(tiny.model, name).register_forward_hook(
            lambda module, args, out, name=name: kinds.update({name: type(out).__name__.lower()})
        )
        for name in names
    ]
    try:
        with torch.no_grad(), trace(tiny.model, [names[0], tiny.down_name(0)], inputs=True) as seen:
            tiny.forward(encoding)
    finally:
        for handle in handles:
            handle.remove()
    state, key = hidden(seen.output[names[0]]), seen.input[tiny.down_name(0)]
    right = state.shape == (*encoding.input_ids.shape, tiny.d_model) and key.shape[-1] == tiny.d_key
    told = ", ".join(f"{k} {kinds[n]}" for k, n in zip(("block", "MLP", "attention"), names, strict=True))
    if right:
        yield Finding("outputs", "ok", f"{told}; hidden states (batch, tokens, width) read from all of them")
    else:
        yield Finding(
            "outputs", "change", f"{told}; the block gives {tuple(state.shape)}, the key {tuple(key.shape)}",
            "correct the paths of the ArchSpec: block output and down projection do not have the widths they should",
        )  # fmt: skip


# --- tokens -------------------------------------------------------------------------------------------------


def _tokens(tiny: LM) -> Iterator[Finding]:
    tok = tiny.tokenizer
    ids = tok("Rome", add_special_tokens=True)["input_ids"]
    adds = tok.bos_token_id is not None and ids[:1] == [tok.bos_token_id]
    yield Finding(
        "BOS", "ok" if adds else "note",
        f"{tok.bos_token!r} is added in front of every text" if adds else "no BOS is added",
        "" if adds else "a subject that opens a prompt has no token before it",
    )  # fmt: skip
    if tok.eos_token_id is not None and ids[-1:] == [tok.eos_token_id]:
        yield Finding(
            "EOS", "note", "the tokenizer appends EOS; lookup skips it, and targets are read before it"
        )
    if not getattr(tok, "is_fast", False):
        yield Finding(
            "lookup",
            "change",
            "the tokenizer gives no character offsets",
            "load the fast one (use_fast=True)",
        )
        return
    facts = [Fact(p, s, "Rome", "Paris") for p, s in SAMPLES]
    try:
        places = []
        for side in ("right", "left"):
            encoding, where = find_positions(tiny, list(SAMPLES), "subject_last", side)
            places.append([int(x) for x in where - encoding.first])
        pieces = [_piece(encoding, row, column) for row, column in enumerate(where.tolist())]
        rows = encode_targets(tiny, facts, ContextTemplates())
    except EditkitError as error:
        yield Finding("lookup", "change", str(error), "choose another lookup token, or report the tokenizer")
        return
    wrong = [
        f"{s!r} ends in {p!r}"
        for (_, s), p in zip(SAMPLES, pieces, strict=True)
        if not p or not s.endswith(p)
    ]
    unknown = [
        p
        for i, p in enumerate(pieces)
        if tok.unk_token_id is not None and encoding.input_ids[i, where[i]] == tok.unk_token_id
    ]
    if unknown:
        yield Finding(
            "unknown",
            "note",
            f"{', '.join(map(repr, unknown))} became {tok.unk_token!r}",
            "such subjects share keys",
        )
    if wrong or places[0] != places[1]:
        yield Finding(
            "lookup", "change", "; ".join(wrong) or f"positions differ with the padding side: {places}",
            "use token='last', and report the tokenizer",
        )  # fmt: skip
    else:
        shown = ", ".join(f"{s!r} at {p!r}" for (_, s), p in zip(SAMPLES, pieces, strict=True))
        yield Finding("lookup", "ok", f"last subject token: {shown}; equal with left and right padding")
    first = [tok.decode([int(place[0, 2])]) for place in rows.places]
    lengths = sorted({len(place) for place in rows.places})
    if any(not "Rome".startswith(f.strip()) for f in first):
        yield Finding(
            "targets", "change", f"the target ' Rome' begins with the token {first[0]!r}",
            "check the tokenizer's post-processor: a special token is taken for the target",
        )  # fmt: skip
    else:
        yield Finding(
            "targets",
            "ok",
            f"' Rome' behind a prompt: {'/'.join(map(str, lengths))} token(s), from {first[0]!r}",
        )


def _piece(encoding: Encoding, row: int, column: int) -> str:
    """The characters a token stands for (decoding a single piece of a byte-level vocabulary may not give them)."""
    begin, end = encoding.offsets[row, column].tolist()
    return encoding.texts[row][begin:end].strip()


@torch.no_grad()
def _padding(tiny: LM) -> Iterator[Finding]:
    given = tiny.tokenizer.pad_token
    texts = [template.replace("{}", subject) for template, subject in SAMPLES]
    sides = {side: tiny.encode(texts, side) for side in ("right", "left")}
    ends = {}
    for side, encoding in sides.items():
        logits = tiny.logits(encoding)
        ends[side] = logits[torch.arange(len(texts)), encoding.last]
    gap = float((ends["left"] - ends["right"]).abs().max() / ends["right"].abs().max())
    if gap < 1e-3:
        yield Finding("padding", "ok", f"pad token {given!r}; left and right padding give the same logits")
    else:
        yield Finding(
            "padding", "change", f"left and right padding differ by {gap:.1e} of the logits",
            "keep to the default padding_side='right'",
        )  # fmt: skip


# --- plan ---------------------------------------------------------------------------------------------------


def _layers(full: LM, method: str, layers: Sequence[int] | None) -> tuple[list[int], Finding]:
    if layers:
        chosen = [full.check_layer(layer) for layer in layers]
        return chosen, Finding("layers", "ok", f"{chosen}, as given")
    try:
        preset = find_for(full)
        kind = method if "layers" in preset.options(method) else "memit"
        chosen = list(preset.options(kind)["layers"])
        status = preset.settings["editor"][kind]["layers"].status
        return chosen, Finding(
            "layers", "ok", f"{chosen} ({status}) of preset {preset.name}: make_editor(..., preset='auto')"
        )
    except ConfigError:
        third = full.n_layers // 3
        chosen = list(range(max(0, third - 2), min(full.n_layers, third + 3)))
        return chosen, Finding(
            "layers", "change", f"no preset has this shape; {chosen} only size the memory plan",
            "find the layers by causal tracing (editkit.locate.tracing), see the page 'Your own model'",
        )  # fmt: skip


def _memory(
    full: LM,
    layers: list[int],
    dtype: torch.dtype,
    method: str,
    memory: dict[str, int],
    tokens_per_batch: int,
) -> Iterator[Finding]:
    plan = memory_plan(full, layers, dtype, method, tokens_per_batch)
    name = str(dtype).removeprefix("torch.")
    wide = torch.promote_types(dtype, torch.float32) == dtype
    yield Finding(
        "dtype", "ok",
        f"forward in {name}; " + ("no masters needed" if wide else f"float32 masters of {len(layers)} matrices")
        + "; second moments and solves in float64",
    )  # fmt: skip
    parts = ", ".join(f"{f.name} {gib(getattr(plan, f.name))}" for f in dataclasses.fields(plan))
    place, free = max(_accelerators(memory).items() or memory.items(), key=lambda item: item[1])
    if plan.peak <= free:
        yield Finding("memory", "ok", f"peak {gib(plan.peak)} of {gib(free)} on {place} ({parts})")
        return
    yield Finding(
        "memory", "change",
        f"peak {gib(plan.peak)}, {place} has {gib(free)}: {gib(plan.peak - free)} missing ({parts})",
        "; ".join(savings(full, layers, dtype, method, tokens_per_batch, free, memory)),
    )  # fmt: skip


# --- command ------------------------------------------------------------------------------------------------


def add_parser(subparsers) -> None:
    """`editkit doctor`."""
    parser = subparsers.add_parser("doctor", help="check in a minute whether a model can be edited here")
    parser.add_argument("model", help="name on the Hub, or folder")
    parser.add_argument("--method", default="memit", help="method to plan memory for (default memit)")
    parser.add_argument("--layers", type=int, nargs="+", help="edited layers (default: the preset's)")
    parser.add_argument("--dtype", choices=DTYPES, help="of the forward pass (default: by memory)")
    parser.add_argument(
        "--memory", type=float, metavar="GIB", help="plan for one accelerator of that size instead"
    )
    parser.add_argument(
        "--tokens-per-batch", type=int, default=8192, help="z_tokens_per_batch (default 8192)"
    )
    parser.add_argument("--tokenizer", help="name or folder, if it is not beside the model")
    parser.add_argument("--revision", help="commit, tag or branch on the Hub")
    parser.set_defaults(func=_run)


def _run(args: argparse.Namespace) -> int:
    where = {"revision": args.revision} if args.revision else {}
    memory = None if args.memory is None else {**free_memory(), "accelerator": int(args.memory * 2**30)}
    if is_gguf(args.model):
        raise ModelError(
            f"{args.model} is a GGUF file; load it with load_lm, write model and tokenizer with save_folder "
            "(editkit.models.gguf) and examine that folder"
        )
    found = examine(
        source_of(args.model), method=args.method, layers=args.layers, memory=memory,
        tokens_per_batch=args.tokens_per_batch, dtype=DTYPES.get(args.dtype),
        tokenizer=_tokenizer(args.tokenizer) if args.tokenizer else None, **where,
    )  # fmt: skip
    for finding in found:
        print(finding)
    todo = sum(f.status == "change" for f in found)
    print(f"\n{todo} thing(s) to change before editing" if todo else "\nready to edit")
    return 1 if todo else 0
