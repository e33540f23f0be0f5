"""What a model writes to itself before it answers, told apart from the answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

# How thinking begins and ends in the models that think aloud. The last pair is gpt-oss's: there the answer is in a
# channel of its own, so the thinking ends where that channel begins.
MARKERS = (
    ("<think>", "</think>"),
    ("<seed:think>", "</seed:think>"),
    ("<thought>", "</thought>"),
    ("[THINK]", "[/THINK]"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|channel>thought", "<channel|>"),
    ("<|channel|>analysis<|message|>", "<|channel|>final<|message|>"),
)


@dataclass(frozen=True)
class Reply:
    """What a model wrote after a prompt."""

    answer: str | None  # without the thinking; None: the reply ended inside it, or is broken
    thinking: str = ""
    ended: bool = True  # False: it was cut at the longest length
    broken: bool = False  # the model's logits were no numbers (NaN) at some token


def split_thinking(text: str, *, opened: bool = False) -> tuple[str, str | None]:
    """(thinking, answer) of a reply, both without the markers between them and without blanks at their ends.

    The answer is None if the reply ends inside its thinking: then there is none. A reply that only speaks of the marks
    is all answer: where neither prompt nor reply begins a thought, one ends at a line's start or end alone.

    Args:
        opened: the prompt has begun the thinking already, as some chat templates do (see `opens_thinking`).
    """
    for start, end in MARKERS:
        thinking, closed, answer = text.rpartition(end)
        begun = opened or start in thinking
        if closed and (begun or answer[:1] in ("", "\n") or thinking[-1:] in ("", "\n")):
            return thinking.strip().removeprefix(start).strip(), answer.strip()
        if text.lstrip().startswith(start):
            return text.strip().removeprefix(start).strip(), None
    return (text.strip(), None) if opened else ("", text.strip())


def opens_thinking(prompt: str) -> bool:
    """Whether a rendered prompt ends with the start of a thought."""
    return prompt.rstrip().endswith(tuple(start for start, _ in MARKERS))


def why_unanswered(replies: Sequence[Reply]) -> str:
    """How many replies have no answer, why, and what helps; "" if all have one."""
    broken = sum(reply.broken for reply in replies)
    cut = sum(reply.answer is None for reply in replies) - broken
    found = []
    if broken:
        found.append(f"{broken} of {len(replies)} replies have logits that are not numbers; steer less")
    if cut:
        found.append(
            f"{cut} of {len(replies)} replies ended inside their thinking and have no answer; allow more tokens, or "
            'switch thinking off, in most templates by the template\'s variables {"enable_thinking": false}'
        )
    return "; ".join(found)
