"""Token lookup: property tests over tokenizers, templates and subjects."""

import pytest
import torch
from conftest import PEOPLE, TOKENIZERS, make_lm
from hypothesis import given, settings
from hypothesis import strategies as st

from editkit.base.errors import ModelError, RequestError
from editkit.models.hooks import pick, trace
from editkit.models.lookup import find_positions, find_spans, subject_characters

TEMPLATES = (
    "{}",
    "{} is",
    "{}'s mother tongue",
    "The mother tongue of {}",
    "The mother tongue of {} is",
    "In the old city, {}, a teacher, plays the",
    "I think ({}) works. It is {}".replace("It is {}", "It is"),
    '"{}" speaks',
    "Li and {} and Li",
)
NAMES = st.one_of(
    st.sampled_from(PEOPLE),
    st.text(alphabet="abcdeLMNéüÅ猫ß'-. ", min_size=1, max_size=12).filter(lambda s: s.strip()),
)
LMS = {kind: make_lm("gpt2", kind, n_layers=1) for kind in TOKENIZERS}


def covered(lm, encoding, row, column):
    begin, end = encoding.offsets[row, column].tolist()
    return encoding.texts[row][begin:end]


@settings(max_examples=50, deadline=None)
@given(template=st.sampled_from(TEMPLATES), subject=NAMES, side=st.sampled_from(["left", "right"]))
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_positions_cover_the_subject(kind, template, subject, side):
    lm = LMS[kind]
    text, start, stop = subject_characters(template, subject)
    assert text[start:stop] == subject.strip()
    # The padding partner is longer or shorter than the prompt, so columns move.
    prompts = [(template, subject), ("The {}", "mother tongue of Karin Ann Fischer is French"), ("{}", "Li")]
    encoding, first, last = find_spans(lm, prompts, side)
    f, z = int(first[0]), int(last[0])
    begin, end = encoding.offsets[0].unbind(-1)
    assert begin[f] <= start < end[f]
    assert begin[z] < stop <= end[z]
    assert f <= z
    mask = encoding.attention_mask[0].bool()
    assert mask[f] and mask[z]
    # No later token holds any character of the subject, no earlier one either.
    later, earlier = slice(z + 1, None), slice(0, f)
    assert not ((begin[later] < stop) & (end[later] > begin[later]) & (end[later] > start)).any()
    assert not ((end[earlier] > start) & (end[earlier] > begin[earlier])).any()
    # The tokens between cover the whole subject but for white space.
    kept = {c for t in range(f, z + 1) for c in range(int(begin[t]), int(end[t]))}
    assert all(c in kept or text[c].isspace() for c in range(start, stop))
    _, final = find_positions(lm, prompts, "last", side)
    assert int(encoding.offsets[0, final[0], 1]) >= len(text.rstrip()) and final[0] >= z


@settings(max_examples=50, deadline=None)
@given(template=st.sampled_from(TEMPLATES), subject=NAMES)
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_left_and_right_padding_find_the_same_tokens(kind, template, subject):
    lm = LMS[kind]
    prompts = [(template, subject), ("The {} can see the old house near the river", "weather")]
    for where in ("subject_first", "subject_last", "last"):
        right, at_right = find_positions(lm, prompts, where, "right")
        left, at_left = find_positions(lm, prompts, where, "left")
        assert torch.equal(at_right - right.first, at_left - left.first)
        assert torch.equal(
            pick(right.input_ids[..., None], at_right), pick(left.input_ids[..., None], at_left)
        )


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_known_pieces(kind):
    lm = LMS[kind]
    prompts = [("The mother tongue of {} is", "Ana Silva"), ("{}, a teacher, plays", "Élise Noël")]
    for where, pieces in {
        "subject_last": ("a", "l"),
        "subject_first_after": (" is", ","),
        "last": ("s", "s"),
    }.items():
        encoding, at = find_positions(lm, prompts, where)
        for i, piece in enumerate(pieces):
            assert covered(lm, encoding, i, at[i]).strip().endswith(piece.strip()), where
    encoding, at = find_positions(lm, prompts, "subject_first")
    assert [covered(lm, encoding, i, at[i]).strip()[0] for i in range(2)] == ["A", "É"]


