"""Reading records: one JSON file in an official schema -> a list of typed items, every mistake named by
place.

A loader gives `read` a function that turns one `Record` into a Fact (or another typed item). A malformed
record raises DataError with file, index and field ("counterfact.json record 17: ..."), or is skipped and
logged. Oddities that a loader repairs are counted, logged and kept in the corpus' provenance.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import json
import logging
import lzma
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from ..base.errors import DataError
from ..base.paths import file_to_read, user_path
from ..models.facts import SLOT, Fact, ambiguous

log = logging.getLogger(__name__)

_REQUIRED = object()


@dataclasses.dataclass(frozen=True)
class Provenance:
    """What a corpus was made from.

    corpus, form: loader and schema.   file, sha256: name and hash of the bytes that were read.
    records: records in the file.   loaded: items made.   skipped: malformed records left out.
    defects: {description: how many records}, everything that was repaired or is known to be odd.
    """

    corpus: str
    form: str
    file: str
    sha256: str
    records: int
    loaded: int
    skipped: int
    defects: dict[str, int]

    def as_dict(self) -> dict[str, Any]:
        """Plain data, ready for a JSON sidecar."""
        return dataclasses.asdict(self)


class Corpus(list):
    """A list of Facts (or of typed records) that knows where it comes from; slices are plain lists."""

    def __init__(self, items: Iterable, provenance: Provenance):
        super().__init__(items)
        self.provenance = provenance


class Record:
    """One JSON record with checked access; every complaint names file, record and field."""

    def __init__(self, value: Any, where: str, notes: collections.Counter, prefix: str = "", index: int = 0):
        self.value, self.where, self.notes, self.prefix, self.index = value, where, notes, prefix, index
        if not isinstance(value, dict):
            at = f"{prefix.rstrip('.')!r} " if prefix else ""
            raise DataError(f"{where}: {at}must be a JSON object, got {_kind(value)}")

    def error(self, field: str, message: str) -> DataError:
        """The error to raise for a field."""
        return DataError(f"{self.where}: '{self.prefix}{field}' {message}")

    def note(self, message: str) -> None:
        """Count an oddity of this record."""
        self.notes[message] += 1

    def get(self, field: str, default: Any = _REQUIRED) -> Any:
        """The raw value of a dotted field, e.g. "requested_rewrite.target_new.str"."""
        value = self.value
        for key in field.split("."):
            if not isinstance(value, dict) or value.get(key) is None:
                if default is _REQUIRED:
                    raise self.error(field, "is missing")
                return default
            value = value[key]
        return value

    def text(self, field: str, default: Any = _REQUIRED) -> str:
        """A non-empty text, blanks around it removed (and counted)."""
        value = self.get(field, default)
        return value if value is default else self.clean(field, value)

    def first_text(self, field: str, default: Any = _REQUIRED) -> str:
        """A text, or the first of a list of texts (both occur in the wild)."""
        value = self.get(field, default)
        if value is default:
            return value
        if isinstance(value, list):
            if not value:
                raise self.error(field, "is an empty list; at least one text is needed")
            value = value[0]
        return self.clean(field, value)

    def texts(self, field: str, default: Any = _REQUIRED) -> tuple[str, ...]:
        """A list of non-empty texts."""
        value = self.get(field, default)
        if value is default:
            return value
        if not isinstance(value, list):
            raise self.error(field, f"must be a list of texts, got {_kind(value)}")
        return tuple(self.clean(f"{field}[{i}]", item) for i, item in enumerate(value))

    def objects(self, field: str, default: Any = _REQUIRED) -> list[Record]:
        """A list of JSON objects, as records of their own."""
        value = self.get(field, default)
        if value is default:
            return value
        if not isinstance(value, list):
            raise self.error(field, f"must be a list of objects, got {_kind(value)}")
        return [
            Record(item, self.where, self.notes, f"{self.prefix}{field}[{i}].", self.index)
            for i, item in enumerate(value)
        ]

    def clean(self, field: str, value: Any) -> str:
        """Check that a value is a non-empty text and strip it."""
        if not isinstance(value, str):
            raise self.error(field, f"must be a text, got {_kind(value)}")
        if not value.strip():
            raise self.error(field, "is empty")
        if value != value.strip():
            kind = re.sub(r"\[\d+\]", "[]", self.prefix + field)  # one count for all items of a list
            self.note(f"blanks around '{kind}' removed")
        return value.strip()

    def template(self, field: str) -> str:
        """A prompt template with exactly one slot."""
        prompt = self.text(field)
        if prompt.count(SLOT) != 1:
            what = "has no '{}' slot" if SLOT not in prompt else f"has {prompt.count(SLOT)} '{{}}' slots"
            raise self.error(field, f"{what}: {prompt!r}; it must mark the place of the subject exactly once")
        return prompt

    def split(self, field: str, subject: str) -> tuple[str, str]:
        """(template, subject) of a full prompt: the first mention of the subject becomes the slot.

        A mention that is a word of its own is preferred to one inside a longer word. If only the case
        differs, the mention's own spelling is the subject, so that template and subject always give back the
        prompt.
        """
        prompt = self.text(field)
        if SLOT in prompt:
            raise self.error(field, f"contains a slot '{{}}' although a full text is expected: {prompt!r}")
        name = re.escape(subject)
        for pattern, flags in (
            (rf"(?<!\w){name}(?!\w)", 0),
            (name, 0),
            (rf"(?<!\w){name}(?!\w)", re.IGNORECASE),
        ):
            found = list(re.finditer(pattern, prompt, flags))
            if not found:
                continue
            if len(found) > 1:
                self.note(
                    f"'{self.prefix}{field}' names the subject more than once, slot at the first mention"
                )
            if flags:
                self.note(
                    f"'{self.prefix}{field}' spells the subject in another case, spelling of the prompt kept"
                )
            a, b = found[0].span()
            return prompt[:a] + SLOT + prompt[b:], prompt[a:b]
        raise self.error(field, f"does not mention the subject {subject!r}: {_short(prompt)!r}")


def read(
    corpus: str,
    path: str | Path,
    parse: Callable[[Record], Any],
    *,
    form: str = "",
    limit: int | None = None,
    on_error: str = "raise",
    one_object: bool = True,
) -> Corpus:
    """Read a JSON list (or .jsonl file) and parse every record.

    limit:    only the first `limit` records of the file, as the official scripts count.
    on_error: "raise" stops at the first malformed record, "skip" leaves it out and logs it.
    one_object: a text has one object. Pairs of facts that break this (two cities of one name) are counted and logged,
              and keep their row in `Fact.meta`, so that errors about them name it.
    Items with a `case_id` must have distinct ones. Raises DataError.
    """
    if on_error not in ("raise", "skip"):
        raise DataError(f"on_error={on_error!r}; use 'raise' or 'skip'")
    if limit is not None and limit < 1:
        raise DataError(f"limit={limit}; use a positive number of records, or None for all")
    path = user_path(path)
    rows, sha256 = read_json(path)
    if not isinstance(rows, list):
        raise DataError(f"{path.name}: expected a JSON list of records, got {_kind(rows)}")
    notes: collections.Counter = collections.Counter()
    items, rows_of, skipped, seen = [], [], 0, {}
    for index, row in enumerate(rows[:limit]):
        try:
            before = notes.copy()
            item = parse(Record(row, f"{path.name} record {index}", notes, index=index))
            case_id = getattr(item, "case_id", None)
            if case_id in seen and case_id is not None:
                raise DataError(
                    f"{path.name} record {index}: case_id {case_id!r} is that of record {seen[case_id]}"
                )
            seen[case_id] = index
            items.append(item)
            rows_of.append(index)
        except DataError as error:
            if on_error == "raise":
                raise
            notes = before
            skipped += 1
            log.warning("skipped %s", error)
    if one_object and items and all(isinstance(item, Fact) for item in items):
        pairs = ambiguous(items)
        if pairs:
            notes["pairs of facts with one text and two objects"] = len(pairs)
            a, b = (f"record {rows_of[i]} ({items[i].case_id})" for i in pairs[0])
            log.warning("%s: %r has two objects in %s and %s", path.name, items[pairs[0][0]].text, a, b)
        for i in sorted({i for pair in pairs for i in pair}):  # so that an error about them can say where they stand
            items[i] = items[i].replace(meta=(*items[i].meta, ("row", str(rows_of[i]))))
    for message, count in sorted(notes.items()):
        log.warning("%s: %d x %s", path.name, count, message)
    if skipped:
        log.warning("%s: %d of %d records skipped", path.name, skipped, len(rows[:limit]))
    if rows and not items:
        raise DataError(
            f"{path.name}: no usable record; is this a {corpus} file{f' of form {form}' if form else ''}?"
        )
    return Corpus(
        items, Provenance(corpus, form, path.name, sha256, len(rows), len(items), skipped, dict(notes))
    )


def read_json(path: Path) -> tuple[Any, str]:
    """(parsed content, sha256 of the bytes) of a .json or .jsonl file, also one with .xz behind. Raises DataError."""
    try:
        path = file_to_read(path)
        raw = path.read_bytes()
        if path.suffix == ".xz":
            path, raw = path.with_suffix(""), lzma.decompress(raw)
    except lzma.LZMAError as error:
        raise DataError(f"{path.name} is damaged ({error}); get it again") from error
    except OSError as error:
        raise DataError(
            f"cannot read {path}: {error.strerror or error}; give the path of an existing file"
        ) from error
    if raw.startswith(b"version https://git-lfs"):
        raise DataError(
            f"{path.name} is a Git LFS pointer, not the data itself; fetch it with `git lfs pull`"
        )
    try:
        text = raw.decode("utf-8-sig")
        if path.suffix == ".jsonl":
            lines = [(n, line) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
            content = []
            for n, line in lines:
                try:
                    content.append(json.loads(line))
                except json.JSONDecodeError as error:
                    raise DataError(f"{path.name} line {n}: not valid JSON ({error.msg})") from error
        else:
            content = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path.name} line {error.lineno}: not valid JSON ({error.msg}); is the download complete?"
        ) from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path.name}: not UTF-8 text (byte {error.start}); is it packed?") from error
    return content, hashlib.sha256(raw).hexdigest()


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "a truth value", type(None): "null"}
    return names.get(type(value), "a number")


def _short(text: str, width: int = 80) -> str:
    return text if len(text) <= width else text[: width - 3] + "..."
