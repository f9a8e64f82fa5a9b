"""Applications of entanglement: facts that an edit keeps, the audit trail, what to re-check first."""

import itertools
import json

import numpy as np
import pytest
import torch
from conftest import SENTENCES

from editkit.base.errors import ConfigError, DataError, RequestError
from editkit.linear.normal import alphaedit_update, memit_update, null_projector
from editkit.locate.keys import compute_keys
from editkit.locate.moments import second_moment
from editkit.methods import EDITORS, make_editor
from editkit.methods.contract import check_editor
from editkit.models.facts import Fact, Probe
from editkit.studies.clare.audit import START, AuditLog, delta_hash, entry_hash, explain
from editkit.studies.clare.preservation import may_be_kept, preservation_set, preserving, preserving_editor
from editkit.studies.clare.redteam import changed_facts, recall_at, recall_curves, recheck_order

CONTEXTS = [["{}"], ["The weather was fine today. {}"]]
Z = {"z_lr": 0.3, "z_steps": 3, "z_clamp_factor": 2.0, "contexts": CONTEXTS}
KEPT = [
    Fact("The city of {} is", "Mary", "Rome", case_id="k0"),
    Fact("{} lives in", "Élise Noël", "Paris", case_id="k1"),
]


@pytest.fixture
def lm(tiny_lm):
    return tiny_lm("gpt2")


@pytest.fixture
def C0(lm):
    found = second_moment(lm, [0, 1], SENTENCES)
    return {layer: c.C + 0.05 * torch.eye(c.d, dtype=torch.float64) for layer, c in found.items()}


def options(name: str) -> dict:
    return {"threshold": 0.5, "ridge": 1.0, **Z} if name == "alphaedit" else {"lam": 10.0, **Z}


# --- preservation -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", ["symmetric", "released"])
@pytest.mark.parametrize("name", ["memit", "alphaedit"])
def test_preserved_facts_are_columns_with_residual_zero(name, solver, lm, C0, facts):
    """Delta solves the normal equations with mu K_p K_p^T beside the prior."""
    seen = {}
    editor = preserving_editor(
        name,
        lm,
        KEPT,
        4.0,
        statistics=C0,
        layers=[0],
        solver=solver,
        record=seen.__setitem__,
        **options(name),
    )
    delta = editor.edit(facts[:2])
    assert delta.metadata["preserved"] == [f.key for f in KEPT] and delta.metadata["preserve_weight"] == 4.0
    K, R, K_p = seen["K_0"], seen["resid_0"], seen["K_kept_0"]
    editor.restore()
    assert torch.equal(K_p, compute_keys(lm, KEPT, 0, token="subject_last"))
    S = 4.0 * K_p @ K_p.T
    if name == "memit":
        expected = memit_update(K, R, C0[0], 10.0, S)
    else:
        expected = alphaedit_update(K, R, null_projector(C0[0], 0.5), S, 1.0)
    assert torch.allclose(seen["upd_0"], expected, rtol=1e-6 if solver == "symmetric" else 2e-3, atol=1e-6)


@pytest.mark.parametrize("name", ["memit", "alphaedit"])
def test_preservation_keeps_the_values_of_its_keys(name, lm, C0, facts):
    moved = {}
    for weight in (0.0, 1.0, 1e4):
        seen = {}
        editor = preserving_editor(
            name, lm, KEPT, weight, statistics=C0, layers=[0], record=seen.__setitem__, **options(name)
        )
        editor.edit(facts[:2])
        editor.restore()
        moved[weight] = float((seen["upd_0"] @ compute_keys(lm, KEPT, 0)).norm())
    assert moved[0.0] > moved[1.0] > moved[1e4] and moved[1e4] < 0.05 * moved[0.0]


@pytest.mark.parametrize("name", ["memit", "memit_seq", "alphaedit", "rect"])
def test_without_a_set_nothing_changes(name, lm, C0, facts):
    plain = make_editor(name, lm, statistics=C0, layers=[0, 1], **options(name))
    first, second = plain.edit(facts[:1]), plain.edit(facts[1:3])
    plain.restore()
    kept = preserving_editor(name, lm, statistics=C0, layers=[0, 1], **options(name))
    assert delta_hash(kept.edit(facts[:1])) == delta_hash(first)
    assert delta_hash(kept.edit(facts[1:3])) == delta_hash(second)
    kept.restore()


