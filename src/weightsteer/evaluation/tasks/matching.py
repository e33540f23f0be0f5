"""Whether a free reply gives one of the answers that count as right, by its words."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence

ARTICLES = {"a", "an", "the"}
NEGATIONS = {"not", "never", "neither", "nor", "cannot", "cant", "isnt", "wasnt", "arent", "dont", "doesnt", "didnt"}
DENIED_BEFORE = re.compile(rf"\b(?:{'|'.join(sorted(NEGATIONS))})(?: (?!but )\w+){{0,5}} $")  # within the clause
DENIED_AFTER = re.compile(
    r"\s*((is|are|was|were) ((\w+ly|in fact|of course) )*(not|wrong|incorrect|false)|isnt|arent|wasnt)\b"
)
DOUBTED_BEFORE = re.compile(r"(?<!no )(?<!without )\b(?:doubt|either)(?: \w+){0,6} $")
REPORTED_BEFORE = re.compile(  # "you said", "many people think": the reply's own view may follow after "but"
    r"\b(?:you|they|people|many|most|some|others)(?: \w+){0,2} (?:assume|believe|claim|mention|said|say|suggest|think"
    r"|thought)(?:e?d)?(?: \w+){0,5} $"
)
CONTRADICTED_AFTER = re.compile(r"[^.]*[|.]+ (?:but|however|yet|actually|although|in fact)\b")
GLUED = (  # what is one number or name, and would come apart: 1,000 and 1.5, -40, 10² and 10^2, C++ and C#
    (re.compile(r"['’`]|(?<=\d),(?=\d{3}(?!\d))"), ""),
    (re.compile(r"(?<=\d)\.(?=\d)"), "point"),
    (re.compile(r"(?<![\w)])[-\u2212](?=\d)"), "minus"),
    (re.compile(r"(?<=\w)\^(?=\d)"), "pow"),
    (re.compile(r"(?<=\w)\+\+"), "plusplus"),
    (re.compile(r"(?<=[a-z])#"), "sharp"),
)
SUPERSCRIPT = re.compile("[⁰¹²³⁴-⁹]+")
UNSPACED = re.compile(r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff]")  # scripts without spaces
ALIKE = 0.6  # token-F1 above which a sentence may count as saying the answer
UNITS = "zero one two three four five six seven eight nine ten eleven twelve"
TEENS = "thirteen fourteen fifteen sixteen seventeen eighteen nineteen"
TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
NUMBERS = {word: i for i, word in enumerate(f"{UNITS} {TEENS}".split())}
NUMBERS |= {word: 10 * i for i, word in enumerate(TENS.split(), start=2)}


def matches(reply: str, right: Sequence[str], wrong: Sequence[str]) -> bool:
    """Whether a reply gives one of the right answers.

    Case, accents, articles and punctuation do not count, and number words are digits. An answer is
    given where its words stand together in the reply, outside any longer wrong answer, and are not
    denied in their clause ("it is not Paris", "Paris is wrong"), left open ("either Paris or Lyon") or said by
    others only ("you said Paris, but"); "yes" and "no" only as the reply's
    first word or after "answer is". Else it is given by a sentence without a wrong answer in it
    that holds the answer's names and numbers, and whose token-F1 with it is above 0.6 and above that with every wrong
    answer, if both or neither of the two hold a negation.
    """
    rights = {" ".join(words): answer for answer in right if (words := words_of(answer))}
    wrongs = [" ".join(words) for answer in wrong if (words := words_of(answer))]
    text = normalise(reply)
    return any(
        _contains(text, key, wrongs) or _resembles(text, key, wrongs, _telling(answer))
        for key, answer in rights.items()
    )


def normalise(text: str) -> str:
    """Folded words and numbers parted by spaces; "|" stands where a clause ends, "." where a sentence does."""
    powers = SUPERSCRIPT.sub(lambda match: f"^{match[0]}", text)
    bare = "".join(c for c in unicodedata.normalize("NFKD", powers) if not unicodedata.combining(c)).casefold()
    for pattern, glue in GLUED:
        bare = pattern.sub(glue, bare)
    parts = re.findall(r"[^\W_]+|[,;:()\"—、]|[.!?\n。]", bare)
    marked = [part if part.isalnum() else "." if part in ".!?\n。" else "|" for part in parts]
    # an article stands before a word; "Vitamin A" ends in a name
    marked = [p for p, after in zip(marked, [*marked[1:], "."], strict=False) if p not in ARTICLES or after in "|."]
    digits = " ".join(str(NUMBERS.get(part, part)) for part in marked)
    tens = re.sub(r"\b([2-9])0 ([1-9])\b", r"\1\2", digits)  # "sixty-four"
    hundreds = re.sub(r"\b(?:([1-9][0-9]?) )?hundred(?: (?:and )?([0-9]{1,2}))?\b", _times(100), tens)
    thousands = re.sub(r"\b(?:([1-9][0-9]{0,2}) )?thousand(?: (?:and )?([0-9]{1,3}))?\b", _times(1000), hundreds)
    return re.sub(r"\b(?:minus|negative) (?=\d)", "minus", re.sub(r"(?<=\d) point (?=\d)", "point", thousands))


def _times(unit: int) -> Callable[[re.Match[str]], str]:
    """Writes "two hundred and five" as 205: how often the unit is taken, and what is added."""
    return lambda match: str(int(match[1] or 1) * unit + int(match[2] or 0))


def words_of(text: str) -> list[str]:
    return [token for token in normalise(text).split() if token not in "|."]


def _contains(text: str, answer: str, wrong: Sequence[str]) -> bool:
    """Whether the answer's words stand in the text, undenied."""
    if answer in ("yes", "no"):
        return bool(re.match(rf"(?:.*\banswer is )?{answer}\b", text))
    for longer in filter(_place(answer).search, wrong):
        text = _place(longer).sub("|", text)
    return any(_is_asserted(text[: m.start()], text[m.end() :]) for m in _place(answer).finditer(text))


