"""Memories beside the model: where prompts end, routes kept while decoding, attaching without trace, files."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from conftest import MODEL_TYPES, TOKENIZERS

from editkit.base.config import Config, option
from editkit.base.errors import ConfigError, DataError, ModelError, RequestError
from editkit.methods import EDITORS, make_editor, register
from editkit.methods.memory import MemoryEditor, open_memory
from editkit.models.prompts import prompts, readers
from editkit.scoring import engine
from editkit.scoring.generation import generate

PROMPTS = ["The mother tongue of Ana Silva is", "Li", "You can see the old house near the"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MarkConfig(Config):
    layer: int = option(0, "layer", low=0)
    size: float = option(3.0, "size of the mark")


class Mark(MemoryEditor):
    """Adds to a layer a vector that depends on the mean of the prompt's keys: any error in the span shows."""

    name = "test-mark"
    Config = MarkConfig

    def check(self):
        self.lm.check_layer(self.config.layer)

    def modules(self):
        return [self.lm.down_name(self.config.layer)]

    def reset_memory(self):
        self.targets, self.fail = [], False
        m, d = self.lm.weight_shape(self.config.layer)
        self.projection = 0.2 * torch.randn(m, d, generator=torch.Generator().manual_seed(3))
        self.calls = 0

    def memory(self):
        return {"targets": self.targets}, {"projection": self.projection}

    def load_memory(self, values, tensors):
        self.targets, self.projection = list(values["targets"]), tensors["projection"]

    def write_facts(self, facts):
        for fact in facts:
            self.targets = [*self.targets, fact.target]
            self.projection += 0.01
        if self.fail:
            raise RuntimeError("interrupted")

    def route(self, x, out, state):
        self.calls += 1
        return torch.tanh(state.mean(x) @ self.projection.T)[:, None] * self.config.size

    def read(self, name, x, out, state):
        return out + state.route if self.targets else None


@pytest.fixture(autouse=True)
def registered():
    register(Mark)
    yield
    del EDITORS[Mark.name]


@pytest.fixture
def marked(tiny_lm, facts):
    def make(model_type="llama", tokenizer="bytelevel", n=1):
        lm = tiny_lm(model_type, tokenizer)
        editor = Mark(lm)
        editor.edit(facts[:n])
        return lm, editor

    return make


def alone(lm, text):
    return lm.logits(lm.encode([text]))[0]


