"""Keeps what is put into a rubric from writing the rubric's own delimiters, or a chat template's control tokens."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

MARKER_WORDS = 6  # what has more words is prose, not a delimiter
MARKER = re.compile(r"[\[<]|([^\w\s()])\1+")  # a delimiter starts with such a bracket, or a run of one sign
RUN = re.compile(r"([^\w\s()\[\]<>])(?:[^\S\n]*\1)+")
NEVER = "(?!)"
HTML = (  # elements of ordinary text, in lower case; <s> is not among them, which models read as a text's start
    "a abbr b big blockquote body br button center code dd del details div dl dt em figure font footer form h1 h2 h3 "
    "h4 h5 h6 head header hr html i ins kbd label li link main mark meta nav ol option p pre q script section select "
    "small span strong style sub summary sup svg table tbody td th thead title tr u ul var"
)
CONTROL = re.compile(  # what tokenizers may read as the end of a turn or the start of one, even inside a text
    r"[<\[]\|[^<>\[\]\n]{0,60}\|[>\]]"  # <|im_end|>, <|channel|>
    r"|<</?[A-Za-z]{1,20}>>"  # <<SYS>>
    # <s>, <think>, <tool_call>, <unused0>, <start_of_turn>
    rf"|</?(?!(?:{'|'.join(HTML.split())})/?>)[\w.:\-▁]{{1,40}}(?: [\w.:\-▁]{{1,20}}){{0,3}}/?>"
    r"|\[/?(?:[A-Z][A-Z0-9_ ]{1,40}|[a-z]?MASK|inst)\]"  # [INST], [SYSTEM_PROMPT], [TOOL_CALLS], [gMASK]
    r"|[\[\]]~!?\w{0,8}[\[\]]|\[\w~\["  # ]~b], [e~[
)
ROUND = {"[": "(", "<": "(", "]": ")", ">": ")"}  # round brackets delimit nothing
SHAPES = {"Ps": "[", "Pe": "]", "Pd": "-"}  # Unicode's categories of brackets and dashes
SIGNS = str.maketrans("═≡≣꞊⹀゠〓─━¯−∗⁎“”„‟″«‹≪»›≫_", '=======----**"""""<<<>>> ')  # how other signs look


def is_delimiter(text: str) -> bool:
    """Whether a piece of a rubric is a delimiter, such as `[ANSWER START]` or `=== BEGIN REPLY ===`."""
    return bool(MARKER.match(text)) and len(re.findall(r"\w+", text)) <= MARKER_WORDS


@dataclass(frozen=True)
class DelimiterGuard:
    """What makes a text unable to write a rubric's delimiters, and leaves its words as they are.

    Likenesses are looked for in the text as it looks: without invisible characters, other alphabets' brackets
    and signs taken for the plain ones. Brackets around a delimiter's words become round, which delimit nothing,
    and runs of a sign are cut to one. So it is with the brackets of chat templates' control tokens.
    """

    signs: str  # those that delimiters have runs of
    brackets: re.Pattern[str]  # brackets around or beside their words; `NEVER` where none has brackets
    before: re.Pattern[str]  # one of their words at the end of a text
    after: re.Pattern[str]  # one of them at its start

    @classmethod
    def against(cls, markers: Sequence[str]) -> DelimiterGuard:
        """The guard against these delimiters, in any case, and with any of their words in any order."""
        words = sorted({word for marker in markers for word in re.findall(r"[^\W_]+", marker)})
        signs = {run[0] for marker in markers for run in re.findall(r"([^\w\s()\[\]<>])\1", marker)}
        before, after, within = (_one_of(words, *sides) for sides in (("", r"\b"), (r"\b", ""), ("", "")))
        inner, near = r"[^\[\]<>]", r"[^\w\n]{0,20}"
        around = rf"(?<![\[<])[\[<]++(?={inner}{{0,80}}[\]>]){inner}*?{within}{inner}*+[\]>]++"
        beside = rf"(?<![\[<])[\[<]++{near}{after}|{before}{near}?[\]>]++"
        bracketed = any(re.search(r"[\[<]", marker) for marker in markers)
        return cls(
            "".join(sorted(signs)),
            re.compile(f"{around}|{beside}" if bracketed else NEVER, re.IGNORECASE),
            re.compile(rf"{before}{near}\Z", re.IGNORECASE),
            re.compile(f"{near}{after}", re.IGNORECASE),
        )

    def disarmed(self, text: str) -> str:
        """The text without a likeness. What is left of one may be another, so that this goes on until none is found."""
        while edits := self._edits(*_as_it_looks(text)):
            text = "".join(edits.get(place, char) for place, char in enumerate(text))
        return text

    def _edits(self, plain: str, places: Sequence[int]) -> dict[int, str]:
        """Place in the text -> what stands there instead."""
        spans = [match.span() for pattern in (self.brackets, CONTROL) for match in pattern.finditer(plain)]
        edits = {places[i]: ROUND[plain[i]] for span in spans for i in range(*span) if plain[i] in ROUND}
        for run in RUN.finditer(plain):
            if self._is_likeness(run, plain):
                edits |= {places[i]: "" for i in range(run.start() + 1, run.end())}
        return edits

    def _is_likeness(self, run: re.Match[str], plain: str) -> bool:
        """Three or more of a rubric's own sign, or two beside its words; of other signs a line of them beside those."""
        own, long = run[1] in self.signs, run[0].count(run[1]) > 2
        if own and long:
            return True
        if not (own or long) or run[1] in ".!?":
            return False
        before = plain[max(0, run.start() - 60) : run.start()]
        return bool(self.before.search(before) or self.after.match(plain, run.end()))


def _one_of(words: Sequence[str], left: str, right: str) -> str:
    """A pattern for one of these words, with signs or other letters in and beside it; short ones stand by themselves.

    `left` and `right`: what else holds on either side.
    """
    loose = r"[^\w\[\]<>\n]{0,4}"
    patterns = [f"{left}{loose.join(word)}{right}" if len(word) > 2 else rf"\b{word}\b" for word in words]
    return f"(?:{'|'.join(patterns) or NEVER})"


def _as_it_looks(text: str) -> tuple[str, list[int]]:
    """The text in plain signs, and the place in the text of each character of it."""
    seen = [(char, place) for place, original in enumerate(text) for char in _plain(original)]
    return "".join(char for char, _ in seen), [place for _, place in seen]


@cache
def _plain(char: str) -> str:
    """What a character looks like: nothing for an invisible one, or one that is drawn onto another."""
    if unicodedata.category(char) in ("Cc", "Cf", "Cs", "Mn", "Me") and not char.isspace():
        return ""
    looks = unicodedata.normalize("NFKC", char).translate(SIGNS)
    return "".join(c if c.isascii() else SHAPES.get(unicodedata.category(c), c) for c in looks)
