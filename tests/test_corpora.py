"""Loaders of the benchmark corpora on hand-written records in the official schemas."""

import collections
import copy
import hashlib
import json
import logging

import pytest
from record_files import RECORDS, change, rows, write

from editkit.base.errors import DataError, RequestError
from editkit.corpora import base, counterfact, mquake, ripple, selfcheck, temporal, zsre
from editkit.models.facts import Fact, validate_facts

FACT_LOADERS = {
    "counterfact": (counterfact.load, "counterfact.json"),
    "counterfact easyedit": (
        lambda p, **k: counterfact.load(p, form="easyedit", **k),
        "counterfact_easyedit.json",
    ),
    "zsre rome": (zsre.load, "zsre.json"),
    "zsre easyedit": (lambda p, **k: zsre.load(p, "easyedit", **k), "zsre.json"),
    "selfcheck": (selfcheck.load, "selfcheck.json"),
    "temporal": (temporal.load, "temporal.json"),
}
LOADERS = FACT_LOADERS | {
    "mquake": (mquake.load, "mquake.json"),
    "ripple": (ripple.load, "ripple.json"),
}


# ------------------------------------------------------------------ what every loader does


@pytest.mark.parametrize("name", FACT_LOADERS)
def test_facts_are_valid_and_give_back_the_text(name):
    load, file = FACT_LOADERS[name]
    facts = load(RECORDS / file)
    assert len(facts) == len(rows(file))
    assert validate_facts(facts) == list(facts)
    assert len({f.case_id for f in facts}) == len(facts)
    field = "prompt" if file != "zsre.json" else "src"
    for fact, row in zip(facts, rows(file)):
        assert isinstance(fact, Fact)
        if field in row:
            assert fact.text == row[field]
        for text in (
            fact.target,
            *fact.paraphrases,
            *(p.answer for p in (*fact.neighborhood, *fact.locality)),
        ):
            assert text == text.strip() != ""


@pytest.mark.parametrize("name", LOADERS)
def test_provenance_and_limit(name):
    load, file = LOADERS[name]
    corpus = load(RECORDS / file)
    assert corpus.provenance.sha256 == hashlib.sha256((RECORDS / file).read_bytes()).hexdigest()
    assert corpus.provenance.file == file
    assert (corpus.provenance.records, corpus.provenance.loaded) == (len(rows(file)), len(corpus))
    assert json.loads(json.dumps(corpus.provenance.as_dict()))["skipped"] == 0
    assert load(RECORDS / file, limit=1) == corpus[:1]
    with pytest.raises(DataError, match="limit=0"):
        load(RECORDS / file, limit=0)


@pytest.mark.parametrize("name", LOADERS)
def test_jsonl_is_read_alike(name, tmp_path):
    load, file = LOADERS[name]
    lines = "\n".join(json.dumps(r) for r in rows(file)) + "\n"
    assert load(write(tmp_path, "records.jsonl", lines)) == load(RECORDS / file)


@pytest.mark.parametrize("name", LOADERS)
def test_every_required_field_is_missed_by_name(name, tmp_path):
    """Removing a field of the second record is harmless (optional) or named with file and index."""
    load, file = LOADERS[name]
    content = rows(file)
    if len(content) == 1:
        content = [content[0], copy.deepcopy(content[0])]
    named = []
    for field in content[1]:
        broken = [content[0], change(content[1], field, ...), *content[2:]]
        path = write(tmp_path, file, broken)
        try:
            load(path)
        except DataError as error:
            assert str(error).startswith(f"{file} record 1: '{field}"), error
            assert "is missing" in str(error)
            named.append(field)
    assert named, "no field of this schema is required?"


@pytest.mark.parametrize("name", LOADERS)
def test_skip_logs_and_counts(name, tmp_path, caplog):
    load, file = LOADERS[name]
    content = [*rows(file), {"unrelated": 1}, "not even an object"]
    path = write(tmp_path, file, content)
    n = len(content)
    with pytest.raises(DataError, match=f"record {n - 2}: "):
        load(path)
    with caplog.at_level(logging.WARNING, logger="editkit"):
        corpus = load(path, on_error="skip")
    assert corpus == load(RECORDS / file)
    assert corpus.provenance.skipped == 2
    assert f"{file} record {n - 2}: " in caplog.text and f"{file} record {n - 1}: " in caplog.text
    assert f"2 of {n} records skipped" in caplog.text
    with pytest.raises(DataError, match="'raise' or 'skip'"):
        load(path, on_error="ignore")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("list.json", {"records": []}, "list.json: expected a JSON list of records, got an object"),
        ("cut.json", '[{"a": 1},', "cut.json line 1: not valid JSON"),
        ("cut.jsonl", '{"a": 1}\n{"a"\n', "cut.jsonl line 2: not valid JSON"),
        ("pointer.json", "version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
    ],
)
def test_unreadable_files(name, content, message, tmp_path):
    with pytest.raises(DataError, match=message.replace("[", r"\[")):
        zsre.load(write(tmp_path, name, content))


