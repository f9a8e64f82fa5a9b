"""How recorded numbers are written, in notebooks and in the book alike."""

from __future__ import annotations

import math
import re
from typing import Any

from ..base.errors import ConfigError

MISSING = "n/a"
# What the two ends beside a number may be: how sure it is, or only how far its parts lie apart.
KINDS = {
    "": "95 % interval",
    "bootstrap": "95 % bootstrap interval",
    "exact": "exact 95 % interval",
    "seeds": "least and greatest of the seeds",
    "range": "least and greatest",
}
_SPEC = re.compile(r"(?:.?[<>=^])?[-+ ]?#?0?\d*[,_]?(?:\.\d+)?[bcdeEfFgGnosxX%]?")


def check_spec(spec: str) -> str:
    """Check a format spec such as ".1f", ",d", ".1%" ("%" is short for ".1%"), else raise ConfigError."""
    spec = ".1%" if spec == "%" else spec
    if not _SPEC.fullmatch(spec):
        raise ConfigError(f"{spec!r} is not a number format; use one such as '.3g', '.1f', '.1%' or ',d'")
    return spec


def format_number(x: Any, spec: str | None = None) -> str:
    """One number or text as printed: narrow space before %, true minus, thousands separated, None as n/a."""
    if x is None or (isinstance(x, float) and math.isnan(x)):
        return MISSING
    if isinstance(x, bool):
        return "yes" if x else "no"
    if isinstance(x, str):
        return {"inf": "∞", "-inf": "−∞"}.get(x, x)
    if isinstance(x, float) and math.isinf(x):
        return "∞" if x > 0 else "−∞"
    if spec is None:
        spec = ",d" if isinstance(x, int) else ".3g"
    spec = check_spec(spec)
    if spec.endswith("d") and not isinstance(x, int):
        spec = spec[:-1] + ".0f"
    text = format(x, spec)
    if text.startswith("-"):
        text = ("" if not re.search("[1-9]", text) else "−") + text[1:]
    return text.replace("%", "\u202f%")


def format_value(record: dict, *, spec: str | None = None, interval: bool = True) -> str:
    """A recorded value with its unit and, where there is one, its interval: "98.7 % [97.9, 99.3]"."""
    spec = spec or record.get("fmt")
    unit = record.get("unit") or ""
    text = format_number(record["value"], spec) + (f"\u202f{unit}" if unit else "")
    if interval and record.get("lo") is not None:
        lo, hi = (format_number(record[end], spec).removesuffix("%").rstrip("\u202f") for end in ("lo", "hi"))
        text += f" [{lo}, {hi}]"
    return text
