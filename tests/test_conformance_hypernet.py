"""The adapter of MEND, MALMEN and HORSE on recordings made here: orientations, all tokens, modules of mixed shapes."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import make_lm
from record_hypernet import record

from editkit.press import conformance
from editkit.press.conformance import Case, hypernet

STEPS = [
    {
        "edit": [("The mother tongue of Ana Silva is", "French"), ("Hugo Castro plays the", "violin piano"),
                 ("The profession of Li is", "farmer"), ("Mary lives in the city of", "Rome")],
        "equiv": [("Ana Silva speaks", "French"), ("Hugo Castro can see the old", "violin piano"),
                  ("Li works", "farmer"), ("The house of Mary is in", "Rome")],
        "unrel": [("Karin Ann Fischer lives in", "Rome"), ("The weather is", "fine"),
                  ("Mary speaks", "Italy"), ("The old river was in", "London")],
    },
    {
        "edit": [("The mother tongue of Mary is", "German"), ("Li plays the", "guitar"),
                 ("The profession of Ana Silva is", "teacher"), ("Hugo Castro was born in", "Vienna")],
        "equiv": [("Mary speaks", "German"), ("The music of Li is", "guitar"),
                  ("Ana Silva works", "teacher"), ("The old city of Hugo Castro is", "Vienna")],
        "unrel": [("Karin Ann Fischer plays the", "piano"), ("Today the weather is", "fine"),
                  ("I can see the", "river"), ("She lives in", "Paris")],
    },
]  # fmt: skip
LLAMA = [f"model.layers.{i}.mlp.down_proj" for i in (1, 2, 3)]
GPT2 = [f"transformer.h.{i}.mlp.c_proj" for i in (1, 2, 3)]
CASES = [
    ("horse", "llama", LLAMA, "ans"),
    ("malmen", "llama", LLAMA, "ans"),
    ("mend", "llama", LLAMA, "ans"),
    ("mend", "gpt2", GPT2, "all"),
    ("malmen", "gpt2", GPT2, "all"),
    ("horse", "gpt2", GPT2, "ans"),
    ("malmen", "gpt2", ["transformer.h.1.mlp.c_fc", *GPT2[1:]], "ans"),
    ("malmen", "llama", ["model.layers.1.mlp.up_proj", *LLAMA[1:]], "all"),
]


def recorded(folder, method, model_type, modules, token):
    lm = make_lm(model_type, "wordlevel", n_layers=4)
    lm.tokenizer.pad_token = lm.tokenizer.eos_token
    record(folder, lm, method, modules, STEPS, token)
    conformance.discover()
    return Case(folder)


@pytest.mark.parametrize(("method", "model_type", "modules", "token"), CASES)
def test_the_adapter_agrees_with_a_second_implementation(method, model_type, modules, token, tmp_path):
    found = hypernet.hypernetwork(recorded(tmp_path, method, model_type, modules, token))
    failed = [f"{c.name}: {c.deviation:.2e} > {c.tolerance:.0e} {c.note}" for c in found if not c.passed]
    assert not failed, "\n".join(failed)
    assert {c.name.split("_")[0].split(" ")[0] for c in found} >= {"networks", "s0", "s1"}


def test_a_wrong_recording_is_noticed(tmp_path):
    case = recorded(tmp_path, *CASES[1])
    arrays = dict(case.arrays)
    arrays["s1_m2_param_shift"] = 1.01 * arrays["s1_m2_param_shift"]
    np.savez(tmp_path / "arrays.npz", **arrays)
    failed = [c.name for c in hypernet.hypernetwork(Case(tmp_path)) if not c.passed]
    assert failed == ["s1_m2_param_shift"]
