"""The corpus of real facts: table, wordings, edits and what follows, parts, recall; the script that makes it."""

from __future__ import annotations

import gzip
import importlib.util
import sys
from collections import Counter
from pathlib import Path

import pytest
from conftest import make_lm

from editkit.base.errors import ConfigError, DataError, RequestError
from editkit.corpora import cards, real
from editkit.corpora.table import FactTable
from editkit.corpora.world import edit_facts, must_change
from editkit.corpora.world.consequences import changes
from editkit.models.facts import SLOT, validate_facts
from editkit.studies import real as study
from editkit.studies import testbed

ROOT = Path(__file__).resolve().parents[1]
spec = importlib.util.spec_from_file_location("real_facts", ROOT / "tools" / "real_facts.py")
script = importlib.util.module_from_spec(spec)
sys.modules["real_facts"] = script
spec.loader.exec_module(script)


@pytest.fixture(scope="module")
def table() -> FactTable:
    return real.load()


# ------------------------------------------------------------------ the table


def test_the_table_is_large_clean_and_small_on_disk(table):
    rows, left_out = real.rows()
    assert len(rows) >= 7000 and len({r[0] for r in rows}) >= 7
    assert {r[3] for r in rows} == set(real.SOURCES)
    assert sum(left_out.values()) > 500 and left_out["cities with a large namesake in another country"] > 20
    assert real.FACTS.stat().st_size + real.TEXT.stat().st_size < 400 * 1024
    notices = (real.FOLDER / "NOTICES.md").read_text(encoding="utf-8")
    assert all(group in notices for group in real.SOURCES) and "Copyright 2006 by Princeton University" in notices


@pytest.mark.parametrize(
    "relation, subject, value",
    [
        ("capital", "France", "Paris"), ("continent", "Kenya", "Africa"), ("currency", "Japan", "yen"),
        ("language", "Brazil", "Portuguese"), ("country", "Marseille", "France"), ("state", "Chicago", "Illinois"),
        ("nationality", "Antoine Lavoisier", "French"), ("profession", "Antoine Lavoisier", "chemist"),
        ("symbol", "gold", "Au"), ("element_series", "neon", "noble gas"), ("landform", "Nile", "river"),
        ("mythology", "Zeus", "Greek"), ("city_capital", "Marseille", "Paris"),
        ("city_continent", "Marseille", "Europe"), ("city_currency", "Osaka", "yen"),
        ("city_language", "Hamburg", "German"),
    ],
)  # fmt: skip
def test_facts_that_everybody_knows(table, relation, subject, value):
    assert table.value(relation, subject) == value and subject in table.subjects(relation)


def test_ambiguous_subjects_are_left_out(table):
    for relation, subject in (("country", "Hyderabad"), ("country", "Valencia"), ("language", "Switzerland")):
        assert not table.has(relation, subject)


def test_prompts_carry_an_example_about_another_subject(table):
    for r in table.relations.values():
        subject, answer = real.EXAMPLES[r.id]
        assert subject not in table.subjects(r.id)
        assert len(r.templates) >= 4  # one to edit, three paraphrases
        for t in r.templates:
            assert t.text.count(SLOT) == 1 and t.text.startswith(t.example) and f" {answer}." in t.example
            assert t.example == f"{t.wording.replace(SLOT, subject)} {answer}."
    plain = real.load(examples=False)
    assert "France" in plain.subjects("capital") and not plain.relation("capital").templates[0].example
    assert set(plain.subjects("capital")) > set(table.subjects("capital"))


def test_statements_place_the_subject_behind_the_example(table):
    s = table.statement("capital", "France", 0)
    assert s.prompt[slice(*s.subject_span)] == "France" and s.text.endswith("France is called Paris.")


# ------------------------------------------------------------------ edits


def test_edits_have_all_probes_and_touch_none_that_must_stay(table):
    facts = edit_facts(table, 200, seed=1, n_neighbors=3, n_consequences=4)
    assert validate_facts(facts) == facts and len({f.case_id for f in facts}) == 200
    assert len({f.relation for f in facts}) >= 7
    touched = {c.key for f in facts for c in changes(table, f.relation, f.subject, f.target)}
    for f in facts:
        assert f.target != f.target_true == table.value(f.relation, f.subject)
        assert len(f.paraphrases) >= 3 and all(f.subject in p for p in f.paraphrases)
        for p in (*f.neighborhood, *f.same_subject, *f.locality):
            assert (p.kind, p.subject) not in touched and table.value(p.kind, p.subject) == p.answer
        assert {p.answer for p in f.neighborhood} <= {f.target_true}
        assert {p.subject for p in f.same_subject} <= {f.subject} and len(f.consequences) <= 4
    assert sum(bool(f.neighborhood) for f in facts) > 150 and sum(bool(f.consequences) for f in facts) > 20


