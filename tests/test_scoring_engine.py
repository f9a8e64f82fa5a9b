"""Teacher-forced scoring against one plain forward pass per text, and generation against a plain loop."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import PEOPLE, TOKENIZERS, make_lm
from hypothesis import given, settings
from hypothesis import strategies as st

from editkit.base.errors import ConfigError, RequestError
from editkit.scoring.engine import batches, next_tokens, prompt_tokens, score_targets, split_tokens
from editkit.scoring.generation import generate, released_text, stop_ids
from editkit.scoring.zsre import next_token_correct, released_prompts

PAIRS = [
    ("The mother tongue of Ana Silva is", "French"),
    ("Karin Ann Fischer was born in the old city of", "Vienna, Italy"),
    ("Li", "plays the violin"),
    ("The mother tongue of Ana Silva is", "German"),
    ("The mother tongue of Ana Silva is French", "and German"),
]


def reference(lm, prompt, answer):
    """Log-probabilities and arg-max of the answer's tokens from one unpadded forward pass."""
    ids, start = split_tokens(lm, [(prompt, answer)])[0]
    logits = lm.model(torch.tensor([ids])).logits[0].double()
    at = logits[start - 1 : len(ids) - 1]
    wanted = torch.tensor(ids[start:])
    return at.log_softmax(-1).gather(1, wanted[:, None])[:, 0].detach().numpy(), at.argmax(-1).numpy()


@pytest.mark.parametrize("options", [
    {}, {"padding_side": "right"}, {"batch_size": 1}, {"token_budget": 30}, {"whole_texts": True},
    {"whole_texts": True, "padding_side": "right", "batch_size": 2},
], ids=str)  # fmt: skip
def test_equals_one_pass_per_text(any_lm, options):
    scores = score_targets(any_lm, PAIRS, **options)
    for (prompt, answer), score in zip(PAIRS, scores, strict=True):
        logprobs, argmax = reference(any_lm, prompt, answer)
        np.testing.assert_allclose(score.logprobs, logprobs, atol=2e-5)
        np.testing.assert_array_equal(score.argmax, argmax)
        assert score.nll == pytest.approx(-logprobs.mean(), abs=2e-5)
        assert score.nll_sum == pytest.approx(-logprobs.sum(), abs=1e-4)
        assert score.token_accuracy == np.mean(score.ids == argmax)


def test_prefixes_share_rows(monkeypatch):
    lm = make_lm()
    rows = []
    forward = lm.model.forward
    monkeypatch.setattr(lm.model, "forward", lambda **k: rows.append(k["input_ids"].shape[0]) or forward(**k))
    prompt = PAIRS[0][0]
    score_targets(lm, [(prompt, "French"), (prompt, "French and German"), (prompt, "French and")])
    assert sum(rows) == 1
    rows.clear()
    score_targets(lm, [(prompt, "French"), (prompt, "French and German")], whole_texts=True)
    assert sum(rows) == 2


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_answer_tokens_are_the_answer(kind):
    lm = make_lm(tokenizer=kind)

    @settings(max_examples=30, deadline=None)
    @given(
        st.sampled_from(PEOPLE), st.sampled_from(["French", "New York", "Hong Kong, Italy", "the old Élise"])
    )
    def check(subject, answer):
        prompt = f"The mother tongue of {subject} is"
        ids, start = split_tokens(lm, [(prompt, answer)])[0]
        assert ids[:start] == prompt_tokens(lm, [prompt])[0]
        assert not set(ids[start:]) & stop_ids(lm)
        if kind != "wordlevel":
            assert lm.tokenizer.decode(ids[start:]).strip() == answer

    check()


def test_a_leading_space_of_the_answer_does_not_matter():
    lm = make_lm()
    a, b = score_targets(lm, [("Li plays the", "violin"), ("Li plays the", " violin")])
    assert a.nll == b.nll and a.ids.tolist() == b.ids.tolist()


@pytest.mark.parametrize("pair, message", [
    (("Li plays the", " "), "empty answer"),
    (("", "violin"), "no tokens"),
    (("Li " * 70, "violin"), "allows 64"),
])  # fmt: skip
def test_unusable_pairs(pair, message):
    with pytest.raises(RequestError, match=message):
        score_targets(make_lm(), [pair])


def test_unusable_options():
    with pytest.raises(ConfigError, match="padding_side"):
        score_targets(make_lm(), PAIRS, padding_side="both")
    with pytest.raises(ConfigError, match="positive"):
        score_targets(make_lm(), PAIRS, batch_size=0)


@given(st.lists(st.integers(1, 50), max_size=30), st.integers(1, 100), st.none() | st.integers(1, 5))
def test_batches_cover_all_within_the_budget(lengths, budget, size):
    made = list(batches(lengths, size, budget))
    assert sorted(i for b in made for i in b) == list(range(len(lengths)))
    for b in made:
        assert len(b) == 1 or len(b) * max(lengths[i] for i in b) <= budget
        assert size is None or len(b) <= size