def test_missing_and_packed_files(tmp_path):
    with pytest.raises(DataError, match=r"cannot read .*nowhere\.json"):
        zsre.load(tmp_path / "nowhere.json")
    (tmp_path / "packed.json").write_bytes(b"\x1f\x8b\x08\x00\xff")
    with pytest.raises(DataError, match="not UTF-8"):
        zsre.load(tmp_path / "packed.json")


def test_nothing_usable_is_an_error_even_when_skipping(tmp_path):
    with pytest.raises(DataError, match="no usable record; is this a zsre file of form easyedit"):
        zsre.load(RECORDS / "counterfact.json", "easyedit", on_error="skip")


# ------------------------------------------------------------------ CounterFact


def test_counterfact_fields():
    fact = counterfact.load(RECORDS / "counterfact.json")[0]
    assert (fact.prompt, fact.subject, fact.target, fact.target_true) == (
        "{} plays the",
        "Orla Fenwick",
        "cello",
        "harp",
    )
    assert (fact.relation, fact.case_id) == ("P1303", "0")
    assert fact.paraphrases[1] == "Orla Fenwick is a master of the"
    assert [(p.prompt, p.answer) for p in fact.neighborhood] == [
        ("Tavish Moor plays the", "harp"),
        ("Ines Calder plays the", "harp"),
    ]
    assert fact.generation == ("Orla Fenwick's favourite piece is", "Every morning Orla Fenwick")
    meta = dict(fact.meta)
    assert (meta["target_new_id"], meta["target_true_id"], meta["pararel_idx"]) == ("Q9000", "Q8000", "1000")
    assert json.loads(meta["attribute_prompts"]) == ["Bram Holt plays the"]
    assert fact.meta == tuple(sorted(fact.meta))


def test_counterfact_snippets(caplog):
    facts = counterfact.load(RECORDS / "counterfact.json", snippets=RECORDS / "attribute_snippets.json")
    assert facts[0].reference == (
        "Bram Holt has played the cello since childhood.",
        "Una Reed teaches the cello in Tarn.",
    )
    assert facts[2].reference == ()
    assert facts.provenance.defects == {"no attribute snippet for relation and new object": 1}
    assert "1 x no attribute snippet" in caplog.text


def test_malformed_snippets(tmp_path):
    content = rows("attribute_snippets.json")
    del content[1]["samples"][0]["text"]
    with pytest.raises(DataError, match=r"snips\.json record 1: needs relation_id"):
        counterfact.load_snippets(write(tmp_path, "snips.json", content))


def test_counterfact_easyedit_fields():
    facts = counterfact.load(RECORDS / "counterfact_easyedit.json", form="easyedit")
    assert facts[1].prompt == "The seat of government of {} is"
    assert facts[1].target_true == "Ostrey"  # given as a list
    assert [(p.prompt, p.answer) for p in facts[0].locality] == [("Tavish Moor plays the", "harp")]
    with pytest.raises(DataError, match="multi"):
        counterfact.load(RECORDS / "counterfact_easyedit.json", form="easyedit", multi=True)
    with pytest.raises(DataError, match="forms 'rome' and 'easyedit'"):
        counterfact.load(RECORDS / "counterfact.json", form="memit")


EDIT = "requested_rewrite."


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        (
            EDIT + "prompt",
            "Orla plays the",
            r"'requested_rewrite.prompt' has no '\{\}' slot: 'Orla plays the'",
        ),
        (EDIT + "prompt", "{} and {} play the", r"has 2 '\{\}' slots"),
        (EDIT + "target_new", "cello", "'requested_rewrite.target_new.str' is missing"),
        (EDIT + "target_new.str", " ", "'requested_rewrite.target_new.str' is empty"),
        (EDIT + "subject", 7, "'requested_rewrite.subject' must be a text, got a number"),
        ("paraphrase_prompts", "one text", "'paraphrase_prompts' must be a list of texts, got a text"),
        ("neighborhood_prompts", ["ok", None], r"'neighborhood_prompts\[1\]' must be a text, got null"),
        ("case_id", 0, "case_id '0' is that of record 0"),
    ],
)
def test_counterfact_malformed(field, value, message, tmp_path):
    content = rows("counterfact.json")
    content[1] = change(content[1], field, value)
    with pytest.raises(DataError, match=f"^counterfact.json record 1: .*{message}"):
        counterfact.load(write(tmp_path, "counterfact.json", content))


def test_repairs_are_counted(tmp_path, caplog):
    content = rows("counterfact.json")
    content[0] = change(content[0], EDIT + "target_new.str", " cello")
    content[1] = change(content[1], EDIT + "target_new.str", "Ostrey")
    corpus = counterfact.load(write(tmp_path, "cf.json", content))
    assert corpus[0].target == "cello"
    assert corpus.provenance.defects == {
        "blanks around 'requested_rewrite.target_new.str' removed": 1,
        "new object equals the true object": 1,
    }
    assert "cf.json: 1 x new object equals the true object" in caplog.text


