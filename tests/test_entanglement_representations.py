"""Representations of facts, and scores as factors."""

from __future__ import annotations

import pytest
import torch
from conftest import MODEL_TYPES, make_lm

from editkit.base.errors import ConfigError, DataError, ModelError, NumericsError, RequestError
from editkit.entanglement import (
    MODULES,
    blocks,
    centered_cosine,
    check_facts,
    cosine,
    represent,
    represent_many,
    whitened,
    whitened_cosine,
)
from editkit.locate.keys import compute_keys, read_states
from editkit.models.facts import Fact

FACTS = [
    Fact("The mother tongue of {} is", "Ana Silva", "French"),
    Fact("{} lives in", "Hugo Castro", "Rome"),
    Fact("Therefore, the instrument that {} plays is the", "Li", "violin"),
    Fact("{} lives in", "Karin Ann Fischer", "Vienna"),
    Fact("{} lives in", "Karin Ann Fischer", "London"),
]


@pytest.mark.parametrize("kind", MODEL_TYPES)
def test_agrees_with_the_states_editors_read(kind):
    lm = make_lm(kind)
    names = [lm.block_name(1), lm.mlp_name(1)]
    states = read_states(lm, FACTS, outputs=names, token="last")
    found = represent_many(lm, FACTS, [1], MODULES)
    for name, module in zip(names, ("block_output", "mlp_output"), strict=True):
        assert torch.allclose(found[1, module].double(), states.output[name].T, atol=1e-5)
    keys = compute_keys(lm, FACTS, 1, token="last")
    assert torch.allclose(found[1, "down_input"].double(), keys.T, atol=1e-5)
    assert found[1, "attn_output"].shape == (5, lm.d_model)
    assert found[1, "block_output"].dtype == torch.float32


def test_batching_and_early_stop_change_nothing():
    lm = make_lm("llama")
    whole = represent(lm, FACTS, 0, token="subject_last")
    assert torch.allclose(represent(lm, FACTS, 0, token="subject_last", tokens_per_batch=1), whole, atol=1e-6)
    assert torch.equal(represent(lm, FACTS, 0, token="subject_last", early_stop=False), whole)


def test_early_stop_skips_the_later_blocks():
    lm = make_lm("llama")
    ran = []
    handle = lm.model.get_submodule(lm.block_name(1)).register_forward_hook(lambda *_: ran.append(1))
    represent(lm, FACTS, 0)
    assert not ran
    represent(lm, FACTS, 0, early_stop=False)
    handle.remove()
    assert ran


def test_mean_and_answer():
    lm = make_lm("llama")
    encoding = lm.encode([FACTS[0].text])
    with torch.no_grad():
        states = lm.model(**encoding, output_hidden_states=True).hidden_states[1][0]
    offsets = encoding.offsets[0]
    real = offsets[:, 1] > offsets[:, 0]
    assert torch.allclose(represent(lm, FACTS[:1], 0, token="mean")[0], states[real].mean(0), atol=1e-5)
    after = represent(lm, FACTS[:1], 0, with_answer=True)
    asked = Fact("The mother tongue of {} is French", "Ana Silva", "x")
    assert torch.equal(after, represent(lm, [asked], 0))
    with pytest.raises(ConfigError, match="before the answer"):
        represent(lm, FACTS, 0, token="subject_last", with_answer=True)
    with pytest.raises(RequestError, match="has no answer"):
        represent(lm, [("{} is", "Li")], 0, with_answer=True)