@torch.no_grad()
@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_matter(marked, model_type, side):
    lm, _ = marked(model_type)
    encoding = lm.encode(PROMPTS, side)
    logits = lm.logits(encoding)
    for i, text in enumerate(PROMPTS):
        own = logits[i][encoding.attention_mask[i].bool()]
        torch.testing.assert_close(own, alone(lm, text), atol=2e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_the_answer_is_not_seen_by_the_route(marked, model_type, side):
    lm, _ = marked(model_type)
    answers = [" German and so on", " plays", " river"]
    texts = [p + a for p, a in zip(PROMPTS, answers, strict=True)]
    lengths = lm.encode(PROMPTS).lengths
    encoding = lm.encode(texts, side)
    with prompts(lm, lengths):
        logits = lm.logits(encoding)
    told = logits
    for i, text in enumerate(PROMPTS):
        n = int(lengths[i])
        own = logits[i][encoding.attention_mask[i].bool()][:n]
        torch.testing.assert_close(own, alone(lm, text), atol=2e-5, rtol=1e-4)
    assert not torch.allclose(
        told, lm.logits(encoding), atol=1e-3
    )  # the whole text as prompt is another route


@torch.no_grad()
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_generation_keeps_the_route_of_the_prompt(marked, model_type):
    """Hugging Face's generate with left padding and cache against teacher forcing without either."""
    lm, editor = marked(model_type)
    encoding = lm.encode(PROMPTS, "left")
    editor.calls = 0
    ids = lm.model.generate(
        input_ids=encoding.input_ids, attention_mask=encoding.attention_mask, max_new_tokens=6, min_new_tokens=6,
        do_sample=False, pad_token_id=lm.tokenizer.pad_token_id,
    )  # fmt: skip
    assert editor.calls == 1
    lengths = encoding.lengths
    for i in range(len(PROMPTS)):
        row = ids[i, -(6 + int(lengths[i])) :][None]
        with prompts(lm, lengths[i : i + 1]):
            out = lm.model(input_ids=row, use_cache=False).logits[0]
        predicted = out[int(lengths[i]) - 1 : -1].clone()
        predicted[:, lm.tokenizer.eos_token_id] = -torch.inf  # min_new_tokens
        assert predicted.argmax(-1).tolist() == ids[i, -6:].tolist()


@torch.no_grad()
def test_beams_and_samples_of_several_prompts_keep_their_routes(marked):
    lm, _ = marked()
    encoding = lm.encode(PROMPTS, "left")
    options = {"max_new_tokens": 5, "pad_token_id": lm.tokenizer.pad_token_id}
    whole = lm.model.generate(**{k: encoding[k] for k in ("input_ids", "attention_mask")}, num_beams=3,
                              do_sample=False, **options)  # fmt: skip
    for i, text in enumerate(PROMPTS):
        one = lm.encode([text])
        single = lm.model.generate(input_ids=one.input_ids, attention_mask=one.attention_mask, num_beams=3,
                                   do_sample=False, **options)  # fmt: skip
        assert lm.tokenizer.decode(single[0, one.input_ids.shape[1] :], skip_special_tokens=True) == (
            lm.tokenizer.decode(whole[i, encoding.input_ids.shape[1] :], skip_special_tokens=True)
        )


@torch.no_grad()
@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_scorers_tell_where_prompts_end(marked, tokenizer):
    lm, _ = marked(tokenizer=tokenizer)
    pairs = [("The mother tongue of", "French"), ("The mother tongue of French", "violin"),
             ("The mother tongue of", "French violin"), ("Li plays the", "piano")]  # fmt: skip
    scores = [engine.score_targets(lm, pairs, padding_side=side) for side in ("left", "right")]
    scores.append([engine.score_targets(lm, [pair])[0] for pair in pairs])
    for i, (prompt, answer) in enumerate(pairs):
        ((ids, start),) = engine.split_tokens(lm, [(prompt, answer)])
        with prompts(lm, [start]):
            logp = lm.model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        expected = [float(logp[t - 1, ids[t]]) for t in range(start, len(ids))]
        for found in scores:
            assert found[i].logprobs.tolist() == pytest.approx(expected, abs=2e-5)


def test_sharing_of_rows_without_a_memory_is_as_before(tiny_lm):
    lm = tiny_lm("llama")
    seen = []
    handle = lm.model.register_forward_pre_hook(
        lambda m, a, k: seen.append(len(k["input_ids"])), with_kwargs=True
    )
    engine.score_targets(lm, [("The mother tongue of", "French"), ("The mother tongue of French", "violin")])
    handle.remove()
    assert seen == [1]


@torch.no_grad()
def test_our_generator_with_prompts_of_different_length(marked):
    lm, _ = marked()
    greedy = generate(lm, PROMPTS, max_new_tokens=5, stop=False)
    one_by_one = [generate(lm, [p], max_new_tokens=5, stop=False)[0] for p in PROMPTS]
    assert [g.ids for g in greedy] == [g.ids for g in one_by_one]
    sampled = generate(
        lm, PROMPTS, max_new_tokens=5, stop=False, top_k=2, generator=torch.Generator().manual_seed(0)
    )
    assert [len(s.ids) for s in sampled] == [len(g.ids) for g in greedy]


@torch.no_grad()
def test_interleaved_caches_keep_their_own_routes(marked):
    lm, _ = marked()
    first, second = (lm.encode([p]) for p in PROMPTS[:2])
    a = lm.model(**first, use_cache=True)
    b = lm.model(**second, use_cache=True)
    nxt = torch.tensor([[7]])

    def step(cache, n):
        return lm.model(
            input_ids=nxt, attention_mask=torch.ones(1, n + 1), past_key_values=cache, use_cache=True
        )

    for out, encoding in ((a, first), (b, second)):
        n = encoding.input_ids.shape[1]
        got = step(out.past_key_values, n).logits[0, -1]
        with prompts(lm, [n]):
            want = lm.model(input_ids=torch.cat([encoding.input_ids, nxt], 1)).logits[0, -1]
        torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_a_cache_filled_without_the_memory_is_refused(marked):
    lm, editor = marked()
    encoding = lm.encode(PROMPTS[:1])
    with editor.detached():
        cache = lm.model(**encoding, use_cache=True).past_key_values
    with pytest.raises(ModelError, match="filled without the memory"):
        lm.model(input_ids=torch.tensor([[7]]), past_key_values=cache, use_cache=True)


@torch.no_grad()
def test_a_prompt_read_in_pieces_is_refused(marked):
    """Prefill by chunks, or a second turn of a chat: the memory would decide by the first piece alone."""
    lm, _ = marked()
    encoding = lm.encode([PROMPTS[0] + " the old house"])
    ids, n = encoding.input_ids, encoding.input_ids.shape[1]
    with pytest.raises(ModelError, match="prefill_chunk_size"):
        lm.model.generate(**encoding, max_new_tokens=2, prefill_chunk_size=2)
    cache = lm.model(input_ids=ids[:, : n - 3], use_cache=True).past_key_values
    with pytest.raises(ModelError, match="whole prompt"):
        lm.model(input_ids=ids[:, n - 3 :], past_key_values=cache, use_cache=True)
    # an answer of several tokens after a prompt that was read whole is fine, where it is said so
    with prompts(lm, [n - 3]):
        want = lm.model(input_ids=ids).logits[0, -1]
        cache = lm.model(input_ids=ids[:, : n - 3], use_cache=True).past_key_values
        got = lm.model(input_ids=ids[:, n - 3 :], past_key_values=cache, use_cache=True).logits[0, -1]
    torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-4)