@pytest.mark.parametrize("solver", ["symmetric", "released"])
def test_history_holds_each_kept_fact_once(lm, C0, facts, tmp_path, solver):
    editor = preserving_editor(
        "memit_seq", lm, KEPT[:1], 2.0, statistics=C0, layers=[0], solver=solver, **options("memit_seq")
    )
    keys = []
    editor.record = lambda name, value: keys.append(value) if name in ("K_0", "K_kept_0") else None
    editor.edit(facts[:1])
    editor.edit(facts[1:2])
    editor.preserve(KEPT, 2.0)  # one more
    editor.edit(facts[2:3])
    assert [k.shape[1] for k in keys] == [1, 1, 1, 1, 1]  # K, kept, K, K, kept: in the order of reading
    S = sum(weight * k @ k.T for weight, k in zip((1, 2, 1, 1, 2), keys))
    if solver == "symmetric":
        assert torch.allclose(editor.gram(0), 10.0 * C0[0] + S, rtol=1e-9)
    else:
        assert torch.allclose(editor.caches[0].double(), S, rtol=1e-4, atol=1e-5)
    editor.save(tmp_path / "state")
    again = preserving_editor(
        "memit_seq", lm, KEPT, 2.0, statistics=C0, layers=[0], solver=solver, **options("memit_seq")
    )
    editor.restore()
    again.load(tmp_path / "state")
    again.edit(facts[3:])
    third = again.edit([facts[0].replace(prompt="The language of {} is")])
    assert third.metadata["preserved"] == [f.key for f in KEPT]
    if solver == "symmetric":
        assert again.stream(0).engine.n_facts == 5 + 2  # no kept fact was added a second time


@pytest.mark.parametrize("name", ["memit", "alphaedit"])
def test_contract_with_a_set(name, tiny_lm, facts):
    lm = tiny_lm("llama")
    found = second_moment(lm, [0, 1], SENTENCES)
    C0 = {layer: c.C + 0.05 * torch.eye(c.d, dtype=torch.float64) for layer, c in found.items()}

    def factory(lm, **changes):
        return preserving_editor(
            name, lm, KEPT, **{"statistics": C0, "layers": [0, 1], **options(name), **changes}
        )

    check_editor(factory, lm, facts[:3])


def test_refusals(lm, C0, facts):
    editor = preserving_editor("memit", lm, statistics=C0, layers=[0], **options("memit"))
    editor.preserve([facts[0].replace(target="Italy")])
    with pytest.raises(RequestError, match="kept and changed at once"):
        editor.edit(facts[:1])
    with pytest.raises(RequestError, match="are the same"):
        editor.preserve([KEPT[0], KEPT[0]])
    with pytest.raises(ConfigError, match="weight"):
        editor.preserve(KEPT, -1.0)
    with pytest.raises(ConfigError, match=r"no normal equations.*memit"):
        preserving(EDITORS["ft"])
    with pytest.raises(ConfigError, match="did you mean 'memit'"):
        preserving_editor("memitt", lm)


def test_what_may_be_kept():
    edit = Fact(
        "The capital of {} is", "France", "Rome", "Paris", relation="capital", paraphrases=("France's capital is",),
        consequences=(Probe("The tower stands in the capital", "Rome"),),
    )  # fmt: skip
    pool = [
        Fact("The capital of {} is", "France", "Paris"),  # the edit itself, with another answer
        Fact("{} has the capital", "France", "Paris", relation="capital"),  # the same in other words
        Fact("The capital of {} is", "Italy", "Rome"),
        Fact("The {} stands in the capital", "tower", "Paris"),  # a consequence
        Fact("{}'s capital is", "France", "Paris"),  # a paraphrase
        Fact("The anthem of {} is", "France", "Marseillaise"),
    ]
    assert may_be_kept([edit], pool).tolist() == [[False, False, True, False, False, True]]
    scores = torch.tensor([[9.0, 8, 1, 7, 6, 2]])
    assert preservation_set(scores, [edit], pool, 1) == [5]
    assert preservation_set(scores, [edit], pool, 2) == [2, 5]
    two = edit.replace(subject="Italy", paraphrases=(), consequences=())
    assert preservation_set(torch.ones(2, 6), [edit, two], pool, 1) == [5]  # kept by both edits
    with pytest.raises(RequestError, match="2 facts of the pool"):
        preservation_set(scores, [edit], pool, 3)
    with pytest.raises(RequestError, match="shape"):
        preservation_set(scores[0], [edit], pool, 1)


