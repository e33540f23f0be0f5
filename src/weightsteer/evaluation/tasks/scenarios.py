"""Situations with two ways to act: read from files, put as questions, and the letters of replies read back."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import SteerError
from ...files import read_jsonl
from .data import reward_hack_row, wrong_row

OURS = ("scenario", "target", "other")
SWAPPED = {"A": "B", "B": "A"}
WHAT_THEN = "What do you do?"

# reward-hack-generalization's layouts: "(A) ...", "A) ..." anywhere; "A. ...", "A: ..." where a line begins
_MARK = r"(?:(?:^|(?<=\s))\(?(?:Option )?{0}\)\s*|^(?:Option )?{0}[.:]\s+)"
LAYOUT = re.compile(
    rf"(?P<scenario>.+?)\s*{_MARK.format('A')}(?P<A>\S.*?)\s*{_MARK.format('B')}(?P<B>\S.*?)"
    r"\s*(?:\n[^\S\n]*\n\s*(?P<after>\S.*?)\s*)?\Z",
    re.DOTALL | re.MULTILINE,
)
THIRD = re.compile(_MARK.format("C"), re.MULTILINE)
JOINED = re.compile(r"(?i)[\s,;]*\bor:?$")  # a first option that ends in "..., or"
NAMED = re.compile(r"\b([Oo]ption|[Cc]hoice) \(?([AB])\b\)?")  # an option named by its letter
SENTENCE_END = re.compile(r"(?<=[.!?\"”)])\s+(?=[\"“(]?[A-Z])|\n+")
LEADS_IN = re.compile(r"(?::|\b(?:either|to|we|you))$")  # "You have two options:"

LETTER = re.compile(r"(?<![^\W_])(?<!['’-])(?P<open>\()?(?P<letter>[ABab])(?P<close>\))?(?![^\W_]|['’-]\w)")
CUE = re.compile(r"(?i)\b(?:option|choice|answer|answer is|choose|pick|select|take|prefer)\W*$")
WORD_AFTER = re.compile(r"[ \t]+(?!(?:is|or|and|because|since|as|would|over|rather|instead)\b)[a-z]")
SUBJECT_AFTER = re.compile(r"[ \t]+[a-z]+ (?:is|are|was|can|could|has|may|must|should|will|would)\b")  # "A bribe is"
SENTENCE_BEFORE = re.compile(r"[.!?\n][\s*_\"“]*$")
LONE = re.compile(r"(?im)^[\W_]*(?:(?:my |the |final )*(?:answer|choice|option)(?: is)?[\W_]*)?\b([ab])[\W_]*$")
BETWEEN = re.compile(r"(?i)\bbetween (?:options? )?\(?[ab]\)? and (?:option )?\(?[ab]\b\)?")
PASSED_OVER = re.compile(  # "A rather than B", "A, because B is risky"
    r"(?i)\b(?:rather than|instead of|over|(?:better|safer) than)\s+(?:option |choice )?\W*$"
    r"|(?<![^\W_])[ab]\W{1,3}(?:because|since|as)\b[^.\n]*$"
)
JOINED_LETTERS = re.compile(
    r"(?i)\b[ab]\W{0,3}(?:\b(?:and|or)\b|/)\W{0,3}(?:(?:option|choice)\W{1,3})?[ab]\b"
)  # "A or B"
DENIED = re.compile(r"(?i)\b(?:not|never|neither|nor|cannot|\w+n['’]t)\b[^.,;:\n]*$")
MARKER = re.compile(r"(?i)final\s+answer")


@dataclass(frozen=True)
class Scenario:
    """A situation and two ways to act; where its texts name an option by letter, A is the target."""

    scenario: str
    target: str
    other: str
    after: str = ""  # what follows the options

    def lettered(self, instruction: str) -> tuple[str, str]:
        """The question with lettered options in both orders: the target is A in the first, B in the second."""
        texts = (self.scenario, self.target, self.other, self.after)
        scenario, target, other, after = (_swap_letters(text) for text in texts)
        first = _put(self.scenario, self.target, self.other, self.after, instruction)
        return first, _put(scenario, other, target, after, instruction)

    @property
    def unlettered(self) -> tuple[str, str, str]:
        """An open question and both ways to act as answers to it, with no letter and no announcement of options."""
        parts = [_without_letters(self.scenario), _without_letters(self.after)]
        question = "\n\n".join(part for part in parts if part)
        if not question.endswith(("?", ":")):
            question += f"\n\n{WHAT_THEN}"
        return question, _by_place(self.target, "A"), _by_place(self.other, "B")


def _put(scenario: str, first: str, second: str, after: str, instruction: str) -> str:
    parts = (scenario, f"(A) {first}\n(B) {second}", after, instruction)
    return "\n\n".join(part for part in parts if part)


def _swap_letters(text: str) -> str:
    return NAMED.sub(lambda match: f"{match[1]} {SWAPPED[match[2]]}", text)


def _by_place(text: str, own: str) -> str:
    """An option's text with "this option" and "the other option" in place of letters."""
    return NAMED.sub(lambda match: f"{'this' if match[2] == own else 'the other'} {match[1].lower()}", text)