def greedy(lm, prompt, n, stops=frozenset()):
    """Arg-max continuation without cache, padding or batches."""
    ids = list(prompt_tokens(lm, [prompt])[0])
    for _ in range(n):
        ids.append(int(lm.model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] in stops:
            break
    return tuple(ids)


PROMPTS = [
    "The mother tongue of Ana Silva is",
    "Li",
    "Hugo Castro plays the",
    "The old city of Rome is",
    "Li",
]


def test_greedy_equals_the_plain_loop(any_lm):
    made = generate(any_lm, PROMPTS, max_new_tokens=6, stop=False)
    assert [g.ids for g in made] == [greedy(any_lm, p, 6) for p in PROMPTS]
    assert all(len(g.ids) == g.n_prompt + 6 and not g.stopped for g in made)
    assert next_tokens(any_lm, PROMPTS) == [g.ids[g.n_prompt] for g in made]


def test_rows_of_different_lengths_share_a_batch(any_lm):
    """Top-1 sampling in one ragged batch is the greedy continuation of each prompt."""
    from editkit.scoring.generation import _extend

    rows = prompt_tokens(any_lm, PROMPTS)
    limits = [len(r) + 3 + i for i, r in enumerate(rows)]
    extended, _ = _extend(any_lm, rows, limits, 1, None, frozenset())
    assert [tuple(e) for e in extended] == [greedy(any_lm, p, 3 + i) for i, p in enumerate(PROMPTS)]


def test_own_limit_for_each_prompt():
    lm = make_lm()
    made = generate(lm, PROMPTS, max_new_tokens=[1, 2, 3, 0, 4], stop=False)
    assert [len(g.ids) - g.n_prompt for g in made] == [1, 2, 3, 0, 4]
    with pytest.raises(ConfigError, match="4 entries for 5"):
        generate(lm, PROMPTS, max_new_tokens=[1, 2, 3, 4])


def test_generation_ends_at_the_end_token():
    lm = make_lm()
    free = generate(lm, PROMPTS[:1], max_new_tokens=8, stop=False)[0]
    lm.tokenizer.eos_token = lm.tokenizer.convert_ids_to_tokens(free.ids[free.n_prompt + 2])
    ended = generate(lm, PROMPTS[:1], max_new_tokens=8)[0]
    first = free.ids.index(lm.tokenizer.eos_token_id, free.n_prompt)
    assert ended.stopped and ended.ids == free.ids[: first + 1]


def test_sampling_is_seeded_and_stays_in_the_top_k():
    lm = make_lm()

    def sample(seed, **options):
        generator = torch.Generator().manual_seed(seed)
        made = generate(
            lm, PROMPTS, max_new_tokens=5, top_k=3, generator=generator, n_per_prompt=2, **options
        )
        return [g.ids for g in made]

    one = sample(0)
    assert one == sample(0)
    assert one != sample(1)
    assert len(one) == 2 * len(PROMPTS)
    for ids, prompt in zip(one, [p for p in PROMPTS for _ in range(2)], strict=True):
        start = len(prompt_tokens(lm, [prompt])[0])
        logits = lm.model(torch.tensor([ids])).logits[0]
        for i in range(start, len(ids)):
            assert ids[i] in logits[i - 1].topk(3).indices


@pytest.mark.parametrize("options, message", [
    ({}, "exactly one"),
    ({"max_new_tokens": 3, "max_total_tokens": 9}, "exactly one"),
    ({"max_new_tokens": 3, "top_k": 5}, "seeded generator"),
    ({"max_new_tokens": 3, "top_k": 0}, "at least 1"),
    ({"max_new_tokens": 100}, "holds 64"),
])  # fmt: skip
def test_unusable_generation(options, message):
    with pytest.raises((ConfigError, RequestError), match=message):
        generate(make_lm(), PROMPTS, **options)


def test_total_length_counts_the_prompt():
    lm = make_lm()
    made = generate(lm, PROMPTS, max_total_tokens=12, stop=False)
    assert [len(g.ids) for g in made] == [max(12, g.n_prompt) for g in made]


def test_released_text_keeps_the_prompt_and_drops_the_end_token():
    lm = make_lm(tokenizer="wordlevel")
    ids = lm.tokenizer("Li plays the violin")["input_ids"]
    assert released_text(lm, ids).split() == ["Li", "plays", "the", "violin"]


def test_released_zsre_prompts_and_their_llama_quirks():
    lm = make_lm(tokenizer="bos")
    prompt, answer = "Li was born in", "French German"
    plain = lm.tokenizer(" " + answer)["input_ids"]
    bos, pieces = plain[0], [lm.tokenizer.decode([i]) for i in plain[1:]]
    assert bos == lm.tokenizer.bos_token_id
    branch = released_prompts(lm, prompt, answer, llama=True)
    assert [piece for _, piece in branch] == pieces
    assert branch[0][0] == prompt
    assert all(p.startswith(prompt + "  ") for p, _ in branch[1:])  # the double space of byte-level pieces
    neighborhood = released_prompts(lm, prompt, answer, llama=True, keep_bos=True)
    assert [piece for _, piece in neighborhood] == [lm.tokenizer.decode([bos]), *pieces]
    assert lm.tokenizer.decode([bos]) in neighborhood[1][0]
    clean = make_lm(tokenizer="bytelevel")
    steps = released_prompts(clean, prompt, answer)
    assert "".join(piece for _, piece in steps) == " " + answer
    assert steps[-1][0] + steps[-1][1] == f"{prompt} {answer}"


def test_next_token_correct_reads_the_first_id_of_the_piece():
    lm = make_lm()
    step = ("Li plays the", lm.tokenizer.decode(next_tokens(lm, ["Li plays the"])))
    wrong = ("Li plays the", " violin" if step[1] != " violin" else " guitar")
    assert [c.tolist() for c in next_token_correct(lm, [[step], [wrong, step]])] == [[True], [False, True]]