def test_a_copy_of_a_model_with_a_memory_is_refused(marked):
    lm, editor = marked()
    with pytest.raises(ModelError, match=r"its own save\(\) and load\(\)"):
        copy.deepcopy(lm.model)
    with editor.detached():
        copy.deepcopy(lm.model)


def test_bad_prompt_lengths(marked):
    lm, _ = marked()
    encoding = lm.encode(PROMPTS)
    with pytest.raises(RequestError, match="positive"), prompts(lm, [1, 0, 2]):
        pass
    with (
        pytest.raises(RequestError, match="2 prompt lengths were given for a batch of 3"),
        prompts(lm, [1, 2]),
    ):
        lm.logits(encoding)
    encoding["attention_mask"][1] = 0
    with pytest.raises(RequestError, match="row 1 has no prompt token"):
        lm.logits(encoding)
    mask = torch.zeros(3, 1, encoding.input_ids.shape[1], encoding.input_ids.shape[1])
    with pytest.raises(ModelError, match="2-d attention mask"):
        lm.model(input_ids=encoding.input_ids, attention_mask=mask)
    assert readers(lm)[0].state is None and readers(lm)[0].lengths is None


@torch.no_grad()
def test_attach_and_detach_leave_no_trace(any_lm, facts):
    lm, encoding = any_lm, any_lm.encode(PROMPTS)

    def picture():
        hooks = sum(
            len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._forward_hooks_always_called)
            for m in lm.model.modules()
        )
        tree = [(n, type(m), tuple(m.__dict__)) for n, m in lm.model.named_modules()]
        return tree, {k: v.clone() for k, v in lm.model.state_dict().items()}, hooks

    tree, state, hooks = picture()
    logits = lm.logits(encoding)
    editor = Mark(lm)
    with editor.attached():
        assert torch.equal(lm.logits(encoding), logits)  # an empty memory changes nothing
    editor.edit(facts[:1])
    assert editor.is_attached and not torch.equal(lm.logits(encoding), logits)
    assert picture()[0] == tree and picture()[1].keys() == state.keys()
    edited = lm.logits(encoding)
    with editor.detached():
        assert torch.equal(lm.logits(encoding), logits)
    assert torch.equal(lm.logits(encoding), edited)
    editor.detach()
    editor.detach()
    after = picture()
    assert after[0] == tree and after[2] == hooks
    assert all(torch.equal(after[1][k], v) for k, v in state.items())
    assert torch.equal(lm.logits(encoding), logits)
    with pytest.raises(KeyError), editor.attached():
        raise KeyError
    assert not editor.is_attached


