"""Helpers of the corpus tests: hand-written records, and damaged copies of them."""

import copy
import json
from pathlib import Path

RECORDS = Path(__file__).parent / "data" / "records"


def rows(name: str) -> list:
    return json.loads((RECORDS / name).read_text(encoding="utf-8"))


def write(folder: Path, name: str, content) -> Path:
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def change(row: dict, field: str, value) -> dict:
    """A copy of a record with one dotted field set, or removed (value `...`)."""
    row = copy.deepcopy(row)
    *parents, last = field.split(".")
    node = row
    for key in parents:
        node = node[int(key)] if isinstance(node, list) else node[key]
    if value is ...:
        del node[last]
    else:
        node[last] = value
    return row
