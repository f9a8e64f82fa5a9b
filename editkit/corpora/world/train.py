"""Training of the companion model from scratch (`editkit train`)."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from pathlib import Path

import numpy as np
import torch

from ...base.errors import ConfigError
from ...base.paths import user_path
from ...base.sources import digest
from .corpus import END, Sampler, encode_examples


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Recipe of a companion model. Sizes in tokens, learning rates per step of the cosine schedule."""

    layers: int = 6
    width: int = 256
    mlp: int = 1024
    heads: int = 4
    vocab_size: int = 6000
    length: int = 48  # tokens per training sequence
    batch_tokens: int = 3072  # tokens per optimiser step
    steps: int = 1300
    lr: float = 2e-3  # AdamW: embeddings, norms, biases (and everything if muon_lr is 0)
    muon_lr: float = 0.02  # Muon for the matrices of the blocks; 0 = AdamW everywhere
    warmup: int = 100
    weight_decay: float = 0.01
    clip: float = 1.0
    text_weight: float = 0.3  # weight of free-text tokens against statement answers
    seed: int = 0
    threads: int = 2

    def __post_init__(self):
        if self.width % self.heads:
            raise ConfigError(f"width {self.width} is not divisible by heads {self.heads}")
        if self.steps <= self.warmup:
            raise ConfigError(f"steps ({self.steps}) must exceed warmup ({self.warmup})")


class Muon(torch.optim.Optimizer):
    """Momentum orthogonalised by a Newton-Schulz iteration, in the dtype of the weights.

    torch.optim.Muon iterates in bfloat16, which is emulated (25 times slower, measured) on CPUs without bf16 units.
    """

    def __init__(
        self, params, lr: float, momentum: float = 0.95, weight_decay: float = 0.0, ns_steps: int = 4
    ):
        super().__init__(
            params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "ns_steps": ns_steps}
        )

    @staticmethod
    def orthogonalise(g: torch.Tensor, steps: int) -> torch.Tensor:
        """Nearest semi-orthogonal matrix to g, approximately (quintic Newton-Schulz)."""
        a, b, c = 3.4445, -4.7750, 2.0315
        x = g / (g.norm() + 1e-7)
        flip = x.shape[0] > x.shape[1]
        if flip:
            x = x.T
        for _ in range(steps):
            gram = x @ x.T
            x = a * x + (b * gram + c * gram @ gram) @ x
        return x.T if flip else x

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(p)
                m = state["momentum"].mul_(group["momentum"]).add_(p.grad)
                update = self.orthogonalise(p.grad + group["momentum"] * m, group["ns_steps"])
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update, alpha=-group["lr"] * max(1.0, p.shape[0] / p.shape[1]) ** 0.5)


def build_model(config: TrainConfig, tokenizer):
    """Random Qwen2ForCausalLM of the recipe's size (tied embeddings), seeded."""
    from transformers import AutoModelForCausalLM, Qwen2Config

    torch.manual_seed(config.seed)
    end = tokenizer.convert_tokens_to_ids(END)
    return AutoModelForCausalLM.from_config(
        Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=config.width,
            intermediate_size=config.mlp,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.heads,
            max_position_embeddings=256,
            tie_word_embeddings=True,
            bos_token_id=end,
            eos_token_id=end,
            pad_token_id=end,
            initializer_range=0.02,
        )
    )


def make_optimizers(model, config: TrainConfig) -> list[torch.optim.Optimizer]:
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and ".layers." in n]
    others = [p for n, p in model.named_parameters() if not (p.ndim == 2 and ".layers." in n)]
    if config.muon_lr > 0:
        return [
            Muon(matrices, config.muon_lr, weight_decay=config.weight_decay),
            torch.optim.AdamW(others, config.lr, betas=(0.9, 0.95), weight_decay=0.0),
        ]
    return [
        torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": config.weight_decay},
                {"params": others, "weight_decay": 0.0},
            ],
            config.lr,
            betas=(0.9, 0.98),
        )
    ]


def schedule(step: int, config: TrainConfig) -> float:
    """Linear warm-up, then cosine decay to 2 % of the peak."""
    if step < config.warmup:
        return (step + 1) / config.warmup
    t = (step - config.warmup) / max(1, config.steps - config.warmup)
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * t))


