"""Conformance: run recorded cases of the official implementations against ours.

Adapters live in the modules of this package, one per family, and register themselves:

    @adapter("memit")
    def memit(case: Case) -> list[Comparison]:
        lm = case.load_model()
        ...
        return [compare("z", z, case.arrays["z_0"], 1e-4), ...]
"""

from .case import CannotHandle, Case, Comparison, adapter, compare, compare_equal, registered
from .runner import Outcome, discover, find_cases, run, run_case

__all__ = [
    "CannotHandle",
    "Case",
    "Comparison",
    "Outcome",
    "adapter",
    "compare",
    "compare_equal",
    "discover",
    "find_cases",
    "registered",
    "run",
    "run_case",
]
