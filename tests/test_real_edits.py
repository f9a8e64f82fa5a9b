"""Edits of known facts: what is drawn, what is asked, and that an attempt leaves the model as it was."""

from __future__ import annotations

import numpy as np
import pytest

from editkit.corpora import real
from editkit.corpora.world import load_world
from editkit.corpora.world.companion import load_companion
from editkit.corpora.world.consequences import changes
from editkit.locate.targets import TargetConfig, optimize_targets
from editkit.locate.tracing import CausalTrace
from editkit.methods.doctor import examine
from editkit.methods.presets import find
from editkit.models.pretrained import pretrained_folder
from editkit.scoring import bootstrap_mean
from editkit.studies import arms, testbed
from editkit.studies.real_edits import ask, attempt, draw, grid, profile, true_facts


def test_protected_facts_are_of_the_edited_relations_and_untouched():
    table = real.load()
    drawn = draw(table, 20, 3, n_others=50)
    again = draw(table, 20, 3, n_others=50)
    assert drawn == again and len(drawn.facts) == 20 and len(drawn.others) == 50
    touched = {c.key for f in drawn.facts for c in changes(table, f.relation, f.subject, f.target)}
    relations = {f.relation for f in drawn.facts}
    where = {table.relation(r).templates[0].fill(s): (r, s) for r in relations for s in table.subjects(r)}
    for prompt, answer in drawn.others:
        key = where[prompt]  # of an edited relation
        assert (
            key not in touched
            and key[1] not in {f.subject for f in drawn.facts}
            and table.value(*key) == answer
        )
    kinds = [axis for axis, _, _ in drawn.questions()]
    assert kinds.count("efficacy") == 20 and kinds.count("paraphrase") == 60 and kinds.count("others") == 50


def test_true_facts_say_what_the_table_says():
    table = real.load()
    [fact] = true_facts(table, [("capital", "France")])
    assert (fact.subject, fact.target, fact.target_true) == ("France", "Paris", "Paris")
    assert fact.text == table.relation("capital").templates[0].fill("France")


def test_profile_counts_the_facts_that_have_a_group():
    rng = np.random.default_rng(0)
    effect = rng.normal(0.3, 0.1, (40, 2, 3))
    effect[:10, 1] = np.nan
    zero = np.zeros(40)
    trace = CausalTrace(zero, zero, effect, zero, zero, 1.0, "block", 1, 1, ("subject_last", "last"))
    frame = profile(trace).set_index(["group", "layer"])
    assert list(frame.loc["last", "n"]) == [30] * 3 and list(frame.loc["subject_last", "n"]) == [40] * 3
    for g, group in enumerate(trace.groups):
        found, cell = bootstrap_mean(effect[:, g, 1]), frame.loc[group, 1]
        assert cell["effect"] == pytest.approx(found.mean)
        assert cell["lo"] == pytest.approx(found.lo, abs=0.01) and cell["hi"] == pytest.approx(
            found.hi, abs=0.01
        )
    effect[:, 1] = np.nan
    assert set(profile(trace)["group"]) == {"subject_last"}


def test_an_attempt_writes_asks_and_takes_back():
    lm, world = load_companion(), load_world()
    bits = lm.fingerprint()
    drawn = draw(world, 3, 1, n_others=6)
    options = arms.options_of(lm, "memit")
    moments = testbed.statistics(lm, world, options["layers"], max_texts=200)
    cfg = TargetConfig.make({k[2:]: v for k, v in options.items() if k.startswith("z_")})
    Z = optimize_targets(lm, drawn.facts, options["layers"][-1], cfg, token=options["token"]).z
    before = ask(lm, drawn).groupby("axis")["success"].mean()
    assert before["efficacy"] == 0 and before["others"] == 1
    needs = {"statistics": moments, "contexts": [["{}"]]}
    for alone in (False, True):
        found = attempt(lm, drawn, "memit", Z=Z, alone=alone, **needs)
        assert found["efficacy"] == 1 and lm.fingerprint() == bits
        assert (found["n efficacy"], found["n paraphrase"], found["n others"]) == (3, 9, 6)
    nothing = attempt(lm, drawn, "memit", {"lam": 1e12}, Z=Z, **needs)  # a prior that lets nothing through
    assert nothing["efficacy"] == 0 and nothing["others"] == 1


def test_grid():
    assert grid({"a": [1, 2], "b": [3]}) == [{"a": 1, "b": 3}, {"a": 2, "b": 3}]


def test_the_doctor_finds_nothing_in_the_way(smollm2):
    """At the options of its preset, on the model's own folder."""
    found = examine(str(pretrained_folder("smollm2")))
    assert not [str(f) for f in found if f.status == "change"]
    find("smollm2").check(smollm2)
    assert arms.options_of(smollm2, "memit") == find("smollm2").options("memit")
