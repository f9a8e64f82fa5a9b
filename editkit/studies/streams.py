"""A stream of edits: batches one after the other, looked at on the way, kept so that an interrupted one goes on."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..base.cached import locked, made_key
from ..base.errors import ConfigError
from ..base.paths import written
from ..base.progress import bar
from ..models.facts import Fact
from .bench import Bench


@dataclasses.dataclass(frozen=True)
class Keep:
    """Where a long stream leaves its state, so that an interrupted one goes on to the same weights.

    folder:  made if missing; one stream has two small files there. One process at a time runs a stream: another that
             wants the same waits.
    name:    must change with everything that decides the stream; see `kept_stream`.
    seconds: the state is written when this much time has passed since the last writing.
    forget:  a finished stream is removed; else its state and notes stay, and it is not edited again.
    """

    folder: Path
    name: str
    seconds: float = 60.0
    forget: bool = True

    @property
    def index(self) -> Path:
        return self.folder / f"{self.name}.json"

    def load(self, editor) -> tuple[int, list]:
        """(facts already written, notes of the checkpoints so far); (0, []) when there is nothing to resume."""
        if not self.index.exists():
            return 0, []
        found = json.loads(self.index.read_text())
        editor.load(self.folder / found["state"])
        return found["done"], found["notes"]

    def save(self, editor, done: int, notes: list) -> None:
        """Weights and history first, then the index that names them: a kill in between loses one saving."""
        self.folder.mkdir(parents=True, exist_ok=True)
        former = json.loads(self.index.read_text())["state"] if self.index.exists() else None
        state = f"{self.name}-{done}.safetensors"
        editor.save(self.folder / state)
        with written(self.index) as part:
            part.write_text(json.dumps({"done": done, "state": state, "notes": notes}))
        if former not in (None, state):
            (self.folder / former).unlink(missing_ok=True)

    def clear(self) -> None:
        """Forget the stream."""
        if self.index.exists():
            (self.folder / json.loads(self.index.read_text())["state"]).unlink(missing_ok=True)
            self.index.unlink()


def edit_stream(
    editor,
    facts: Sequence[Fact],
    batch: int = 1,
    *,
    checkpoint: Callable[[int], Any] | None = None,
    every: int | None = None,
    at: Sequence[int] | None = None,
    keep: Keep | None = None,
) -> list:
    """Edit facts in batches; the model stays edited. Returns what the checkpoints returned, in order.

    checkpoint: called as checkpoint(facts so far) before the first batch, after each `every` facts and at the end; or
        at the numbers `at` and nowhere else.
    keep: where to save the state while the stream runs, and to resume from if it was interrupted (what checkpoints
        returned before is returned again); results have to be JSON-able then.
    Raises ConfigError for checkpoints inside a batch, and for numbers that do not increase or lie beyond the facts.
    """
    points = list(at) if at is not None else [*range(0, len(facts), every or max(len(facts), 1)), len(facts)]
    if points != sorted(set(points)) or (points and not 0 <= points[0] <= points[-1] <= len(facts)):
        raise ConfigError(f"at = {points} must increase, from 0 or more to at most {len(facts)} facts")
    if inside := [n for n in points if n % batch and n != len(facts)]:
        raise ConfigError(
            f"{inside[0]} facts are no multiple of batch = {batch}; checkpoints lie between batches"
        )
    with locked(keep.folder, keep.name) if keep else contextlib.nullcontext():
        done, notes = keep.load(editor) if keep else (0, [])
        if checkpoint and points[:1] == [0] and not notes:
            notes.append(checkpoint(0))
        saved = time.monotonic()
        starts = range(done, len(facts), batch)
        for start in bar(starts, "stream", unit="batch") if len(starts) > 1 else starts:
            stop = min(start + batch, len(facts))
            editor.edit(facts[start:stop])
            if checkpoint and stop in points:
                notes.append(checkpoint(stop))
            if keep and time.monotonic() - saved >= keep.seconds:
                keep.save(editor, stop, notes)
                saved = time.monotonic()
        if keep and keep.forget:
            keep.clear()
        elif keep and len(starts):
            keep.save(editor, len(facts), notes)
    return notes


class Timed:
    """An editor that adds up the wall seconds of its edits, counts their facts and keeps the last change."""

    def __init__(self, editor) -> None:
        self.editor, self.seconds, self.n_edited, self.delta = editor, 0.0, 0, None

    def __getattr__(self, name: str):
        return getattr(self.editor, name)

    def edit(self, facts: Sequence[Fact]):
        """As the editor's."""
        start = time.perf_counter()
        try:
            self.delta = self.editor.edit(facts)
            return self.delta
        finally:
            self.seconds += time.perf_counter() - start
            self.n_edited += len(facts)

    @property
    def seconds_per_edit(self) -> float:
        """Of the edits made through this object."""
        return self.seconds / max(self.n_edited, 1)

    @property
    def relative_change(self) -> float:
        """||W' - W|| / ||W|| over the matrices of the last edit, which has to be one of weights."""
        delta = self.delta
        moved = sum(float((delta.after[k] - delta.before[k]).double().square().sum()) for k in delta.after)
        return (moved / sum(float(v.double().square().sum()) for v in delta.before.values())) ** 0.5


def kept_stream(bench: Bench, editor, batch: int, shared: bool, *more: Any) -> Keep | None:
    """Where the bench keeps an interrupted stream of this editor: in its cache folder, if it has one.

    more: JSON-able values that decide what the checkpoints return.
    """
    if bench.cache_dir is None:
        return None
    facts = [[f.prompt, f.subject, f.target] for f in bench.facts]
    content = [
        bench.fingerprint, editor.name, editor.config.to_dict(), bench.contexts.groups, facts, batch, shared, more,
    ]  # fmt: skip
    return Keep(bench.cache_dir / "streams", made_key(content, __file__, inspect.getfile(type(editor))))


def spread(facts: Sequence[Fact], n: int | None) -> list[Fact]:
    """n facts evenly spaced over a list, first and last included; all of them for None or n >= len."""
    if n is None or n >= len(facts):
        return list(facts)
    return [facts[i] for i in np.linspace(0, len(facts) - 1, n).round().astype(int)]