def test_consequences_follow_from_the_sources(table):
    [moved] = [c for c in changes(table, "country", "Marseille", "Japan") if c.relation == "city_currency"]
    assert (moved.old, moved.new, moved.kind) == ("euro", "yen", "two_hop")
    cities = {c.subject for c in changes(table, "currency", "France", "yen") if c.kind == "two_hop_via"}
    assert {"Marseille", "Lyon", "Paris"} <= cities
    [fact] = edit_facts(table, 1, 3, ["country"])
    assert {p.kind for p in must_change(table, fact)} == {"edit", "two_hop"}


def test_a_gap_of_the_sources_is_undefined_not_wrong(table):
    """Switzerland has four official languages, so nobody can say what a city's language becomes."""
    found = {c.relation: c for c in changes(table, "country", "Marseille", "Switzerland")}
    assert found["city_language"].new is None and found["city_language"].kind == "undefined"
    assert found["city_continent" if "city_continent" in found else "city_capital"].new
    back = {c.relation: c for c in changes(table, "country", "Zürich", "France")}
    assert back["city_language"].old is None and back["city_language"].new == "French"
    with pytest.raises(RequestError, match="is unknown"):
        changes(table, "country", "Marseille", "Atlantis")


def test_known_facts_only(table):
    keys = {("capital", "France"), ("capital", "Germany"), ("currency", "Japan"), ("city_currency", "Osaka")}
    few = table.restricted(keys)
    assert {(r, s) for r in few.relations for s in few.subjects(r)} == keys
    facts = edit_facts(few, 2, 0)
    assert {(f.relation, f.subject) for f in facts} <= keys
    assert {(p.kind, p.subject) for f in facts for p in (*f.same_subject, *f.locality, *f.neighborhood)} <= keys
    assert few.value("country", "Osaka") == "Japan"  # values stay, or consequences could not be worked out
    touched = {c.key for c in changes(few, "currency", "Japan", "euro")}
    assert ("city_currency", "Osaka") in touched


def test_parts_share_neither_subjects_nor_new_objects(table):
    one, two = (real.part(table, i, seed=4) for i in (0, 1))
    for r in table.relations:
        assert not set(one.subjects(r)) & set(two.subjects(r))
        assert set(one.subjects(r)) | set(two.subjects(r)) == set(table.subjects(r))
        assert not set(one.objects(r)) & set(two.objects(r))
    targets = [{(f.relation, f.target) for f in edit_facts(t, 150, 0)} for t in (one, two)]
    assert not targets[0] & targets[1]
    shared = real.part(table, 0, seed=4, objects="shared")
    assert shared.objects("country") == table.objects("country")
    assert real.part(table, 0, seed=5).subjects("country") != one.subjects("country")
    with pytest.raises(ConfigError, match="part 2 of 2"):
        real.part(table, 2)
    with pytest.raises(ConfigError, match="'apart' or 'shared'"):
        real.part(table, 0, objects="some")


def test_text_states_no_fact_of_the_table(table):
    texts = real.english()
    assert len(texts) == 9000 and all(t == t.strip() and len(t.split()) >= 6 for t in texts)
    whole = "\n".join(texts)
    named = [s for s in table.subjects("nationality") if s in whole]
    assert len(named) < 0.02 * len(table.subjects("nationality"))
    lines = real.prompts(table, [("capital", "France")])
    assert lines == ["The capital city of Peru is called Lima. The capital city of France is called Paris."]


# ------------------------------------------------------------------ bad tables, and the script


def written(path: Path, *lines: str) -> Path:
    head = ["# {}", "relation\tsubject\tobject\tsource"]
    path.write_bytes(gzip.compress("\n".join([*head, *lines]).encode()))
    return path


