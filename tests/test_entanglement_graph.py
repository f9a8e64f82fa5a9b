"""The graph: equal to all pairs by brute force, resumable to the same bytes, refused where it does not fit."""

import base64
import importlib
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import sparse

from editkit.base.errors import ConfigError, DataError, ModelError, NumericsError, RequestError
from editkit.entanglement import graph_io
from editkit.entanglement.authors_schema import all_pairs, import_json, read_json, triplet, write_json
from editkit.entanglement.graph import EntanglementGraph, build_graph, excluded_pairs, prompt_groups
from editkit.entanglement.graph_statistics import (
    assortativity,
    clustering,
    describe,
    edge_examples,
    explorer_frame,
    hubs,
    labels,
    neighborhood_overlap,
    rank_agreement,
    share_equal,
    stability,
    threshold_for,
    undirected,
)
from editkit.entanglement.similarity import cosine, whitened
from editkit.models.facts import Fact

N = 40


@pytest.fixture
def corpus() -> list[Fact]:
    """40 facts of 4 templates; facts 3 and 11 answer one prompt in two ways."""
    facts = [Fact(f"The t{i % 4} of {{}} is", f"s{i // 2}", f"a{i % 7}") for i in range(N)]
    facts[11] = facts[3].replace(target="another")
    return facts


@pytest.fixture
def H() -> torch.Tensor:
    return torch.randn(N, 6, generator=torch.Generator().manual_seed(1))


def brute(H: torch.Tensor, facts: list[Fact]) -> np.ndarray:
    E = cosine(H).matrix().numpy().copy()
    groups = prompt_groups(facts)
    E[groups[:, None] == groups[None]] = -np.inf
    return E


@pytest.mark.parametrize("rows", [1, 7, 40, 100])
def test_lists_of_the_strongest(tmp_path, H, corpus, rows):
    graph = build_graph(tmp_path / "g", cosine(H), facts=corpus, top_k=5, rows=rows)
    E = brute(H, corpus)
    assert graph.n == N and graph.n_edges == 5 * N
    for i in range(N):
        ends, weights = graph.neighbors(i)
        assert ends.tolist() == np.argsort(-E[i], kind="stable")[:5].tolist()
        assert np.allclose(weights, E[i, ends]) and (np.diff(weights) <= 0).all()
        assert graph.neighbors(i, 2)[0].tolist() == ends[:2].tolist()


def test_threshold(tmp_path, H, corpus):
    E = brute(H, corpus)
    graph = build_graph(tmp_path / "g", cosine(H), facts=corpus, threshold=0.4, rows=9)
    dense = graph.adjacency().toarray()
    assert np.array_equal(dense > 0, E >= 0.4) and np.allclose(dense[dense > 0], E[E >= 0.4])
    assert (dense > 0).sum() == graph.n_edges and dense[3, 11] == 0
    both = build_graph(tmp_path / "both", cosine(H), facts=corpus, threshold=0.4, top_k=3)
    assert (both.adjacency().toarray() > 0).sum() == np.minimum((E >= 0.4).sum(1), 3).sum()
    assert np.array_equal(graph.adjacency(threshold=0.6).toarray() > 0, E >= 0.6)


def test_asymmetric_score(tmp_path, H, corpus):
    C = torch.eye(6) + 0.1
    score = whitened(H, C)
    graph = build_graph(tmp_path / "g", score, facts=corpus, top_k=3)
    E = score.matrix().float().numpy().copy()
    E[prompt_groups(corpus)[:, None] == prompt_groups(corpus)[None]] = -1
    assert graph.neighbors(4)[0].tolist() == np.argsort(-E[4])[:3].tolist()
    assert graph.header["symmetric"] is False
    assert len(list(graph.pairs())) == 3 * N


def test_excluded_pairs():
    pairs = excluded_pairs(5, np.array([0, 1, 0, 2, 2]))
    assert {tuple(p) for p in pairs.tolist()} == {
        *((i, i) for i in range(5)), (0, 2), (2, 0), (3, 4), (4, 3)
    }  # fmt: skip
    assert (np.diff(pairs[:, 0]) >= 0).all()
    assert len(excluded_pairs(3, None)) == 3


def _files(folder):
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


