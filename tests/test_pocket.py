"""The pocket companion: its tables belong to it, and a browser computes with it what editkit computes."""

from __future__ import annotations

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from browser import MISSING, Browser, find_browser
from pocket_page import open_page, standalone

from editkit.base.errors import DataError
from editkit.corpora.world import companion as worlds
from editkit.corpora.world.companion import POCKET, load_companion, load_world
from editkit.corpora.world.train import greedy_recall
from editkit.entanglement.similarity import cosine, whitened
from editkit.locate.keys import compute_keys, read_states
from editkit.methods.base import make_editor
from editkit.press import pocket

pytestmark = pytest.mark.xdist_group("pocket")
ALL = "const all = g => { let s; do { s = g.next(); } while (!s.done); return s.value; };"


@pytest.fixture(scope="module")
def lm():
    return load_companion(POCKET)


@pytest.fixture(scope="module")
def page():
    return pocket.page_facts(load_world(POCKET))


@pytest.fixture(scope="module")
def table():
    return pocket.load_table()


@pytest.fixture(scope="module")
def browser(lm):
    program = find_browser()
    if program is None:
        pytest.skip(MISSING)
    made = Browser(program)
    open_page(made)
    assert not made.console
    yield made
    made.close()


def js(browser, code: str):
    """The value of a function body; S is the page's session, all(generator) runs a generator to its end."""
    return browser.evaluate(f"(() => {{ const S = Pocket.session; {ALL} {code} }})()")


def fresh(browser, **settings) -> None:
    js(
        browser,
        f"S.restore(); S.ops = []; S.runs.length = 0; Object.assign(S.settings, {json.dumps(settings)});",
    )


def editor(lm, table, name="memit_seq", layers=(2,), lam=100.0, **options):
    moments = {layer: table[f"moment.{layer}"] for layer in pocket.SITES}
    return make_editor(
        name, lm, statistics=moments, layers=layers, lam=lam, token="last", n_contexts=0, **options
    )


def edit(made, facts, Z) -> dict[str, torch.Tensor]:
    """Write facts towards the columns of Z (m, n); what the editor read and wrote, by name."""
    seen = {}
    made.targets = lambda _: Z
    made.record = lambda key, value: seen.__setitem__(key, value.clone())
    made.edit(facts)
    return seen


# ---------------------------------------------------------------- the files


def test_the_model_is_small_and_knows_its_world(lm):
    assert sum(p.numel() for p in lm.model.parameters()) <= 2_000_000
    statements = load_world(POCKET).statements()[::7]
    hit = greedy_recall(
        lm.model, lm.tokenizer, [s.prompt for s in statements], [s.answer for s in statements]
    )
    assert hit.mean() > 0.97
    weights = (POCKET / "model.safetensors").stat().st_size * 4 / 3  # base64
    assert weights <= 4e6


def test_the_tables_belong_to_the_model_and_the_facts(table, page):
    assert table["z"].shape == (pocket.N_EDITS * pocket.N_CHOICES, 128)
    assert len(page.untouched) == pocket.N_UNTOUCHED
    assert all(
        len({f.target_true, *news}) == 1 + pocket.N_CHOICES for f, news in zip(page.facts, page.choices)
    )
    for layer in pocket.SITES:
        assert torch.linalg.eigvalsh(table[f"moment.{layer}"])[0] > 0


def test_tables_of_another_model_are_refused(tmp_path):
    shutil.copytree(POCKET, tmp_path / "pocket")
    path = tmp_path / "pocket" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-2] + b"\0\0")
    with pytest.raises(DataError, match=r"another model.*editkit pocket"):
        pocket.load_table(tmp_path / "pocket")


def test_the_card_names_the_command_that_made_the_model(tmp_path):
    shutil.copytree(POCKET, tmp_path / "pocket")
    assert worlds.write_card(tmp_path / "pocket").read_text() == (POCKET / "README.md").read_text()
    assert "`editkit train --out DIR --pocket`" in (POCKET / "README.md").read_text()
    setup = json.loads((POCKET / "world.json").read_text())
    assert setup["recipe"] == dataclasses.asdict(worlds.POCKET_RECIPE)
    assert setup["companion"] == dataclasses.asdict(worlds.POCKET_WORLD)


# ---------------------------------------------------------------- the browser against Python


def test_the_tokenizer_cuts_alike(browser, lm, page):
    odd = ["", "It's 12 o'clock, Zürich!", "  two blanks", "end ", "naïve — ☃", "they'll we've I'd"]
    texts = [*(f"{f.text} {f.target}." for f in page.facts), *(" ".join(p) for p in page.untouched), *odd]
    ours = js(browser, f"return {json.dumps(texts)}.map(t => S.tokenizer.encode(t));")
    theirs = lm.tokenizer(texts, add_special_tokens=False)["input_ids"]
    assert [a for a, t in zip(ours, texts) if t] == [b for b, t in zip(theirs, texts) if t]