# --- audit --------------------------------------------------------------------------------------------------


@pytest.fixture
def log(tmp_path):
    log = AuditLog(tmp_path / "audit" / "edits.jsonl")
    for i in range(4):
        log.append({"kind": "edit", "editor": "memit", "facts": [
            {"key": f"k{i}", "prompt": "The city of {} is", "subject": f"s{i}", "target": "Rome", "strength": 1.0 + i,
             "entangled": [["x", 0.1 * i]]}
        ]})  # fmt: skip
    return log


def test_chain(log):
    entries = log.entries()
    assert [e["number"] for e in entries] == [0, 1, 2, 3] and entries[0]["previous"] == START
    assert all(b["previous"] == a["hash"] == entry_hash(a) for a, b in itertools.pairwise(entries))
    head = log.head
    log.append({"kind": "note", "text": "é"})
    log.verify(head)
    assert log.entries()[4]["text"] == "é" and len(log) == 5


def rewrite(log, change):
    lines = [json.loads(line) for line in log.path.read_text().splitlines()]
    lines = change(lines)
    log.path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def change_target(lines):
    lines[1]["facts"][0]["target"] = "Paris"
    return lines


@pytest.mark.parametrize(
    "change, match",
    [
        (change_target, "line 2: the entry was changed"),
        (lambda lines: [lines[0], *lines[2:]], "line 2: the entry before it was removed"),
        (lambda lines: [lines[1], lines[0], *lines[2:]], "line 1: the entry before"),
        (lambda lines: [*lines[:2], [1], *lines[2:]], "line 3: not an entry"),
    ],
)
def test_tampering_is_noticed(log, change, match):
    rewrite(log, change)
    with pytest.raises(DataError, match=match):
        log.verify()


def test_cut_off_and_rewritten_logs_lack_the_head(log):
    head = log.head
    rewrite(log, lambda lines: lines[:-1])
    log.verify()
    with pytest.raises(DataError, match="no entry with the hash"):
        log.verify(head)


def test_killed_append(log):
    raw = log.path.read_bytes()
    log.path.write_bytes(raw + b'{"number": 4, "ti')
    for call in (log.entries, lambda: log.append({})):
        with pytest.raises(DataError, match="repair"):
            call()
    assert log.repair() == b'{"number": 4, "ti'
    assert log.path.read_bytes() == raw and log.append({"kind": "note"})["number"] == 4


def test_damaged_end_and_bad_content(log):
    with pytest.raises(DataError, match="not JSON"):
        log.append({"x": float("nan")})
    with pytest.raises(DataError, match="not JSON"):
        log.append({"x": object()})
    assert len(log) == 4
    log.path.write_bytes(log.path.read_bytes() + b"{}\n")
    with pytest.raises(DataError, match="last entry is damaged"):
        log.append({})


def test_explain(log):
    table = explain(log.entries(), [0.95, 0.1, 0.3, 0.0])
    assert table["number"].tolist() == [0, 2, 1, 3]
    assert table["evidence"].tolist() == pytest.approx([0.95, 0.9, 0.2, 0.0])
    assert table["prompt"][0] == "The city of s0 is"
    assert explain(log.entries(), {"k1": 1.0}, key="x")["number"].tolist() == [1, 3, 2, 0]
    assert explain(log.entries(), {})["evidence"].sum() == 0
    log.append({"kind": "note"})
    assert len(explain(log.entries(), np.zeros(4))) == 4
    with pytest.raises(RequestError, match="4 edited facts, 3"):
        explain(log.entries(), np.zeros(3))
    assert next(iter(explain([], []).columns)) == "number"


def test_record_of_an_edit(lm, C0, facts, tmp_path):
    log = AuditLog(tmp_path / "log.jsonl")
    editor = make_editor("memit", lm, statistics=C0, layers=[0], **options("memit"))
    delta = editor.edit(facts[:2])
    entry = log.record(
        delta, facts[:2], strength=[0.5, 2.0], entangled=[[("a", 0.9)], []], checks=[{"p": 1}], layer=0
    )
    assert entry["change"] == delta_hash(delta) and entry["base"] == delta.base and entry["layer"] == 0
    assert entry["facts"][0]["entangled"] == [["a", 0.9]] and entry["facts"][1]["strength"] == 2.0
    assert log.entries() == [entry]
    table = explain(log.entries(), [1.0, 0.5])
    assert len(table) == 1 and table["evidence"][0] == 1.0 and table["target"][0] == facts[1].target
    editor.restore()
    other = editor.edit(facts[2:3])
    assert delta_hash(other) != delta_hash(delta)
    with pytest.raises(RequestError, match="1 strengths"):
        log.record(delta, facts[:2], strength=[1.0])
    with pytest.raises(RequestError, match="lists of entangled"):
        log.record(delta, facts[:2], entangled=[[]])


