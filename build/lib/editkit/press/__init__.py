"""What makes the book: notebooks as measured, resumable runs, plots, and the comparison with the official code.

`start` for notebooks, `editkit run` for studies. May import everything but `studies`.
"""

from .report import Run, start

__all__ = ["Run", "start"]