@pytest.mark.parametrize("killed_after", [0, 1, 3])
@pytest.mark.parametrize("kwargs", [{"top_k": 4}, {"threshold": 0.3}])
def test_killed_run_resumes_to_the_same_bytes(tmp_path, H, corpus, monkeypatch, killed_after, kwargs):
    kwargs |= {"facts": corpus, "rows": 9}
    whole = build_graph(tmp_path / "whole", cosine(H), **kwargs)
    folder, append, seen = tmp_path / "killed", graph_io.GraphWriter.append, []

    def stop(writer, *block):
        if len(seen) == killed_after:  # killed in the middle of writing
            with open(folder / graph_io.INDICES, "ab") as handle:
                handle.write(b"half of a bl")
            with open(folder / graph_io.JOURNAL, "a") as handle:
                handle.write('{"rows": [0')
            raise KeyboardInterrupt
        seen.append(1)
        append(writer, *block)

    monkeypatch.setattr(graph_io.GraphWriter, "append", stop)
    with pytest.raises(KeyboardInterrupt):
        build_graph(folder, cosine(H), **kwargs)
    with pytest.raises(DataError, match="unfinished"):
        EntanglementGraph.open(folder)
    done = []
    monkeypatch.setattr(
        graph_io.GraphWriter, "append", lambda writer, *block: (done.append(1), append(writer, *block))
    )
    with pytest.raises(DataError, match="another matrices"):
        build_graph(folder, cosine(H + 1), **kwargs)
    build_graph(folder, cosine(H), **kwargs)
    assert len(done) == 5 - killed_after
    assert _files(folder) == _files(whole.folder)


def test_finished_graph_is_opened_not_built(tmp_path, H, corpus, monkeypatch):
    build_graph(tmp_path / "g", cosine(H), facts=corpus, top_k=4)
    monkeypatch.setattr(graph_io.GraphWriter, "append", None)
    build_graph(tmp_path / "g", cosine(H), facts=corpus, top_k=4).verify()
    with pytest.raises(DataError, match="another top_k"):
        build_graph(tmp_path / "g", cosine(H), facts=corpus, top_k=5)


def test_half_precision(tmp_path, H, corpus):
    whole = build_graph(tmp_path / "a", cosine(H), facts=corpus, top_k=4)
    half = build_graph(tmp_path / "b", cosine(H), facts=corpus, top_k=4, dtype="float16")
    assert half.neighbors(0)[0].tolist() == whole.neighbors(0)[0].tolist()
    assert np.allclose(half.weights, whole.weights, atol=1e-3)
    assert (half.folder / "weights.bin").stat().st_size * 2 == (whole.folder / "weights.bin").stat().st_size


def test_empty_graph(tmp_path, H, corpus):
    with pytest.raises(DataError, match=r"empty.*40 facts reaches 1\.5; the highest score is 0\.9"):
        build_graph(tmp_path / "g", cosine(H), facts=corpus, threshold=1.5)
    with pytest.raises(DataError, match="no entanglement graph"):
        EntanglementGraph.open(tmp_path / "g")
    build_graph(tmp_path / "g", cosine(H), facts=corpus, threshold=0.5)  # nothing is left in the way


def test_graph_of_another_model_or_corpus(tmp_path, H, corpus, tiny_lm):
    lm = tiny_lm("gpt2")
    graph = build_graph(tmp_path / "g", cosine(H), facts=corpus, lm=lm, about={"layer": 1}, top_k=4)
    assert EntanglementGraph.open(graph.folder, lm=lm, facts=corpus).header["about"] == {"layer": 1}
    lm.set_matrix(0, lm.get_matrix(0) + 1)
    with pytest.raises(ModelError, match="present weights"):
        EntanglementGraph.open(graph.folder, lm=lm)
    with pytest.raises(DataError, match="another order"):
        EntanglementGraph.open(graph.folder, facts=corpus[::-1])
    nameless = build_graph(tmp_path / "n", cosine(H), top_k=4)
    with pytest.raises(ModelError, match="does not say"):
        nameless.check(lm=lm)


def test_damaged_files(tmp_path, H, corpus):
    graph = build_graph(tmp_path / "g", cosine(H), facts=corpus, top_k=4)
    path = graph.folder / graph_io.WEIGHTS
    raw = bytearray(path.read_bytes())
    raw[5] ^= 1
    path.write_bytes(raw)
    with pytest.raises(DataError, match="has changed"):
        EntanglementGraph.open(graph.folder).verify()
    path.write_bytes(raw[:-4])
    with pytest.raises(DataError, match="cut off"):
        EntanglementGraph.open(graph.folder)
    (graph.folder / graph_io.HEADER).write_text('{"format": "else"}')
    with pytest.raises(DataError, match="not a header"):
        EntanglementGraph.open(graph.folder)


