"""Running notebooks as measured, resumable runs: `start` for notebooks, `editkit run` for studies."""

from .report import Run, start

__all__ = ["Run", "start"]
