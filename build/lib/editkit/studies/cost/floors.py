"""The least that each phase of an edit has to do: floating point operations, and bytes read and written.

A floor is no estimate. It counts matrix products and factorisations only, each once, with symmetry used where there is
one, and no activations; divided by the rates that the machine reaches at its best (`rates`) it is a time that no
implementation of the same algorithm gets below. A multiplication and an addition are two operations.

Symbols: m hidden width, d key width, L edited layers, n facts, P parameters of a block's matrices, V vocabulary.
"""

from __future__ import annotations

import dataclasses

from ...models.lm import LM
from .bench import LOCATE, MOMENTS, ONCE, Bench
from .rates import Rates


@dataclasses.dataclass(frozen=True)
class Work:
    """Operations in a dtype ("float64", or that of the model), and bytes."""

    flops: float
    bytes: float
    dtype: str

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.bytes + other.bytes, self.dtype)

    def seconds(self, rates: Rates) -> float:
        """The longer of both: arithmetic and memory can overlap."""
        return max(self.flops / rates.flops[self.dtype], self.bytes / rates.bytes)

    def bound(self, rates: Rates) -> str:
        """ "arithmetic" or "memory": which of the two the floor comes from."""
        return "arithmetic" if self.flops / rates.flops[self.dtype] >= self.bytes / rates.bytes else "memory"


def block_parameters(lm: LM) -> int:
    """P: numbers in the matrices of one block."""
    prefix = lm.block_name(0) + "."
    return sum(
        p.numel() for name, p in lm.model.named_parameters() if name.startswith(prefix) and p.ndim == 2
    )


def _down(lm: LM) -> float:
    """Share of a block's parameters in its down projection."""
    return lm.d_model * lm.d_key / block_parameters(lm)


def passes(
    lm: LM, tokens: float, blocks: float, times: float = 1, length: float = 0, backward: bool = False
) -> Work:
    """Forward (and backward, to the activations only) passes of some tokens through some blocks.

    2 P operations per token and block, 4 m t more for scores over t tokens; a backward pass to activations costs the
    same again. Each of `times` passes reads the weights once, a backward pass once more.   tokens: of all passes.
    """
    P, sides = block_parameters(lm), 2 if backward else 1
    flops = sides * tokens * blocks * (2 * P + 4 * lm.d_model * length)
    return Work(flops, sides * times * blocks * P * lm.dtype.itemsize, _name(lm))


def head(lm: LM, places: float, times: float = 1, backward: bool = False) -> Work:
    """Logits of some places: 2 m V operations each, the matrix read once per pass."""
    size = lm.d_model * lm.model.get_submodule(lm.spec.head).weight.shape[0]
    sides = 2 if backward else 1
    return Work(sides * 2 * size * places, sides * times * size * lm.dtype.itemsize, _name(lm))


def moments(lm: LM, tokens: float, layers: int, last: int) -> Work:
    """Sum of k k^T over tokens: half of 2 d^2 operations each by symmetry, and the passes up to the last layer.

    All counted at the rate of float64, the dtype of the sum; passes are in the model's dtype and may be faster.
    """
    d = lm.d_key
    forward = passes(lm, tokens, last + 1 - _down(lm))
    return Work(tokens * layers * d * d + forward.flops, layers * d * d * 8.0 + forward.bytes, "float64")


def solve(method: str, m: int, d: int, n: int, layers: int) -> Work:
    """Solving the layers of one batch, float64.

    memit, memit_seq: K K^T (n d^2 by symmetry), Cholesky (d^3 / 3), two triangular solves with the fewer of n and m
    right-hand sides (2 d^2 each), R times the result (2 m d n).   alphaedit: the same in a null space as wide as the
    keys, and the ways into it and out of it (2 d^2 (n + m)).   rome: Cholesky once, two triangular solves and a
    rank-one update (2 m d) per fact.   Each reads and writes the system and the update once.
    """
    moved = 8.0 * (2 * d * d + 2 * m * d)
    if method == "rome":
        return Work(d**3 / 3 + n * (2 * d * d + 4 * m * d), moved + n * 16.0 * m * d, "float64")
    flops = n * d * d + d**3 / 3 + 2 * d * d * min(n, m) + 2 * m * d * n
    if method == "alphaedit":
        flops += 2 * d * d * (n + m)
    return Work(layers * flops, layers * moved, "float64")


def null_space(d: int, layers: int) -> Work:
    """Eigenvectors of a symmetric (d, d): reduction to tridiagonal form (4/3 d^3) and back (2 d^3)."""
    return Work(layers * (4 / 3 + 2) * d**3, layers * 16.0 * d * d, "float64")