@pytest.mark.parametrize(
    "kwargs, error, match",
    [
        ({}, ConfigError, "top_k"),
        ({"top_k": 40}, ConfigError, "between 1 and 39"),
        ({"threshold": float("nan")}, ConfigError, "finite"),
        ({"top_k": 3, "rows": 0}, ConfigError, "rows"),
        ({"top_k": 3, "dtype": "int8"}, DataError, "float32 or float16"),
    ],
)
def test_bad_requests(tmp_path, H, corpus, kwargs, error, match):
    with pytest.raises(error, match=match):
        build_graph(tmp_path / "g", cosine(H), facts=corpus, **kwargs)


def test_bad_facts_and_scores(tmp_path, H, corpus):
    with pytest.raises(RequestError, match="facts 0 and 39 are the same"):
        build_graph(tmp_path / "g", cosine(H), facts=[*corpus[:-1], corpus[0]], top_k=3)
    with pytest.raises(RequestError, match="39 facts but 40"):
        build_graph(tmp_path / "g", cosine(H), facts=corpus[:-1], top_k=3)
    with pytest.raises(ConfigError, match="n by n"):
        build_graph(tmp_path / "g", cosine(H, H[:3]), top_k=3)
    broken = cosine(H)
    broken.left[2, 2] = torch.nan
    with pytest.raises(NumericsError, match="NaN"):
        build_graph(tmp_path / "g", broken, top_k=3)
    with pytest.raises(RequestError, match="facts 0 to 39"):
        build_graph(tmp_path / "h", cosine(H), top_k=3).neighbors(40)


# --- the authors' schema ------------------------------------------------------------------------------------


def test_key_of_the_released_graphs():
    """First row of the corpus, key from its README (clare.md section 5)."""
    first = Fact("The type of music that {} plays is", "P. G. Wodehouse", "comedy")
    assert triplet(first) == {
        "key": "9bdc7eaa829f405df1bd8e56cd67223e", "prompt": "The type of music that {} plays is",
        "subject": "P. G. Wodehouse", "answer": "comedy",
        "formatted": "The type of music that P. G. Wodehouse plays is -> comedy",
    }  # fmt: skip


def test_all_pairs_there_and_back(tmp_path, H, corpus):
    score = cosine(H)
    path = write_json(tmp_path / "all.json", corpus, score)
    plain = json.loads(path.read_text())
    assert set(plain) == {"triplets", "entanglement_metrics"} and len(plain["triplets"]) == N
    assert len(plain["entanglement_metrics"]) == N * (N - 1) // 2
    pair = f"{corpus[2].key}:{corpus[5].key}"
    value = plain["entanglement_metrics"][pair]["value"]["cosine_sim"]
    assert value == pytest.approx(float(score.matrix()[2, 5]), abs=1e-6)
    facts, pairs, values = read_json(path)
    assert [(f.prompt, f.subject, f.target) for f in facts] == [
        (f.prompt, f.subject, f.target) for f in corpus
    ]
    assert np.allclose(values, score.matrix().numpy()[pairs[:, 0], pairs[:, 1]])
    graph, facts = import_json(path, tmp_path / "imported", top_k=5)
    built = build_graph(tmp_path / "built", score, facts=corpus, top_k=5)
    assert np.array_equal(graph.indices, built.indices) and np.allclose(graph.weights, built.weights)
    assert graph.header["score"] == "cosine_sim" and graph.header["about"] == {"source": "CLaRE schema"}


def test_edges_of_a_graph_there_and_back(tmp_path, H, corpus):
    graph = build_graph(tmp_path / "g", cosine(H), facts=corpus, threshold=0.4)
    write_json(tmp_path / "edges.json", corpus, graph)
    again, _ = import_json(tmp_path / "edges.json", tmp_path / "again", threshold=0.4)
    assert np.array_equal(graph.indptr, again.indptr)
    assert np.array_equal(graph.adjacency().toarray(), again.adjacency().toarray())
    with pytest.raises(DataError, match="other facts"):
        write_json(tmp_path / "x.json", corpus[::-1], graph)
    with pytest.raises(DataError, match="empty"):
        import_json(tmp_path / "edges.json", tmp_path / "none", threshold=2.0)


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_streaming_reader_cuts_anywhere(tmp_path, H, corpus, monkeypatch, chunk):
    monkeypatch.setattr("editkit.entanglement.authors_schema._CHUNK", chunk)
    monkeypatch.setattr("editkit.entanglement.authors_schema._LONGEST", 10_000)
    few = corpus[:5]
    text = json.dumps({
        "about": [1, {"x": "{"}], "entanglement_metrics": {
            f"{few[i].key}:{few[j].key}": {"value": {"cosine_sim": i - j / 8}} for i in range(5) for j in range(i)
        }, "triplets": [triplet(f) for f in few],
    }, indent=1)  # fmt: skip
    path = tmp_path / "a.json"
    path.write_text(text)
    facts, pairs, values = read_json(path)
    assert [f.key for f in facts] == [f.key for f in few]
    assert {(i, j): v for (i, j), v in zip(pairs.tolist(), values.tolist())} == {
        (i, j): i - j / 8 for i in range(5) for j in range(i)
    }


