"""The entanglement graph of a corpus: all pairs in blocks, the strong ones on disk (clare.md section 6).

    H = represent(lm, facts, layer)
    graph = build_graph(folder, cosine(H), facts=facts, lm=lm, about={"layer": layer}, top_k=32)
    ends, weights = graph.neighbors(17, 8)           # the eight facts most entangled with fact 17

An edge i -> j says: editing i is expected to move j. The graph of a symmetric score under a threshold is
symmetric; lists of the k strongest are not, since a hub is in many lists but has only k places in its own.
Format and resuming: `graph_io`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..base.errors import ConfigError, DataError, ModelError, NumericsError, RequestError
from ..base.paths import user_path
from ..base.progress import bar
from ..locate.moments import text_hash
from ..models.facts import Fact
from .graph_io import HEADER, WEIGHTS, GraphWriter, open_arrays, read_header, sha256_of
from .similarity import Score, blocks

if TYPE_CHECKING:
    from scipy.sparse import csr_array

    from ..models.lm import LM

ROWS = 1024  # rows of a block: a product of 1,024 x 11,427 scores takes 47 MB


def facts_hash(facts: Sequence[Fact]) -> str:
    """sha256 over prompts, subjects and targets in order: which corpus, and which fact is which row."""
    return text_hash([part for f in facts for part in (f.prompt, f.subject, f.target)])


def prompt_groups(facts: Sequence[Fact]) -> np.ndarray:
    """(n,) int: facts with the same number ask one prompt of one subject and differ in the answer only."""
    numbers: dict[tuple[str, str], int] = {}
    return np.array([numbers.setdefault((f.prompt, f.subject), len(numbers)) for f in facts], dtype=np.int64)


def excluded_pairs(n: int, groups: np.ndarray | None) -> np.ndarray:
    """(p, 2) int64 pairs (i, j) that never become edges, sorted by i: i itself, and facts of its group."""
    diagonal = np.repeat(np.arange(n), 2).reshape(-1, 2)
    if groups is None:
        return diagonal
    order = np.argsort(groups, kind="stable")
    cuts = np.flatnonzero(np.diff(groups[order])) + 1
    parts = [
        np.stack(np.meshgrid(g, g, indexing="ij"), -1).reshape(-1, 2)
        for g in np.split(order, cuts)
        if len(g) > 1
    ]
    pairs = np.unique(np.concatenate([diagonal, *parts]), axis=0)
    return pairs.astype(np.int64)


def build_graph(
    folder: str | os.PathLike,
    score: Score,
    *,
    facts: Sequence[Fact] | None = None,
    lm: LM | None = None,
    about: dict[str, Any] | None = None,
    top_k: int | None = None,
    threshold: float | None = None,
    dtype: str = "float32",
    rows: int = ROWS,
) -> EntanglementGraph:
    """Compare all pairs, keep the strong ones on disk, and open the result.

    score:     factors of the score (`similarity`), converted to float32; one side, n by n.
    facts:     the n facts. Pairs that share prompt and subject (several valid answers) are left out: their
               states are equal whatever the model has learned, and they must not serve as edit and probe.
    lm:        the model the representations come from; its fingerprint is stored and checked later.
    about:     more for the header: layer, token, module (JSON values).
    top_k:     keep the k strongest per fact.   threshold: keep scores >= threshold. One of them is needed;
               with both, an edge passes both.
    rows:      facts compared at once; part of the graph's identity, since it decides the last bits.

    Memory: one block of rows x n scores. A killed call is continued by repeating it, to the same bytes; a
    finished graph of equal identity is opened as it is. Scores are made on the device of the factors.
    Raises ConfigError, RequestError (duplicate facts), DataError (empty graph; folder of another graph).
    """
    score = score.to(torch.float32)
    n = len(score)
    if not (torch.isfinite(score.left).all() and torch.isfinite(score.right).all()):
        raise NumericsError("a factor of the score is NaN or Inf; check representations and second moment")
    if len(score.right) != n:
        raise ConfigError(f"a graph needs a score of n by n facts, got {n} by {len(score.right)}")
    _check_request(n, facts, top_k, threshold, rows)
    groups = None if facts is None else prompt_groups(facts)
    skip = excluded_pairs(n, groups)
    identity = {
        "score": score.name, "symmetric": score.symmetric, "absolute": score.absolute,
        "threshold": None if threshold is None else float(threshold), "top_k": top_k, "block": rows,
        "width": score.left.shape[1], "matrices": _matrix_hash(score),
        "excluded": hashlib.sha256(skip.astype("<i8").tobytes()).hexdigest(),
        "excluded_pairs": len(skip) - n,
        "facts": None if facts is None else facts_hash(facts),
        "model": None if lm is None else lm.name,
        "fingerprint": None if lm is None else lm.fingerprint(),
        "about": dict(about or {}),
    }  # fmt: skip
    folder = user_path(folder)
    if (folder / HEADER).exists():
        return _reopen(folder, identity, n, dtype)
    writer = GraphWriter(folder, identity, n, dtype)
    starts = np.searchsorted(skip[:, 0], np.arange(n + 1))
    highest = -np.inf
    columns = score.right.T
    memory = columns.new_empty(
        min(rows, n), n
    )  # one block, used again: fresh memory costs a tenth of the time
    for part in bar([b for b in blocks(n, rows) if b.start >= writer.row], f"{n} x {n} pairs", unit="block"):
        block = torch.mm(score.left[part], columns, out=memory[: part.stop - part.start])
        if score.absolute:
            block.abs_()
        drop = torch.from_numpy(skip[starts[part.start] : starts[part.stop]]).to(block.device)
        block[drop[:, 0] - part.start, drop[:, 1]] = -torch.inf
        counts, ends, weights = select(block, top_k, threshold)
        if threshold is not None and not writer.edges and not len(ends):
            highest = max(highest, float(block.max()))
        writer.append(counts, ends, weights)
    if not writer.edges:
        for name in folder.iterdir():
            name.unlink()
        best = f"; the highest score is {highest:.4g}" if np.isfinite(highest) else ""
        raise DataError(
            f"the graph is empty: no pair of {n} facts reaches {threshold}{best}. Lower the threshold"
        )
    writer.finish()
    return EntanglementGraph.open(folder)


def _check_request(n: int, facts, top_k: int | None, threshold: float | None, rows: int) -> None:
    if n < 2:
        raise DataError(f"a graph needs at least two facts, got {n}")
    if top_k is None and threshold is None:
        raise ConfigError("give top_k (edges per fact) or threshold (lowest score), or both")
    if top_k is not None and not 1 <= top_k < n:
        raise ConfigError(f"top_k = {top_k}; with {n} facts it must lie between 1 and {n - 1}")
    if threshold is not None and not np.isfinite(threshold):
        raise ConfigError(f"threshold = {threshold}; give a finite number")
    if rows < 1:
        raise ConfigError(f"rows = {rows}; give at least 1")
    if facts is None:
        return
    if len(facts) != n:
        raise RequestError(
            f"there are {len(facts)} facts but {n} representations; give the same facts to both"
        )
    seen: dict[str, int] = {}
    for i, fact in enumerate(facts):
        if seen.setdefault(fact.key, i) != i:
            raise RequestError(f"facts {seen[fact.key]} and {i} are the same: {fact.text!r}; drop one")


def _matrix_hash(score: Score) -> str:
    digest = hashlib.sha256()
    for side in (score.left,) if score.left is score.right else (score.left, score.right):
        digest.update(f"{tuple(side.shape)}".encode())
        digest.update(side.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _reopen(folder: Path, identity: dict[str, Any], n: int, dtype: str) -> EntanglementGraph:
    graph = EntanglementGraph.open(folder)
    wanted = {**identity, "n": n, "dtype": dtype}
    differ = [key for key, value in wanted.items() if graph.header.get(key) != value]
    if differ:
        raise DataError(
            f"{folder} has a graph with another {', '.join(differ)}; choose another folder or delete it"
        )
    return graph


def select(
    block: Tensor, top_k: int | None, threshold: float | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Edges of a block of scores (b, n): counts per row (b,), ends and weights, strong to weak in each row.

    -inf marks pairs that are left out.
    """
    floor = -torch.inf if threshold is None else threshold
    if top_k is not None:
        values, ends = torch.topk(block, min(top_k, block.shape[1]), dim=1)
        keep = (values >= floor) & torch.isfinite(values)
        return keep.sum(1).cpu().numpy(), ends[keep].cpu().numpy(), values[keep].cpu().numpy()
    if not block.is_cpu:
        place = (block >= floor).flatten().nonzero()[:, 0]
        values, place = block.flatten()[place].cpu().numpy(), place.cpu().numpy()
    else:  # numpy finds few hits among many faster than torch
        place = np.flatnonzero((block >= floor).numpy())
        values = block.numpy().ravel()[place]
    where, ends = np.divmod(place, block.shape[1])
    order = np.lexsort((ends, -values, where))
    return np.bincount(where, minlength=len(block)), ends[order], values[order]


