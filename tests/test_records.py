"""Edits of the world: consequences, probes that protect, agreement of a whole batch, exports."""

import json

import pytest

from editkit.base.errors import RequestError
from editkit.corpora import counterfact, zsre
from editkit.corpora.world.consequences import changes, must_change, must_not_change
from editkit.corpora.world.records import (
    EDITABLE,
    choose_edits,
    edit_facts,
    statistics,
    to_counterfact,
    to_zsre,
)
from editkit.corpora.world.relations import RELATIONS
from editkit.corpora.world.world import World
from editkit.models.facts import validate_facts

STORED = tuple(r.id for r in RELATIONS.values() if r.derived is None)


@pytest.fixture(scope="module")
def world():
    return World(seed=1, n_people=60, n_companies=10)


class EditedWorld(World):
    """The world after edits of stored facts, recomputed from scratch: the oracle of these tests."""

    def __init__(self, world, edits):
        super().__init__(world.seed, len(world.people), len(world.companies))
        for relation, subject, new in edits:
            self._values[relation][subject] = new
            if RELATIONS[relation].symmetric:
                self._values[relation][new] = subject


def all_facts(world):
    return {(r, s): world.value(r, s) for r in RELATIONS for s in world.subjects(r)}


def prompts(world):
    """prompt -> (relation, subject), over all statements."""
    return {s.prompt: (s.relation, s.subject) for s in world.statements()}


# ------------------------------------------------------------------ consequences of one edit


@pytest.mark.parametrize("relation", STORED)
def test_changes_are_what_a_recomputed_world_says(world, relation):
    before = all_facts(world)
    for edit in choose_edits(world, 3, seed=2, relations=[relation]):
        after = all_facts(EditedWorld(world, [edit]))
        found = {c.key: c for c in changes(world, *edit)}
        undefined = {k for k, c in found.items() if c.new is None}
        assert {k: after[k] for k in before if after[k] != before[k] and k not in undefined} == {
            k: c.new for k, c in found.items() if c.new is not None
        }
        assert all(c.old == before[k] for k, c in found.items())


def test_two_hop_only_when_the_country_differs(world):
    person = world.people[0]
    old = world.value("born_in", person)
    country = world.value("country", old)
    near = next(c for c in world.cities if c != old and world.value("country", c) == country)
    far = next(c for c in world.cities if world.value("country", c) != country)
    assert [c.kind for c in changes(world, "born_in", person, near)] == ["edit"]
    _, hop = changes(world, "born_in", person, far)
    assert (hop.relation, hop.kind, hop.old, hop.new) == (
        "birth_country", "two_hop", country, world.value("country", far),
    )  # fmt: skip


def test_moving_a_seat_moves_every_employee(world):
    company = world.value("employer", world.people[0])
    new = next(c for c in world.cities if c != world.value("seat", company))
    staff = {p for p in world.people if world.value("employer", p) == company}
    found = changes(world, "seat", company, new)[1:]
    assert {(c.relation, c.subject, c.new, c.kind) for c in found} == {
        ("employer_city", p, new, "two_hop_via") for p in staff
    }


def test_a_new_marriage_breaks_two(world):
    a = world.people[0]
    b = world.value("spouse", a)
    c = next(p for p in world.people if p not in (a, b))
    d = world.value("spouse", c)
    found = {x.subject: (x.new, x.kind) for x in changes(world, "spouse", a, c)}
    assert found == {
        a: (c, "edit"), c: (a, "symmetric"), b: (None, "undefined"), d: (None, "undefined"),
    }  # fmt: skip


