"""Where a space belongs between a prompt and its answer: decided here for every editor, probe and score.

Most scripts put a space between words, so the answer stands behind one. It does not

- where the language of the prompt writes without spaces (Chinese, Japanese, Thai, Khmer, ...);
- behind an opening bracket or quote, a line end or tab, a hyphen or slash inside a word, an elision ("l'");
- before a closing bracket, a comma and their like.

What this cannot know (an answer that is the rest of a word) is said: `Fact.space`, `Probe.space`.
"""

from __future__ import annotations

import re
import unicodedata

# In front of an answer: it follows its prompt without a space. Unicode's own sign for that (word joiner).
NO_SPACE = "\u2060"

# First words of the names of signs of scripts that are written without spaces, with the punctuation they share.
_UNSPACED = (
    "CJK ", "IDEOGRAPHIC ", "FULLWIDTH ", "HIRAGANA ", "KATAKANA", "HALFWIDTH KATAKANA ", "BOPOMOFO ", "THAI ", "LAO ",
    "KHMER ", "MYANMAR ", "TIBETAN ", "JAVANESE ", "BALINESE ", "TAI ", "NEW TAI ",
)  # fmt: skip
_BEFORE_WORDS, _CURRENCY = "@#", "$£€¥"
_INSIDE_WORDS = "-‐‑‒–—/\\_="
_NO_SPACE_BEFORE = ",;:!?"
_CLOSED_BY = {"“": "„", "‘": "‚", "«": "»", "»": "«", "‹": "›", "›": "‹"}  # closing if this one is open
_ELISION = re.compile(r"(?<![\w'’])(\w|qu|jusqu|lorsqu|puisqu|un|all|dall|dell|nell|sull|quell)['’]$", re.IGNORECASE)


def stem(prompt: str) -> str:
    """The prompt without spaces at its end: they belong to the answer (`gap`)."""
    return prompt.rstrip(" ")


def bare(answer: str) -> str:
    """The answer without what stands around it."""
    return answer.removeprefix(NO_SPACE).strip()


def wanted_space(answer: str, space: bool | None) -> bool | None:
    """What is said about the space before an answer: by `space`, else by how the answer begins; None: nothing."""
    if space is not None:
        return space
    return False if answer.startswith(NO_SPACE) else True if answer[:1].isspace() else None


def marked(answer: str, space: bool | None) -> str:
    """The bare answer, with a word on the space in front of it: True one, False none, None by `gap`'s rule."""
    return {True: " ", False: NO_SPACE, None: ""}[wanted_space(answer, space)] + bare(answer)


def gap(prompt: str, answer: str) -> str:
    """What stands between prompt and answer, " " or "".

    A space that ends the prompt or begins the answer, and `NO_SPACE` before the answer, are taken at their word.
    """
    if answer.startswith(NO_SPACE):
        return ""
    if prompt.endswith(" ") or answer[:1].isspace():
        return " "
    return "" if prompt and _runs_on(prompt, answer) else " "


def join(prompt: str, answer: str) -> str:
    """Prompt and answer as one text."""
    return stem(prompt) + gap(prompt, answer) + answer.removeprefix(NO_SPACE).lstrip()


def _runs_on(prompt: str, answer: str) -> bool:
    last, first = prompt[-1], answer[:1]
    if last.isspace() or _opens(prompt):
        return True
    if first and (first in _NO_SPACE_BEFORE or unicodedata.category(first) == "Pe"):
        return True
    before, after = _writing(last), _writing(first)
    if before and before == after:
        return before == "unspaced"
    signs = sum(_writing(c) == "unspaced" and c.isalnum() for c in prompt)
    if not signs:
        return False
    words = len(re.findall(r"\w+", "".join(c if _writing(c) == "spaced" else " " for c in prompt)))
    return signs > words or (signs == words and before == "unspaced")


def _writing(sign: str) -> str:
    """"spaced", "unspaced", or "" for what stands in texts of either kind: digits, punctuation, emoji."""
    if sign.isascii():
        return "spaced" if sign.isalpha() else ""
    if unicodedata.name(sign, "").startswith(_UNSPACED):
        return "unspaced"
    return "spaced" if unicodedata.category(sign)[0] in "LM" else ""


def _opens(text: str) -> bool:
    """Whether a text ends in a sign that its next word follows directly."""
    last, before = text[-1], text[-2:-1]
    if last.isalnum():
        return False
    if last in _CURRENCY:
        return not text[:-1].rstrip()[-1:].isdigit()
    if last in _BEFORE_WORDS:
        return not before.isalnum()
    if last in _INSIDE_WORDS:
        return bool(before.strip())
    if last in _CLOSED_BY:
        closes = text.count(_CLOSED_BY[last]) > text[:-1].count(last)
        return not closes and not before.isalnum()
    if last in "'’" and _ELISION.search(text):
        return True
    if last in "\"'`*":
        runs = re.findall(rf"{re.escape(last)}+", text)
        return len(runs) % 2 == 1 and not text.rstrip(last)[-1:].isalnum()
    return unicodedata.category(last) in ("Ps", "Pi")
