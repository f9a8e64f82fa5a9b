"""In-context editing: the prefix inside the forward pass equals the prefix in the text."""

from __future__ import annotations

import pytest
import torch

from editkit.base.errors import ConfigError, RequestError
from editkit.methods import make_editor
from editkit.scoring import generate, score_targets


def make(lm, **changes):
    return make_editor("in_context", lm, **changes)


@pytest.mark.parametrize("side", ["left", "right"])
def test_it_is_the_text_with_the_edit_in_front(any_lm, facts, side):
    texts = [f.text for f in facts]
    editor = make(any_lm)
    editor.edit(facts)
    tokenizer = any_lm.tokenizer
    ids = []
    for fact, told in zip(facts, editor.told, strict=True):
        own = tokenizer(fact.text)["input_ids"]
        bos = own[:1] if own[0] == tokenizer.bos_token_id else []
        ids.append(bos + told + own[len(bos) :])  # the first token stands first, and once
        assert tokenizer.decode(told).strip() == f"Imagine that {fact.text} {fact.target}."
        text = tokenizer.decode(told + own[len(bos) :])
        assert f"{fact.target}.{fact.text}" not in text  # a space, or a line's end, between the two
    with editor.detached():
        expected = [any_lm.model(input_ids=torch.tensor([row])).logits[0, -1] for row in ids]
    encoding = any_lm.encode(texts, side)
    logits = any_lm.logits(encoding)
    assert logits.shape[:2] == encoding.input_ids.shape
    for i, last in enumerate(encoding.last.tolist()):
        torch.testing.assert_close(logits[i, last], expected[i], atol=2e-4, rtol=2e-4)
    editor.restore()


def test_decoding_with_a_cache(any_lm, facts):
    editor = make(any_lm, n_edits=2, threshold=0.0)
    editor.edit(facts[:2])
    texts = [f.text for f in facts[:2]]
    whole = []
    for text in texts:
        ids = any_lm.encode([text]).input_ids
        n = ids.shape[1]
        from editkit.models.prompts import prompts

        for _ in range(4):
            with prompts(any_lm, [n]), torch.no_grad():
                ids = torch.cat([ids, any_lm.model(input_ids=ids).logits[:, -1:].argmax(-1)], 1)
        whole.append(ids[0].tolist())
    cached = [list(g.ids) for g in generate(any_lm, texts, max_new_tokens=4, stop=False)]
    assert cached == whole
    found = any_lm.model.generate(
        **any_lm.encode([texts[0]]), max_new_tokens=4, do_sample=False, pad_token_id=0
    )
    assert found[0].tolist()[:6] == whole[0][:6]
    editor.restore()


def test_far_prompts_are_left_alone(tiny_lm, facts, tmp_path):
    lm = tiny_lm("llama")
    other = ["You can see near the river"]
    before = lm.logits(lm.encode(other))
    editor = make(lm, threshold=0.6)
    editor.edit(facts[:1])
    assert torch.equal(lm.logits(lm.encode(other)), before)
    path = editor.save(tmp_path / "ic.safetensors")
    expected = score_targets(lm, [(facts[0].text, facts[0].target)])[0].nll
    editor.restore()
    again = make(lm, threshold=0.6)
    again.load(path)
    assert score_targets(lm, [(facts[0].text, facts[0].target)])[0].nll == expected
    again.edit([facts[0].replace(target="Spanish")])
    assert len(again.told) == 1


def test_a_prefix_that_leaves_no_room_is_refused(tiny_lm, facts):
    lm = tiny_lm("gpt2")
    make(lm, n_edits=1, threshold=0.0).edit(facts[:1])
    long = " ".join(["house"] * (lm.max_tokens // 2 - 2))  # two tokens a word here
    with pytest.raises(RequestError, match="lower n_edits"):
        lm.logits(lm.encode([long]))


def test_threshold_one_shows_an_edit_to_its_own_prompt(tiny_lm, facts):
    lm = tiny_lm("llama")
    editor = make(lm, threshold=1.0)
    before = lm.logits(lm.encode([f.text for f in facts]))
    editor.edit(facts)
    after = lm.logits(lm.encode([f.text for f in facts]))
    assert all(not torch.allclose(a[-1], b[-1]) for a, b in zip(before, after, strict=True))


def test_the_template_needs_a_slot(tiny_lm):
    with pytest.raises(ConfigError, match="must contain"):
        make(tiny_lm("llama"), template="Imagine that.")
