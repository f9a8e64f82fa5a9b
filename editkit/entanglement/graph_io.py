"""The binary format of entanglement graphs: a folder with a header and three memory-mapped arrays.

    header.json   what the graph is of (keys below); written last, so that a folder without it is unfinished
    indptr.bin    int64 (n + 1,): the edges of row i are numbers indptr[i] to indptr[i + 1] (exclusive)
    indices.bin   int32 (edges,): the fact at the other end
    weights.bin   float32 or float16 (edges,): the score; inside a row from strong to weak

All arrays are little-endian without any header of their own: `numpy.memmap(path, dtype)` reads them. The
header holds format, n, edges, dtype, sha256 of the three files, and the identity of the graph: score,
symmetric, absolute, threshold, top_k, block (rows computed at once), matrices (sha256 of the compared
vectors), excluded (sha256 of the pairs left out), and what the caller says about their origin (model,
fingerprint, facts, layer, token, module, ...).

While a graph is being made, `journal.jsonl` has the identity in its first line and a line {"rows", "edges"}
per finished block of rows. A killed run goes on behind the last line and ends with the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from ..base.errors import DataError
from ..base.paths import to_folder, user_path, written

FORMAT = "editkit-entanglement-graph-1"
HEADER, JOURNAL = "header.json", "journal.jsonl"
INDPTR, INDICES, WEIGHTS, COUNTS = "indptr.bin", "indices.bin", "weights.bin", "counts.part"
WEIGHT_TYPES = {"float32": "<f4", "float16": "<f2"}
_NUMBERS = ("format", "n", "edges", "dtype", "sha256")


def sha256_of(path: Path) -> str:
    """sha256 (hex) of a file."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def read_header(folder: str | os.PathLike) -> dict[str, Any]:
    """The header of a finished graph. Raises DataError: no graph, an unfinished one, or a damaged header."""
    folder = user_path(folder)
    try:
        header = json.loads((folder / HEADER).read_text(encoding="utf-8"))
    except FileNotFoundError:
        if (folder / JOURNAL).exists():
            raise DataError(
                f"the graph in {folder} is unfinished; call build_graph with the same arguments to go on"
            ) from None
        raise DataError(f"there is no entanglement graph in {folder}; make one with build_graph") from None
    except ValueError as error:
        raise DataError(
            f"{folder / HEADER} is damaged ({error}); delete the folder and build again"
        ) from None
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise DataError(f"{folder / HEADER} is not a header of format {FORMAT}; build the graph again")
    lacking = [key for key in _NUMBERS if key not in header]
    if lacking:
        raise DataError(f"{folder / HEADER} lacks {lacking}; build the graph again")
    return header


