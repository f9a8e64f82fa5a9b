"""MQuAKE, RippleEdits, and the cards of all corpora."""

import pytest
from record_files import RECORDS, change, rows, write

from editkit.base.errors import DataError
from editkit.corpora import cards, mquake, ripple
from editkit.models.facts import validate_facts

# ------------------------------------------------------------------ MQuAKE


def test_mquake_cases():
    cases = mquake.load(RECORDS / "mquake.json")
    case = cases[0]
    assert case.case_id == "1" and len(case.edits) == 1 and len(case.questions) == 3
    edit = case.edits[0]
    assert (edit.text, edit.target, edit.target_true) == ("Una Reed is married to", "Joss Wylde", "Bram Holt")
    assert edit.paraphrases == ("Who is Una Reed married to?",) and edit.case_id == "1.0"
    assert [h.answer for h in case.hops] == ["Bram Holt", "cello"]
    assert case.new_hops[-1].aliases == ("French horn",)
    assert case.accepts(" French horn") and case.accepts("horn") and not case.accepts("cello")
    assert {(p.answer, p.before, p.kind) for p in case.probes} == {("horn", "cello", "multi_hop")}
    assert case.orig["triples"][0] == ["Q5", "P26", "Q6"]
    assert cases.provenance.defects == {"answer of the last new hop is not the new answer": 1}


def test_mquake_batches():
    cases = mquake.load(RECORDS / "mquake.json")
    facts = mquake.facts(cases[:2])
    assert [f.case_id for f in facts] == ["1.0", "2.1"]  # the shared edit is written once
    assert validate_facts(facts) == facts
    assert len(facts[0].consequences) == 3 and [p.answer for p in facts[1].consequences] == ["drum"]
    with pytest.raises(
        DataError, match=r"MQuAKE case 3: 'Joss Wylde plays the' -> 'lute' conflicts with 'drum'"
    ):
        mquake.facts(cases)
    assert mquake.facts(cases, on_conflict="first") == facts
    with pytest.raises(DataError, match="on_conflict"):
        mquake.facts(cases, on_conflict="last")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("requested_rewrite", [], "'requested_rewrite' is an empty list"),
        ("requested_rewrite.0.prompt", "Una is", r"'requested_rewrite\[0\].prompt' has no '\{\}' slot"),
        ("questions", [], "'questions' is an empty list"),
        ("single_hops", [{"question": "q"}], r"'single_hops\[0\].cloze' is missing"),
        ("new_single_hops", ["q"], r"'new_single_hops\[0\]' must be a JSON object, got a text"),
    ],
)
def test_mquake_malformed(field, value, message, tmp_path):
    content = rows("mquake.json")
    content[0] = change(content[0], field, value)
    with pytest.raises(DataError, match=f"^m.json record 0: {message}"):
        mquake.load(write(tmp_path, "m.json", content))


# ------------------------------------------------------------------ RippleEdits


def test_ripple_edits():
    edits = ripple.load(RECORDS / "ripple.json")
    first, second = edits
    # " is" occurs in the subject; the other prompts about it settle the split
    assert (first.fact.prompt, first.fact.subject) == ("The town where {} lives is", "Wren is a Star")
    assert (first.fact.target, first.fact.target_true) == ("Ostrey", "Tarn")
    assert (second.fact.text, second.fact.target) == ("The given mother of Milo Strand is", "Ines Calder")
    assert second.fact.target_true == "Una Reed"  # spelt original_fact there
    assert set(first.criteria) == set(ripple.CRITERIA)
    assert len(first.criteria["Relation_Specificity"]) == 1  # spelt Relation_Specifity there
    assert [p.kind for p in first.fact.consequences] == [
        "logical_generalization", "subject_aliasing", "compositionality_i", "compositionality_ii",
    ]  # fmt: skip
    assert [(p.prompt, p.answer) for p in first.fact.same_subject] == [
        ("The given mother of Wren is a Star is", "Ada Penrose"),
        ("The town where Ada Penrose lives is", "Ostrey"),
        ("The given mother of Ada Penrose is", "Orla Fenwick"),
    ]
    test = first.criteria["Compositionality_I"][0]
    assert test.condition == "AND" and test.queries[0].kind == "two_hop"
    assert test.queries[0].answers == (("Una Reed", "U. Reed"),)
    assert test.conditions[0].prompt == "The mayor of Ostrey is"
    assert validate_facts([e.fact for e in edits])


def test_ripple_uncheckable_answers_are_logged(caplog):
    edits = ripple.load(RECORDS / "ripple.json")
    assert len(edits[1].criteria["Relation_Specificity"]) == 1
    assert edits.provenance.defects == {
        "query with an answer that cannot be checked": 2,
        "test that cannot be executed left out": 2,
    }
    assert "2 x test that cannot be executed" in caplog.text


def test_ripple_templates_can_be_given(tmp_path):
    only = write(tmp_path, "one.json", [rows("ripple.json")[1]])
    with pytest.raises(
        DataError, match=r"one.json record 0: 'edit.relation' is 'MOTHER', whose template .*pass templates="
    ):
        ripple.load(only)
    edit = ripple.load(only, templates={"MOTHER": "The given mother of {} is"})[0]
    assert edit.fact.subject == "Milo Strand"
    with pytest.raises(DataError, match="subset='all'"):
        ripple.load(subset="all")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        (
            "edit.prompt",
            "Ines Calder is the mother.",
            r"'edit.prompt' is not 'The given mother of \{\} is <object>.'",
        ),
        (
            "Forgetfulness",
            [{"test_queries": [], "test_condition": "XOR"}],
            r"'Forgetfulness\[0\].test_condition' is 'XOR'",
        ),
        (
            "Forgetfulness",
            [{"test_queries": [{"prompt": "a"}]}],
            r"'Forgetfulness\[0\].test_queries\[0\].answers' is missing",
        ),
    ],
)
def test_ripple_malformed(field, value, message, tmp_path):
    content = rows("ripple.json")
    content[1] = change(content[1], field, value)
    with pytest.raises(DataError, match=f"^r.json record 1: {message}"):
        ripple.load(write(tmp_path, "r.json", content))


# ------------------------------------------------------------------ cards


@pytest.mark.parametrize("name", cards.CARDS)
def test_cards_are_complete(name):
    card = cards.CARDS[name]
    assert set(card) - {"sources"} == {"title", "citation", "files", "records", "schema", "defects", "used_in"}
    text = cards.markdown(name)
    assert "None" not in text and card["title"] in text
    assert all(d in text for d in card["defects"])


def test_cards_cover_registry_and_schemas():
    files = [f for card in cards.CARDS.values() for f in card["files"]]
    assert sorted(files) == sorted(cards.REGISTRY)
    for name, file in (("zsre", "zsre.json"), ("selfcheck", "selfcheck.json"), ("temporal", "temporal.json"),
                       ("counterfact", "counterfact.json"), ("mquake", "mquake.json")):  # fmt: skip
        documented = {f for fields in cards.CARDS[name]["schema"] for f in fields.split(", ")}
        assert set(rows(file)[0]) <= documented