def ridge(rows: float, m: int, d: int, sites: int) -> Work:
    """HORSE's solve: N x N Gram matrix of N < d rows, Cholesky, m right-hand sides, and back to (m, d)."""
    k = min(rows, d)
    flops = rows * d * k + k**3 / 3 + 2 * k * k * m + 2 * rows * m * d
    return Work(sites * flops, sites * 8.0 * (rows * (d + m) + m * d), "float64")


def write(lm: LM, layers: float) -> Work:
    """A weight read, its new value written: in the model's dtype, and a float32 master where that is less."""
    size = lm.d_model * lm.d_key
    master = 8 if lm.dtype.itemsize < 4 else 0
    return Work(0.0, layers * size * (2.0 * lm.dtype.itemsize + master), _name(lm))


def floors(bench: Bench, method: str, n: int) -> dict[str, Work]:
    """Phase -> what an edit of n facts has to do at least. Phases without a countable floor are left out."""
    lm = bench.lm
    m, d = lm.d_model, lm.d_key
    if method == MOMENTS:
        layers = list(bench.moments)
        return {f"{MOMENTS} {ONCE}": moments(lm, n, len(layers), max(layers))}
    c = bench.counts(n, method)
    mean = c["whole"] / c["rows"]
    if method in LOCATE:
        layers = bench.layers_of(method)
        last, settings = layers[-1], bench.settings(method)
        above = lm.n_layers - 1 - last
        # What lies above the edited block and behind the edited token is run again at every step.
        steps, calls = settings["z_steps"], c["batches"]
        targets = passes(lm, c["whole"], lm.n_layers - 1, calls, mean) + passes(
            lm, (steps - 1) * c["behind"], above, (steps - 1) * calls, mean, backward=True
        )
        targets += head(lm, steps * (c["asked"] + n), steps * calls, backward=True)
        blocks = sum(layer + 1 - _down(lm) for layer in layers)  # a key is read before the down projection
        keys = passes(lm, c["prompts"] * blocks, 1, calls * blocks, mean)
        states = passes(lm, (len(layers) + 1) * c["bare"], last + 1, calls * (len(layers) + 1), mean)
        if method == "rome":
            keys, states = passes(lm, c["prompts"] * blocks, 1, calls * blocks, mean), Work(0, 0, _name(lm))
        writes = n if method == "rome" else len(layers)
        found = {"forward": keys + states, "targets": targets, "solve": solve(method, m, d, n, len(layers)),
                 "write": write(lm, writes)}  # fmt: skip
        return found | ({f"null space {ONCE}": null_space(d, len(layers))} if method == "alphaedit" else {})
    if method == "memoir":
        settings = bench.settings("memoir")
        layer, k, steps = settings["layer"], settings["k"], settings["steps"]
        twice = 1 + 2 * len(bench.contexts.groups[1])
        tokens = c["whole"] * twice / (c["rows"] / n)
        own = Work(4.0 * steps * tokens * m * k, steps * n * 8.0 * m * k, _name(lm))
        train = passes(lm, steps * tokens, lm.n_layers - 1 - layer, steps * n, mean, backward=True)
        asked = c["asked"] * twice / (c["rows"] / n - 1)
        train += head(lm, steps * asked, steps * n, backward=True) + own
        search = passes(lm, c["bare"], layer + 1, max(1, n / 64), mean) + Work(0, n * n * d / 8, _name(lm))
        return {"forward": passes(lm, tokens, layer + 1, n, mean), "targets": train, "look-up": search}
    if method == "horse":
        options = bench.settings("horse")
        sites = len(options["modules"])
        rows = c["asked"] / (c["rows"] / n - 1)
        calls = max(1.0, n / 32)
        forward = passes(lm, c["bare"], lm.n_layers, calls, mean) + passes(
            lm, c["bare"], sites - 1, calls, mean
        )
        network = 2.0 * rows * sites * options["n_blocks"] * 2 * (d + m) * options["rank"]
        solve_ = ridge(rows, m, d, sites) + Work(network, 0, "float64")
        return {
            "forward": forward + head(lm, rows, calls, backward=True),
            "solve": solve_,
            "write": write(lm, sites),
        }
    if method == "clare":
        layer = bench.targets_layer()
        return {"forward": passes(lm, c["bare"], layer + 1, max(1, c["bare"] / 4096), mean),
                "look-up": Work(float(n) * n * m, n * m * 4.0, "float32")}  # fmt: skip
    # A gradient of all parameters: forward, back to the activations and to the weights; it is written and read once.
    all_parameters = sum(p.numel() for p in lm.model.parameters())
    once = passes(lm, 3 * c["bare"], lm.n_layers, 2 * n, mean) + head(
        lm, c["asked"] / (c["rows"] / n - 1), n, True
    )
    return {"forward": once + Work(0, n * 8.0 * all_parameters, _name(lm))}


def _name(lm: LM) -> str:
    return str(lm.dtype).removeprefix("torch.")
