"""What editing costs at the shapes of real models: random weights, time and memory by phase, and the floor below it.

    bench = Bench.open("llama-3-8b", device="auto", dtype="bfloat16")
    rates = measure_rates(bench.lm.device(), bench.lm.dtype)
    for cost in bench.costs("memit", [1, 10, 100]):
        print(cost.n, cost.total, cost.peak, floors(bench, "memit", cost.n))

Nothing is downloaded and nothing is learnt here: scores of such a model mean nothing, its costs are those of the real
one.
"""

from __future__ import annotations

from .bench import METHODS, Bench, Cost
from .floors import Work, floors
from .meter import Phases
from .rates import Rates, measure_rates
from .shapes import SHAPES, Shape, make_random, shape_named

__all__ = [
    "METHODS", "SHAPES", "Bench", "Cost", "Phases", "Rates", "Shape", "Work", "floors", "make_random", "measure_rates",
    "shape_named",
]  # fmt: skip