@pytest.mark.parametrize(
    "text, match",
    [
        ('{"triplets": [{"key": "a"}]}', "lacks 'prompt'"),
        ('{"triplets": [{"key": "a", "prompt": "{} x", "subject": "s", "answer": "t"}]}', "not the md5"),
        ('{"triplets": [], "entanglement_metrics": {"a:b": {"value": {}}}}', "no value.cosine_sim"),
        ('{"triplets": [], "entanglement_metrics": {"a:b": {"value": {"cosine_sim": "x"}}}}', "not a number"),
        ('{"triplets": [], "entanglement_metrics": {"a:b": {"value": {"cosine_sim": 1}}}}', "none of its 0"),
        ('{"triplets": [', "ends too early"),
        ("[1]", "expected"),
        ('{"triplets": [tru', "not valid JSON"),
    ],
)
def test_bad_files_of_the_schema(tmp_path, text, match):
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(DataError, match=match):
        read_json(path)


def test_schema_needs_symmetric_scores_and_known_pairs(tmp_path, H, corpus):
    with pytest.raises(ConfigError, match="not symmetric"):
        next(all_pairs(whitened(H, torch.eye(6))))
    with pytest.raises(DataError, match="does not exist"):
        write_json(tmp_path / "a.json", corpus, [(0, N, 0.5)])
    once = write_json(tmp_path / "b.json", corpus, [(0, 1, 0.5), (1, 0, 0.5)])
    with pytest.raises(DataError, match="twice"):
        import_json(once, tmp_path / "g")


# --- statistics ---------------------------------------------------------------------------------------------


def ring(n: int, chords: list[tuple[int, int]] = ()) -> sparse.csr_array:
    edges = [(i, (i + 1) % n) for i in range(n)] + list(chords)
    rows, columns = zip(*edges)
    return undirected(sparse.csr_array((np.ones(len(edges)), (rows, columns)), shape=(n, n)))


def test_clustering_of_known_graphs():
    assert clustering(ring(3)) == 1.0 and clustering(ring(6)) == 0.0
    # a square with one diagonal: two facts with coefficient 1, two with 2/3
    assert clustering(ring(4, [(0, 2)])) == pytest.approx((1 + 1 + 2 / 3 + 2 / 3) / 4)
    assert clustering(ring(6, [(0, 2), (2, 4), (0, 4)]), n_sample=3, seed=1) > 0
    assert np.isnan(clustering(sparse.csr_array((3, 3))))


def test_assortativity_of_known_graphs():
    four = ring(4)
    assert assortativity(four, np.array([0, 1, 0, 1])) == pytest.approx(-1.0)
    assert share_equal(four, np.array([0, 1, 0, 1])) == 0.0
    two_parts = sparse.block_diag([ring(3), ring(3)], format="csr")
    assert assortativity(two_parts, np.array([0, 0, 0, 1, 1, 1])) == pytest.approx(1.0)
    assert np.isnan(assortativity(four, np.zeros(4, dtype=int)))


def test_describe(tmp_path, H, corpus):
    graph = build_graph(tmp_path / "g", cosine(H), facts=corpus, threshold=0.3)
    E = brute(H, corpus)
    table = describe(graph, corpus, thresholds=[0.3, 0.8, 5.0])
    for row, t in zip(table.itertuples(), (0.3, 0.8)):
        degrees = (t <= E).sum(1)
        assert row.pairs * 2 == degrees.sum() and row.mean_degree == pytest.approx(degrees.mean())
        assert row.max_degree == degrees.max() and row.isolated == (degrees == 0).sum()
        template = labels(corpus, "template")
        i, j = np.nonzero(t <= E)
        assert row.other_template == pytest.approx(np.mean(template[i] != template[j]))
    assert table["components"][1] >= table["components"][0] and table["giant"][0] >= table["giant"][1]
    assert table["pairs"][2] == 0 and table["components"][2] == N and np.isnan(table["clustering"][2])
    with pytest.raises(ConfigError, match="below"):
        describe(graph, corpus, thresholds=[0.1])
    with pytest.raises(DataError, match="other facts"):
        describe(graph, corpus[::-1])
    with pytest.raises(ConfigError, match="kind"):
        labels(corpus, "color")