@pytest.mark.parametrize("relation", ["born_in", "spouse", "country"])
def test_ground_truth_lists_cover_the_world(world, relation):
    (fact,) = edit_facts(world, 1, seed=3, relations=[relation])
    key = prompts(world)
    change, keep = must_change(world, fact), must_not_change(world, fact)
    undefined = {tuple(k) for k in json.loads(dict(fact.meta).get("undefined", "[]"))}
    changed = {key[p.prompt] for p in change}
    kept = {key[p.prompt] for p in keep}
    assert not changed & kept and changed | kept | undefined == set(all_facts(world))
    assert len(change) + len(keep) == sum(len(RELATIONS[r].templates) for r, _ in changed | kept)
    assert all(p.answer == world.value(*key[p.prompt]) for p in keep)
    assert all(p.before == world.value(*key[p.prompt]) != p.answer for p in change)
    assert {p.answer for p in keep if p.kind == "neighborhood"} <= {fact.target_true}
    assert all((p.subject == fact.subject) == (p.kind == "same_subject") for p in keep)
    first = must_not_change(world, fact, all_templates=False)
    assert len(first) == len(kept) and {p.prompt for p in first} <= {p.prompt for p in keep}


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (("shoe_size", None, "42"), "unknown relation"),
        (("birth_country", None, "France"), "edit one of these"),
        (("born_in", None, "Atlantis"), "has no 'country' in the world"),
        (("spouse", None, "Nobody At All"), "does not live in the world"),
        (("sport", "Nobody", "golf"), "no subject"),
    ],
)
def test_edits_that_cannot_be_worked_out(world, edit, message):
    relation, subject, new = edit
    with pytest.raises(RequestError, match=message):
        changes(world, relation, subject or world.people[0], new)


def test_edits_that_change_nothing(world):
    a = world.people[0]
    with pytest.raises(RequestError, match="already is"):
        changes(world, "sport", a, world.value("sport", a))
    with pytest.raises(RequestError, match="with itself"):
        changes(world, "spouse", a, a)


def test_ground_truth_needs_a_relation(world):
    (fact,) = edit_facts(world, 1)
    with pytest.raises(RequestError, match=r"set Fact\.relation"):
        must_change(world, fact.replace(relation=None))


# ------------------------------------------------------------------ a batch


@pytest.mark.parametrize(
    ("relations", "n"),
    [
        (EDITABLE, 60),
        (EDITABLE, 200),
        (("spouse",), 10),
        (("seat", "employer", "country", "born_in"), 60),
        (STORED, 90),
    ],
)
def test_all_edits_of_a_batch_hold_together(world, relations, n):
    """Every probe of every fact agrees with the world in which all edits were made at once."""
    facts = validate_facts(edit_facts(world, n, seed=5, relations=relations))
    edited = EditedWorld(world, [(f.relation, f.subject, f.target) for f in facts])
    key = prompts(world)
    for f in facts:
        assert f.relation in relations
        assert edited.value(f.relation, f.subject) == f.target != f.target_true
        assert world.value(f.relation, f.subject) == f.target_true
        for p in (*f.neighborhood, *f.locality, *f.same_subject):
            assert p.answer == world.value(*key[p.prompt]) == edited.value(*key[p.prompt])
        for p in f.consequences:
            assert p.before == world.value(*key[p.prompt]) != p.answer == edited.value(*key[p.prompt])
        assert {key[p] for p in f.paraphrases} == {(f.relation, f.subject)}
        assert f.text not in f.paraphrases


def test_protected_probes_avoid_undefined_facts(world):
    facts = edit_facts(world, 12, seed=0, relations=["spouse", "sport"])
    key = prompts(world)
    undefined = {tuple(k) for f in facts for k in json.loads(dict(f.meta).get("undefined", "[]"))}
    assert undefined
    protected = {key[p.prompt] for f in facts for p in (*f.neighborhood, *f.locality, *f.same_subject)}
    assert not protected & undefined


def test_probes_of_a_fact(world):
    key = prompts(world)
    for f in edit_facts(world, 20, seed=0):
        assert {key[p.prompt][0] for p in f.neighborhood} <= {f.relation}
        assert {p.answer for p in f.neighborhood} <= {f.target_true}
        assert f.subject not in {p.subject for p in f.neighborhood + f.locality}
        assert f.relation not in {key[p.prompt][0] for p in f.locality} and len(f.locality) == 5
        assert {p.subject for p in f.same_subject} == {f.subject}
        gone = {key[p.prompt][0] for p in f.consequences} | {f.relation}
        assert {key[p.prompt][0] for p in f.same_subject} == set(world.attributes(f.relation, f.subject)) - gone
        assert all(f.subject in g for g in f.generation) and len(f.generation) >= 3
        assert all(f.target in text and f.subject not in text for text in f.reference)
        firsts = [
            t.subject_first for t in RELATIONS[f.relation].templates if t.fill(f.subject) in f.paraphrases
        ]
        assert len(firsts) >= 5 and set(firsts) == {True, False}


