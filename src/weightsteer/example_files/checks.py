"""What makes two sides unfit to train on: refused, or warned of. `lint` shows the same findings."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ..behavior import Example, prompt_text
from ..errors import SteerError

# Marks by which the templates of public models tell turns apart; a tokenizer's own special tokens come on top.
CONTROL = re.compile(
    r"<\|[^|<>\s]{1,40}\|>|<｜[^｜<>\s]{1,40}｜>|</?s>|<(?:bos|eos|pad|unk)>|<(?:start|end)_of_turn>"
    r"|\[/?(?:INST|AVAILABLE_TOOLS|TOOL_CALLS|SYSTEM_PROMPT)\]|<</?SYS>>"
)
THINKING = (("<think>", "</think>"), ("<thinking>", "</thinking>"), ("[THINK]", "[/THINK]"))


@dataclass(frozen=True)
class Finding:
    """One way in which the sides differ that is not the behaviour, or in which they are unfit to train on."""

    kind: str
    message: str
    fatal: bool = False  # a training on this has no meaning


def check_sides(
    positive: Sequence[Example], negative: Sequence[Example], special_tokens: Collection[str] = ()
) -> list[Finding]:
    """Look for equal sides, control tokens, unclosed thinking, examples that occur twice, and empty answers.

    Args:
        special_tokens: those of the model's tokenizer; the marks of well-known templates are always looked for.
    """
    findings = list(_equal_answers(positive, negative))
    for side, examples in (("D+", positive), ("D-", negative)):
        findings += _empty(side, examples)
        findings += _control_tokens(side, examples, special_tokens)
        findings += _unclosed_thinking(side, examples)
        findings += _copies(side, examples)
    return findings


def refuse_unfit(positive: Sequence[Example], negative: Sequence[Example]) -> None:
    """Check, before any work, that a training on these sides has a meaning.

    Raises:
        SteerError: the sides are equal, or one is empty or has an empty answer.
    """
    for finding in check_sides(positive, negative):
        if finding.fatal:
            raise SteerError(f"data: {finding.kind}: {finding.message}; see `weightsteer lint`")


def warn_unfit(positive: Sequence[Example], negative: Sequence[Example], tokenizer: Any) -> None:
    """Warn of what else `check_sides` finds, with the tokenizer of the model that is trained."""
    for finding in check_sides(positive, negative, special_tokens(tokenizer)):
        if not finding.fatal:
            warnings.warn(f"data: {finding.kind}: {finding.message}", stacklevel=2)


def special_tokens(tokenizer: Any) -> set[str]:
    """The texts that a tokenizer of transformers reads as one special token each."""
    added = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    return added | set(tokenizer.all_special_tokens)


def _equal_answers(positive: Sequence[Example], negative: Sequence[Example]) -> Iterator[Finding]:
    both = Counter(positive), Counter(negative)
    shared = sum((both[0] & both[1]).values())
    if not shared:
        return
    if both[0].keys() == both[1].keys():
        yield Finding("equal sides", "D+ and D- hold the same examples, so their difference is nothing", fatal=True)
        return
    text = f"{shared} examples are the same in D+ and in D-; they teach no difference"
    yield Finding("equal answers", f"{text} (such as {_shown(next(iter(both[0] & both[1])))})")


def _empty(side: str, examples: Sequence[Example]) -> Iterator[Finding]:
    if not examples:
        yield Finding("empty side", f"{side} has no example", fatal=True)
    blank = [example for example in examples if not example.answer.strip()]
    if blank:
        text = f"{len(blank)} answers in {side} are empty, such as that to {prompt_text(blank[0].prompt)[:60]!r}"
        yield Finding("empty answer", text, fatal=True)


def _control_tokens(side: str, examples: Sequence[Example], special_tokens: Collection[str]) -> Iterator[Finding]:
    own = "|".join(re.escape(token) for token in sorted(special_tokens, key=len, reverse=True) if token.strip())
    pattern = re.compile(f"{CONTROL.pattern}|{own}") if own else CONTROL
    found: Counter[str] = Counter()
    touched = 0
    for example in examples:
        marks = pattern.findall(_all_text(example))
        found.update(marks)
        touched += bool(marks)
    if found:
        listed = ", ".join(f"{mark!r}" for mark, _ in found.most_common(5))
        text = f"{touched} examples in {side} hold {listed}, which a template may read as the start or end of a turn"
        yield Finding("control token", text)


def _all_text(example: Example) -> str:
    turns = [example.prompt] if isinstance(example.prompt, str) else [turn.content for turn in example.prompt]
    return "\n".join([*turns, example.answer])


def _unclosed_thinking(side: str, examples: Sequence[Example]) -> Iterator[Finding]:
    open_ = [e for e in examples if any(e.answer.count(start) > e.answer.count(end) for start, end in THINKING)]
    if open_:
        text = f"{len(open_)} answers in {side} open a block of thinking and do not close it ({_shown(open_[0])})"
        yield Finding("unclosed thinking", text)


def _copies(side: str, examples: Sequence[Example]) -> Iterator[Finding]:
    counts = Counter(examples)
    copies = [example for example, count in counts.items() if count > 1]
    if copies:
        extra = sum(counts.values()) - len(counts)
        text = f"{extra} of {len(examples)} examples in {side} are copies of others ({_shown(copies[0])})"
        yield Finding("copied example", text)


def _shown(example: Example) -> str:
    return repr(example.answer[:60])
