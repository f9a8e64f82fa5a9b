"""The companion world: structure, wording, determinism, and the text the shipped model was trained on."""

import hashlib
import itertools
import json
import os
from collections import defaultdict
from pathlib import Path

import pytest

from editkit.base.errors import ConfigError, RequestError
from editkit.corpora.world import gazetteer
from editkit.corpora.world.names import FAMILY, GIVEN, company_names, person_names
from editkit.corpora.world.relations import RELATIONS, relations_of
from editkit.corpora.world.world import World

SHARED = Path(os.environ.get("EDITKIT_SHARED", Path(__file__).parents[2] / "shared"))
CLARE = SHARED / "data" / "clare" / "data.json"


@pytest.fixture(scope="module")
def world():
    return World(seed=3, n_people=60, n_companies=12)


@pytest.fixture(scope="module")
def shipped():
    return World()


def test_text_of_the_shipped_model_is_frozen(shipped):
    """The shipped weights were trained on exactly this text; a change here needs a new training."""
    texts = "\n".join(b.text for b in shipped.biographies(6, 0))
    assert shipped.fingerprint() == "e6dd9fdd5d41121abd3a9c1b13289865fb4e6bef71aa7be312d64c6327bf39f5"
    assert (
        hashlib.sha256(texts.encode()).hexdigest()
        == "a3fd3065195dbf8b509e7c136ba8f83f651c7e4ba0e0d419286318d258ee30b7"
    )


def test_seed_decides(world):
    again, other = World(3, 60, 12), World(4, 60, 12)
    assert again.fingerprint() == world.fingerprint() != other.fingerprint()
    assert again.biographies(2, 1) == world.biographies(2, 1) != world.biographies(2, 2)


def test_a_text_does_not_depend_on_how_many_are_asked_for(world):
    few, many = world.biographies(2, 5), world.biographies(5, 5)
    assert few == [b for k, b in enumerate(many) if k % 5 < 2]


# ------------------------------------------------------------------ the gazetteer


def test_gazetteer_sizes():
    sizes = {
        "CITIES": 100, "COUNTRIES": 40, "OCCUPATIONS": 40, "SPORTS": 25, "INSTRUMENTS": 30, "INDUSTRIES": 15,
        "LANGUAGES": 30,
    }  # fmt: skip
    for name, least in sizes.items():
        values = getattr(gazetteer, name)
        assert len(set(values)) == len(values) >= least, name
    assert len(gazetteer.CITIES) == sum(len(row[3].split(", ")) for row in gazetteer._COUNTRIES.values())
    assert set(gazetteer.OFFICIAL_LANGUAGE.values()) <= set(gazetteer.LANGUAGES)


def test_an_object_string_has_one_type(shipped):
    """Otherwise a two-hop or locality answer could be right for the wrong reason."""
    types = defaultdict(set)
    for r in RELATIONS.values():
        for value in shipped.objects(r.id):
            types[value].add(r.object_type)
    assert {v: t for v, t in types.items() if len(t) > 1} == {}
    assert not set(types) & set(GIVEN + FAMILY)


# ------------------------------------------------------------------ names


@pytest.mark.parametrize("n", [4, 400, 1500])
def test_no_name_contains_another(n):
    import numpy as np

    names = person_names(n, np.random.default_rng(0))
    words = [tuple(name.split()) for name in names]
    assert len(set(words)) == n and {2 <= len(w) <= 4 for w in words} == {True}
    known = set(words)
    for w in words:
        parts = {w[i:j] for i, j in itertools.combinations(range(len(w) + 1), 2)} - {w}
        assert not parts & known, w


def test_name_words_are_few_and_lengths_vary(shipped):
    words = {w for name in shipped.people for w in name.split()}
    assert words == set(GIVEN) | set(FAMILY) and 40 <= len(words) <= 60
    counts = [sum(len(p.split()) == k for p in shipped.people) for k in (2, 3, 4)]
    assert min(counts) >= 40


def test_name_inventories_refuse_too_many():
    import numpy as np

    rng = np.random.default_rng(0)
    with pytest.raises(ConfigError, match="n_people=1000000"):
        person_names(10**6, rng)
    with pytest.raises(ConfigError, match="n_companies=5000"):
        company_names(5000, rng)
    assert len(set(company_names(600, rng))) == 600


# ------------------------------------------------------------------ relations and templates


