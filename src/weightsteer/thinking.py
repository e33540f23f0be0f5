"""What a model writes to itself before it answers, told apart from the answer."""

from __future__ import annotations

from dataclasses import dataclass

# How thinking begins and ends in the models that think aloud. The last pair is gpt-oss's: there the answer is in a
# channel of its own, so the thinking ends where that channel begins.
MARKERS = (
    ("<think>", "</think>"),
    ("<seed:think>", "</seed:think>"),
    ("[THINK]", "[/THINK]"),
    ("<|channel>thought", "<channel|>"),
    ("<|channel|>analysis<|message|>", "<|channel|>final<|message|>"),
)


@dataclass(frozen=True)
class Reply:
    """What a model wrote after a prompt."""

    answer: str | None  # without the thinking; None: the reply ended inside it
    thinking: str = ""
    ended: bool = True  # False: it was cut at the longest length


def split_thinking(text: str, *, opened: bool = False) -> tuple[str, str | None]:
    """(thinking, answer) of a reply, both without the markers between them and without blanks at their ends.

    The answer is None if the reply ends inside its thinking: then there is none.

    Args:
        opened: the prompt has begun the thinking already, as some chat templates do (see `opens_thinking`).
    """
    for start, end in MARKERS:
        thinking, closed, answer = text.rpartition(end)
        if closed:
            return thinking.strip().removeprefix(start).strip(), answer.strip()
        if text.lstrip().startswith(start):
            return text.strip().removeprefix(start).strip(), None
    return (text.strip(), None) if opened else ("", text.strip())


def opens_thinking(prompt: str) -> bool:
    """Whether a rendered prompt ends with the start of a thought."""
    return prompt.rstrip().endswith(tuple(start for start, _ in MARKERS))