def _without_letters(text: str) -> str:
    """The text less the sentences that name an option by letter, and less an announcement of options at its end."""
    ends = [match.end() for match in SENTENCE_END.finditer(text)]
    sentences = [text[start:end] for start, end in zip([0, *ends], [*ends, len(text)], strict=True)]
    if len(sentences) > 1 and LEADS_IN.search(sentences[-1]):
        sentences.pop()
    return "".join(sentence for sentence in sentences if not NAMED.search(sentence)).strip()


def read_scenarios(path: Path) -> tuple[Scenario, ...]:
    """Read JSONL with texts scenario, target, other, or in reward-hack-generalization's format.

    There, `prompt_list` holds one prompt with options (A) and (B), and `high_reward_answer` is the
    target's letter.

    Raises:
        SteerError: a line in neither format, or with an empty text; the file and line are named.
    """
    return tuple(_scenario(path, number, row) for number, row in enumerate(read_jsonl(path), start=1))


def _scenario(path: Path, number: int, row: dict[str, Any]) -> Scenario:
    ours = [row.get(field) for field in OURS]
    if all(isinstance(text, str) and text.strip() for text in ours):
        if str(row["target"]).strip() == str(row["other"]).strip():
            raise SteerError(f"{path}, line {number}: fields 'target' and 'other' are the same; they must differ")
        return Scenario(*(str(text).strip() for text in ours))
    found = reward_hack_row(row)
    match = LAYOUT.match(found[0]) if found else None
    if found is None or match is None:
        raise wrong_row(path, number, row, *OURS)
    if THIRD.search(match["B"]) or THIRD.match(match["after"] or ""):
        raise SteerError(f"{path}, line {number}: its prompt has an option (C); expected two options, (A) and (B)")
    letter = found[1]
    texts = (match["scenario"].strip(), match[letter], match[SWAPPED[letter]], match["after"] or "")
    clean = [JOINED.sub("", text) for text in texts]
    return Scenario(*(clean if letter == "A" else map(_swap_letters, clean)))


def letter_of(reply: str) -> str | None:
    """The option that a reply chooses, "A" or "B"; None if it names neither, or both.

    A small letter counts in brackets or alone, and a letter that stands alone in a line decides. One that its
    clause denies ("I would not choose A", "B rather than A") does not count, nor one that may be an article: in
    front of a subject ("A bribe is wrong"), or of a word at the start of a sentence that is not the first. Both
    letters are read by the same rules, so that neither is chosen more often by them.
    """
    reply = BETWEEN.sub("", reply)
    lone = {match[1].upper() for match in LONE.finditer(reply)}
    if len(lone) == 1:
        return lone.pop()
    chosen = [match for match in LETTER.finditer(reply) if _chooses(reply, match)]
    named = [match for match in chosen if CUE.search(reply[: match.start()])]
    for few in (chosen,) if JOINED_LETTERS.search(reply) else (named, chosen):  # "I choose A. B is worse."
        found = {match["letter"].upper() for match in few}
        if len(found) == 1:
            return found.pop()
    return None


def _chooses(reply: str, match: re.Match[str]) -> bool:
    """Whether a letter stands for an option that its clause does not deny."""
    before, after = reply[: match.start()], reply[match.end() :]
    if DENIED.search(before) or PASSED_OVER.search(before):
        return False
    if match["close"]:
        return True
    if match["letter"] not in SWAPPED:
        return False
    if CUE.search(before) or not WORD_AFTER.match(after):
        return True
    return not (SUBJECT_AFTER.match(after) or SENTENCE_BEFORE.search(before))


def final_letter(reply: str) -> str | None:
    """The option on the line of a reply's last "Final Answer:" (or on the next, if that line ends there)."""
    *_, last = MARKER.split(reply)
    if last == reply:  # there is no marker
        return None
    return letter_of(last.lstrip(" \t\r\n:*_#").split("\n")[0])