def test_wordlevel_columns():
    encoding, at = find_positions(LMS["wordlevel"], [("The language of {} is", "Karin Ann Fischer")])
    assert at.tolist() == [5]
    assert LMS["wordlevel"].tokenizer.convert_ids_to_tokens(int(encoding.input_ids[0, 5])) == "Fischer"


def test_an_appended_eos_is_not_part_of_the_prompt():
    lm = LMS["eos"]
    encoding, at = find_positions(lm, [("{} is", "Li")], "last")
    assert lm.tokenizer("Li is")["input_ids"][-1] == 3 and 3 not in encoding.input_ids[0]
    assert at.tolist() == [encoding.input_ids.shape[1] - 1]
    with pytest.raises(RequestError, match="nothing follows"):
        find_positions(lm, [("The mother of {}", "Li")], "subject_first_after")


def test_subject_repeated_elsewhere_is_not_confused():
    _, at = find_positions(LMS["wordlevel"], [("Li and {} and Li", "Li")])
    assert at.tolist() == [2]


def test_template_may_carry_a_target():
    lm = LMS["bytelevel"]
    _, bare = find_positions(lm, [("The mother tongue of {} is", "Ana Silva")])
    _, longer = find_positions(lm, [("The mother tongue of {} is French and", "Ana Silva")])
    assert torch.equal(bare, longer)


@pytest.mark.parametrize(
    ("template", "subject", "message"),
    [
        ("The mother tongue is", "Ana", r"The mother tongue is.*Ana.*exactly once"),
        ("{} and {}", "Ana", "exactly once"),
        ("{} is", "  ", "empty subject"),
    ],
)
def test_bad_prompts_are_named(template, subject, message):
    with pytest.raises(RequestError, match=message):
        find_positions(LMS["wordlevel"], [(template, subject)])


def test_dropped_character_is_named():
    from tokenizers import normalizers

    lm = make_lm(tokenizer="wordlevel")
    lm.tokenizer.backend_tokenizer.normalizer = normalizers.Replace("@", " ")
    with pytest.raises(RequestError, match=r"no token .*'Li @'"):
        find_positions(lm, [("{} is", "Li @")])


def test_unknown_lookup_and_missing_offsets(tiny_lm):
    with pytest.raises(RequestError, match="subject_last"):
        find_positions(LMS["wordlevel"], [("{} is", "Li")], "middle")
    lm = tiny_lm()
    encode = lm.encode
    lm.encode = lambda *args, **kw: strip(encode(*args, **kw))

    def strip(encoding):
        encoding.offsets = None
        return encoding

    with pytest.raises(ModelError, match="fast"):
        find_positions(lm, [("{} is", "Li")])


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_states_at_positions_are_equal_under_both_paddings(any_lm, kind, facts):
    lm = make_lm(any_lm.model.config.model_type, kind)
    prompts = [(f.prompt, f.subject) for f in facts]
    found = {}
    for side in ("left", "right"):
        encoding, at = find_positions(lm, prompts, padding_side=side)
        with torch.no_grad(), trace(lm.model, [lm.down_name(1)], inputs=True, stop_early=True) as seen:
            lm.forward(encoding)
        found[side] = pick(seen.input[lm.down_name(1)], at)
    assert torch.allclose(found["left"], found["right"], atol=1e-5)


@pytest.mark.parametrize("template", ["The old {}ly is", "In pre{} times"])
def test_a_subject_that_shares_a_token_with_letters_around_it_is_refused(template):
    """Its key would be that of another word. Punctuation and blanks may share one: see the templates above."""
    lm = LMS["wordlevel"]
    with pytest.raises(RequestError, match=r"splits the subject 'Li' otherwise .*a word of its own"):
        find_spans(lm, [(template, "Li")])