def test_one_memory_at_a_time(marked, facts):
    lm, editor = marked()
    other = Mark(lm)
    for action in (other.attach, lambda: other.edit(facts[:1])):
        with pytest.raises(ModelError, match="another memory is attached"):
            action()
    editor.detach()
    other.edit(facts[:1])


def test_a_failed_edit_leaves_the_memory_as_it_was(marked, facts):
    _, editor = marked()
    before = editor.state_dict()
    editor.fail = True
    with pytest.raises(RuntimeError):
        editor.edit(facts[1:2])
    assert editor.targets == ["French"] and editor.n_facts == 1 and editor.is_attached
    assert all(torch.equal(v, before[k]) for k, v in editor.state_dict().items())
    with pytest.raises(RequestError):
        editor.edit([])


def test_save_load_open(marked, facts, tiny_lm, tmp_path):
    lm, editor = marked()
    path = editor.save(tmp_path / "deep" / "mark.safetensors")
    editor.edit(facts[1:2])
    full = editor.state_dict()
    editor.restore()
    assert not editor.is_attached and editor.n_facts == 0
    again = open_memory(path, lm)
    assert isinstance(again, Mark) and again.is_attached and again.n_facts == 1
    again.edit(facts[1:2])
    assert again.targets == ["French", "violin"]
    assert all(torch.equal(v, full[k]) for k, v in again.state_dict().items())
    again.restore()
    with pytest.raises(ConfigError, match=r"size = 3.0 \(here 2.0\)"):
        make_editor("test-mark", lm, size=2.0).load(path)
    with pytest.raises(ModelError, match="another model"):
        open_memory(path, tiny_lm("llama", seed=1))
    (tmp_path / "x").write_text("x")
    with pytest.raises(DataError, match="cannot read"):
        open_memory(tmp_path / "x", lm)


def test_weights_changed_since_the_first_edit_are_noticed(marked, facts):
    lm, editor = marked()
    editor.detach()
    with torch.no_grad():
        lm.weight(1)[0, 0] += 1
    for action in (editor.attach, lambda: editor.edit(facts[1:2])):
        with pytest.raises(ModelError, match="have changed since"):
            action()
    editor.restore()
    editor.edit(facts[1:2])


def test_background_texts(tiny_lm):
    lm = tiny_lm("llama", "wordlevel")
    state = torch.random.get_rng_state()
    texts = Mark(lm).background_texts(seed=1)
    assert texts == Mark(lm).background_texts(seed=1) != Mark(lm).background_texts(seed=2)
    assert len(texts) == 100 and all(t.strip() for t in texts)
    assert torch.equal(state, torch.random.get_rng_state())
    assert Mark(lm, background=["a b"]).background_texts() == ["a b"]
    for bad in ([], "text", ["a", " "]):
        with pytest.raises(RequestError, match="background must be"):
            Mark(lm, background=bad)
    with pytest.raises(ConfigError, match="takes no background"):
        make_editor("ft", lm, layers=[0], background=["a"])


def test_modules_called_outside_a_pass(marked):
    lm, _ = marked()
    module = lm.model.get_submodule(lm.down_name(0))
    with pytest.raises(ModelError, match="outside a forward pass"):
        module(torch.zeros(1, 2, lm.d_key))