def test_hubs(tmp_path, corpus):
    """A fact in the direction of the mean is in every list."""
    X = torch.randn(N, 40, generator=torch.Generator().manual_seed(0)) + 0.3
    X[7] = 1.0
    graph = build_graph(tmp_path / "g", cosine(X), facts=corpus, top_k=3)
    table = hubs(graph, corpus, 2)
    assert table["prompt"][0] == corpus[7].text and table["listed"][0] > N / 2
    assert table["listed"][0] >= table["listed"][1] and 0 <= table["own_template"][0] <= 1
    shown = edge_examples(graph, corpus, [0, 5], 2)
    assert len(shown) == 4 and shown["fact"][0] == corpus[0].text


def test_stability(tmp_path, H, corpus):
    noisy = cosine(H + 0.1 * torch.randn(N, 6, generator=torch.Generator().manual_seed(2)))
    other = cosine(torch.randn(N, 6, generator=torch.Generator().manual_seed(3)))
    scores = {"same": cosine(2 * H), "noisy": noisy, "other": other}
    graphs = {name: build_graph(tmp_path / name, s, facts=corpus, top_k=5) for name, s in scores.items()}
    table = stability(graphs, scores, "same", 5).set_index("variant")
    assert table.loc["same", "overlap"] == 1.0 and table.loc["same", "spearman"] == pytest.approx(1.0)
    for column in ("overlap", "spearman", "spearman_row"):
        assert table.loc["same", column] > table.loc["noisy", column] > table.loc["other", column]
    with pytest.raises(DataError, match="not 9 long"):
        neighborhood_overlap(graphs["same"], graphs["noisy"], 9)
    with pytest.raises(DataError, match="same facts"):
        rank_agreement(scores["same"], cosine(H[:5]))
    with pytest.raises(DataError, match="different facts"):
        neighborhood_overlap(graphs["same"], build_graph(tmp_path / "x", cosine(H), top_k=5), 5)


def test_threshold_for_a_density(H, corpus):
    t = threshold_for(cosine(H), 0.1)
    E = cosine(H).matrix().numpy()
    share = ((t <= E).sum() - N) / (N * (N - 1))
    assert share == pytest.approx(0.1, abs=0.01)
    with pytest.raises(ConfigError, match="density"):
        threshold_for(cosine(H), 2.0)


