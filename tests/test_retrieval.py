"""Plain retrieval: nearest prompts, answers token by token, batches, decoding, files."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from editkit.base.errors import ConfigError, ModelError
from editkit.methods import make_editor
from editkit.methods.memory.token_index import TokenIndex
from editkit.scoring import generate, score_targets

TEXTS = ["the weather was fine today", "you can see the old house", "near the river"]


def make(lm, **changes):
    return make_editor("retrieval", lm, background=TEXTS, **changes)


def test_index_against_scikit_learn():
    from sklearn.feature_extraction.text import TfidfVectorizer

    texts = ["a b b c", "c d", "a d d e"]
    vector = TfidfVectorizer(token_pattern=r"\w").fit(texts)
    names = list(vector.get_feature_names_out())
    index = TokenIndex(len(names), [[names.index(w) for w in t.split()] for t in texts])
    query = "a b e e"
    expected = (vector.transform([query]) @ vector.transform(texts).T).toarray()[0]
    best, cosine = index.find([[names.index(w) for w in query.split()]], n=3)
    assert best[0].tolist() == np.argsort(-expected).tolist()
    np.testing.assert_allclose(cosine[0], np.sort(expected)[::-1])


def test_an_empty_index_finds_nothing():
    best, cosine = TokenIndex(5).find([[1, 2]])
    assert best.shape == cosine.shape == (1, 0)


@pytest.mark.parametrize("by", ["states", "tokens"])
def test_answers_are_said_and_the_rest_stays(any_lm, facts, by):
    texts = [f.text for f in facts]
    other = "You can see the old house near"
    before = any_lm.logits(any_lm.encode([other]))
    editor = make(any_lm, by=by, threshold=0.99)
    editor.edit(facts)
    for side in ("left", "right"):
        found = score_targets(any_lm, [(f.text, f.target) for f in facts], padding_side=side)
        assert all(s.correct.all() and s.nll < 0.01 for s in found)
    wrong = score_targets(any_lm, [(facts[0].text, facts[1].target)])[0]
    assert not wrong.correct[0]
    for text, fact in zip(generate(any_lm, texts, max_new_tokens=6), facts, strict=True):
        assert text.text.strip().startswith(fact.target)
    torch.testing.assert_close(any_lm.logits(any_lm.encode([other])), before)
    editor.restore()


def test_the_latest_answer_wins_and_streams_resume(tiny_lm, facts, tmp_path):
    lm = tiny_lm("llama")
    editor = make(lm)
    editor.edit(facts[:2])
    editor.edit([facts[0].replace(target="Spanish")])
    assert len(editor.answers) == 2
    [found] = score_targets(lm, [(facts[0].text, "Spanish")])
    assert found.correct.all()
    path = editor.save(tmp_path / "r.safetensors")
    editor.restore()
    again = make(lm)
    again.load(path)
    again.edit(facts[2:])
    found = score_targets(lm, [(facts[0].text, "Spanish"), *((f.text, f.target) for f in facts[1:])])
    assert all(s.correct.all() for s in found)


def test_bad_input(tiny_lm):
    with pytest.raises(ModelError, match="layer 8 does not exist"):
        make(tiny_lm("llama"), layer=8)
    with pytest.raises(ConfigError, match="at most 1"):
        make(tiny_lm("llama"), threshold=1.5)