def test_killed_run_resumes_to_the_same_bits(tmp_path, monkeypatch):
    lm = make_lm("llama")
    whole = represent(lm, FACTS, 0, facts_per_block=2)
    from editkit.entanglement import representations

    calls, read = [], representations._read

    def dies_late(*args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return read(*args)

    monkeypatch.setattr(representations, "_read", dies_late)
    with pytest.raises(KeyboardInterrupt):
        represent(lm, FACTS, 0, facts_per_block=2, folder=tmp_path)
    assert torch.equal(represent(lm, FACTS, 0, facts_per_block=2, folder=tmp_path), whole)
    assert len(calls) == 4  # two finished, one killed, and only that one again
    with pytest.raises(DataError, match="another model"):
        represent(lm, FACTS[:4], 0, facts_per_block=2, folder=tmp_path)


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ([], "empty"),
        ([Fact("no slot", "Li", "x")], "slot"),
        ([("no slot", "Li")], "slot"),
        ([Fact("{} is", " ", "x")], "empty subject"),
        ([("{} is", "")], "empty subject"),
        (["text"], "pair"),
        ([FACTS[0], FACTS[1], FACTS[0]], "facts 0 and 2 are the same"),
        ([FACTS[3], FACTS[4], FACTS[3]], "are the same"),
    ],
)
def test_bad_facts_are_refused(facts, message):
    with pytest.raises(RequestError, match=message):
        check_facts(facts)


def test_bad_places_are_refused():
    lm = make_lm("llama")
    with pytest.raises(ConfigError, match="did you mean 'block_output'"):
        represent(lm, FACTS, 0, module="block")
    with pytest.raises(ConfigError, match="token"):
        represent(lm, FACTS, 0, token="middle")
    with pytest.raises(ModelError, match="does not exist"):
        represent(lm, FACTS, 9)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_scores_match_their_definitions():
    H, Q = draw(5, 7), draw(4, 7, seed=1)
    C = draw(7, 20, seed=2) @ draw(7, 20, seed=2).T / 20
    E = torch.nn.functional.cosine_similarity(H[:, None], Q[None], dim=-1)
    assert torch.allclose(cosine(H, Q).matrix(), E)
    mu = torch.cat([H, Q]).mean(0)
    E = torch.nn.functional.cosine_similarity((H - mu)[:, None], (Q - mu)[None], dim=-1)
    assert torch.allclose(centered_cosine(H, Q).matrix(), E)
    G, a = H @ C.inverse() @ Q.T, (H @ C.inverse() * H).sum(-1)
    assert torch.allclose(whitened(H, C, Q).matrix(), G.abs() / a[:, None])
    M = 3.0 * C
    G, b = H @ M.inverse() @ Q.T, (H @ M.inverse() * H).sum(-1)
    assert torch.allclose(whitened(H, C, Q, lam=3.0).matrix(), G.abs() / (1 + b)[:, None])
    q = (Q @ C.inverse() * Q).sum(-1)
    G = H @ C.inverse() @ Q.T
    assert torch.allclose(whitened_cosine(H, C, Q).matrix(), G.abs() / (a[:, None] * q).sqrt())


@pytest.mark.parametrize("score", [cosine, centered_cosine, lambda H: whitened_cosine(H, torch.eye(7))])
def test_symmetric_scores(score):
    made = score(draw(6, 7))
    whole = made.matrix()
    assert made.symmetric
    assert torch.allclose(whole, whole.T)
    assert torch.allclose(whole.diagonal(), torch.ones(6, dtype=whole.dtype))


def test_whitened_of_itself_is_one():
    score = whitened(draw(6, 7), torch.eye(7))
    assert not score.symmetric
    assert torch.allclose(score.matrix().diagonal(), torch.ones(6, dtype=torch.float64))


def test_blocks_cover_the_matrix():
    score = cosine(draw(7, 5)).to(torch.float32)
    rows = [torch.cat([score.block(r, c) for c in blocks(7, 3)], 1) for r in blocks(7, 3)]
    assert torch.allclose(torch.cat(rows), score.matrix())
    assert score.left is score.right
    with pytest.raises(ConfigError):
        blocks(7, 0)


def test_unusable_numbers_are_refused():
    H = draw(3, 4)
    with pytest.raises(NumericsError, match="zero"):
        cosine(torch.zeros(2, 4))
    with pytest.raises(NumericsError, match="NaN"):
        cosine(H * torch.nan)
    with pytest.raises(NumericsError, match="widths"):
        cosine(H, draw(3, 5))
    with pytest.raises(NumericsError, match="positive definite"):
        whitened(H, torch.zeros(4, 4))
    with pytest.raises(NumericsError, match="width"):
        whitened(H, torch.eye(5))
    with pytest.raises(ConfigError, match="lam"):
        whitened(H, torch.eye(4), lam=0.0)