def test_logits_agree(browser, lm, page):
    fresh(browser)
    for i in (0, 57, 123, 299):
        ours = js(browser, f"return Array.from(S.model.head(S.model.run(S.facts[{i}].key).out, 1));")
        ids = lm.tokenizer(page.facts[i].text, return_tensors="pt", add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            theirs = lm.model(ids).logits[0, -1].double().numpy()
        assert np.abs(np.array(ours) - theirs).max() < 1e-4


@pytest.mark.parametrize("layers, spread", [((2,), "linear_decay"), ((1, 2), "linear_decay"), ((1, 2), "consecutive"),
                                            ((1, 2), "uniform")])  # fmt: skip
def test_keys_and_updates_agree(browser, lm, page, table, layers, spread):
    """The second of two batches with history: keys, residuals and the solved change of every block."""
    made = editor(lm, table, layers=layers, spread=spread)
    fresh(browser, layers=layers, lam=100, history=True, batch=20, spread=spread)
    Z = table["z"][:: pocket.N_CHOICES].T
    try:
        for k in (0, 20):
            seen = edit(made, list(page.facts[k : k + 20]), Z[:, k : k + 20])
            ours = js(
                browser,
                f"""const r = all(S.editor.write(S.facts.slice({k}, {k + 20}).map(f => ({{text: f.key, z: f.z[0]}})),
                S.settings)); return r.map(x => [x.layer, x.keys.map(k => Array.from(k)), Array.from(x.Delta)]);""",
            )
        assert [layer for layer, _, _ in ours] == list(layers)
        for layer, keys, delta in ours:
            K, D = seen[f"K_{layer}"], seen[f"upd_{layer}"]
            assert (torch.tensor(keys).T - K).abs().max() < 1e-5 * K.abs().max()
            assert (torch.tensor(delta).reshape(D.shape) - D).norm() < 1e-5 * D.norm()
    finally:
        made.restore()
        fresh(browser)


@pytest.mark.parametrize("history", [True, False], ids=["history", "no history"])
def test_a_stream_of_a_hundred_keeps_the_same_edits(browser, lm, page, table, history):
    made = editor(lm, table, "memit_seq" if history else "memit")
    fresh(browser, layers=[2], lam=100, history=history, batch=10, spread="linear_decay")
    ours = js(
        browser,
        "all(S.stream(100)); return [S.run.points.at(-1), [...S.written.values()].map(w => +w.holds)];",
    )
    facts, Z = list(page.facts[:100]), table["z"][:: pocket.N_CHOICES].T
    try:
        for k in range(0, 100, 10):
            edit(made, facts[k : k + 10], Z[:, k : k + 10])
        hit = greedy_recall(lm.model, lm.tokenizer, [f.text for f in facts], [f.target for f in facts])
        safe = greedy_recall(lm.model, lm.tokenizer, *zip(*page.untouched, strict=True))
    finally:
        made.restore()
    point, holds = ours
    assert point == {"n": 100, "kept": int(hit.sum()), "untouched": int(safe.sum())}
    assert holds == hit.astype(int).tolist()


def test_what_is_expected_to_move_is_what_editkit_expects(browser, lm, page, table):
    fresh(browser, layers=[2], lam=100, history=True)
    ours = js(browser, "return all(S.expect(0)).slice(0, 299).map(r => [r.place, r.whitened, r.clare]);")
    pairs = [(f.prompt, f.subject) for f in page.facts]
    K = compute_keys(lm, pairs, 2, token="last").T
    H = read_states(lm, pairs, outputs=[lm.block_name(2)], token="last").output[lm.block_name(2)].T
    ours = np.array(ours)
    rest = ours[:, 0].astype(int)
    theirs = whitened(K[:1], table["moment.2"], K[rest], lam=100.0).matrix()[0].numpy()
    np.testing.assert_allclose(ours[:, 1], theirs, atol=1e-5 * theirs.max())
    np.testing.assert_allclose(ours[:, 2], cosine(H[:1], H[rest]).matrix()[0].numpy(), atol=1e-5)


def test_one_batch_and_many_agree_with_history_only(browser):
    apart = {}
    for history in (True, False):
        fresh(browser, layers=[2], lam=100, history=history, batch=20)
        apart[history] = js(browser, "return all(S.compare(100))[0].most;")
    assert apart[True] < 1e-6 < 1e-3 < apart[False]


def test_restore_is_exact(browser):
    fresh(browser, layers=[1, 2], lam=10, history=True, batch=20, spread="linear_decay")
    counts = js(
        browser, "all(S.stream(60)); const n = S.model.changed(); return [n, S.restore(), S.written.size];"
    )
    assert counts[0] > 100_000 and counts[1:] == [0, 0]
    assert standalone().is_file()