# --- red-teaming --------------------------------------------------------------------------------------------


def test_recheck_order():
    scores = torch.tensor([[0.0, 0.6, 0.2, 0.5], [0.0, 0.0, 0.9, 0.5]])
    assert recheck_order(scores[0]).tolist() == [1, 3, 2, 0]
    assert recheck_order(scores).tolist() == [2, 3, 1, 0]
    assert recheck_order(scores, strength=[10.0, 0.1]).tolist() == [1, 3, 2, 0]
    assert recheck_order(scores, exclude=[0, 0, 1, 0], budget=2).tolist() == [3, 1]
    with pytest.raises(RequestError, match="2 edits but 1"):
        recheck_order(scores, strength=[1.0])


def test_recall_at():
    changed = np.array([[True, False, False, True]])
    assert recall_at([[4.0, 3, 2, 1]], changed).tolist() == [[0, 0.5, 0.5, 0.5, 1]]
    assert recall_at([[4.0, 1, 2, 3]], changed).tolist() == [[0, 0.5, 1, 1, 1]]
    assert recall_at(np.zeros((1, 4)), changed).tolist() == [[0, 0.25, 0.5, 0.75, 1]]  # guessing
    left_out = recall_at([[4.0, 3, 2, 1]], changed, exclude=[[True, False, False, False]])
    assert left_out.tolist() == [[0, 0, 0, 1, 1]]
    assert np.isnan(recall_at([[1.0, 2]], np.array([[False, False]]))).all()
    with pytest.raises(RequestError, match="one value per pair"):
        recall_at([[1.0, 2]], changed)


def test_changed_facts():
    shift = np.arange(40.0).reshape(2, 20)
    found = changed_facts(shift, 0.9)
    assert found.sum(1).tolist() == [2, 2] and found[0, 18:].all()
    with pytest.raises(RequestError, match="quantile"):
        changed_facts(shift, 1.0)


def test_recall_curves():
    shift = np.random.default_rng(0).random((12, 60))
    changed = changed_facts(shift)
    curves, areas = recall_curves(
        {"oracle": shift, "nothing": 0 * shift}, changed, groups=np.repeat([0, 1, 2], 4)
    )
    areas = areas.set_index("predictor")
    assert areas.loc["oracle", "area"] == pytest.approx(1 - 1.5 / 60, abs=1e-6)
    assert areas.loc["nothing", "area"] == pytest.approx(0.5) and (areas["n"] == 12).all()
    first = curves[curves["predictor"] == "oracle"]
    assert len(first) == 21 and first["recall"].iloc[[0, -1]].tolist() == [0, 1]
    assert ((curves["lo"] <= curves["recall"] + 1e-12) & (curves["recall"] <= curves["hi"] + 1e-12)).all()
    with pytest.raises(RequestError, match="no fact changed"):
        recall_curves({"x": shift}, np.zeros((12, 60), dtype=bool))


def test_what_a_preserved_fact_does_to_the_others():
    """Proposition of book/clare/applications.md: ripple of one edit with one preserved key, for any other key."""
    draw = torch.Generator().manual_seed(3)
    X = torch.randn(8, 30, dtype=torch.float64, generator=draw)
    C, lam, mu = X @ X.T / 30, 2.0, 5.0
    k_i, k_p, k_j, r = (torch.randn(n, 1, dtype=torch.float64, generator=draw) for n in (8, 8, 8, 4))

    def s(a, b):
        return float(a.T @ torch.linalg.solve(lam * C, b))

    def s_new(a, b):
        return s(a, b) - mu * s(a, k_p) * s(k_p, b) / (1 + mu * s(k_p, k_p))

    delta = memit_update(k_i, r, C, lam, mu * k_p @ k_p.T)
    for k in (k_i, k_j, k_p):
        assert torch.allclose(delta @ k, r * s_new(k_i, k) / (1 + s_new(k_i, k_i)))
    assert s_new(k_i, k_p) == pytest.approx(s(k_i, k_p) / (1 + mu * s(k_p, k_p)))