@dataclasses.dataclass(frozen=True)
class EntanglementGraph:
    """A graph on disk; arrays are memory-mapped, so that opening it costs nothing.

    header: see `graph_io`.   indptr (n + 1,), indices (edges,), weights (edges,): rows in compressed form.
    """

    folder: Path
    header: dict[str, Any]
    indptr: np.ndarray
    indices: np.ndarray
    weights: np.ndarray

    @classmethod
    def open(
        cls, folder: str | os.PathLike, *, lm: LM | None = None, facts: Sequence[Fact] | None = None
    ) -> EntanglementGraph:
        """Open a finished graph, and `check` it against a model and facts where given.

        Raises DataError for a missing, unfinished or damaged graph, and what `check` raises.
        """
        folder = user_path(folder)
        header = read_header(folder)
        graph = cls(folder, header, *open_arrays(folder, header))
        graph.check(lm, facts)
        return graph

    def check(self, lm: LM | None = None, facts: Sequence[Fact] | None = None) -> None:
        """Raise ModelError if the graph is of another model, DataError if it is of other facts."""
        found = self.header.get("fingerprint")
        if lm is not None and found is not None and lm.fingerprint() != found:
            raise ModelError(
                f"the graph in {self.folder} is of the model {self.header.get('model')} as it was then, not of "
                f"{lm.name} with its present weights; restore the unedited model, or build its own graph"
            )
        if lm is not None and found is None:
            raise ModelError(f"the graph in {self.folder} does not say of which model it is; pass no lm")
        if facts is not None and self.header.get("facts") != facts_hash(facts):
            raise DataError(
                f"the graph in {self.folder} is of {self.n} other facts, or of these in another order; "
                "pass the facts it was built from"
            )

    def verify(self) -> None:
        """Raise DataError if a file's content has changed since it was written."""
        for name, expected in self.header["sha256"].items():
            if sha256_of(self.folder / name) != expected:
                raise DataError(
                    f"{self.folder / name} has changed; delete the folder and build the graph again"
                )

    @property
    def n(self) -> int:
        """Number of facts."""
        return self.header["n"]

    @property
    def n_edges(self) -> int:
        """Number of directed edges (a symmetric graph has each pair twice)."""
        return self.header["edges"]

    def neighbors(self, fact: int, k: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """The (up to k) strongest edges of a fact: indices and scores, strong to weak."""
        if not 0 <= fact < self.n:
            raise RequestError(f"fact {fact} does not exist; the graph has facts 0 to {self.n - 1}")
        begin, end = int(self.indptr[fact]), int(self.indptr[fact + 1])
        stop = end if k is None else min(end, begin + k)
        return np.asarray(self.indices[begin:stop]), np.asarray(self.weights[begin:stop], dtype=np.float32)

    def rows(self) -> np.ndarray:
        """(edges,) the fact at which each edge starts."""
        return np.repeat(np.arange(self.n), np.diff(self.indptr))

    def adjacency(self, threshold: float | None = None, k: int | None = None) -> csr_array:
        """Weights (n, n) as a scipy matrix with sorted columns; threshold and k keep fewer edges."""
        from scipy.sparse import csr_array

        weights, counts = np.asarray(self.weights, dtype=np.float32), np.diff(self.indptr)
        keep = np.ones(self.n_edges, dtype=bool)
        if k is not None:
            keep &= np.arange(self.n_edges) - np.repeat(self.indptr[:-1], counts) < k
        if threshold is not None:
            keep &= weights >= threshold
        rows = self.rows()[keep]
        indptr = np.searchsorted(rows, np.arange(self.n + 1))
        matrix = csr_array((weights[keep], np.asarray(self.indices)[keep], indptr), shape=(self.n, self.n))
        matrix.sort_indices()
        return matrix

    def pairs(self) -> Iterator[tuple[int, int, float]]:
        """Each edge once: (i, j, score); of a symmetric score only i < j, a pair in either list counts."""
        if not self.header.get("symmetric"):
            for i in range(self.n):
                yield from ((i, int(j), float(w)) for j, w in zip(*self.neighbors(i)))
            return
        matrix = self.adjacency()
        matrix = matrix.maximum(matrix.T).tocsr()
        matrix.sort_indices()
        for i in range(self.n):
            part = slice(matrix.indptr[i], matrix.indptr[i + 1])
            yield from (
                (i, int(j), float(w)) for j, w in zip(matrix.indices[part], matrix.data[part]) if j > i
            )


__all__ = [
    "WEIGHTS", "EntanglementGraph", "build_graph", "excluded_pairs", "facts_hash", "prompt_groups", "select",
]  # fmt: skip
