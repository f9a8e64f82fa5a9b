"""Progress bars for long work."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

from tqdm import tqdm

Item = TypeVar("Item")


def bar(iterable: Iterable[Item], desc: str, *, total: int | None = None, unit: str = "it") -> Iterable[Item]:
    """Wrap an iterable in a plain text progress bar.

    The bar is drawn on terminals only: in notebooks run by papermill and in log files it would leave
    thousands of lines, so there the iterable passes through silently.
    """
    return tqdm(iterable, desc=desc, total=total, unit=unit, disable=None, leave=False)
