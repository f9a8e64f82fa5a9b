"""Prompt and answer as one text and as tokens: one rule for editors, probes, scores and generation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import TOKENIZERS, make_lm
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from editkit.base.errors import RequestError
from editkit.locate.contexts import ContextTemplates
from editkit.locate.keys import compute_keys
from editkit.locate.target_rows import encode_targets
from editkit.models.answers import prompt_tokens, split_tokens
from editkit.models.facts import Fact, Probe
from editkit.models.joining import NO_SPACE, gap, join
from editkit.models.lm import LM
from editkit.scoring.engine import score_targets
from editkit.scoring.generation import generate
from editkit.scoring.protocols import score
from editkit.scoring.text import perplexity


@pytest.mark.parametrize("prompt, answer, text", [
    ("The capital of France is", "Lyon", "The capital of France is Lyon"),
    ("Italy's capital,", "Rome", "Italy's capital, Rome"),
    ("The award he won is", "'Auster'", "The award he won is 'Auster'"),
    ("法国的首都是", "里昂", "法国的首都是里昂"),
    ("法国的首都是", "Lyon", "法国的首都是Lyon"),
    ("法国的首都是：", "里昂", "法国的首都是：里昂"),
    ("法国的人口是", "68", "法国的人口是68"),
    ("我最喜欢的歌手是Taylor", "Swift", "我最喜欢的歌手是Taylor Swift"),
    ("The capital of France in Chinese is", "里昂", "The capital of France in Chinese is 里昂"),
    ("フランスの首都は", "リヨン", "フランスの首都はリヨン"),
    ("เมืองหลวงของฝรั่งเศสคือ", "ลียง", "เมืองหลวงของฝรั่งเศสคือลียง"),
    ("프랑스의 수도는", "리옹", "프랑스의 수도는 리옹"),
    ("عاصمة فرنسا هي", "ليون", "عاصمة فرنسا هي ليون"),
    ("फ्रांस की राजधानी है", "ल्यों", "फ्रांस की राजधानी है ल्यों"),
    ("The flag of France is", "🇫🇷", "The flag of France is 🇫🇷"),
    ("法国的国旗是", "🇫🇷", "法国的国旗是🇫🇷"),
    ("I like 🍕", "pizza", "I like 🍕 pizza"),
    ("The capital (", "Lyon", "The capital (Lyon"), ("the old town (Lyon)", "is", "the old town (Lyon) is"),
    ('He said: "', "Lyon", 'He said: "Lyon'), ('The city "Lyon"', "is", 'The city "Lyon" is'),
    ("Sie sagte: „", "Lyon", "Sie sagte: „Lyon"), ("Sie sagte: „Lyon“", "und", "Sie sagte: „Lyon“ und"),
    ("the players'", "wives", "the players' wives"), ("La capitale de l'", "Italie", "La capitale de l'Italie"),
    ("self-", "made", "self-made"), ("Answer -", "Lyon", "Answer - Lyon"),
    ("Q: the capital?\nA:\n", "Lyon", "Q: the capital?\nA:\nLyon"), ("France\t", "Lyon", "France\tLyon"),
    ("It costs $", "100", "It costs $100"), ("It costs 100 €", "today", "It costs 100 € today"),
    ("the answer", ")", "the answer)"),
    ("The capital of France is ", "Lyon", "The capital of France is Lyon"),
    ("plays the vio", NO_SPACE + "lin", "plays the violin"), ("法国的首都是", " Lyon", "法国的首都是 Lyon"),
])  # fmt: skip
def test_the_space_is_that_of_the_prompts_language(prompt, answer, text):
    assert join(prompt, answer) == text


FACTS = [
    Fact("{}的首都是", "法国", "里昂", "巴黎", case_id="zh"),
    Fact("{}の首都は", "フランス", "リヨン", "パリ", case_id="ja"),
    Fact("{}คือ", "ลาว", "ไทย", "จีน", case_id="th"),
    Fact("عاصمة {} هي", "فرنسا", "ليون", "باريس", case_id="ar"),
    Fact("{} का", "घर", "मन", "तन", case_id="hi"),
    Fact("The flag of {} is", "France", "🇫🇷", "🇮🇹", case_id="emoji"),
    Fact("{} plays the vio", "Ana Silva", "lin", "la", case_id="word", space=False),
    Fact("{} was born in the year", "Ana Silva", "1984", "1985", case_id="number"),
    Fact("The capital of {} is (", "Italy", "Rome", "Paris", case_id="bracket"),
    Fact("Her language: {} speaks ", "Ana Silva", "French", "German", case_id="blank"),
]


@pytest.mark.parametrize("kind", ["bytelevel", "bytelevel_trim", "bos", "eos", "metaspace"])
@pytest.mark.parametrize("fact", FACTS, ids=lambda f: f.case_id)
def test_editor_and_scorer_read_the_same_tokens(kind, fact):
    lm = make_lm(tokenizer=kind)
    ((ids, start),) = split_tokens(lm, [fact.pair])
    assert ids[:start] == prompt_tokens(lm, [fact.text.rstrip(" ")])[0]  # what the model reads when it is asked
    encoding, _, places = encode_targets(lm, [fact], ContextTemplates(), "last").take([0])
    assert places[:, 3].tolist() == ids[start:] and places[:, 2].tolist() == list(range(start - 1, len(ids) - 1))
    assert encoding.input_ids[0].tolist() == ids[: encoding.input_ids.shape[1]]
    (scored,) = score_targets(lm, [fact.pair])
    assert scored.ids.tolist() == ids[start:]
    if kind != "metaspace":  # its pieces do not spell every script
        assert lm.tokenizer.decode(ids[start:]) == fact.target_text


def test_the_space_is_visible_and_can_be_set():
    zh = FACTS[0]
    assert (zh.target_text, zh.statement) == ("里昂", "法国的首都是里昂")
    assert zh.replace(space=True).target_text == " 里昂" and FACTS[-1].target_text == " French"
    assert Fact("{} plays the vio", "Li", "lin").target_text == " lin"
    assert Fact("{} plays the vio", "Li", "lin", space=False).statement == "Li plays the violin"
    assert gap("Li plays the vio", Fact("{} plays the vio", "Li", "lin", space=False).pair[1]) == ""


def test_contexts_in_another_language_do_not_change_it():
    lm, fact = make_lm(), FACTS[0].replace(target="Lyon")
    contexts = ContextTemplates.of(["{}", "The weather was fine today and the old house is near the river. {}"])
    _, _, places = encode_targets(lm, [fact], contexts, "last").take([0])
    by_row = [places[places[:, 1] == row][:, 3].tolist() for row in range(2)]
    assert by_row[0] == by_row[1] == lm.tokenizer("Lyon")["input_ids"]


def test_a_space_at_the_end_of_a_prompt_belongs_to_the_answer():
    lm = make_lm()
    plain = Fact("{} speaks", "Ana Silva", "French", "German", paraphrases=("Ana Silva talks",), case_id="a",
                 locality=(Probe("Li plays the", "violin"),))  # fmt: skip
    blank = plain.replace(prompt="{} speaks ", paraphrases=("Ana Silva talks ",),
                          locality=(Probe("Li plays the ", "violin"),))  # fmt: skip
    for token in ("last", "subject_last"):
        assert torch.equal(compute_keys(lm, [plain], 1, token=token), compute_keys(lm, [blank], 1, token=token))
    for protocol in ("rome", "generate"):
        a, b = (score(lm, [f], protocol).drop(columns="prompt") for f in (plain, blank))
        assert a.equals(b)
    ends = Fact("The language of {}", "Ana Silva ", "French")
    assert split_tokens(lm, [ends.pair]) == split_tokens(lm, [ends.replace(subject="Ana Silva").pair])
    assert torch.equal(compute_keys(lm, [ends], 1), compute_keys(lm, [ends.replace(subject="Ana Silva")], 1))


def test_probes_have_a_space_of_their_own():
    lm = make_lm()
    fact = Fact("{} speaks", "Li", "French", "German", case_id="0",
                consequences=(Probe("Li plays the vio", "lin", before="la", space=False),))  # fmt: skip
    table = score(lm, [fact], "rome", ["consequence"])
    (new,) = score_targets(lm, [("Li plays the vio", NO_SPACE + "lin")])
    assert table.nll_new[0] == new.nll != score_targets(lm, [("Li plays the vio", "lin")])[0].nll
    assert table.answer[0] == "lin"


def lone_space_lm() -> LM:
    """A model whose tokenizer writes numbers as a space and digits, as those of Llama-3 and Qwen do."""
    words = {w: i for i, w in enumerate(["</s>", "ĠLi", "Li", "Ġborn", "Ġin", "Ġ", *"0123456789"])}
    tok = Tokenizer(WordLevel(words, unk_token="</s>"))
    tok.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False),
    ])  # fmt: skip
    return LM(make_lm().model, PreTrainedTokenizerFast(tokenizer_object=tok, eos_token="</s>"))


def test_numbers_keep_their_lone_space_in_editor_and_scorer():
    lm, fact = lone_space_lm(), Fact("{} born in", "Li", "1984")
    ((ids, start),) = split_tokens(lm, [fact.pair])
    assert lm.tokenizer.convert_ids_to_tokens(ids[start:]) == ["Ġ", "1", "9", "8", "4"]
    places = encode_targets(lm, [fact], ContextTemplates()).take([0])[2]
    assert places[:, 3].tolist() == ids[start:]


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_special_tokens_stand_once_in_front_and_never_behind(kind):
    lm = make_lm(tokenizer=kind)
    text = "Ana Silva speaks French"
    (row,) = prompt_tokens(lm, [text])
    assert lm.encode([text]).input_ids[0].tolist() == row
    assert row.count(2) == (kind in ("bos", "metaspace")) and 3 not in row
    if kind in ("bos", "metaspace"):
        again = f"{lm.tokenizer.bos_token}{text}"
        (carried,) = prompt_tokens(lm, [again])
        assert carried.count(2) == 1 and lm.encode([again]).input_ids[0].tolist() == carried
        if kind == "bos":
            assert carried == row
            assert np.array_equal(perplexity(lm, [text]), perplexity(lm, [again]))
            a, b = (generate(lm, [t], max_new_tokens=3)[0] for t in (text, again))
            assert a.ids == b.ids and a.n_prompt == b.n_prompt
            pairs = [("Ana Silva speaks", "French"), ("<s>Ana Silva speaks", "French")]
            plain, own = score_targets(lm, pairs)
            assert plain.nll == own.nll
            key, carried_key = (
                compute_keys(lm, [Fact(p, "Ana Silva", "French")], 1) for p in ("{} speaks", "<s>{} speaks")
            )
            assert torch.equal(key, carried_key)


def test_an_appended_end_token_is_not_scored_as_text():
    with_end, without = make_lm(tokenizer="eos"), make_lm(tokenizer="bytelevel")
    text = "Ana Silva speaks French"
    assert with_end.tokenizer(text)["input_ids"] == [*without.tokenizer(text)["input_ids"], 3]
    assert np.array_equal(perplexity(with_end, [text]), perplexity(without, [text]))


@pytest.mark.parametrize("field", ["paraphrases", "generation", "reference", "neighborhood", "locality", "same_subject",
                                   "consequences"])  # fmt: skip
def test_a_text_where_a_list_belongs_is_refused(field):
    with pytest.raises(RequestError, match=f"{field} must be a list.*give a list"):
        Fact("{} plays the", "Li", "violin", **{field: "Violinist?"})
    with pytest.raises(RequestError, match=f"{field} must hold"):
        Fact("{} plays the", "Li", "violin", **{field: [3]})


def test_lists_of_a_fact_become_tuples_and_probe_texts_are_checked():
    fact = Fact("{} plays the", "Li", "violin", paraphrases=["Li, who plays the"])
    assert fact.paraphrases == ("Li, who plays the",) and hash(fact)
    with pytest.raises(RequestError, match="answer must be a text"):
        Probe("Li plays the", None)


@pytest.mark.parametrize("target, text", [(" 里昂", " 里昂"), ("里昂", "里昂"), (NO_SPACE + "Lyon", "Lyon")])
def test_a_word_on_the_space_holds_in_editor_and_scorer_alike(target, text):
    lm, fact = make_lm(), Fact("{}的首都是", "法国", target, "巴黎", case_id="0")
    assert fact.target_text == text
    places = encode_targets(lm, [fact], ContextTemplates()).take([0])[2]
    table = score(lm, [fact], "rome")
    (scored,) = score_targets(lm, [fact.pair])
    assert places[:, 3].tolist() == scored.ids.tolist() and table.nll_new[0] == pytest.approx(scored.nll)
    assert table.answer[0] == text.strip()