def _is_asserted(before: str, after: str) -> bool:
    """Whether words between these two parts of a text are neither denied, nor left open, nor only somebody else's."""
    if DENIED_BEFORE.search(before) or DOUBTED_BEFORE.search(before) or DENIED_AFTER.match(after):
        return False
    return not (REPORTED_BEFORE.search(before) and CONTRADICTED_AFTER.match(after))


def _place(answer: str) -> re.Pattern[str]:
    """Finds an answer's words in a normalised text, whatever marks stand between them."""
    before, after = ("" if UNSPACED.match(end) else r"\b" for end in (answer[0], answer[-1]))
    return re.compile(rf"{before}{answer.replace(' ', '[ |.]+')}{after}")


def _telling(answer: str) -> set[str]:
    """The words of an answer that another cannot stand in for: numbers, and names but for the one that begins it."""
    others = answer.split()[1:]
    names = [word for word in others if word[:1].isupper() and word not in ("I", "A")]
    numbers = [word for word in words_of(answer) if any(char.isdigit() for char in word)]
    roman = [word for word in others if re.fullmatch(r"[IVX]+\W*", word)]
    return {part for word in (*names, *roman) for part in words_of(word)} | set(numbers)


def _resembles(text: str, answer: str, wrong: Sequence[str], telling: set[str]) -> bool:
    """Whether a sentence with all that tells this answer, and no wrong one, is nearer to it than to every wrong one."""
    plain = NEGATIONS.isdisjoint(answer.split())
    rivals = [_place(other) for other in wrong if not _place(other).search(answer)]
    for part in text.split("."):
        if not telling <= set(part.split()):
            continue
        fair = NEGATIONS.isdisjoint(part.split()) == plain and not any(rival.search(part) for rival in rivals)
        if fair and _f1(part, answer) > max([ALIKE, *(_f1(part, other) for other in wrong)]):
            return True
    return False


def _f1(one: str, other: str) -> float:
    """Harmonic mean of the shares of each text's words that the other holds too, repeats counted."""
    left, right = (Counter(token for token in text.split() if token not in "|.") for text in (one, other))
    return 2 * (left & right).total() / max(1, left.total() + right.total())