@pytest.mark.parametrize(
    "lines, message",
    [
        (["capital\tFrance\tParis"], "line 3: expected four fields"),
        (["capital\tFrance\t Paris\tcldr"], "line 3: expected four fields without outer blanks"),
        (["capitol\tFrance\tParis\tcldr"], "line 3: unknown relation or source"),
        (["city_capital\tLyon\tParis\tcldr"], "line 3: unknown relation or source"),
        (["capital\tFrance\tParis\tcldr", "capital\tFrance\tLyon\tcldr"], "line 4: capital of 'France' stands in"),
    ],
)
def test_bad_rows_are_named_by_line(tmp_path, lines, message):
    with pytest.raises(DataError, match=message):
        real.load(written(tmp_path / "t.gz", *lines))


def test_a_damaged_table_is_named(tmp_path):
    (tmp_path / "half.gz").write_bytes(real.FACTS.read_bytes()[:5000])
    with pytest.raises(DataError, match=r"half\.gz.*restore it"):
        real.load(tmp_path / "half.gz")


NOUNS = """\
  1 This software and database is being provided to you
00000001 18 n 01 person 0 000 | a human being
00000002 18 n 01 chemist 0 001 @ 00000001 n 0000 | a scientist who specializes in chemistry; "she is a chemist now"
00000003 17 n 01 river 0 001 @ 00000009 n 0000 | a large natural stream of water (larger than a creek)
00000004 18 n 03 Weir 0 Ada_Weir 0 Ada_Q._Weir 0 001 @i 00000002 n 0000 | French chemist who found nothing (1801-1850)
00000005 18 n 02 Moss 0 Ann_Moss 0 001 @i 00000002 n 0000 | French chemist and writer
00000006 18 n 02 Low 0 Bo_Low 0 001 @i 00000002 n 0000 | French chemist
00000007 18 n 02 Ray 0 Cy_Ray 0 001 @i 00000002 n 0000 | French chemist
00000008 18 n 01 Zed 0 001 @i 00000002 n 0000 | French chemist
00000010 17 n 02 Alm 0 Alm_River 0 001 @i 00000003 n 0000 | a river in nowhere
00000011 18 n 01 Hul 0 001 @i 00000001 n 0000 | (Greek mythology) a god of small things
"""


def test_the_script_reads_wordnet():
    nouns = {s.offset: s for s in script.read_wordnet(NOUNS.splitlines())}
    assert len(nouns) == 10 and nouns["00000004"].words == ("Weir", "Ada Weir", "Ada Q. Weir")
    left_out = Counter()
    rows = {(r.relation, r.subject): r.object for r in script.people(nouns, left_out)}
    assert rows["nationality", "Ada Weir"] == "French" and rows["profession", "Ann Moss"] == "chemist"
    assert left_out == {"people without a full name or a nation": 1}
    places = {(r.relation, r.subject): r.object for r in script.places(nouns)}
    assert places == {("landform", "Alm"): "river", ("mythology", "Hul"): "Greek"}
    assert sorted(script.english(nouns.values())) == [
        "Chemist: a scientist who specializes in chemistry. She is a chemist now.",
        "River: a large natural stream of water (larger than a creek).",
    ]


def test_the_script_leaves_out_what_has_no_one_answer():
    left_out = Counter()
    rows = [
        script.Row("landform", "Blue Lake", "lake", "wordnet"),
        script.Row("country", "Springfield", "Here", "geonames"),
        script.Row("country", "Springfield", "There", "geonames"),
        script.Row("symbol", "carbon", "C", "mendeleev"),
        script.Row("capital", " Oz ", "Emerald", "geonames"),
    ]  # fmt: skip
    kept = script.clean(rows, left_out)
    assert [(r.subject, r.object) for r in kept] == [("Oz", "Emerald"), ("carbon", "C")]
    assert set(left_out) == {"landform: the answer stands in the question", "country: subjects with several objects"}


def test_the_card_counts_what_the_table_has(table):
    card, (rows, left_out) = cards.CARDS["real"], real.rows()
    follow = table.size()["facts"] + _examples(table) - len(rows)
    assert card["records"] == {"stored facts": len(rows), "facts that follow": follow}
    text = cards.markdown("real")
    assert all(what in text and licence in text for what, licence, _ in real.SOURCES.values())
    assert f"{sum(left_out.values()):,} candidates" in text
    shares = sum(s[:4].lower() == o[:4].lower() for r, s, o, _ in rows if r == "language")
    assert f"in {shares} facts the language begins like the country" in text
    british = sum(o in ("British", "English", "Scottish", "Welsh") for r, _, o, _ in rows if r == "nationality")
    assert f"{british} people" in text
    types: dict[str, set[str]] = {}
    for relation, subject, _, _ in rows:
        types.setdefault(subject.lower(), set()).add(table.relation(relation).subject_type)
    assert f"{sum(len(kinds) > 1 for kinds in types.values())} names stand for things of two types" in text


