"""GRACE: the codebook's rules on paper, values, routing, files; the released rules of labels."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from editkit.base.errors import ConfigError, ModelError, NumericsError
from editkit.methods import make_editor
from editkit.methods.memory import open_memory
from editkit.methods.memory.codebook import Codebook, Label
from editkit.models.prompts import prompts
from editkit.scoring import generate, score_targets

OPTIONS = {"layer": 0, "steps": 25, "lr": 0.5, "loss_threshold": 0.01, "value_init": "warm"}
A, B = Label((1,), 3), Label((2,), 3)


def make(lm, **changes):
    return make_editor("grace", lm, **{**OPTIONS, **changes})


def place(book, x, label=A):
    return book.place(torch.tensor([float(x), 0.0]), torch.zeros(1), label)


def test_rules_in_one_dimension():
    book = Codebook(2, 1, radius=1.0)
    assert place(book, 0) == (0, "new")
    assert place(book, 0.5) == (0, "inside")
    assert place(book, 1.8) == (0, "expanded") and book.radii.tolist() == pytest.approx([1.8])
    assert place(book, 5, B) == (1, "new")  # 5 > 1 + 1.8
    assert place(book, 1, B) == (2, "split")
    assert book.radii.tolist() == pytest.approx([0.5 - 1e-5, 1.0, 0.5])
    assert place(book, 5, A) == (1, "replaced") and len(book) == 3 and book.labels[1] == A
    nearest, distance, hit = book.find(torch.tensor([[0.4, 0.0], [0.45, 0.3], [9.0, 0.0]]))
    assert nearest.tolist() == [0, 0, 1] and hit.tolist() == [True, False, False]
    assert distance[0] == pytest.approx(0.4)


def test_moving_average_moves_the_key():
    book = Codebook(2, 1, 1.0, expand="moving_average")
    place(book, 0)
    place(book, 1.5)
    assert book.keys[0].tolist() == [0.75, 0.0] and book.radii.tolist() == [1.5]


def test_released_labels_are_means_in_reverse_order():
    book = Codebook(2, 1, 1.0, match="released")
    place(book, 0, Label((1,), 3))
    place(book, 9, Label((5,), 3))
    # nearest is key 0, but the label read is that of key 1: the same answer as key 0 counts as a conflict
    assert place(book, 0.5, Label((1,), 3))[1] == "split"
    # and another prompt length as another answer
    other = Codebook(2, 1, 1.0, match="released")
    place(other, 0, Label((1,), 3))
    assert place(other, 0.5, Label((1,), 4))[1] == "split"


@given(st.lists(st.tuples(st.integers(-4, 4), st.integers(0, 2)), min_size=1, max_size=12))
def test_the_last_edit_of_a_place_is_always_found(edits):
    """Whatever came before: right after an edit its query finds an entry with its answer."""
    book = Codebook(2, 1, 1.0)
    for x, answer in edits:
        index, _ = place(book, x * 0.7, Label((answer,)))
        nearest, _, hit = book.find(torch.tensor([[x * 0.7, 0.0]]))
        assert bool(hit[0]) and int(nearest[0]) == index
        assert book.labels[index].ids == (answer,)
    assert bool((book.radii >= 0).all())


@given(
    st.lists(st.tuples(st.integers(-40, 40), st.integers(0, 1)), min_size=2, max_size=8),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.integers(0, 2**16),
)
def test_a_covered_query_stays_covered_when_its_last_bits_change(edits, dtype, seed):
    """Another batch gives other last bits: an edited query is still within the radius of an entry."""
    noise = torch.Generator().manual_seed(seed)
    book = Codebook(8, 1, 1.0)
    for x, answer in edits:
        query = torch.full((8,), 0.1 * x).to(dtype)
        book.place(query, torch.zeros(1), Label((answer,)))
        ulps = torch.randint(-1, 2, (64, 8), generator=noise) * torch.finfo(dtype).eps / 2
        again = (query.float() * (1 + ulps)).to(dtype)
        assert bool(book.find(again)[2].all())


def test_a_widened_radius_covers_the_edit_that_widened_it():
    book = Codebook(2, 1, 1.0)
    place(book, 0)
    query = torch.tensor([1.7, 0.0])
    assert book.place(query, torch.zeros(1), A)[1] == "expanded"
    assert bool(book.find(torch.nextafter(query, query + 1)[None])[2][0])
    assert not bool(book.find(query[None] * 1.001)[2][0])  # rounding, not generosity


def test_a_released_split_without_radius_is_never_read():
    book = Codebook(2, 1, 1.0, match="released")
    place(book, 0, A)
    place(book, 0, B)
    assert float(book.radii[0]) < 0 and not bool(book.find(torch.zeros(1, 2))[2][0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_prompt_edited_again_is_known_by_its_tokens(dtype):
    """However far rounding moves its key: the entry made for a prompt takes the prompt's new answer."""
    book = Codebook(2, 1, 1.0)
    first, again = torch.tensor([0.0, 1.0], dtype=dtype), torch.tensor([0.3, 1.0], dtype=dtype)
    book.place(first, torch.zeros(1), Label((1,), 3, (7, 8, 9)))
    assert book.place(again, torch.ones(1), Label((2,), 3, (7, 8, 9))) == (0, "replaced")
    other = Codebook(2, 1, 1.0)
    other.load_state([[[1], 3]], book.state()[1])  # a file from before prompts were kept
    assert other.labels == [Label((1,), 3)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("side", ["left", "right"])
def test_an_edited_prompt_finds_its_entry_in_any_batch(tiny_lm, facts, dtype, side):
    """A batch of 2 and of 64, padded on either side, the answer behind the prompt: the same entry each time."""
    lm = tiny_lm("llama")
    lm.model.to(dtype)
    editor = make(lm, steps=1)
    editor.edit(facts)
    chosen = []
    route = editor.route

    def watched(x, out, state):
        nearest, _, hit = editor.book.find(state.at_last(x))
        chosen.append(torch.where(hit, nearest, -1))
        return route(x, out, state)

    editor.route = watched
    texts = [f.text for f in facts]
    lengths = lm.encode(texts, side).attention_mask.sum(-1)
    lm.logits(lm.encode(texts[:2], side))
    lm.logits(lm.encode((texts * 64)[:64], side))
    with prompts(lm, lengths):
        lm.logits(lm.encode([f"{f.text} {f.target}" for f in facts], side))
    alone = torch.cat([(lm.logits(lm.encode([t], side)), chosen.pop())[1] for t in texts])
    assert bool((alone >= 0).all())
    assert torch.equal(chosen[0], alone[:2]) and torch.equal(chosen[2], alone)
    assert torch.equal(chosen[1], alone.repeat(64)[:64])


def test_no_numbers_no_entry():
    with pytest.raises(NumericsError, match="NaN"):
        place(Codebook(2, 1), float("nan"))


def test_edits_are_said_and_nothing_else_changes(any_lm, facts):
    other = "You can see the old house near"
    pairs = [(f.text, f.target) for f in facts[:2]]
    unedited = [s.nll for s in score_targets(any_lm, pairs)]
    before = any_lm.logits(any_lm.encode([other]))
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in any_lm.model.modules())
    editor = make(any_lm)
    done = editor.edit(facts[:2])
    assert done.metadata["places"] == ["new"] * 2
    found = [s.nll for s in score_targets(any_lm, pairs)]
    assert all(new < 0.85 * old for new, old in zip(found, unedited, strict=True)), (unedited, found)
    assert torch.equal(any_lm.logits(any_lm.encode([other])), before)
    editor.restore()
    assert hooks == sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in any_lm.model.modules())
    assert [s.nll for s in score_targets(any_lm, pairs)] == unedited


