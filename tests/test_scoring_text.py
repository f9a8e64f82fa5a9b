"""Text statistics against figures derived by hand."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from conftest import make_lm

from editkit.base.errors import ConfigError, DataError, RequestError
from editkit.models.facts import Fact
from editkit.scoring import TfIdf, confident_share, ngram_entropy, perplexity, score_text
from editkit.scoring.text import same_answer, text_logprobs, words


@pytest.mark.parametrize("text, entropy", [
    ("a a a a", 0.0),  # one 2-gram, one 3-gram
    ("a b", 0.0),  # a single 2-gram, no 3-gram
    ("", 0.0),
    ("a b c d e", (2 / 3 * 2 + 4 / 3 * np.log2(3)) / 2),  # 4 different 2-grams, 3 different 3-grams
    ("a b a b", (2 / 3 * (np.log2(3) - 2 / 3) + 4 / 3 * 1) / 2),  # ab twice, ba once; aba, bab
])  # fmt: skip
def test_ngram_entropy(text, entropy):
    assert ngram_entropy(text) == pytest.approx(entropy, abs=1e-12)


def test_words_splits_sentences_and_contractions():
    assert words("He said: it's fine. Then he left.") == [
        "He", "said", ":", "it", "'s", "fine", ".", "Then", "he", "left", "."]  # fmt: skip


@pytest.mark.parametrize("a, b, same", [
    ("The  New York!", "new york", True), ("an Apple", "apple", True), ("Paris", "Rome", False),
    ("", "the", True),
])  # fmt: skip
def test_same_answer(a, b, same):
    assert same_answer(a, b) is same


def test_tfidf_by_hand():
    # Two texts; "cat" is in both: idf = ln(3/3) + 1 = 1, the others: ln(3/2) + 1.
    rare = np.log(1.5) + 1
    weights = TfIdf.fit(["The cat", "a cat sat"])
    assert dict(weights.vocabulary) == {"cat": 0, "sat": 1, "the": 2}  # "a" is too short
    np.testing.assert_allclose(weights.idf, [1, rare, rare])
    expected = 1 / np.sqrt(1 + rare**2)
    assert weights.similarity("cat", "CAT sat") == pytest.approx(expected)
    assert weights.similarity("cat", "dog") == 0
    again = TfIdf(weights.vocabulary, weights.idf)
    assert again.similarity("cat", "cat sat") == pytest.approx(expected)


def test_tfidf_refuses_what_does_not_fit():
    with pytest.raises(DataError, match="do not fit"):
        TfIdf({"cat": 0}, np.ones(2))
    with pytest.raises(DataError, match="reference texts"):
        TfIdf.fit(["a", ""])


def test_tfidf_weights_of_the_recordings(golden_dir):
    data = json.loads((golden_dir / "models" / "data.json").read_text())
    case = json.loads((golden_dir / "metrics" / "gpt2" / "case.json").read_text())
    weights = TfIdf.fit(data["train_sentences"] + data["filler_sentences"])
    assert dict(weights.vocabulary) == case["tfidf_vocabulary"]
    with np.load(golden_dir / "metrics" / "gpt2" / "arrays.npz") as arrays:
        np.testing.assert_allclose(weights.idf, arrays["tfidf_idf"], rtol=1e-12)


TEXTS = ["The old house near the river.", "Hugo Castro plays the violin and lives in Rome.", "Li speaks"]


@pytest.mark.parametrize("options", [{}, {"padding_side": "left"}, {"batch_size": 1}], ids=str)
def test_perplexity_is_the_definition(any_lm, options):
    for i, text in enumerate(TEXTS):
        ids = torch.tensor([any_lm.tokenizer(text)["input_ids"]])
        loss = any_lm.model(ids, labels=ids).loss.item()  # the mean over the N - 1 predicted tokens
        n = ids.shape[1]
        assert np.log(perplexity(any_lm, TEXTS, **options)[i]) == pytest.approx(loss, abs=2e-5)
        released = np.log(perplexity(any_lm, TEXTS, divisor="n", **options)[i])
        assert released == pytest.approx(loss * (n - 1) / n, abs=2e-5)


def test_confident_share_counts_tokens_over_the_threshold():
    lm = make_lm()
    probs = [np.exp(lp) for lp in text_logprobs(lm, TEXTS)]
    threshold = float(np.median(np.concatenate(probs)))
    expected = [np.mean(p > threshold) for p in probs]
    np.testing.assert_allclose(confident_share(lm, TEXTS, threshold=threshold), expected)
    assert 0 < np.mean(expected) < 1


def test_truncation():
    lm = make_lm()
    whole, cut = text_logprobs(lm, TEXTS[:1]), text_logprobs(lm, TEXTS[:1], max_length=4)
    assert len(cut[0]) == 3
    np.testing.assert_allclose(cut[0], whole[0][:3], atol=1e-5)


def test_unusable_texts():
    lm = make_lm()
    with pytest.raises(RequestError, match="fewer than two"):
        perplexity(lm, ["a"])
    with pytest.raises(RequestError, match="max_length"):
        perplexity(lm, ["old house " * 50])
    with pytest.raises(ConfigError, match="released code"):
        perplexity(lm, TEXTS, divisor="N")


@pytest.fixture
def spoken():
    return [
        Fact("{} plays the", "Li", "violin", case_id="a", generation=("Li plays the", "Li is"),
             reference=("The violin is old.", "Li lives in Rome.")),
        Fact("{} plays the", "Hugo Castro", "guitar", case_id="b", generation=("Hugo Castro is",)),
        Fact("{} plays the", "Ana Silva", "guitar", case_id="c"),
    ]  # fmt: skip


def test_score_text(spoken):
    lm = make_lm()
    table = score_text(lm, spoken, seed=3, max_total_tokens=20)
    assert table["fact_id"].tolist() == ["a", "b"]
    assert table["text"][0].startswith("Li plays the") and "Li is" in table["text"][0]
    assert np.isnan(table["consistency"][1]) and 0 <= table["consistency"][0] <= 1
    assert table["fluency"][1] == pytest.approx(ngram_entropy(table["text"][1]))
    assert table.equals(score_text(lm, spoken, seed=3, max_total_tokens=20))
    assert table["text"][0] != score_text(lm, spoken, seed=4, max_total_tokens=20)["text"][0]
    alone = score_text(lm, spoken[1:], seed=3, max_total_tokens=20)
    assert alone["text"][0] == table["text"][1]  # a fact's sample does not depend on its company


def test_score_text_needs_prompts(spoken):
    with pytest.raises(DataError, match=r"Fact\.generation"):
        score_text(make_lm(), spoken[2:], seed=0)
