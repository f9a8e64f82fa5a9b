"""The engines of recursive least squares by name."""

from __future__ import annotations

from editkit.base.errors import ConfigError
from editkit.linear.cholesky_gram import CholeskyGram
from editkit.linear.inverse_gram import InverseGram
from editkit.linear.keys_only import KeysOnly
from editkit.linear.recursive import AccumulatedLeastSquares, DirectGram

ENGINES: dict[str, type[AccumulatedLeastSquares]] = {
    engine.name: engine for engine in (DirectGram, InverseGram, CholeskyGram, KeysOnly)
}


def make_engine(name: str, M0, d: int | None = None, **options) -> AccumulatedLeastSquares:
    """Engine "direct", "inverse", "cholesky" or "keys" for the prior M0: a (d, d) matrix, or a scalar with
    `d`.

    `options` (basis, tag and what the engine's class documents) are passed on. Raises ConfigError: unknown
    name.
    """
    if name not in ENGINES:
        raise ConfigError(f"engine {name!r} is unknown; use one of {', '.join(ENGINES)}")
    return ENGINES[name](M0, d, **options)
