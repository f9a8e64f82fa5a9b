"""Plain retrieval: the answer of the nearest stored prompt is said, if it is near enough.

The baseline that costs nothing: no gradient, no training, a few numbers per edit. Prompts are compared by the
model's states (mean over the prompt at one block, background mean taken off, cosine) or by their tokens
(TF-IDF). A hit raises the logit of the stored answer's next token above all others, as long as what is fed
agrees with the answer; then the model goes on by itself.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import torch
from torch import Tensor

from ...base.config import Config, option
from ...base.errors import ModelError
from ...locate.contexts import ContextTemplates
from ...locate.target_rows import encode_targets
from ...models.facts import Fact
from ...models.hooks import submodule, trace
from ...models.prompts import PromptState
from ..base import register
from .base import MemoryEditor
from .codebook import rounding
from .token_index import TokenIndex

_LEAD = 12.0  # nats by which the stored answer leads every other token


@dataclasses.dataclass(frozen=True, kw_only=True)
class RetrievalConfig(Config):
    """Options of plain retrieval."""

    by: Literal["states", "tokens"] = option("states", "what prompts are compared by")
    layer: int | None = option(None, "block whose output is compared; None: the middle one", low=0)
    threshold: float = option(0.8, "least cosine at which the stored answer is said", low=0, high=1)
    seed: int = option(0, "seed of the background texts", low=0)


@dataclasses.dataclass
class _Spoken:
    """A batch's hits: stored answer (or none) per row, and how many of its tokens have been fed."""

    answers: list[list[int] | None]
    fed: list[int]


@register
class Retrieval(MemoryEditor):
    """Nearest stored prompt, stored answer."""

    name = "retrieval"
    Config = RetrievalConfig
    config: RetrievalConfig

    @property
    def layer(self) -> int:
        """The block that is compared."""
        return self.lm.n_layers // 2 if self.config.layer is None else self.config.layer

    def check(self) -> None:
        if self.config.layer is not None:
            self.lm.check_layer(self.config.layer)

    def modules(self) -> list[str]:
        return [self.lm.block_name(self.layer)]

    def reset_memory(self) -> None:
        self.answers: list[list[int]] = []
        self.index = TokenIndex(self.lm.embeddings().shape[0])
        self.features = torch.zeros(0, self.lm.d_model)
        self.mean: Tensor | None = None
        self._forced: tuple[tuple[int, int], list[tuple[int, int, int]]] | None = None

    def memory(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        tensors = {"features": self.features}
        if self.mean is not None:
            tensors["mean"] = self.mean
        return {"answers": self.answers, "rows": self.index.rows}, tensors

    def load_memory(self, values: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        self.reset_memory()
        self.answers, self.features, self.mean = values["answers"], tensors["features"], tensors.get("mean")
        self.index = TokenIndex(self.index.vocabulary, values["rows"])

    def find(self, rows: list[list[int]], states: Tensor | None) -> list[tuple[int, float]]:
        """Nearest edit and cosine of every prompt; (-1, 0) while nothing is stored."""
        if not self.answers:
            return [(-1, 0.0)] * len(rows)
        if self.config.by == "tokens":
            best, cosine = self.index.find(rows)
            return list(zip(best[:, 0].tolist(), cosine[:, 0].tolist(), strict=True))
        value, best = (self._unit(states) @ self.features.T).max(-1)
        return list(zip(best.tolist(), value.tolist(), strict=True))

    def _unit(self, states: Tensor) -> Tensor:
        centered = states.detach().float().cpu() - self.mean
        return centered / centered.norm(dim=-1, keepdim=True).clamp(min=1e-12)

    def route(self, x: Tensor, out: Tensor, state: PromptState) -> _Spoken:
        if state.ids is None:
            raise ModelError("retrieval reads token ids; call the model with input_ids, not embeddings")
        prompts = [row[keep].tolist() for row, keep in zip(state.ids, state.prompt, strict=True)]
        found = self.find(prompts, state.mean(out))
        # the slack lets a prompt find itself in any batch; a cosine moves by the square of its states' rounding
        slack = max(1e-6, 2 * rounding(out.dtype) ** 2)
        hit = [i if cosine >= self.config.threshold - slack else -1 for i, cosine in found]
        return _Spoken([self.answers[i] if i >= 0 else None for i in hit], [0] * len(hit))

    def read(self, name: str, x: Tensor, out: Tensor, state: PromptState) -> None:
        """Nothing changes here; notes (row, column, token) to be said for the hook on the output matrix."""
        forced: list[tuple[int, int, int]] = []
        last = state.last.tolist() if state.prefill else None
        for i, answer in enumerate(state.route.answers):
            if answer is None:
                continue
            start, fed = (0, state.route.fed[i]) if last is None else (last[i] + 1, 0)
            if last is not None:
                forced.append((i, last[i], answer[0]))
            for column in range(start, out.shape[1]):
                if fed < 0 or not bool(state.real[i, column]):
                    break
                if fed >= len(answer) or int(state.ids[i, column]) != answer[fed]:
                    fed = -1  # something else was said: the rest of the answer makes no sense
                    break
                fed += 1
                if fed < len(answer):
                    forced.append((i, column, answer[fed]))
            state.route.fed[i] = fed
        self._forced = ((out.shape[0], out.shape[1]), forced)
        return None

    def attach(self) -> None:
        if self.is_attached:
            return
        super().attach()
        head = submodule(self.lm.model, self.lm.spec.head)
        self._handles.append(head.register_forward_hook(self._say))

    def _say(self, module: torch.nn.Module, args: tuple, logits: Tensor) -> Tensor | None:
        """Raise the noted tokens. The output matrix may have been given the last columns only."""
        forced, self._forced = self._forced, None
        if forced is None or not forced[1] or logits.ndim != 3 or len(logits) != forced[0][0]:
            return None
        skipped = forced[0][1] - logits.shape[1]
        new = logits.clone()
        for row, column, token in forced[1]:
            if column >= skipped:
                new[row, column - skipped, token] = logits[row, column - skipped].max() + _LEAD
        return new

    @torch.no_grad()
    def write_facts(self, facts: list[Fact]) -> dict[str, Any]:
        name = self.lm.block_name(self.layer)

        def states(encoding, mask: Tensor) -> Tensor:
            with trace(self.lm.model, [name], stop_at=name) as seen:
                self.lm.forward(encoding)
            mask = mask.to(seen.output[name])
            return (seen.output[name] * mask[..., None]).sum(1).float().cpu() / mask.sum(
                1, keepdim=True
            ).cpu()

        if self.mean is None:
            encoding = self.lm.encode(self.background_texts(self.config.seed))
            self.mean = states(encoding, encoding.attention_mask).mean(0)
        encoded = encode_targets(self.lm, facts, ContextTemplates(), "last")
        columns = torch.arange(encoded.encoding.input_ids.shape[1], device=encoded.positions.device)
        prompt = (columns <= encoded.positions) & encoded.encoding.attention_mask.bool()
        features = self._unit(states(encoded.encoding, prompt))
        for i, places in enumerate(encoded.places):
            row = encoded.encoding.input_ids[i][prompt[i]].tolist()
            answer = places[:, 2].tolist()
            if row in self.index.rows:  # a prompt edited again: the latest answer
                known = self.index.rows.index(row)
                self.answers[known], self.features[known] = answer, features[i]
                continue
            self.answers.append(answer)
            self.index.add(row)
            self.features = torch.cat([self.features, features[i : i + 1]])
        return {"stored": len(self.answers)}