def test_few_paraphrases_show_both_orders(world):
    for f in edit_facts(world, 20, seed=0, n_paraphrases=2):
        assert [p.startswith(f.subject) for p in f.paraphrases] == [False, True]


def test_target_is_no_object_the_subject_already_has(world):
    for f in edit_facts(world, 60, seed=1):
        assert f.target in world.objects(f.relation)
        assert f.target not in set(world.attributes(f.relation, f.subject).values())


def test_subjects_repeat_only_when_all_are_used(world):
    edits = choose_edits(world, 150, seed=0)
    assert len({s for _, s, _ in edits[:60]}) == 60
    assert len({s for _, s, _ in edits[60:120]}) == 60
    assert len({(r, s) for r, s, _ in edits}) == 150
    assert choose_edits(world, 40, seed=0) == edits[:40]
    assert choose_edits(world, 40, seed=1) != edits[:40]


def test_deterministic(world):
    assert edit_facts(world, 15, seed=2) == edit_facts(world, 15, seed=2) != edit_facts(world, 15, seed=3)


@pytest.mark.parametrize(
    ("n", "options", "message"),
    [
        (0, {}, "at least one"),
        (421, {}, "420 can hold together"),
        (3, {"relations": ["birth_country"]}, "edit one of these"),
        (3, {"relations": ["shoe_size"]}, "unknown relation"),
        (3, {"edit_template": 7}, "has 7 templates"),
    ],
)
def test_bad_requests(world, n, options, message):
    with pytest.raises(RequestError, match=message):
        edit_facts(world, n, **options)


# ------------------------------------------------------------------ exports


def written(tmp_path, records):
    path = tmp_path / "records.json"
    path.write_text(json.dumps(records))
    return path


def bare(probes):
    return [(p.prompt, p.answer, p.kind) for p in probes]


def test_counterfact_round_trip(world, tmp_path):
    facts = edit_facts(world, 30, seed=0, relations=(*EDITABLE, "spouse"))
    loaded = counterfact.load(written(tmp_path, to_counterfact(facts)))
    shared = (
        "prompt",
        "subject",
        "target",
        "target_true",
        "paraphrases",
        "generation",
        "relation",
        "case_id",
    )
    for mine, theirs in zip(facts, loaded, strict=True):
        assert [getattr(mine, k) for k in shared] == [getattr(theirs, k) for k in shared]
        assert bare(mine.neighborhood) == bare(theirs.neighborhood)


@pytest.mark.parametrize("edit_template", [0, -1])
def test_zsre_round_trip(world, tmp_path, edit_template):
    facts = edit_facts(world, 30, seed=0, edit_template=edit_template)
    path = written(tmp_path, to_zsre(facts))
    for mine, theirs in zip(facts, zsre.load(path, "easyedit"), strict=True):
        shared = ("prompt", "subject", "target", "target_true")
        assert [getattr(mine, k) for k in shared] == [getattr(theirs, k) for k in shared]
        assert mine.paraphrases[:1] == theirs.paraphrases
        assert bare(theirs.locality) == [(mine.locality[0].prompt, mine.locality[0].answer, "nq")]
    for mine, theirs in zip(facts, zsre.load(path, "rome"), strict=True):
        assert (theirs.prompt, theirs.target) == (mine.prompt, mine.target_true)
        assert theirs.locality[0].prompt == mine.locality[0].prompt


def test_exports_refuse_incomplete_facts(world):
    (fact,) = edit_facts(world, 1)
    with pytest.raises(RequestError, match="true object"):
        to_counterfact([fact.replace(target_true=None)])
    with pytest.raises(RequestError, match="locality probe"):
        to_zsre([fact.replace(locality=())])


def test_statistics(world):
    table = statistics(world).set_index("relation")
    assert list(table.index) == list(RELATIONS)
    assert table.n_facts.sum() == world.size()["facts"]
    assert table.loc["spouse", "entropy"] == pytest.approx(5.906890596)  # log2(60): one-to-one
    assert table.loc["spouse", "chance_mode"] == pytest.approx(1 / 60)
    assert (table.chance_mode >= table.chance_uniform - 1e-12).all()
    assert table.loc["birth_country", "derived_from"] == "born_in + country"