# ------------------------------------------------------------------ zsRE


def test_zsre_two_readings():
    rome, easy = zsre.load(RECORDS / "zsre.json"), zsre.load(RECORDS / "zsre.json", "easyedit")
    assert (rome[0].prompt, rome[0].subject) == ("Who was the architect of {}?", "Harrow Bridge")
    assert (rome[0].target, rome[0].target_true) == ("Milo Strand", None)
    assert (easy[0].target, easy[0].target_true) == ("Ada Penrose", "Milo Strand")
    assert rome[0].paraphrases == easy[0].paraphrases == ("Harrow Bridge was designed by whom?",)
    question = "nq question: what is the longest river in vellmark"
    assert [(p.prompt, p.answer) for p in rome[0].locality] == [(question + "?", "the Iddle")]
    assert [p.prompt for p in easy[0].locality] == [question]
    assert json.loads(dict(rome[0].meta)["answers"]) == ["Milo Strand", "M. Strand"]
    assert zsre.irrelevant_texts(easy)[0] == question + " the Iddle"
    with pytest.raises(DataError, match="forms 'rome' and 'easyedit'"):
        zsre.load(RECORDS / "zsre.json", "mend")


def test_zsre_defects_are_logged(caplog):
    facts = zsre.load(RECORDS / "zsre.json", "easyedit")
    assert facts[1].target == "Lake Brume" and facts[1].subject == "iddle"
    assert facts[2].prompt == "Is {}, the Sela of the song, a person?"
    for text in ("another case", "more than once", "equals the correct one", "blanks around 'alt'"):
        assert text in caplog.text


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("subject", "Nobody", "'src' does not mention the subject 'Nobody'"),
        ("answers", [], "'answers' is an empty list"),
        ("src", "Who designed {}?", r"'src' contains a slot '\{\}' although a full text is expected"),
        ("loc_ans", "", "'loc_ans' is empty"),
    ],
)
def test_zsre_malformed(field, value, message, tmp_path):
    content = rows("zsre.json")
    content[2] = change(content[2], field, value)
    with pytest.raises(DataError, match=f"^z.json record 2: {message}"):
        zsre.load(write(tmp_path, "z.json", content))


@pytest.mark.parametrize(
    ("prompt", "subject", "template", "found"),
    [
        ("Annapolis and Ann", "Ann", "Annapolis and {}", "Ann"),  # a word of its own comes first
        ("Reannual", "ann", "Re{}ual", "ann"),  # else inside a word
        ("About ANN here", "Ann", "About {} here", "ANN"),
        ("C++ (1985) is", "C++ (1985)", "{} is", "C++ (1985)"),
    ],
)
def test_split(prompt, subject, template, found):
    record = base.Record({"p": prompt}, "x.json record 0", collections.Counter())
    assert record.split("p", subject) == (template, found)
    assert template.replace("{}", found) == prompt


# ------------------------------------------------------------------ long-form data


def test_selfcheck_and_temporal_fields():
    fact = selfcheck.load(RECORDS / "selfcheck.json")[0]
    assert fact.prompt.startswith("This is a Wikipedia passage about {}. Osric Tallow (1811")
    assert fact.target == "built the tower clock of Ostrey in 1844."
    assert [(p.prompt, p.answer) for p in fact.locality] == [("Tarn is a town that", "lies on the Iddle.")]
    fact = temporal.load(RECORDS / "temporal.json")[0]
    assert fact.prompt == "The {}, closed in 1962, is" and fact.paraphrases == ()
    assert fact.reference == (rows("temporal.json")[0]["ood_rephrase"],)


def test_zsre_takes_other_locality_texts_as_they_are(tmp_path):
    content = [change(row, "loc", "Tarn lies on the") for row in rows("zsre.json")]
    facts = zsre.load(write(tmp_path, "z.json", content))
    assert facts[0].locality[0].prompt == "Tarn lies on the"


def test_two_cities_of_one_name_are_counted_and_named(tmp_path, caplog):
    rows = [
        {"case_id": i, "requested_rewrite": {"prompt": "{} lies in", "subject": s, "target_new": {"str": new},
                                             "target_true": {"str": true}}, "paraphrase_prompts": [],
         "neighborhood_prompts": [], "generation_prompts": []}
        for i, (s, new, true) in enumerate([("Paris", "Italy", "France"), ("Rome", "Spain", "Italy"),
                                            ("Paris", "Peru", "Texas")])
    ]  # fmt: skip
    path = tmp_path / "two.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    corpus = counterfact.load(path)
    assert corpus.provenance.defects["pairs of facts with one text and two objects"] == 1
    assert "'Paris lies in' has two objects in record 0" in caplog.text
    with pytest.raises(RequestError, match=r"facts 0 \(0, row 0\) and 2 \(2, row 2\) conflict"):
        validate_facts(corpus)
