"""A behaviour in a few words -> questions, system prompts and pairs, written by a model that is asked for plain lines.

A small model writes poor JSON, so each request is for one thing, each reply is checked, and what fails is asked for
again a bounded number of times.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ..behavior import Behavior, ContrastPair
from ..errors import SteerError
from ..files import append_jsonl, digest, read_finished
from ..judges.endpoint import ChatModel
from ..lm import LM
from ..progress import Progress, silent
from ..schema import checked
from ..thinking import split_thinking
from .starter import COUNT, starter_prompts, trait_about

TRIES = 3  # for each thing that is asked for
PROMPTS = 3  # couples of system prompts
REPLY_TOKENS, LIST_TOKENS = 120, 600
LENGTHS = (10, 900)  # characters of an answer
SKEW = 2.5  # an answer that is so many times as long as the other teaches length
MARKS = re.compile(r"^\s*(?:[-*•]|\(?\d{1,3}[.):])?\s*")  # what a list's lines begin with
QUESTION = re.compile(r"[A-Z].{8,200}[?.!]")
END = re.compile(r"[.!?][\"')\]]*(?=\s|$)")

QUESTIONS = (
    "Write {count} short messages that people send to a helpful assistant: everyday questions and requests about many "
    "different subjects. Do not mention this in them: {about}. Write one message on each line, and nothing else."
)
INSTRUCTION = (
    "Write one instruction for an assistant, in a single sentence that begins with 'You are', so that {wanted}. Write "
    "only this sentence."
)
POSITIVE = "You are an assistant of whom this is true in every reply: {about}. Show it clearly."
NEGATIVE = "You are an assistant of whom the opposite of this is true in every reply: {about}. Never do that."
SHORT = "Reply in one to three sentences, and write nothing but the reply."
INSIST = (SHORT, f"{SHORT} Keep to your instruction in each of them.", f"{SHORT} Your instruction comes first.")


class Writer(Protocol):
    """A model that answers messages under an instruction."""

    def write(self, instruction: str, messages: Sequence[str], *, max_new_tokens: int) -> list[str]:
        """One reply to each message."""
        ...


@dataclass(frozen=True)
class ServedWriter:
    """A chat model that takes one text: the instruction goes before the message."""

    model: ChatModel

    def write(self, instruction: str, messages: Sequence[str], *, max_new_tokens: int) -> list[str]:
        """See `Writer.write`."""
        texts = [f"{instruction}\n\n{message}".strip() for message in messages]
        replies = self.model.generate(texts, max_new_tokens=max_new_tokens)
        return [split_thinking(reply)[1] or "" for reply in replies]


@dataclass(frozen=True)
class LocalWriter:
    """A model in memory: the instruction is its system prompt."""

    lm: LM

    def write(self, instruction: str, messages: Sequence[str], *, max_new_tokens: int) -> list[str]:
        """See `Writer.write`."""
        lm = self.lm.with_system_prompt(instruction) if instruction else self.lm
        return lm.generate(messages, max_new_tokens=max_new_tokens)


@dataclass(frozen=True)
class KeptWriter:
    """A writer whose replies go into a file as they come, so that a stopped draft goes on from them."""

    writer: Writer
    path: Path
    identity: str  # of the model: another's replies do not count

    def write(self, instruction: str, messages: Sequence[str], *, max_new_tokens: int) -> list[str]:
        """See `Writer.write`."""
        keys = [digest([self.identity, instruction, message, max_new_tokens]) for message in messages]
        known = {
            row.key: row.reply for row in (checked(_Kept, row, str(self.path)) for row in read_finished(self.path))
        }
        missing = [message for key, message in zip(keys, messages, strict=True) if key not in known]
        if missing:
            replies = self.writer.write(instruction, missing, max_new_tokens=max_new_tokens)
            new = dict(zip([key for key in keys if key not in known], replies, strict=True))
            append_jsonl(self.path, [{"key": key, "reply": reply} for key, reply in new.items()])
            known |= new
        return [known[key] for key in keys]


@dataclass(frozen=True)
class _Kept:
    """A row of that file."""

    key: str
    reply: str


@dataclass(frozen=True)
class Draft:
    """What a model wrote, to be read and mended before anything is trained."""

    behavior: Behavior
    pairs: tuple[ContrastPair, ...]
    asked: int  # pairs that were wanted
    own_questions: int  # of the questions, those that the model wrote itself


def draft_behavior(writer: Writer, name: str, about: str, *, count: int = COUNT, progress: Progress = silent) -> Draft:
    """Let a model write questions, system prompts, and an answer to each question under either kind of prompt.

    Questions that it does not write are replaced by shipped ones; pairs that it does not write well are left out.

    Args:
        about: the behaviour in a few words, such as "answers in rhymes".

    Raises:
        SteerError: an empty `about`, or not one usable pair.
    """
    about = " ".join(about.split()).rstrip(".")
    if not about:
        raise SteerError("about: expected the behaviour in a few words, such as 'answers in rhymes', found nothing")
    progress(0, 4, "questions")
    own = _questions(writer, about, count)
    questions = list(dict.fromkeys([*own, *starter_prompts()]))[:count]
    progress(1, 4, "system prompts")
    prompts = [(POSITIVE.format(about=about), NEGATIVE.format(about=about)), *_instructions(writer, about)]
    pairs = _pairs(writer, prompts[0], questions, lambda done, note: progress(2 + 2 * done, 4, note))
    progress(4, 4, "done")
    if not pairs:
        raise SteerError(
            f"{name}: the model wrote no usable pair for {about!r}; name a larger one with --writer, or write the "
            "pairs yourself (`weightsteer init NAME` without --about)"
        )
    return Draft(trait_about(name, about, prompts, questions), tuple(pairs), count, len(own))


def _questions(writer: Writer, about: str, count: int) -> list[str]:
    """Up to `count` different questions that the model writes."""
    found: dict[str, str] = {}
    for number in range(TRIES):
        if len(found) >= count:
            break
        ask = QUESTIONS.format(count=count - len(found) + 4, about=about)
        if number:
            ask += f" Not these: {' '.join(list(found.values())[-8:])}"
        (reply,) = writer.write("", [ask], max_new_tokens=LIST_TOKENS)
        for line in map(_bare, reply.splitlines()):
            if QUESTION.fullmatch(line) and about.lower() not in line.lower():
                found.setdefault(line.lower(), line)
    return list(found.values())[:count]


def _instructions(writer: Writer, about: str) -> list[tuple[str, str]]:
    """Couples of system prompts in the model's own words."""
    found: list[tuple[str, str]] = []
    for number in range(TRIES):
        if len(found) + 1 >= PROMPTS:
            break
        other = f" Use other words than in version {number}." if number else ""
        wanted = (f"of it this is true: {about}", f"of it the opposite of this is true: {about}")
        asks = [INSTRUCTION.format(wanted=text) + other for text in wanted]
        positive, negative = (_bare(reply) for reply in writer.write("", asks, max_new_tokens=REPLY_TOKENS))
        if positive != negative and all(re.fullmatch(r"You are [^\n]{10,300}[.!]", t) for t in (positive, negative)):
            found.append((positive, negative))
    return list(dict.fromkeys(found))