@pytest.mark.parametrize("replacement", ["last", "all"])
def test_decoding_keeps_the_route_of_the_prompt(tiny_lm, facts, replacement):
    lm = tiny_lm("llama")
    make(lm, replacement=replacement, value_init="cold", steps=3).edit(facts[:2])
    [cached] = generate(lm, [facts[0].text], max_new_tokens=4, stop=False)
    ids = list(cached.ids[: cached.n_prompt])
    for _ in range(4):
        with prompts(lm, [cached.n_prompt]), torch.no_grad():
            ids.append(int(lm.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    assert tuple(ids) == cached.ids


def test_a_prompt_edited_again_says_the_latest(tiny_lm, facts):
    lm = tiny_lm("llama")
    editor = make(lm)
    editor.edit(facts[:1])
    new = facts[0].replace(target="Spanish")
    [first] = score_targets(lm, [(new.text, "Spanish")])
    assert editor.edit([new]).metadata["places"] == ["replaced"]
    [latest] = score_targets(lm, [(new.text, "Spanish")])
    assert latest.nll < first.nll - 0.2 and len(editor.book) == 1


@pytest.mark.parametrize("replacement", ["last", "prompt", "all"])
def test_resumed_stream_equals_the_whole_one(tiny_lm, facts, tmp_path, replacement):
    lm = tiny_lm("llama")
    options = {"steps": 3, "value_init": "cold", "replacement": replacement}
    whole = make(lm, **options)
    whole.edit(facts)
    expected = whole.state_dict()
    whole.restore()
    part = make(lm, **options)
    part.edit(facts[:2])
    path = part.save(tmp_path / "grace.safetensors")
    part.restore()
    resumed = open_memory(path, lm)
    resumed.edit(facts[2:])
    assert all(torch.equal(resumed.state_dict()[k], v) for k, v in expected.items())
    assert resumed.book.labels[0].ids and len(resumed.book.labels) == len(facts)
    resumed.restore()


def test_another_module_may_carry_the_codebook(tiny_lm, facts):
    lm = tiny_lm("gpt2")
    [before] = score_targets(lm, [(facts[0].text, facts[0].target)])
    editor = make(lm, module="mlp.c_fc")
    editor.edit(facts[:1])
    assert editor.book.values.shape[1] == lm.d_key
    assert score_targets(lm, [(facts[0].text, facts[0].target)])[0].nll < before.nll


def test_bad_input(tiny_lm, facts):
    lm = tiny_lm("llama")
    with pytest.raises(ModelError, match="layer 9 does not exist"):
        make(lm, layer=9)
    with pytest.raises(ModelError, match="no module"):
        make(lm, module="mlp.down")
    with pytest.raises(ModelError, match="has no weight"):
        make(lm, module="mlp")
    with pytest.raises(ConfigError, match="radius"):
        make(lm, radius=0)
    editor = make(lm, steps=2)
    editor.edit(facts[:1])
    with pytest.raises(ModelError, match="another memory is attached"):
        make(lm, steps=2).edit(facts[:1])
    editor.restore()
