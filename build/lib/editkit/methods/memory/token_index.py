"""Which stored prompt is nearest: TF-IDF cosine over tokens, without a model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import sparse


class TokenIndex:
    """Stored token rows, compared by the cosine of their TF-IDF vectors.

    idf = log((1 + n) / (1 + rows with the token)) + 1 over the stored rows, as in scikit-learn.
    """

    def __init__(self, vocabulary: int, rows: Sequence[Sequence[int]] = ()) -> None:
        self.vocabulary, self.rows = vocabulary, [list(r) for r in rows]
        self._matrix: sparse.csr_matrix | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def add(self, row: Sequence[int]) -> None:
        """Store one more row."""
        self.rows.append(list(row))
        self._matrix = None

    def replace(self, i: int, row: Sequence[int]) -> None:
        """Store another row in the place of row i."""
        self.rows[i], self._matrix = list(row), None

    def _counts(self, rows: Sequence[Sequence[int]]) -> sparse.csr_matrix:
        columns = np.concatenate([np.asarray(r, dtype=np.int64) for r in rows])
        index = np.repeat(np.arange(len(rows)), [len(r) for r in rows])
        shape = (len(rows), self.vocabulary)
        return sparse.coo_matrix((np.ones(len(columns)), (index, columns)), shape=shape).tocsr()

    def _unit(self, counts: sparse.csr_matrix) -> sparse.csr_matrix:
        weighted = counts @ sparse.diags(self._idf)
        norm = np.sqrt(np.asarray(weighted.multiply(weighted).sum(1)))[:, 0]
        return sparse.diags(1 / np.maximum(norm, 1e-12)) @ weighted

    def find(self, queries: Sequence[Sequence[int]], n: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """Indices and cosines (queries, n) of the nearest rows, best first; fewer columns if fewer are stored."""
        if not self.rows:
            return np.zeros((len(queries), 0), dtype=int), np.zeros((len(queries), 0))
        if self._matrix is None:
            counts = self._counts(self.rows)
            seen = np.asarray((counts > 0).sum(0)).ravel()
            self._idf = np.log((1 + len(self.rows)) / (1 + seen)) + 1
            self._matrix = self._unit(counts)
        cosine = (self._unit(self._counts(queries)) @ self._matrix.T).toarray()
        best = np.argsort(-cosine, axis=1, kind="stable")[:, :n]
        return best, np.take_along_axis(cosine, best, axis=1)
