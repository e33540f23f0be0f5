"""(question, answer) -> how much of the behaviour it shows: by likelihood, or by a model that reads a rubric."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from ..behavior import Behavior, Example, prompt_text
from ..errors import SteerError
from ..files import digest
from ..language_model import LanguageModel
from ..progress import Progress, silent
from ..thinking import why_unanswered
from .delimiter_guard import DelimiterGuard, is_delimiter
from .endpoint import THINKING_ROOM, THOUGHT, ChatModel, Endpoint

FIELD = re.compile(r"\{(question|answer|reference)\}")
OWN_MARKERS = "===== BEGIN {0} =====\n{{{1}}}\n===== END {0} ====="
NUMBER = r"[0-9]+(?:\.[0-9]+)?"
VERDICT = re.compile(
    rf"""(?:```\w*\s)?[\s*_`"'#>\[({{$]*                                   # markdown, JSON and quotes around it
        (?:\\boxed\{{|<(?:score|rating|grade|verdict|answer)>\s*)?["']?
        (?:(?:the\s+|my\s+)?(?:(?:final|overall)\s+)?(?:score|rating|grade|verdict|answer|number)
           [\s*_`"']*(?:[:=]|\bis\b)[\s*_`"'\[(:]*
          |i(?:\s+would|['\u2019]d)?\s+(?:rate|score|give)\s+(?:(?:it|(?:this|that|the)(?:\s+\w+)?)\s+)?(?:(?:as|at|an?)\s+)?
          |(?P<label>[^\W\d]+(?:[ -][^\W\d]+){{0,3}})[*_`"']*\s*[:=][\s*_`"'\[(]*)?
        (?P<score>-?{NUMBER})(?!\w)""",
    re.VERBOSE | re.IGNORECASE,
)
LABEL_WORDS = {"score", "rating", "grade", "verdict", "level", "overall", "final", "the", "of"}
SCALE_END = re.compile(rf"""[\s*_`"'\])(]*(?:/|(?:out\s+)?of\b)\s*({NUMBER})(?![.,]?[0-9])""", re.IGNORECASE)
SENTENCE_END = re.compile(r"[.!?]\s(?!\s*[0-9])|\n(?!\s*[0-9])")


class Judge(Protocol):
    """Scores answers; None where the judge gave no usable verdict."""

    @property
    def name(self) -> str:
        """What tells this judge from another, for the record."""
        ...

    def scores(self, examples: Sequence[Example], *, progress: Progress = silent) -> list[float | None]:
        """One score in 0 to 100 for each example."""
        ...


@dataclass(frozen=True)
class LikelihoodJudge:
    """The answering model's own verdict: is the answer likelier under S+ or under S-?

    The log-odds log p(answer | S+) - log p(answer | S-), averaged over the behaviour's prompt
    pairs, as a probability times 100. Needs no other model and no network, and drops just those
    answers on which the system prompt had no effect.
    """

    lm: LanguageModel
    behavior: Behavior

    @property
    def name(self) -> str:
        """See `Judge.name`."""
        return f"likelihood {self.lm.name} {self.lm.revision}"

    def scores(self, examples: Sequence[Example], *, progress: Progress = silent) -> list[float | None]:
        """See `Judge.scores`."""
        pairs = list(zip(self.behavior.positive_prompts, self.behavior.negative_prompts, strict=True))
        odds = [0.0] * len(examples)
        for done, (positive, negative) in enumerate(pairs, start=1):
            up, down = self._totals(examples, positive), self._totals(examples, negative)
            odds = [o + (u - d) / len(pairs) for o, u, d in zip(odds, up, down, strict=True)]
            progress(done, len(pairs), "judging")
        return [None if math.isnan(o) else 100.0 / (1.0 + math.exp(-max(-50.0, min(50.0, o)))) for o in odds]

    def _totals(self, examples: Sequence[Example], system_prompt: str) -> list[float]:
        lm = self.lm.with_system_prompt(system_prompt)
        scores = lm.score_choices([e.prompt for e in examples], [[e.answer] for e in examples])
        return [score.total for (score,) in scores]


@dataclass(frozen=True)
class LocalChatModel:
    """A model in memory as a `ChatModel`: greedy replies. One that thinks first gets room for it."""

    lm: LanguageModel

    @property
    def name(self) -> str:
        """See `ChatModel.name`."""
        return f"model {self.lm.name} {self.lm.revision}"

    def generate(self, prompts: Sequence[str], *, max_new_tokens: int = 16, progress: Progress = silent) -> list[str]:
        """See `ChatModel.generate`."""
        replies = self.lm.replies(prompts, max_new_tokens=max_new_tokens, progress=progress)
        thinking = [i for i, reply in enumerate(replies) if reply.answer is None and not reply.broken]
        if thinking:
            room = max_new_tokens + THINKING_ROOM
            longer = self.lm.replies([prompts[i] for i in thinking], max_new_tokens=room, progress=progress)
            for index, reply in zip(thinking, longer, strict=True):
                replies[index] = reply
        if missing := why_unanswered(replies):
            warnings.warn(f"{self.lm.name}, as a judge: {missing}", stacklevel=2)
        return [reply.answer or "" for reply in replies]


@dataclass(frozen=True)
class Rubric:
    """What a judge is asked: a text with {question} and {answer}, perhaps {reference}, that is answered by a number.

    What is put into the fields stands between delimiters: those that the text has around them, such as
    `[ANSWER START]` or `=== BEGIN REPLY ===`, else some of our own. It cannot write them itself: see `DelimiterGuard`.
    """

    name: str
    text: str
    low: float = 0.0  # the smallest and the largest score
    high: float = 100.0

    def __post_init__(self) -> None:
        if not {"question", "answer"} <= set(FIELD.findall(self.text)):
            raise SteerError(f"rubric {self.name}: its text must hold {{question}} and {{answer}}")
        if not self.low < self.high:
            raise SteerError(
                f"rubric {self.name}: expected its lowest score below the highest, found {self.low:g} and {self.high:g}"
            )

    @property
    def sha256(self) -> str:
        """Hash of what a verdict depends on."""
        return digest([self.text, self.low, self.high])

    def filled(self, example: Example, reference: str | None = None) -> str:
        """The prompt for a judge, all fields replaced in one pass: a field's name inside a text stays text.

        Raises:
            SteerError: the rubric has a field {reference} and there is none.
        """
        values = {"question": prompt_text(example.prompt), "answer": example.answer}
        if reference is not None:
            values["reference"] = reference
        elif "{reference}" in self.text:
            raise SteerError(f"rubric {self.name}: its text holds {{reference}}, but no references were given")
        return self._fill(values)

    def _fill(self, values: Mapping[str, str]) -> str:
        template, guard = self._guarded
        return FIELD.sub(lambda field: guard.disarmed(values[field[1]]), template)

    @cached_property
    def _guarded(self) -> tuple[str, DelimiterGuard]:
        """The text with every field between delimiters, and what takes their likeness out of a text."""
        template = FIELD.sub(self._delimited, self.text)
        pieces = [piece.strip() for line in template.split("\n") for piece in FIELD.split(line)[::2]]
        return template, DelimiterGuard.against(list(filter(is_delimiter, pieces)))

    def _delimited(self, field: re.Match[str]) -> str:
        """The field as it is if the text has delimiters on both sides of it, else between our own."""
        if all(map(is_delimiter, _around(self.text, field))):
            return field[0]
        before, after = self.text[: field.start()], self.text[field.end() :]
        own = OWN_MARKERS.format(field[1].upper(), field[1])
        return ("" if before[-1:] in ("", "\n") else "\n") + own + ("" if after[:1] in ("", "\n") else "\n")


def rubric_of(behavior: Behavior) -> Rubric:
    """The rubric of a behaviour, from 0 (it does not show) to 100.

    Raises:
        SteerError: the behaviour has none, or one without the fields.
    """
    if not {"question", "answer"} <= set(FIELD.findall(behavior.judge_prompt)):
        raise SteerError(
            f"{behavior.name}: its judge prompt must hold {{question}} and {{answer}}; "
            "use the likelihood judge, or add an 'eval_prompt'"
        )
    return Rubric(behavior.name, behavior.judge_prompt)


def grade(
    chat_model: ChatModel,
    rubric: Rubric,
    examples: Sequence[Example],
    *,
    references: Sequence[str] | None = None,
    progress: Progress = silent,
) -> list[float | None]:
    """Each example's score by the rubric's own scale; None where the reply is no number of that scale.

    `references`: one text an example, for rubrics with a field {reference}; others do not read them.

    Raises:
        SteerError: the rubric wants references and there are none.
    """
    paired: Sequence[str | None] = references if references is not None else [None] * len(examples)
    prompts = [rubric.filled(example, reference) for example, reference in zip(examples, paired, strict=True)]

    def score(reply: str) -> float | None:
        return verdict(reply, low=rubric.low, high=rubric.high, name=rubric.name)

    if isinstance(chat_model, Endpoint):  # a later run asks again for what is no verdict
        chat_model = chat_model.keeping(lambda reply: score(reply) is not None)
    return [score(reply) for reply in chat_model.generate(prompts, progress=progress)]


@dataclass(frozen=True)
class RubricJudge:
    """A `Judge` that has a chat model score answers by a rubric; its scale is stretched to 0 to 100."""

    chat_model: ChatModel
    rubric: Rubric

    @property
    def name(self) -> str:
        """See `Judge.name`."""
        return f"{self.rubric.name} {self.rubric.sha256[:12]} by {self.chat_model.name}"

    def scores(self, examples: Sequence[Example], *, progress: Progress = silent) -> list[float | None]:
        """See `Judge.scores`."""
        low, high = self.rubric.low, self.rubric.high
        grades = grade(self.chat_model, self.rubric, examples, progress=progress)
        return [None if score is None else 100.0 * (score - low) / (high - low) for score in grades]


def is_served(judge: Judge) -> bool:
    """Whether a server judges, so that the model here can go on meanwhile."""
    return isinstance(judge, RubricJudge) and isinstance(judge.chat_model, Endpoint)


def verdict(reply: str, *, low: float = 0.0, high: float = 100.0, name: str = "") -> float | None:
    """The number that a judge's reply starts with, after markdown or words such as "Score:" or "The score is".

    None unless that is the whole verdict and on this scale: another number in the same sentence makes it
    a range, a choice or a condition ("3 or 4"), and only "of 100" or "/100" may name the scale, by its end.
    A fraction below 1 on a scale to 100 may be meant either way. What a model thinks before it answers is dropped.
    After a label that is the rubric's `name` ("Coherence: 85") it is the verdict if no other number follows.
    """
    reply = reply.rpartition(THOUGHT)[2]
    match = VERDICT.match(reply)
    if match is None:
        return None
    score, rest = float(match["score"]), reply[match.end() :]
    scale = SCALE_END.match(rest)
    if scale and float(scale[1]) == high:
        rest = rest[scale.end() :]
    percent = rest.startswith("%") and high != 100
    fraction = high >= 100 and 0 < score < 1
    if match["label"] and not _is_label_of(match["label"], name):  # of evil, "Safety: 95" says the opposite
        return None
    if percent or fraction or re.search("[0-9]", rest if match["label"] else SENTENCE_END.split(rest)[0]):
        return None
    return score if low <= score <= high else None


def _is_label_of(label: str, name: str) -> bool:
    """Whether each word says that it is a score, or begins as one of the rubric's name does ("harmful", of "harm")."""
    own, words = (set(re.findall(r"[^\W_]+", text.lower())) for text in (name, label))
    begins = {word[:4] for word in own}
    return all(word[:4] in begins and "less" not in word for word in words - own - LABEL_WORDS)


def _around(text: str, field: re.Match[str]) -> tuple[str, str]:
    """What stands right before and after a field, up to a line's end or another field; blank lines do not count."""
    before = text[: field.start()].rstrip().rpartition("\n")[2]
    after = text[field.end() :].lstrip().partition("\n")[0]
    return FIELD.split(before)[-1].strip(), FIELD.split(after)[0].strip()