def open_arrays(folder: Path, header: dict[str, Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """indptr, indices, weights of a finished graph, memory-mapped and read-only.

    Raises DataError when a file is missing or has another size than the header says.
    """
    n, edges = header["n"], header["edges"]
    arrays = []
    for name, dtype, size in (
        (INDPTR, "<i8", n + 1), (INDICES, "<i4", edges), (WEIGHTS, WEIGHT_TYPES[header["dtype"]], edges)
    ):  # fmt: skip
        path = folder / name
        if not path.is_file() or path.stat().st_size != size * np.dtype(dtype).itemsize:
            raise DataError(f"{path} is missing or cut off; delete {folder} and build the graph again")
        arrays.append(np.memmap(path, dtype=dtype, mode="r", shape=(size,)))
    return tuple(arrays)


class GraphWriter:
    """Writes a graph block of rows by block of rows; resumes where a killed run has stopped.

    identity: everything that decides the bytes of the graph, JSON-able; an unfinished graph in the folder is
              continued if its identity is equal.
    n:        number of facts.   dtype: "float32" or "float16" for the weights.
    Raises DataError when the folder has an unfinished graph of another identity, or a finished one.
    """

    def __init__(self, folder: str | os.PathLike, identity: dict[str, Any], n: int, dtype: str = "float32"):
        if dtype not in WEIGHT_TYPES:
            raise DataError(f"dtype = {dtype!r}; weights are stored as {' or '.join(WEIGHT_TYPES)}")
        self.folder, self.n, self.dtype = to_folder(folder), n, dtype
        self.identity = json.loads(json.dumps(identity))
        self.row = self.edges = 0
        if (self.folder / HEADER).exists():
            raise DataError(f"{self.folder} has a finished graph; open it, or choose another folder")
        if (self.folder / JOURNAL).exists():
            self._resume()
        else:
            for name in (INDICES, WEIGHTS, COUNTS):
                (self.folder / name).write_bytes(b"")
            self._note({**self.identity, "n": n, "dtype": dtype})

    def _resume(self) -> None:
        path = self.folder / JOURNAL
        raw = path.read_bytes()
        raw = raw[: raw.rfind(b"\n") + 1]  # a line that was cut off is of a block that is done again
        lines = [json.loads(line) for line in raw.splitlines()]
        mine = {**self.identity, "n": self.n, "dtype": self.dtype}
        if not lines:
            path.unlink()
            return self.__init__(self.folder, self.identity, self.n, self.dtype)
        differ = [k for k in sorted({*mine, *lines[0]}) if mine.get(k) != lines[0].get(k)]
        if differ:
            raise DataError(
                f"{self.folder} has an unfinished graph with another {', '.join(differ)}; "
                "give the same arguments to go on, or delete the folder"
            )
        if len(lines) > 1:
            self.row, self.edges = lines[-1]["rows"][1], lines[-1]["edges"]
        path.write_bytes(raw)
        for name, size in (
            (INDICES, 4 * self.edges),
            (WEIGHTS, np.dtype(WEIGHT_TYPES[self.dtype]).itemsize * self.edges),
            (COUNTS, 4 * self.row),
        ):
            file = self.folder / name
            if not file.is_file() or file.stat().st_size < size:
                raise DataError(f"{file} is shorter than the journal says; delete {self.folder}, start again")
            os.truncate(file, size)

    def _note(self, line: dict[str, Any]) -> None:
        with open(self.folder / JOURNAL, "a", encoding="utf-8") as handle:
            handle.write(json.dumps(line, sort_keys=True) + "\n")
            handle.flush()
            os.fsync(handle.fileno())

    def append(self, counts: np.ndarray, indices: np.ndarray, weights: np.ndarray) -> None:
        """Add the next rows: number of edges per row (b,), then all their ends and scores, row by row."""
        data = (
            (COUNTS, counts.astype("<i4")), (INDICES, indices.astype("<i4")),
            (WEIGHTS, weights.astype(WEIGHT_TYPES[self.dtype])),
        )  # fmt: skip
        for name, values in data:
            with open(self.folder / name, "ab") as handle:
                handle.write(values.tobytes())
                handle.flush()
                os.fsync(handle.fileno())
        first, self.row, self.edges = self.row, self.row + len(counts), self.edges + len(indices)
        self._note({"rows": [first, self.row], "edges": self.edges})

    def finish(self) -> dict[str, Any]:
        """Write indptr and header, remove the journal; returns the header. Raises DataError for rows missing."""
        if self.row != self.n:
            raise DataError(f"only {self.row} of {self.n} rows were written")
        counts = np.fromfile(self.folder / COUNTS, dtype="<i4")
        indptr = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]).astype("<i8")
        indptr.tofile(self.folder / INDPTR)
        hashes = {name: sha256_of(self.folder / name) for name in (INDPTR, INDICES, WEIGHTS)}
        header = {
            "format": FORMAT, "n": self.n, "edges": self.edges, "dtype": self.dtype, **self.identity,
            "sha256": hashes,
        }  # fmt: skip
        with written(self.folder / HEADER) as part:
            part.write_text(json.dumps(header, indent=1) + "\n", encoding="utf-8")
        for name in (JOURNAL, COUNTS):
            (self.folder / name).unlink()
        return header