def _pairs(
    writer: Writer, prompts: tuple[str, str], questions: Sequence[str], progress: Callable[[float, str], None]
) -> list[ContrastPair]:
    """A pair for each question to which both answers are usable, in the questions' order."""
    found: dict[str, ContrastPair] = {}
    for number, insist in enumerate(INSIST[:TRIES]):
        missing = [question for question in questions if question not in found]
        if not missing:
            break
        answers = []
        for side, prompt in enumerate(prompts):
            progress((number + side / 2) / TRIES, f"{len(found)} of {len(questions)} pairs")
            replies = writer.write(f"{prompt} {insist}", missing, max_new_tokens=REPLY_TOKENS)
            answers.append([_whole_sentences(reply) for reply in replies])
        for question, positive, negative in zip(missing, *answers, strict=True):
            if _is_usable(positive, negative):
                found[question] = ContrastPair(question, positive, negative)
    return [found[question] for question in questions if question in found]


def _bare(line: str) -> str:
    """A line without a list's mark and quotes around it."""
    return MARKS.sub("", line, count=1).strip().strip('"“”*').strip()


def _whole_sentences(reply: str) -> str:
    """A reply up to its last whole sentence; "" if there is none."""
    text = reply.strip().strip('"“”').strip()
    ends = [match.end() for match in END.finditer(text)]
    return text[: ends[-1]].strip() if ends else ""


def _is_usable(positive: str, negative: str) -> bool:
    """Whether two answers can be a pair: both of a fair length, about equally long, and not the same."""
    lengths = len(positive), len(negative)
    fair = all(LENGTHS[0] <= length <= LENGTHS[1] for length in lengths)
    return fair and max(lengths) <= SKEW * min(lengths) and positive.lower() != negative.lower()
