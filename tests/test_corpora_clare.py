"""The CLaRE corpus: loader, answers, counterfactual requests, tables; the published file where at hand."""

import json
import logging
import os
from pathlib import Path

import pytest

from editkit.base.errors import DataError
from editkit.corpora import analysis, clare, fetch
from editkit.models.facts import Fact, validate_facts

RECORDS = Path(__file__).parent / "data" / "records" / "clare.json"


@pytest.fixture(scope="module")
def small():
    return clare.load(RECORDS)


@pytest.fixture(scope="module")
def published():
    """The whole corpus, from EDITKIT_DATA or the folder next to the repository."""
    shared = Path(os.environ.get("EDITKIT_SHARED", Path(__file__).parents[2] / "shared"))
    for root in (os.environ.get(fetch.DATA_ENV), shared / "data"):
        path = Path(root or "") / "clare" / "data.json"
        if root and path.is_file():
            assert fetch.sha256_of(path) == fetch.REGISTRY["clare"].sha256
            return clare.load(path)
    pytest.skip("the CLaRE corpus is not at hand (EDITKIT_DATA)")


class Pieces:
    """A stand-in tokenizer: one token per word, the id is the word's first letter."""

    def __call__(self, text, add_special_tokens=True):
        def ids(one):
            return [ord(word[0].lower()) for word in one.split()]

        return {"input_ids": ids(text) if isinstance(text, str) else [ids(t) for t in text]}


# ------------------------------------------------------------------ small corpus


def test_load(small):
    assert len(small) == 9
    assert small[0].case_id == small[0].key
    assert (small[3].prompt, small[3].subject, small[3].target) == (
        "{} plays the",
        "Ada Penrose",
        "French horn",
    )
    assert validate_facts(small, allow_conflicts=True)
    assert small.provenance.defects == {
        "prompts with several answers": 1,
        "facts whose prompt has several answers": 2,
        "facts whose answer is the subject": 1,
        "facts whose answer is written in the prompt": 1,
        "facts that share subject and answer with another template": 2,
        "facts whose template continues the subject's name": 1,
    }


def test_repeated_triples_are_refused(tmp_path):
    rows = json.loads(RECORDS.read_text())
    path = tmp_path / "twice.json"
    path.write_text(json.dumps([*rows, rows[0]]))
    with pytest.raises(DataError, match=r"twice\.json record 9: case_id .* is that of record 0"):
        clare.load(path)
    assert clare.load(path, on_error="skip").provenance.skipped == 1


def test_answers(small):
    assert clare.answers_by_prompt(small)["{} plays the", "Ada Penrose"] == ("French horn", "drum")
    unique = clare.unique_answers(small)
    assert [f.subject for f in unique if f.prompt == "{} plays the"] == [
        "Bram Holt",
        "Una Reed",
        "Joss Wylde",
    ]
    assert validate_facts(unique)


def test_counterfactuals(small, caplog):
    with caplog.at_level(logging.INFO, logger="editkit"):
        requests = clare.counterfactuals(small, seed=0)
    assert validate_facts(requests)  # one request per prompt and subject
    answers = clare.answers_by_prompt(small)
    for fact in requests:
        assert fact.target not in answers[fact.prompt, fact.subject]
        assert fact.target in {f.target for f in small if f.prompt == fact.prompt}
        assert fact.target_true == answers[fact.prompt, fact.subject][0]
    # templates with one object ("home", "Islands") cannot be made false
    assert len(requests) == 6 and "2 facts left out" in caplog.text
    una = next(f for f in requests if f.subject == "Una Reed" and f.prompt == "{} plays the")
    assert [(p.prompt, p.answer) for p in una.neighborhood] == [("Bram Holt plays the", "cello")]
    assert {p.prompt for p in una.same_subject} == {
        "The town where Una Reed lives is",
        "The home of Una Reed is",
    }
    town = next(f for f in requests if f.subject == "Una Reed" and f.prompt != "{} plays the")
    # the same object under another template ought to change as well, so it is no preservation probe
    assert [p.answer for p in town.same_subject] == ["cello"]


def test_counterfactuals_depend_on_seed_and_fact_only(small):
    everything = {f.case_id: f for f in clare.counterfactuals(small, 3)}
    assert clare.counterfactuals(small[2:3], 3, corpus=small) == [everything[small[2].key]]
    choices = {clare.counterfactuals(small[2:3], seed, corpus=small)[0].target for seed in range(20)}
    assert choices == {"cello", "French horn", "drum"}


