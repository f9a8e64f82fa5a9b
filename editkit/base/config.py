"""Checked configurations: dataclasses whose fields carry a description, a source and a range.

    class MyConfig(Config):
        lam: float = option(15000.0, "weight of the second moment", source="MEMIT eq. 15", low=0)

Unknown keys are refused with the nearest known name; values are checked for type and range when an instance
is made, so a misspelt or impossible setting never survives until the end of a long run.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import os
import types
import typing
from collections.abc import Iterable, Mapping
from numbers import Integral, Real
from typing import Any, Literal

from .errors import ConfigError


def option(
    default: Any,
    doc: str,
    *,
    source: str = "",
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
) -> Any:
    """A dataclass field with its description, source and range (low <= value <= high, value > above)."""
    meta = {"doc": doc, "source": source, "low": low, "high": high, "above": above}
    return dataclasses.field(default=default, metadata=meta)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Base of all configurations. Instances are immutable; `replace` makes changed copies.

    Raises ConfigError naming the field, the value and what is allowed.
    """

    def __post_init__(self) -> None:
        hints = _hints(type(self))
        for field in dataclasses.fields(self):
            where = f"{type(self).__name__}.{field.name}"
            value = _convert(getattr(self, field.name), hints[field.name], where)
            _check_range(value, field.metadata, where)
            object.__setattr__(self, field.name, value)

    @classmethod
    def make(cls, values: Config | Mapping[str, Any] | None = None, **more: Any):
        """From an instance, a mapping, keyword arguments, or a mix; raises ConfigError for unknown keys."""
        if isinstance(values, Config) and not isinstance(values, cls):
            raise ConfigError(f"expected a {cls.__name__} or a mapping, got a {type(values).__name__}")
        given = values.to_dict() if isinstance(values, Config) else dict(values or {})
        given |= more
        check_known(given, [f.name for f in dataclasses.fields(cls)], f"{cls.__name__} option")
        return cls(**given)

    def replace(self, **changes: Any):
        """A changed copy, checked like a new one."""
        return type(self).make(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-able values."""
        return {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self)}

    @staticmethod
    def with_fields(name: str, source: type[Config], prefix: str) -> type[Config]:
        """A new Config class with the fields of `source`, their names prefixed: to flatten nested options."""
        hints = _hints(source)
        fields = [
            (prefix + f.name, hints[f.name], dataclasses.field(default=f.default, metadata=f.metadata))
            for f in dataclasses.fields(source)
        ]
        return dataclasses.make_dataclass(name, fields, bases=(Config,), frozen=True, kw_only=True)

    @classmethod
    def describe(cls) -> list[dict[str, Any]]:
        """One row per field: name, default, description, source (the table a page or a help text shows)."""
        return [
            {
                "name": f.name,
                "default": _plain(f.default),
                "doc": f.metadata.get("doc", ""),
                "source": f.metadata.get("source", ""),
            }
            for f in dataclasses.fields(cls)
        ]


def check_known(given: Iterable[str], known: Iterable[str], what: str) -> None:
    """Raise ConfigError for the first name that is not known, with the nearest known one."""
    known = list(known)
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(known)}"
            raise ConfigError(f"unknown {what} {name!r}; {hint}")


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _plain(value: Any) -> Any:
    return [_plain(v) for v in value] if isinstance(value, tuple) else value


def _convert(value: Any, hint: Any, where: str) -> Any:
    """The value in the annotation's type (int for float and list for tuple are taken), or ConfigError."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        kinds = [a for a in args if a is not type(None)]
        errors = []
        for kind in kinds:
            try:
                return _convert(value, kind, where)
            except ConfigError as error:
                errors.append(error)
        raise errors[0]
    if origin is Literal:
        if not any(type(value) is type(a) and value == a for a in args):
            raise ConfigError(f"{where} = {value!r}; choose one of {', '.join(map(repr, args))}")
        return value
    if origin is tuple:
        if isinstance(value, (str, bytes)) or not isinstance(value, Iterable):
            raise ConfigError(f"{where} = {value!r}; give a list")
        return tuple(_convert(v, args[0], where) for v in value)
    if hint is bool:
        if not isinstance(value, bool):
            raise ConfigError(f"{where} = {value!r}; give true or false")
        return value
    if hint in (int, float):
        kind = Integral if hint is int else Real
        if isinstance(value, bool) or not isinstance(value, kind):
            raise ConfigError(f"{where} = {value!r}; give {'an integer' if hint is int else 'a number'}")
        if not math.isfinite(value):
            raise ConfigError(f"{where} = {value!r}; give a finite number")
        return hint(value)
    if hint is str and isinstance(value, os.PathLike):
        return os.fspath(value)
    if not isinstance(value, hint):
        raise ConfigError(f"{where} = {value!r}; expected {hint.__name__}")
    return value


def _check_range(value: Any, meta: Mapping[str, Any], where: str) -> None:
    if isinstance(value, tuple):
        for v in value:
            _check_range(v, meta, where)
        return
    if isinstance(value, bool) or not isinstance(value, Real):
        return
    low, high, above = (meta.get(k) for k in ("low", "high", "above"))
    if above is not None and value <= above:
        raise ConfigError(f"{where} = {value!r}; it must be greater than {above}")
    if low is not None and value < low:
        raise ConfigError(f"{where} = {value!r}; it must be at least {low}")
    if high is not None and value > high:
        raise ConfigError(f"{where} = {value!r}; it must be at most {high}")