def _examples(table) -> int:
    return sum(table.has(r, real.EXAMPLES[r][0]) for r in table.relations)


# ------------------------------------------------------------------ recall


@pytest.fixture(scope="module")
def little() -> FactTable:
    keys = {("capital", s) for s in ("France", "Japan", "Kenya")} | {("language", "Brazil"), ("language", "Cuba")}
    return real.load(examples=False).restricted(keys)


def test_recall_is_free_generation_and_is_kept(little, tmp_path, monkeypatch):
    lm = make_lm("llama")
    rows = study.recall(lm, little, cache_dir=tmp_path)
    assert list(rows["relation"]) == ["capital"] * 3 + ["language"] * 2
    assert set(rows.columns) == {"relation", "subject", "answer", "text", "exact", "prefix"}
    assert not rows["prefix"].any()  # a random model knows nothing
    monkeypatch.setattr(study, "score", lambda *a, **k: pytest.fail("asked again"))
    again = study.recall(lm, little, cache_dir=tmp_path)
    assert again.equals(rows)
    other = make_lm("llama", seed=1)  # another model, another recall
    with pytest.raises(pytest.fail.Exception, match="asked again"):
        study.recall(other, little, cache_dir=tmp_path)
    with pytest.raises(DataError, match="no facts to ask"):
        study.recall(lm, little, [])


def test_known_facts_are_those_that_are_said(little, monkeypatch):
    lm = make_lm("llama")
    with pytest.raises(DataError, match="says none of the 5 facts"):
        study.known(lm, little)
    made = study.recall(lm, little)
    made.loc[made["subject"].isin(["France", "Cuba"]), "prefix"] = 1
    made.loc[made["subject"] == "Cuba", "exact"] = 1
    monkeypatch.setattr(study, "recall", lambda *a, **k: made)
    found = study.known(lm, little)
    assert found.subjects("capital") == ["France"] and found.subjects("language") == ["Cuba"]
    assert study.known(lm, little, match="exact").subjects("capital") == []


def test_samples_are_nested_and_seeded(table):
    few, more = study.sample(table, 3, seed=1), study.sample(table, 10, seed=1)
    assert set(few) <= set(more) and len(few) == 3 * len(table.relations)
    assert study.sample(table, 3, seed=2) != few


def test_texts_for_second_moments(table):
    lm = make_lm("llama")
    count = lambda texts: sum(len(ids) for ids in lm.tokenizer(texts)["input_ids"])  # noqa: E731
    for source in ("english", "prompts", "both"):
        texts = study.moment_texts(source, 2000, lm, table)
        assert 2000 <= count(texts) < 2600
        assert texts == study.moment_texts(source, 2000, lm, table)
        assert texts != study.moment_texts(source, 2000, lm, table, seed=1)
    own = study.moment_texts("samples", 90, lm, table, length=24)
    assert len(own) == 4
    with pytest.raises(ConfigError, match="unknown source of text 'news'"):
        study.moment_texts("news", 10, lm, table)


def test_a_pretrained_model_is_edited_where_it_knows(little, table, monkeypatch):
    lm = make_lm("llama")
    monkeypatch.setattr(testbed, "open_model", lambda name, **options: lm)
    monkeypatch.setattr(testbed, "known", lambda *a, **k: little)
    bed = testbed.open_testbed("smollm2")
    assert bed.corpus == "real" and {f.relation for f in bed.edits(2, 0)} <= {"capital", "language"}
    assert {s for _, s, _ in bed.untouched([], 99, 0)} == {"France", "Japan", "Kenya", "Brazil", "Cuba"}
    assert not set(bed.held_out(20)) & set(bed.texts()) and any("capital" in t for t in bed.texts())
    everything = testbed.open_testbed("smollm2", "real-all")
    assert everything.table.size() == table.size()


@pytest.mark.real
def test_smollm2_knows_what_the_page_says(smollm2, table):
    keys = [("capital", s) for s in ("France", "Kenya", "Japan", "Spain")] + [("language", "Brazil")]
    rows = study.recall(smollm2, table, keys)
    assert rows["prefix"].sum() >= 4
    assert testbed.open_model("smollm2").name == "smollm2"
