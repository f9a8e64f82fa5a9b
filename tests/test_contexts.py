"""Context templates: validation, weights, seeded sampling."""

import pytest
import torch
from conftest import make_lm

from editkit.base.errors import ConfigError
from editkit.locate.contexts import STARTS, ContextTemplates, generate, sample_contexts

MEMIT = [["{}"], ["The cat. {}", "I see. {}", "You. {}", "Because. {}", "So. {}"]]


def test_weights_of_groups_and_flat():
    contexts = ContextTemplates.of(MEMIT)
    assert contexts.weights("groups") == pytest.approx([1 / 2] + [1 / 10] * 5)
    assert contexts.weights("flat") == pytest.approx([1 / 6] * 6)
    with pytest.raises(ConfigError, match="'groups' or 'flat'"):
        contexts.weights("mean")


def test_forms_of_input():
    assert ContextTemplates.of(None).flat == ("{}",)
    assert ContextTemplates.of(["{}", "So. {}"]).groups == (("{}",), ("So. {}",))
    contexts = ContextTemplates.of(MEMIT)
    assert ContextTemplates.of(contexts) is contexts
    assert contexts.fill("{} is")[:2] == ["{} is", "The cat. {} is"]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], "at least one group"),
        ([["{}"], []], "no empty group"),
        ([["{}"], ["no slot"]], "no slot"),
        ([["{}"], ["{} and {}"]], "exactly once"),
        ([["{}"], ["a { b {}"]], "no other brace"),
        ([["So. {}"], ["{}"]], "bare"),
        ("{}", "string"),
    ],
)
def test_bad_templates_are_refused(value, message):
    with pytest.raises(ConfigError, match=message):
        ContextTemplates.of(value)


@pytest.mark.parametrize("kind", ["wordlevel", "bos", "metaspace"])
def test_sampling_is_seeded_and_usable(kind):
    lm = make_lm("llama", kind)
    state = torch.random.get_rng_state()
    first = sample_contexts(lm, 5, 12, seed=3)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert first == sample_contexts(lm, 5, 12, seed=3)
    assert first != sample_contexts(lm, 5, 12, seed=4)
    bare, sampled = first.groups
    assert bare == ("{}",) and len(sampled) == 5
    for template, start in zip(sampled, STARTS, strict=True):
        assert template.endswith(". {}")
        if kind != "wordlevel":  # there "Therefore" and its peers are words of the vocabulary, or <unk>
            assert template.startswith(start)


def test_no_contexts():
    lm = make_lm()
    assert sample_contexts(lm, 0).flat == ("{}",)
    with pytest.raises(ConfigError, match="negative"):
        sample_contexts(lm, -1)
    with pytest.raises(ConfigError, match="at least 1"):
        sample_contexts(lm, 2, 10, top_k=0)


def test_greedy_generation_equals_step_by_step_argmax():
    """Batched, left-padded generation must give what each prompt gives alone."""
    lm = make_lm("gpt2", "bytelevel")
    prompts = ["The", "The mother tongue of Ana"]
    texts = generate(lm, prompts, 12, torch.Generator().manual_seed(0), top_k=1)
    special = set(lm.tokenizer.all_special_ids)
    for prompt, text in zip(prompts, texts, strict=True):
        ids = lm.tokenizer(prompt)["input_ids"]
        while len(ids) < 12:
            with torch.no_grad():
                order = lm.model(torch.tensor([ids])).logits[0, -1].argsort(descending=True).tolist()
            ids.append(next(i for i in order if i not in special))
        assert text == " ".join(lm.tokenizer.decode(ids).split())


def test_braces_of_generated_text_are_removed(monkeypatch):
    monkeypatch.setattr("editkit.locate.contexts.generate", lambda *a, **k: ["a {b} c", "{", "d"])
    assert sample_contexts(make_lm(), 3).groups[1] == ("a b c. {}", ". {}", "d. {}")
