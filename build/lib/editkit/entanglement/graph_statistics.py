"""What an entanglement graph looks like: degrees, hubs, components, clustering, who is linked to whom, and how
much of it survives a change of model, layer or token (clare.md section 6).

Undirected measures take the union of both directions: i and j are linked if either lists the other.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd
from scipy import sparse
from scipy.sparse import csgraph
from scipy.stats import rankdata, spearmanr

from ..base.errors import ConfigError, DataError
from ..models.facts import Fact
from .graph import EntanglementGraph
from .similarity import Score

KINDS = {"template": "prompt", "subject": "subject", "answer": "target"}


def labels(facts: Sequence[Fact], kind: str) -> np.ndarray:
    """(n,) int: the same number for facts of the same "template", "subject" or "answer"."""
    if kind not in KINDS:
        raise ConfigError(f"kind = {kind!r}; choose one of {', '.join(KINDS)}")
    numbers: dict[str, int] = {}
    return np.array([numbers.setdefault(getattr(f, KINDS[kind]), len(numbers)) for f in facts])


def undirected(matrix: sparse.csr_array) -> sparse.csr_array:
    """Union of both directions, the higher weight kept; sorted columns."""
    both = sparse.csr_array(matrix.maximum(matrix.T))
    both.sort_indices()
    return both


def share_equal(matrix: sparse.csr_array, label: np.ndarray) -> float:
    """Share of edges whose two ends have the same label; NaN without edges."""
    rows = np.repeat(np.arange(matrix.shape[0]), np.diff(matrix.indptr))
    return float(np.mean(label[rows] == label[matrix.indices])) if matrix.nnz else float("nan")


def assortativity(matrix: sparse.csr_array, label: np.ndarray) -> float:
    """Newman's coefficient (2003, equation 2) of a categorical label, over directed edges.

    0: edges ignore the label, given how many edges each label has; 1: all edges stay inside a label. NaN
    without edges or with a single label.
    """
    rows = np.repeat(np.arange(matrix.shape[0]), np.diff(matrix.indptr))
    if not len(rows):
        return float("nan")
    size = int(label.max()) + 1
    out = np.bincount(label[rows], minlength=size) / len(rows)
    into = np.bincount(label[matrix.indices], minlength=size) / len(rows)
    chance = float(out @ into)
    return (share_equal(matrix, label) - chance) / (1 - chance) if chance < 1 else float("nan")


def clustering(matrix: sparse.csr_array, n_sample: int = 500, seed: int = 0) -> float:
    """Mean local clustering coefficient over (a sample of) the facts with two neighbours or more.

    matrix: undirected. The coefficient of a fact is the share of pairs of its neighbours that are linked. NaN if no
    fact has two neighbours.
    """
    links = matrix.copy()
    links.data = np.ones(len(links.data), dtype=np.float32)
    degrees = np.diff(links.indptr)
    chosen = np.flatnonzero(degrees > 1)
    if not len(chosen):
        return float("nan")
    if len(chosen) > n_sample:
        chosen = np.sort(np.random.default_rng(seed).choice(chosen, n_sample, replace=False))
    some = links[chosen]
    triangles = (some @ links).multiply(some).sum(axis=1)
    pairs = degrees[chosen] * (degrees[chosen] - 1)
    return float(np.mean(np.asarray(triangles).ravel() / pairs))


def describe(
    graph: EntanglementGraph,
    facts: Sequence[Fact],
    *,
    thresholds: Sequence[float] = (),
    ks: Sequence[int] = (),
    n_sample: int = 500,
    seed: int = 0,
) -> pd.DataFrame:
    """One row per threshold or length of the lists; without either, one row for the whole graph.

    Columns: kept (which edges), pairs, density (of all pairs), mean_degree, max_degree, isolated (facts
    without a link), components, giant (share of facts in the largest component), clustering, other_template /
    other_subject / other_answer (share of pairs across), assortativity_template, assortativity_subject.
    A row without edges has NaN where nothing can be said. Raises DataError for facts of another graph.
    """
    graph.check(facts=facts)
    lowest = graph.header["threshold"]
    for t in thresholds:
        if lowest is not None and t < lowest:
            raise ConfigError(f"threshold {t} lies below that of the graph, {lowest}; build a larger graph")
    label = {kind: labels(facts, kind) for kind in KINDS}
    cuts = [(f"score >= {t:.3g}", {"threshold": t}) for t in thresholds]
    cuts += [(f"{k} strongest", {"k": k}) for k in ks]
    rows = []
    for name, cut in cuts or [("all", {})]:
        both = undirected(graph.adjacency(**cut))
        degrees = np.diff(both.indptr)
        n_parts, part = csgraph.connected_components(both, directed=False)
        row = {
            "kept": name, "pairs": both.nnz // 2, "density": both.nnz / (graph.n * (graph.n - 1)),
            "mean_degree": float(degrees.mean()), "max_degree": int(degrees.max()),
            "isolated": int((degrees == 0).sum()), "components": int(n_parts),
            "giant": float(np.bincount(part).max() / graph.n),
            "clustering": clustering(both, n_sample, seed),
        }  # fmt: skip
        row |= {f"other_{kind}": 1 - share_equal(both, label[kind]) for kind in KINDS}
        row |= {f"assortativity_{kind}": assortativity(both, label[kind]) for kind in ("template", "subject")}
        rows.append(row)
    return pd.DataFrame(rows)


def in_degrees(graph: EntanglementGraph, k: int | None = None) -> pd.DataFrame:
    """Per fact: listed (in how many lists of the k strongest it is), weight (sum of the scores there)."""
    matrix = graph.adjacency(k=k)
    return pd.DataFrame({
        "fact": np.arange(graph.n),
        "listed": np.bincount(matrix.indices, minlength=graph.n),
        "weight": np.bincount(matrix.indices, weights=matrix.data, minlength=graph.n),
    })  # fmt: skip


def hubs(graph: EntanglementGraph, facts: Sequence[Fact], n: int = 10, k: int | None = None) -> pd.DataFrame:
    """The n facts in most lists, with prompt, answer, listed, weight, and the share of the lists that belong to
    facts of their own template."""
    graph.check(facts=facts)
    matrix = graph.adjacency(k=k).T.tocsr()
    template = labels(facts, "template")
    table = in_degrees(graph, k).sort_values(["listed", "weight", "fact"], ascending=[False, False, True])
    rows = []
    for fact, listed, weight in table.head(n).itertuples(index=False):
        sources = matrix.indices[matrix.indptr[fact] : matrix.indptr[fact + 1]]
        own = float(np.mean(template[sources] == template[fact])) if len(sources) else float("nan")
        rows.append({
            "prompt": facts[fact].text, "answer": facts[fact].target, "listed": int(listed),
            "weight": float(weight), "own_template": own,
        })  # fmt: skip
    return pd.DataFrame(rows)


def neighborhood_overlap(a: EntanglementGraph, b: EntanglementGraph, k: int) -> np.ndarray:
    """(n,) Jaccard index of each fact's k strongest in two graphs of the same facts.

    Two random lists of k out of n facts have about k / (2 n - k). Raises DataError for graphs of other facts, or
    with shorter lists than k.
    """
    if a.n != b.n or a.header.get("facts") != b.header.get("facts"):
        raise DataError("the two graphs are of different facts; build both from the same list")
    for graph in (a, b):
        if graph.header["top_k"] is None or graph.header["top_k"] < k:
            raise DataError(f"the lists of {graph.folder} are not {k} long; build it with top_k={k} or more")
    found = np.empty(a.n)
    for i in range(a.n):
        one, two = a.neighbors(i, k)[0], b.neighbors(i, k)[0]
        common = len(np.intersect1d(one, two, assume_unique=True))
        found[i] = common / max(len(one) + len(two) - common, 1)
    return found


def score_sample(score: Score, n_rows: int = 500, seed: int = 0) -> np.ndarray:
    """Scores (n_rows, n) of random facts with all facts, NaN on the diagonal."""
    n = len(score)
    rows = np.sort(np.random.default_rng(seed).choice(n, min(n_rows, n), replace=False))
    found = score.block(rows).cpu().double().numpy()
    found[np.arange(len(rows)), rows] = np.nan
    return found


def threshold_for(score: Score, density: float, n_rows: int = 500, seed: int = 0) -> float:
    """The score that about this share of all pairs reaches, estimated on random rows."""
    if not 0 < density < 1:
        raise ConfigError(f"density = {density}; give a share of pairs between 0 and 1")
    return float(np.nanquantile(score_sample(score, n_rows, seed), 1 - density))


def rank_agreement(a: Score, b: Score, n_rows: int = 200, seed: int = 0) -> tuple[float, np.ndarray]:
    """Spearman correlation of two scores of the same facts: over all pairs of random rows, and per row.

    The first mixes facts that are close to everything with pairs that are close to each other; the second,
    (n_rows,), asks each fact for its ranking of the others.
    """
    if len(a) != len(b):
        raise DataError(f"the scores are of {len(a)} and {len(b)} facts; compare scores of the same facts")
    one, two = score_sample(a, n_rows, seed), score_sample(b, n_rows, seed)
    keep = ~np.isnan(one)
    pooled = float(spearmanr(one[keep], two[keep]).statistic)
    rows = [np.corrcoef(rankdata(x[m]), rankdata(y[m]))[0, 1] for x, y, m in zip(one, two, keep)]
    return pooled, np.array(rows)


def stability(
    graphs: dict[str, EntanglementGraph], scores: dict[str, Score], reference: str, k: int, seed: int = 0,
    n_rows: int = 200,
) -> pd.DataFrame:  # fmt: skip
    """Every graph against the reference: columns variant, overlap (mean Jaccard of the k strongest), spearman
    (all pairs), spearman_row (mean over facts)."""
    rows = []
    for name in graphs:
        pooled, per_row = rank_agreement(scores[reference], scores[name], n_rows, seed)
        overlap = neighborhood_overlap(graphs[reference], graphs[name], k)
        rows.append({
            "variant": name, "overlap": float(overlap.mean()), "spearman": pooled,
            "spearman_row": float(np.nanmean(per_row)),
        })  # fmt: skip
    return pd.DataFrame(rows)


def edge_examples(
    graph: EntanglementGraph, facts: Sequence[Fact], starts: Iterable[int], k: int = 5
) -> pd.DataFrame:
    """The k strongest edges of some facts in words: fact, neighbor, answer, score."""
    graph.check(facts=facts)
    rows = []
    for i in starts:
        for j, w in zip(*graph.neighbors(i, k)):
            rows.append({
                "fact": facts[i].text, "neighbor": facts[j].text, "answer": facts[j].target, "score": float(w)
            })  # fmt: skip
    return pd.DataFrame(rows)


def explorer_frame(
    graphs: dict[str, EntanglementGraph], facts: Sequence[Fact], k: int = 8, digits: int = 3
) -> pd.DataFrame:
    """The data of the book's graph explorer: one row per fact with its k strongest edges in every graph.

    Columns prompt, subject, answer, and per graph "<name> to" (row numbers) and "<name>" (scores), separated by
    blanks. Raises DataError for graphs of other facts.
    """
    columns = {"prompt": [f.prompt for f in facts], "subject": [f.subject for f in facts],
               "answer": [f.target for f in facts]}  # fmt: skip
    for name, graph in graphs.items():
        graph.check(facts=facts)
        near = [graph.neighbors(i, k) for i in range(graph.n)]
        columns[f"{name} to"] = [" ".join(map(str, ends)) for ends, _ in near]
        columns[name] = [" ".join(f"{w:.{digits}f}" for w in weights) for _, weights in near]
    return pd.DataFrame(columns)