def test_benchmark_of_all_pairs():
    script = Path(__file__).parents[1] / "benchmarks" / "all_pairs.py"
    if not script.is_file():
        pytest.skip("benchmarks are not part of this installation")
    spec = importlib.util.spec_from_file_location("benchmark_all_pairs", script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    args = module.parse(["--n", "300", "--widths", "16", "--top-k", "4", "--repeats", "2"])
    found = module.run(args)["widths"]["16"]
    assert found["edges"]["top_k"] == 1200 and found["pairs"] == 300 * 299 // 2
    assert found["edges"]["threshold"] == pytest.approx(0.005 * 300 * 299, rel=0.3)
    assert set(found["ratio"]["wall"]) == set(found["ratio"]["processor"]) == {"top_k", "threshold"}


def test_explorer_frame(tmp_path, H, corpus):
    graph = build_graph(tmp_path / "g", cosine(H), facts=corpus, top_k=5)
    frame = explorer_frame({"cosine": graph}, corpus, k=3)
    assert list(frame.columns) == ["prompt", "subject", "answer", "cosine to", "cosine"] and len(frame) == N
    ends, weights = graph.neighbors(7, 3)
    assert [int(x) for x in frame["cosine to"][7].split()] == ends.tolist()
    assert [float(x) for x in frame["cosine"][7].split()] == pytest.approx(weights.tolist(), abs=1e-3)


def test_payload_of_the_explorer(tmp_path, H, corpus, monkeypatch):
    """The book packs what explorer_frame gives; numbers survive up to the 255 steps of a score."""
    folder = Path(__file__).parents[1] / "book" / "_ext"
    if not folder.is_dir():
        pytest.skip("the book is not part of this installation")
    monkeypatch.syspath_prepend(str(folder))
    packed = importlib.import_module("companion_explorer").packed
    short = build_graph(tmp_path / "t", cosine(H), facts=corpus, threshold=0.7)
    long = build_graph(tmp_path / "g", cosine(H), facts=corpus, top_k=5)
    rows = explorer_frame({"long": long, "short": short}, corpus, k=4).to_dict("records")
    data = packed(rows)
    part = np.frombuffer(base64.b64decode(data["facts"]), "<u2").reshape(N, 3)
    fact = corpus[9]
    assert (data["prompts"][part[9, 0]], data["subjects"][part[9, 1]], data["answers"][part[9, 2]]) == (
        fact.prompt, fact.subject, fact.target
    )  # fmt: skip
    for score, graph in zip(data["scores"], (long, short)):
        to = np.frombuffer(base64.b64decode(score["to"]), "<u2").reshape(N, score["k"])
        strength = np.frombuffer(base64.b64decode(score["strength"]), "u1").reshape(N, score["k"])
        for i in range(N):
            ends, weights = graph.neighbors(i, score["k"])
            assert to[i, : len(ends)].tolist() == ends.tolist() and (to[i, len(ends) :] == 0xFFFF).all()
            found = score["low"] + strength[i, : len(ends)] / 255 * (score["high"] - score["low"])
            assert np.allclose(found, weights, atol=2e-3)
    plain = {part: rows[0][part] for part in ("prompt", "subject", "answer")}
    for bad, match in (
        ([], "rows"),
        ([{"prompt": "x"}], "columns"),
        ([plain], "no score"),
        ([{**rows[0], "long to": "99 1 2 3"}], "no row"),
        ([{**rows[0], "long": "0.5"}], "as many"),
    ):
        with pytest.raises(ValueError, match=match):
            packed(bad)


def test_explorer_in_a_browser(tmp_path, H, corpus, monkeypatch):
    """Search, follow a neighbor, go back, change the score: from the file system, without network."""
    browser = pytest.importorskip("browser")
    program = browser.find_browser()
    folder = Path(__file__).parents[1] / "book" / "_ext"
    if program is None or not folder.is_dir():
        pytest.skip(browser.MISSING)
    monkeypatch.syspath_prepend(str(folder))
    module = importlib.import_module("companion_explorer")
    corpus[5] = corpus[5].replace(subject="Élise Noël")
    scores = {"cosine": cosine(H), "centered": cosine(H - H.mean(0))}
    graphs = {name: build_graph(tmp_path / name, s, facts=corpus, top_k=4) for name, s in scores.items()}
    rows = explorer_frame(graphs, corpus, k=4).to_dict("records")
    data = module.packed(rows) | {"note": "A note.", "start": "s9 t2"}
    module.RunExplorer.write(tmp_path / "data.js", data)
    page = tmp_path / "page.html"
    page.write_text(
        '<meta charset=utf-8><main><div id=x></div><script defer src="data.js" data-explorer=x></script>'
    )
    shown = "document.querySelector('.ek-explorer-head').textContent"
    first = "document.querySelector('.ek-explorer-columns button')"
    window = browser.Browser(program)
    try:
        window.open(page)
        assert not window.console
        assert window.evaluate(shown) == f"{corpus[18].text} {corpus[18].target}"
        ends, weights = graphs["cosine"].neighbors(18)
        strength = window.evaluate(f"{first}.querySelector('.ek-explorer-score').textContent")
        assert float(strength) == pytest.approx(float(weights[0]), abs=0.01)
        window.evaluate(f"{first}.click()")
        assert window.evaluate(shown) == f"{corpus[ends[0]].text} {corpus[ends[0]].target}"
        window.evaluate("document.querySelector('.ek-explorer-small').click()")
        assert window.evaluate(shown) == f"{corpus[18].text} {corpus[18].target}"
        window.evaluate(
            "(s => { s.value = 1; s.dispatchEvent(new Event('change')); })(document.querySelector('select'))"
        )
        other = corpus[graphs["centered"].neighbors(18)[0][0]]
        assert window.evaluate(f"{first}.textContent").startswith(f"{other.text} {other.target}")
        window.evaluate(
            "(f => { f.value = 'elise noel'; f.dispatchEvent(new Event('input')); })(document.querySelector('input'))"
        )
        hits = window.evaluate(
            "[...document.querySelectorAll('.ek-explorer-hits li')].map(e => e.textContent)"
        )
        assert hits == [f"{corpus[5].text} {corpus[5].target}"]
    finally:
        window.close()
