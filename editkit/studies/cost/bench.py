"""One method after the other on a random model of some shape: what an edit of n facts costs, phase by phase."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from ...base.config import check_known
from ...base.device import auto, free_bytes, is_out_of_memory
from ...base.errors import ConfigError, ModelError
from ...base.paths import user_path
from ...corpora.world import load_companion, load_world
from ...corpora.world.records import edit_facts
from ...locate.contexts import ContextTemplates
from ...locate.moments import Covariance, second_moment
from ...locate.target_rows import encode_targets
from ...methods import EDITORS, make_editor
from ...methods.hypernet.network import make_hypernetwork
from ...methods.presets import find, find_for
from ...models.batching import by_length
from ...models.capacity import memory_plan
from ...models.facts import Fact
from ...models.lm import LM
from ...models.preflight import free_memory, gib, weight_bytes
from .meter import Phases
from .shapes import Shape, make_random, shape_named

LOCATE = ("rome", "memit", "memit_seq", "alphaedit")
METHODS = (*LOCATE, "memoir", "horse", "clare", "gradsim")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

# Fixed texts instead of what the model would write: a random model writes noise.
CONTEXTS = (
    "The house by the river is very old.", "I think that the weather was fine.", "Because it was late we went home.",
    "You can see the mountains from here.", "Therefore the meeting was moved to May.",
)  # fmt: skip
BACKGROUND = 64 * 15  # tokens of a batch of background texts of MEMOIR
PUBLISHED = "Llama-3-8B-Instruct"  # whose settings are scaled to shapes without a preset


@dataclasses.dataclass(frozen=True)
class Cost:
    """What one edit of n facts took. seconds and peak by phase, peak in bytes above weights and second moments.

    once: phases that a longer stream pays only once.   failed: why there is no measurement, else empty.
    """

    method: str
    n: int
    seconds: dict[str, float]
    peak: dict[str, float]
    needed: float
    failed: str = ""

    @property
    def total(self) -> float:
        """Seconds without the phases that are paid once."""
        return sum(s for name, s in self.seconds.items() if not name.endswith(ONCE))

    @property
    def rise(self) -> float:
        """Highest peak of any phase."""
        return max(self.peak.values(), default=0.0)


ONCE, MOMENTS = "(once)", "second moments"


class Bench:
    """A random model, facts, and the second moments of its keys.

    edited: number of edited layers where the shape has no published settings.   tokens: of text behind the second
    moments; 0: twice the key width.   on_host: keep the second moments in the memory of the host.
    """

    def __init__(
        self, lm: LM, shape: Shape, *, n_facts: int, edited: int = 2, tokens: int = 0, on_host: bool = True,
        tokens_per_batch: int = 8192, steps: int = 0, seed: int = 0,
    ) -> None:  # fmt: skip
        self.lm, self.shape, self.edited, self.on_host = lm, shape, edited, on_host
        self.tokens, self.tokens_per_batch, self.steps = tokens or 2 * lm.d_key, tokens_per_batch, steps
        self.world = load_world()
        none = {"n_paraphrases": 0, "n_neighbors": 0, "n_locality": 0, "n_same_subject": 0}
        self.facts: list[Fact] = edit_facts(self.world, n_facts + 1, seed, **none)
        self.contexts = ContextTemplates((("{}",), tuple(f"{text} {{}}" for text in CONTEXTS)))
        self.moments: dict[int, Covariance] = {}
        self.moment_cost = Cost(MOMENTS, 0, {}, {}, 0.0)

    @classmethod
    def open(
        cls,
        shape: str | dict[str, Any],
        *,
        device: str = "auto",
        dtype: str = "float32",
        seed: int = 0,
        **options,
    ) -> Bench:
        """A bench on a new random model. Raises ConfigError or ModelError before memory is taken for nothing."""
        check_known([dtype], DTYPES, "dtype")
        chosen = shape_named(shape)
        lm = make_random(chosen, auto(device), DTYPES[dtype], load_companion().tokenizer, seed)
        return cls(lm, chosen, seed=seed, **options)

    # --- settings -------------------------------------------------------------------------------------------

    def settings(self, method: str) -> dict[str, Any]:
        """Published settings of a method for this shape, else those of Llama-3-8B with layers moved in proportion.

        Every fact takes all steps: a random model does not reach the loss at which trained ones stop.
        """
        kind = "network" if method == "horse" else "editor"
        try:
            preset = find_for(self.lm)
            options = preset.options(method, kind)
            fits = True
        except ConfigError:
            preset, fits = find(PUBLISHED), False
            options = preset.options(method, kind)
        if not fits:
            options |= self._scaled(method, preset.n_layers)
        if method in LOCATE:
            options |= {"z_loss_threshold": 0.0, "z_tokens_per_batch": self.tokens_per_batch}
            if not fits:
                options.pop("z_loss_layer", None)
            if self.steps:
                options["z_steps"] = self.steps
        if method == "rome":
            options["whiten"] = True  # as in the paper
        if method == "memoir":
            options |= {"stop_loss": 0.0}
            if self.steps:
                options["steps"] = self.steps
        return options

    def _scaled(self, method: str, n_layers: int) -> dict[str, Any]:
        lm, n = self.lm, self.lm.n_layers
        if method == "memoir":
            return {"layer": min(round(27 / n_layers * n), n - 1), "k": round(2 / 7 * lm.d_key)}
        if method == "horse":
            names = [lm.down_name(layer) for layer in range(max(0, n - self.edited), n)]
            return {"modules": names, "rank": max(8, round(1920 / 18432 * (lm.d_key + lm.d_model)))}
        last = max(min(self.edited, n) - 1, round(8 / n_layers * n))
        many = 1 if method == "rome" else min(self.edited, n)
        return {"layers": list(range(last - many + 1, last + 1))}

    @property
    def layers(self) -> list[int]:
        """Layers that MEMIT edits here."""
        return list(self.settings("memit")["layers"])

    def targets_layer(self, method: str = "memit") -> int:
        """Layer whose states are read or optimised."""
        return self.settings(method)["layer"] if method == "memoir" else self.layers_of(method)[-1]

    def layers_of(self, method: str) -> list[int]:
        """Layers that a locate-then-edit method edits; of the others those of MEMIT."""
        return list(self.settings(method)["layers"]) if method in LOCATE else self.layers

    # --- what the facts are made of -------------------------------------------------------------------------

    def counts(self, n: int, method: str = "memit") -> dict[str, float]:
        """Tokens of n facts: whole (rows of the targets), behind (from the edited token on), asked (predicted), prompts
        (rows of the keys), bare (without contexts). Beside them rows, batches of targets, and for the largest batch its
        tokens with padding (full) and the share of its columns that lies behind the edited token.
        """
        rows = encode_targets(self.lm, self.facts[:n], self.contexts, "subject_last", "{} is a")
        whole = rows.encoding.attention_mask.sum(-1).reshape(n, -1)
        behind = whole - rows.positions
        prompts = (
            whole.clone()
        )  # the last answer token is masked already, the others are those asked about but one
        for f, places in enumerate(rows.places):
            for row in places[:, 0].tolist():
                prompts[f, row] -= 1
        prompts[:, :-1] += 1
        sizes = [rows.per_fact * length for length in rows.lengths]
        one = method == "rome"  # a fact at a time
        groups = [[i] for i in range(n)] if one else by_length(sizes, self.tokens_per_batch)
        return {
            "whole": int(whole.sum()), "behind": int(behind.sum()), "asked": sum(len(p) for p in rows.places),
            "prompts": int(prompts[:, :-1].sum()), "bare": int(prompts[:, 0].sum()), "rows": whole.numel(),
            "batches": len(groups), "share": max(int(behind[g].max()) / int(whole[g].max()) for g in groups),
            "full": max(int(whole[g].max()) * whole[g].numel() for g in groups),
        }  # fmt: skip

    def needed(self, method: str, n: int) -> float:
        """Predicted bytes beside weights and second moments (capacity.memory_plan; counted for the other methods)."""
        lm = self.lm
        if method in LOCATE:
            counts = self.counts(n, method)
            plan = memory_plan(
                lm, self.layers_of(method), lm.dtype, method, round(counts["full"]), repeated=counts["share"]
            )
            return float(plan.first) + self._copies(len(self.layers_of(method)))
        m, d = lm.d_model, lm.d_key
        token = 4.0 * (6 * m + 4 * d)  # a token on its way through a block, float32
        parameters = sum(p.numel() for p in lm.model.parameters())
        if method == "memoir":  # the memory, a copy kept for undoing, and three arrays of the trained columns
            return 4.0 * (2 * m * d + 4 * m * self.settings("memoir")["k"]) + BACKGROUND * token
        if method == "horse":
            options = self.settings("horse")
            sites, size = len(options["modules"]), d + m
            network = options["n_blocks"] * (2 * size * options["rank"] + (2 * sites + 1) * size)
            rows = 3 * n
            solved = 12.0 * rows * sites * size + 8 * sites * m * d + 16 * m * d
            return 4.0 * network + solved + self._copies(sites)
        if (
            method == "gradsim"
        ):  # a gradient being compared, in float32; the one that is held lies on the host
            return 4.0 * parameters * (2 if lm.device().type == "cpu" and n > 1 else 1)
        return 4.0 * n * m + min(self.counts(n)["bare"], 4096) * token

    def _copies(self, layers: int) -> float:
        """Copies of the edited matrices from before and after, for undoing; they lie on the host."""
        itemsize = self.lm.dtype.itemsize
        return 2.0 * layers * self.lm.d_model * self.lm.d_key * itemsize * (self.lm.device().type == "cpu")

    # --- running --------------------------------------------------------------------------------------------

    def measure_moments(self) -> Cost:
        """Second moments of the edited layers over texts of the world, and what they cost."""
        layers = sorted({*self.layers, *self.layers_of("rome")})
        phases = Phases(self.lm.device())
        texts, count = [], 0
        for text in self.world.corpus_texts():
            texts.append(text)
            count += len(self.lm.tokenizer(text)["input_ids"])
            if count >= self.tokens:
                break
        with phases.measured(), phases.phase(f"{MOMENTS} {ONCE}"):
            found = second_moment(self.lm, layers, texts, tokens_per_batch=4096)
        self.moment_tokens = next(iter(found.values())).n
        for layer in list(found):
            C = found.pop(layer)
            C = C.to("cpu") if self.on_host else C
            # Few tokens leave directions without any weight; a small ridge changes no cost.
            C.C.diagonal().add_(1e-3 * float(C.C.diagonal().mean()))
            self.moments[layer] = C
        need = len(layers) * self.lm.d_key**2 * 8.0
        self.moment_cost = Cost(MOMENTS, self.moment_tokens, phases.seconds, phases.peak, need)
        return self.moment_cost

    def costs(self, method: str, sizes: Sequence[int], *, limit_s: float = float("inf")) -> Iterator[Cost]:
        """Costs of edits of growing size, until one would take longer than `limit_s` by proportion. One that runs out
        of memory, or is predicted to on the host, comes as a `Cost` with `failed`, and is the last.
        """
        check_known([method], METHODS, "method")
        last: Cost | None = None
        for n in sorted(sizes):
            if last is not None and last.total * n / last.n > limit_s:
                return
            last = self.cost(method, n)
            yield last
            if last.failed:
                return

    def cost(self, method: str, n: int) -> Cost:
        """Cost of editing (or comparing) n facts; the model is as before afterwards."""
        if not 0 < n < len(self.facts):
            raise ConfigError(f"n = {n}; this bench has facts for 1 to {len(self.facts) - 1}")
        if method in LOCATE and not self.moments:
            self.measure_moments()
        device, needed = self.lm.device(), self.needed(method, n)
        free = free_bytes(device) or free_memory()["host"]
        if device.type == "cpu" and needed > free:  # the system would end the process
            return Cost(method, n, {}, {}, needed, f"not tried: needs {gib(needed)}, free are {gib(free)}")
        phases = Phases(device)
        try:
            _RUN[method if method not in LOCATE else "locate"](self, method, n, phases)
        except (RuntimeError, MemoryError, ModelError) as error:
            if not is_out_of_memory(error):
                raise
            had = f"out of memory: predicted {gib(needed)} beside the weights, free were {gib(free)}"
            return Cost(method, n, phases.seconds, phases.peak, needed, had)
        return Cost(method, n, phases.seconds, phases.peak, needed)

    @property
    def weight_bytes(self) -> int:
        """Bytes of the model."""
        return weight_bytes(self.lm.model, self.lm.dtype)


def _locate(bench: Bench, method: str, n: int, phases: Phases) -> None:
    with phases.measured():
        editor = make_editor(
            method, bench.lm, statistics=bench.moments, contexts=bench.contexts, **bench.settings(method)
        )
        watched = {
            "targets": "targets", "value": "targets", "keys": "forward", "current": "forward", "key": "forward",
            "step": "solve", "direction": "solve", "projector": f"null space {ONCE}", "matrix": "write",
            "set_matrix": "write", "_fingerprint": f"hash of the model {ONCE}",
        }  # fmt: skip
        for name, phase in watched.items():
            if hasattr(editor, name):
                phases.watch(editor, name, phase)
        try:
            editor.edit(bench.facts[:n])
        finally:
            with phases.phase(f"undo {ONCE}"):
                editor.restore()


def _memoir(bench: Bench, method: str, n: int, phases: Phases) -> None:
    with phases.measured():
        texts = bench.world.corpus_texts()[:100]
        contexts = ContextTemplates((("{}",), tuple(f"{t} {{}}" for t in CONTEXTS for _ in range(2))))
        editor = make_editor(
            "memoir", bench.lm, contexts=contexts, background=texts, **bench.settings("memoir")
        )
        watched = {"prepare": f"background {ONCE}", "_rows": "forward", "train": "targets",
                   "_fingerprint": f"hash of the model {ONCE}"}  # fmt: skip
        for name, phase in watched.items():
            phases.watch(editor, name, phase)
        try:
            editor.edit(bench.facts[:n])
            with phases.phase("look-up"):
                editor.look_up([f.text for f in bench.facts[:n]])
        finally:
            editor.restore()


def _horse(bench: Bench, method: str, n: int, phases: Phases) -> None:
    options = dict(bench.settings("horse"))
    with phases.measured():
        with phases.phase(f"network {ONCE}"):
            net = make_hypernetwork("horse", bench.lm, modules=options.pop("modules"), **options)
            editor = EDITORS["horse"](bench.lm, {}, hypernetwork=net)
            net.observe(editor.rows([(f.text, f.target) for f in bench.facts[-4:]]))
        watched = {"rows": "forward", "_add": "write", "_fingerprint": f"hash of the model {ONCE}"}
        for name, phase in watched.items():
            phases.watch(editor, name, phase)
        phases.watch(net, "plan", "solve")
        try:
            editor.edit(bench.facts[:n])
        finally:
            with phases.phase(f"undo {ONCE}"):
                editor.restore()


def _clare(bench: Bench, method: str, n: int, phases: Phases) -> None:
    from ...entanglement import represent
    from ...entanglement.graph import build_graph
    from ...entanglement.similarity import cosine

    with phases.measured():
        with phases.phase("forward"):
            H = represent(bench.lm, bench.facts[:n], bench.targets_layer())
        if n > 1:
            with phases.phase("look-up"), tempfile.TemporaryDirectory() as folder:
                build_graph(user_path(folder) / "graph", cosine(H.to(bench.lm.device())), top_k=min(32, n - 1))


def _gradsim(bench: Bench, method: str, n: int, phases: Phases) -> None:
    from ...entanglement.gradsim import gradients, gradsim

    facts = bench.facts[:n]
    with phases.measured(), phases.phase("forward"):
        if n == 1:
            gradients(bench.lm, facts)
        else:  # n gradients: one is held, the others are compared with it
            gradsim(bench.lm, facts[:1], facts[1:])


_RUN: dict[str, Callable[[Bench, str, int, Phases], None]] = {
    "locate": _locate, "memoir": _memoir, "horse": _horse, "clare": _clare, "gradsim": _gradsim,
}  # fmt: skip
