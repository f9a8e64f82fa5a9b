"""An audit trail of edits: an append-only, hash-chained log, and "which edit may explain this change?".

    log = AuditLog("edits.jsonl")
    log.record(delta, requests, keys=K, entangled=...)          # after every edit
    explain(log.entries(), scores)                              # edits, most likely culprit first

Each line is a JSON object with its number, the hash of the line before, and its own hash (sha256 over its
canonical JSON without `hash`). Changing, dropping or reordering lines breaks the chain, and `verify` says where.
Whoever can write the file can also rewrite all of it: keep `head` somewhere else to notice that.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from filelock import FileLock
from torch import Tensor

from ...base.errors import DataError, RequestError
from ...base.paths import user_path
from ...models.facts import Fact

if TYPE_CHECKING:
    from ...methods.delta import Delta

START = "0" * 64


def entry_hash(entry: dict[str, Any]) -> str:
    """sha256 (hex) of an entry's canonical JSON, its own `hash` left out."""
    content = {key: value for key, value in entry.items() if key != "hash"}
    text = json.dumps(content, sort_keys=True, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


class AuditLog:
    """An append-only JSONL file; several processes may append to it.

    path: the file; made by the first `append`.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = user_path(path)

    def __len__(self) -> int:
        return len(self.entries())

    def append(self, content: dict[str, Any]) -> dict[str, Any]:
        """Add an entry and return it with number, time (UTC), previous and hash.

        Raises DataError if the end of the file is damaged, or if the content is not JSON.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(str(self.path) + ".lock"):
            last = self._last()
            entry = {
                "number": last["number"] + 1 if last else 0,
                "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                **content,
                "previous": last["hash"] if last else START,
            }
            try:
                entry = json.loads(json.dumps(entry, allow_nan=False))
            except (TypeError, ValueError) as error:
                raise DataError(f"the entry is not JSON: {error}; use numbers, text, lists, dicts") from error
            entry["hash"] = entry_hash(entry)
            with open(self.path, "ab") as handle:
                handle.write((json.dumps(entry, ensure_ascii=False) + "\n").encode())
                handle.flush()
                os.fsync(handle.fileno())
        return entry

    def record(
        self,
        delta: Delta,
        facts: Sequence[Fact],
        *,
        strength: Sequence[float] | None = None,
        entangled: Sequence[Sequence[tuple[str, float]]] | None = None,
        checks: Sequence[dict] = (),
        **about: Any,
    ) -> dict[str, Any]:
        """Append one edit: the model before and after, method, options, facts, and what it may have touched.

        strength:  (n,) how strongly each fact was written, e.g. ||Delta k||; 1 by default.
        entangled: per fact its most entangled facts as (key, score), e.g. from `EntanglementGraph.neighbors`.
        checks:    answers measured before and after, any JSON.   about: more, e.g. layer=3, note="...".
        """
        facts = list(facts)
        if strength is not None and len(strength) != len(facts):
            raise RequestError(f"{len(facts)} facts but {len(strength)} strengths; give one per fact")
        if entangled is not None and len(entangled) != len(facts):
            raise RequestError(f"{len(facts)} facts but {len(entangled)} lists of entangled facts")
        rows = []
        for i, fact in enumerate(facts):
            row = {
                "key": fact.key, "prompt": fact.prompt, "subject": fact.subject, "target": fact.target,
                "target_true": fact.target_true, "strength": 1.0 if strength is None else float(strength[i]),
            }  # fmt: skip
            if entangled is not None:
                row["entangled"] = [[key, float(score)] for key, score in entangled[i]]
            rows.append(row)
        return self.append({
            "kind": "edit", "editor": delta.editor, "config": delta.config, "base": delta.base,
            "change": delta_hash(delta), "facts": rows, "checks": list(checks), **about,
        })  # fmt: skip

    def entries(self) -> list[dict[str, Any]]:
        """All entries in order, after checking the chain. Raises DataError naming the first bad line."""
        if not self.path.exists():
            return []
        raw = self.path.read_bytes()
        if raw and not raw.endswith(b"\n"):
            raise DataError(f"{self.path} ends inside an entry (a killed append); call repair()")
        entries, previous = [], START
        for number, line in enumerate(raw.splitlines()):
            try:
                entry = json.loads(line)
                good = entry["hash"] == entry_hash(entry)
                linked = entry["previous"] == previous and entry["number"] == number
            except (ValueError, KeyError, TypeError):
                raise DataError(f"{self.path}, line {number + 1}: not an entry of an audit log") from None
            if not good:
                raise DataError(f"{self.path}, line {number + 1}: the entry was changed after it was written")
            if not linked:
                raise DataError(
                    f"{self.path}, line {number + 1}: the entry before it was removed, moved or replaced"
                )
            entries.append(entry)
            previous = entry["hash"]
        return entries

    def verify(self, head: str | None = None) -> None:
        """Check the whole chain; with `head`, also that the log still contains the entry of that hash."""
        hashes = [entry["hash"] for entry in self.entries()]
        if head is not None and head not in hashes and head != START:
            raise DataError(f"{self.path} has no entry with the hash {head}: it was cut off or written anew")

    @property
    def head(self) -> str:
        """Hash of the last entry; a log that was cut off or written anew does not contain it."""
        entries = self.entries()
        return entries[-1]["hash"] if entries else START

    def repair(self) -> bytes:
        """Cut off an unfinished last line, if there is one; returns what was cut off."""
        with FileLock(str(self.path) + ".lock"):
            raw = self.path.read_bytes()
            whole = raw.rfind(b"\n") + 1
            os.truncate(self.path, whole)
        return raw[whole:]

    def _last(self) -> dict[str, Any] | None:
        if not self.path.exists() or not self.path.stat().st_size:
            return None
        raw = self.path.read_bytes()
        if not raw.endswith(b"\n"):
            raise DataError(f"{self.path} ends inside an entry (a killed append); call repair()")
        try:
            entry = json.loads(raw.splitlines()[-1])
            if entry["hash"] != entry_hash(entry):
                raise KeyError
        except (ValueError, KeyError, TypeError):
            raise DataError(f"{self.path}: the last entry is damaged; nothing is appended to it") from None
        return entry


def delta_hash(delta: Delta) -> str:
    """sha256 over the weights as an edit left them: which change an entry is about."""
    digest = hashlib.sha256()
    for name, value in sorted(delta.after.items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def explain(
    entries: Sequence[dict[str, Any]],
    scores: Tensor | np.ndarray | dict[str, float],
    *,
    key: str | None = None,
) -> pd.DataFrame:
    """Which edits may explain a change of one fact: edits by `strength_i E_ij`, the likely culprit first.

    entries: of `AuditLog.entries`; others than edits are skipped.
    scores:  E_ij of the changed fact j with every edited fact i, in the log's order, or by key. Without
             scores for a fact (a dict that lacks it), its list `entangled` is asked for `key`, else it counts 0.
    key:     the changed fact's key.
    Columns: number (entry), time, editor, prompt, target, strength, score, evidence (strength times score),
    of which the highest fact of each entry is shown. Raises RequestError if the scores do not fit.
    """
    edited = [(entry, fact) for entry in entries if entry.get("kind") == "edit" for fact in entry["facts"]]
    if not isinstance(scores, dict):
        values = torch.as_tensor(scores).detach().cpu().double().numpy().ravel()
        if len(values) != len(edited):
            raise RequestError(f"the log has {len(edited)} edited facts, {len(values)} scores were given")
    rows = []
    for place, (entry, fact) in enumerate(edited):
        if isinstance(scores, dict):
            listed = {k: s for k, s in fact.get("entangled", []) if key is not None}
            score = float(scores.get(fact["key"], listed.get(key, 0.0)))
        else:
            score = float(values[place])
        rows.append({
            "number": entry["number"], "time": entry["time"], "editor": entry["editor"],
            "prompt": fact["prompt"].replace("{}", fact["subject"]), "target": fact["target"],
            "strength": fact["strength"], "score": score, "evidence": fact["strength"] * score,
        })  # fmt: skip
    columns = ["number", "time", "editor", "prompt", "target", "strength", "score", "evidence"]
    table = pd.DataFrame(rows, columns=columns).sort_values(
        ["evidence", "number"], ascending=[False, False], kind="stable"
    )
    return table.drop_duplicates("number").reset_index(drop=True)