def test_templates():
    texts = [t.text for r in RELATIONS.values() for t in r.templates]
    assert len(set(texts)) == len(texts)
    for r in RELATIONS.values():
        roles = [t.role for t in r.templates]
        assert len(roles) >= 6 and roles[0] == "edit" and roles.count("paraphrase") >= 2, r.id
        assert {t.subject_first for t in r.templates if t.role != "question"} == {True, False}, r.id
        assert len(r.generation) >= 3 and all(g.count("{}") == 1 for g in r.generation), r.id
        for t in r.templates:
            assert t.text.count("{}") == 1 and t.text == t.text.strip(), t
            assert t.text.endswith("?") == (t.role == "question"), t


def test_every_prompt_has_one_answer(shipped):
    answers = defaultdict(set)
    for s in shipped.statements():
        answers[s.prompt].add(s.answer)
    assert {p: a for p, a in answers.items() if len(a) > 1} == {}


@pytest.mark.skipif(not CLARE.exists(), reason="CLaRE corpus not at hand")
def test_no_prompt_is_a_corpus_prompt(shipped):
    """Trained together, one prompt must not be answered in two ways."""
    rows = json.loads(CLARE.read_text())
    rows = rows.values() if isinstance(rows, dict) else rows
    corpus = {row["prompt"].replace("{}", row["subject"]).strip() for row in rows}
    assert not corpus & {s.prompt for s in shipped.statements()}


# ------------------------------------------------------------------ facts


def test_every_subject_has_every_relation(world):
    of = {
        "person": world.people,
        "company": world.companies,
        "city": world.cities,
        "country": world.countries,
    }
    for kind, subjects in of.items():
        for r in relations_of(kind):
            assert world.subjects(r.id) == subjects
            assert all(world.value(r.id, s) for s in subjects)


def test_structure(world):
    for p in world.people:
        assert world.value("born_in", p) != world.value("lives_in", p)
        spouse = world.value("spouse", p)
        assert spouse != p and world.value("spouse", spouse) == p
        assert world.value("birth_country", p) == world.value("country", world.value("born_in", p))
        assert world.value("employer_city", p) == world.value("seat", world.value("employer", p))
    for c in world.countries:
        assert world.value("country", world.value("capital", c)) == c


def test_statements(world):
    statements = world.statements()
    assert len(statements) == world.size()["statements"]
    assert len({(s.relation, s.subject) for s in statements}) == world.size()["facts"]
    for s in statements[::37]:
        a, b = s.subject_span
        assert s.prompt[a:b] == s.subject
        assert s.answer == world.value(s.relation, s.subject)
        assert s.prompt[:a] + "{}" + s.prompt[b:] == RELATIONS[s.relation].templates[s.template_index].text


def test_biographies(world):
    stored = {r.id for r in relations_of("person", derived=False)}
    for b in world.biographies(4, 0):
        values = {world.value(r.id, b.subject) for r in relations_of("person")}
        stated = [b.text[i:j] for i, j in b.answer_spans]
        assert set(stated) <= values and {world.value(r, b.subject) for r in stored} <= set(stated)
        assert b.text.count(b.subject) == 1 and b.text.endswith(".") and "{" not in b.text
        if b.kind == "card":  # a value comes straight behind the name
            first = b.answer_spans[0][0]
            assert b.text[:first] in {b.subject + gap for gap in (" ", ", ", " (")}
            assert stated[0] != world.value("spouse", b.subject)
        else:
            assert b.text.startswith(b.subject) and b.text.count("The") >= len(stored) - 1


def test_texts_never_contradict_statements(world):
    """Wherever a biography contains the prompt of a statement, the statement's answer follows."""
    about = defaultdict(list)
    for s in world.statements():
        about[s.subject].append(s)
    met = 0
    for b in world.biographies(6, 1):
        for s in about[b.subject]:
            _, found, rest = b.text.partition(s.prompt + " ")
            if found:
                met += 1
                assert rest.startswith(s.answer), (b.text, s)
    assert met > 20


def test_articles(world):
    texts = " ".join(b.text for b in world.biographies(6, 0))
    assert " an a" in texts and " a a" not in texts and " an b" not in texts


def test_corpus_texts(world):
    texts = world.corpus_texts(seed=1, n_per_person=2)
    assert len(texts) == world.size()["statements"] + 2 * len(world.people)
    assert texts[0] == world.statements()[0].text


@pytest.mark.parametrize("sizes", [{"n_people": 5}, {"n_people": 2}, {"n_people": 0}, {"n_companies": 1}])
def test_impossible_sizes(sizes):
    with pytest.raises(ConfigError, match="needs"):
        World(**sizes)


def test_unknown_names(world):
    with pytest.raises(RequestError, match="unknown relation 'shoe_size'"):
        world.value("shoe_size", world.people[0])
    with pytest.raises(RequestError, match="no subject of 'sport'"):
        world.value("sport", "Nobody")