def test_counterfactuals_match_token_counts(small):
    for seed in range(5):
        picked = clare.counterfactuals(small, seed, tokenizer=Pieces())
        horn = next(f for f in picked if f.target_true == "horn")
        assert horn.target in {"cello", "drum"}  # one token, as "horn"; "French horn" has two
        french = next(f for f in picked if f.target_true == "French horn")
        assert french.target in {
            "cello",
            "horn",
        }  # no other object of two tokens: any with another first token
    facts = [Fact("{} eats", s, t) for s, t in (("A", "pear"), ("B", "plum"), ("C", "fig"))]
    for seed in range(5):
        assert clare.counterfactuals(facts, seed, tokenizer=Pieces())[0].target == "fig"


def test_counterfactuals_need_an_alternative(small):
    with pytest.raises(DataError, match="pass the whole corpus"):
        clare.counterfactuals(small[:1], 0)


def test_entropy():
    assert analysis.entropy([4, 4]) == pytest.approx(1.0)
    assert analysis.entropy([1] * 8) == pytest.approx(3.0)
    assert analysis.entropy([5]) == analysis.entropy([]) == 0.0


def test_tables(small):
    assert analysis.summary(small) == {
        "facts": 9, "templates": 4, "subjects": 5, "answers": 7, "prompts": 8,
        "prompts_with_several_answers": 1, "facts_with_unique_answer": 7,
        "subjects_with_one_fact": 2, "subjects_that_are_answers": 1,
    }  # fmt: skip
    top = analysis.templates(small).iloc[0]
    assert (top.template, top.n_facts, top.n_subjects, top.n_answers) == ("{} plays the", 5, 4, 4)
    assert (top.several, top.top_answer, top.top_share) == (1, "cello", 0.4)
    assert top.entropy == pytest.approx(analysis.entropy([2, 1, 1, 1]))
    assert top.effective_answers == pytest.approx(2**top.entropy)
    assert analysis.subjects(small).iloc[0].to_dict() == {
        "subject": "Una Reed", "n_facts": 3, "n_templates": 3, "n_answers": 2,
    }  # fmt: skip
    assert list(analysis.answers(small).answer[:2]) == ["Ostrey", "cello"]
    several = analysis.several_answers(small)
    assert several.to_dict("records") == [
        {"template": "{} plays the", "subject": "Ada Penrose", "n_answers": 2, "answers": "French horn, drum"}
    ]


def test_lengths(small):
    frame = analysis.lengths(small[:1], Pieces())
    assert frame[["part", "words", "characters", "tokens"]].values.tolist() == [
        ["prompt", 4, 19, 4],
        ["subject", 2, 9, 2],
        ["answer", 1, 5, 1],
    ]
    assert "tokens" not in analysis.lengths(small[:1])


# ------------------------------------------------------------------ published corpus


def test_published_numbers(published):
    assert published[0].key == "9bdc7eaa829f405df1bd8e56cd67223e"
    assert analysis.summary(published) == {
        "facts": 11427, "templates": 212, "subjects": 6140, "answers": 4895, "prompts": 10851,
        "prompts_with_several_answers": 265, "facts_with_unique_answer": 10586,
        "subjects_with_one_fact": 4918, "subjects_that_are_answers": 1166,
    }  # fmt: skip
    assert published.provenance.defects == {
        "prompts with several answers": 265,
        "facts whose prompt has several answers": 841,
        "facts whose answer is the subject": 18,
        "facts whose answer is written in the prompt": 112,
        "facts that share subject and answer with another template": 345,
        "facts whose template continues the subject's name": 16,
        "facts with double blanks": 1,
    }
    assert max(analysis.several_answers(published).n_answers) == 14
    assert list(analysis.templates(published).n_facts[:6]) == [728, 603, 574, 569, 538, 463]
    assert analysis.subjects(published).iloc[0].to_dict()["subject"] == "Norman Mailer"
    assert list(analysis.answers(published).n_facts[:3]) == [657, 365, 273]
    assert (analysis.templates(published).n_facts == 1).sum() == 41


def test_published_counterfactuals(published):
    requests = clare.counterfactuals(published, 0)
    assert len(validate_facts(requests)) == 10764
    answers = clare.answers_by_prompt(published)
    assert not any(f.target in answers[f.prompt, f.subject] for f in requests)