def train_step(
    model, optimizers, sampler: Sampler, token_weight: np.ndarray, step: int, config: TrainConfig
) -> float:
    """One optimiser step on freshly drawn sequences; returns the mean loss of the scored tokens (nats)."""
    ids, mask, owner = sampler.draw(config.batch_tokens)
    used = (owner >= 0).any(0).nonzero()[0].max() + 1
    ids, mask, owner = ids[:, :used], mask[:, :used], owner[:, :used]
    x = torch.from_numpy(ids)
    scored = torch.from_numpy(mask[:, 1:])
    hidden = model.model(x).last_hidden_state[:, :-1]
    losses = torch.nn.functional.cross_entropy(
        model.lm_head(hidden[scored]), x[:, 1:][scored], reduction="none"
    )
    owners = owner[:, 1:][mask[:, 1:]]
    weight = torch.from_numpy(token_weight[owners]).float()
    loss = (losses * weight).sum() / weight.sum()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
    factor = schedule(step, config)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group.setdefault("peak", group["lr"])
            group["lr"] = group["peak"] * factor
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    sampler.update(owners, losses.detach().numpy())
    return float(loss.detach())


def train(
    examples,
    tokenizer,
    config: TrainConfig,
    *,
    out_dir: str | Path | None = None,
    evaluate=None,
    every: int = 200,
    log=print,
    weights=None,
    stop_after: int | None = None,
):
    """Train a model; returns (model, log records).

    examples: list of Example. weights: sampling weight per example. evaluate: callable(model) -> dict, called every
    `every` steps. out_dir: a checkpoint (model, optimisers, sampler, random state) is written there every `every`
    steps, and an interrupted call with the same arguments goes on from it to the same result; a checkpoint of other
    texts or another recipe is refused (ConfigError).
    stop_after: stop at this step as if interrupted (used by the test of resuming).
    """
    torch.set_num_threads(config.threads)
    model = build_model(config, tokenizer)
    optimizers = make_optimizers(model, config)
    encoded = encode_examples(tokenizer, examples)
    sampler = Sampler(
        encoded, tokenizer.convert_tokens_to_ids(END), length=config.length, seed=config.seed, weight=weights
    )
    token_weight = np.array([config.text_weight if e.spans is None else 1.0 for e in examples])
    checkpoint = user_path(out_dir) / "checkpoint.pt" if out_dir else None
    first, records, spent = 0, [], 0.0
    texts = digest(*(example.text for example in examples), json.dumps(tokenizer.get_vocab(), sort_keys=True))
    if checkpoint and checkpoint.exists():
        state = torch.load(checkpoint, weights_only=False)
        for part, mine in (("config", dataclasses.asdict(config)), ("texts", texts)):
            if state.get(part) != mine:
                what = "recipe" if part == "config" else "world or corpus"
                raise ConfigError(f"{checkpoint} belongs to another {what}; remove it or choose another folder")
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        sampler.load_state_dict(state["sampler"])
        first, records, spent = state["step"], state["records"], state["spent"]
    start = time.perf_counter()
    running = []
    for step in range(first, config.steps):
        if stop_after is not None and step >= stop_after:
            break
        running.append(train_step(model, optimizers, sampler, token_weight, step, config))
        if (step + 1) % every == 0 or step + 1 == config.steps:
            record = {
                "step": step + 1,
                "loss": float(np.mean(running)),
                "seconds": spent + time.perf_counter() - start,
            }
            if evaluate is not None:
                model.eval()
                record |= evaluate(model)
                model.train()
            running = []
            records.append(record)
            log(json.dumps(record))
            if checkpoint:
                checkpoint.parent.mkdir(parents=True, exist_ok=True)
                partial = checkpoint.with_suffix(".partial")
                torch.save(
                    {
                        "config": dataclasses.asdict(config),
                        "texts": texts,
                        "model": model.state_dict(),
                        "optimizers": [o.state_dict() for o in optimizers],
                        "sampler": sampler.state_dict(),
                        "step": step + 1,
                        "records": records,
                        "spent": spent + time.perf_counter() - start,
                    },
                    partial,
                )
                partial.replace(checkpoint)
    model.eval()
    return model, records


@torch.no_grad()
def greedy_recall(model, tokenizer, prompts, answers, batch_size: int = 512) -> np.ndarray:
    """1.0 where greedy generation after the prompt gives exactly "answer." (token by token), shape (n,)."""
    prompt_ids = tokenizer(list(prompts), add_special_tokens=False)["input_ids"]
    answer_ids = tokenizer([f" {a}." for a in answers], add_special_tokens=False)["input_ids"]
    hit = np.zeros(len(prompt_ids))
    by_length: dict[tuple[int, int], list[int]] = {}
    for i, (p, a) in enumerate(zip(prompt_ids, answer_ids, strict=True)):
        by_length.setdefault((len(p), len(a)), []).append(i)
    for (length, n), members in by_length.items():
        for k in range(0, len(members), batch_size):
            part = members[k : k + batch_size]
            # greedy generation equals the answer iff every answer token is the argmax given the ones before it
            ids = torch.tensor([prompt_ids[i] + answer_ids[i] for i in part])
            hidden = model.model(ids[:, :-1]).last_hidden_state[:, length - 1 : length + n - 1]
            same = model.lm_head(hidden).argmax(-1) == ids[:, length:]
            hit[part] = same.all(1).float().numpy()
    return hit
