"""A talk with the steered model in the terminal."""

from __future__ import annotations

import math

from transformers import TextStreamer

from ..lm import LM
from ..shown import ask, say
from ..vectors.weight_vector import WeightVector

HELP = "/k NUMBER changes the strength, /reset forgets the talk, /quit ends"


def talk(vector: WeightVector, lm: LM, *, k: float, max_new_tokens: int = 300) -> None:
    """Read lines from stdin until /quit or end of file; replies are streamed."""
    turns: list[dict[str, str]] = []
    say(f"k = {k:g}. {HELP}")
    with vector.applied(lm, k) as handle:
        while (line := _read(float(handle.k))) is not None:
            command, _, rest = line.partition(" ")
            if command == "/quit":
                return
            if command == "/reset":
                turns.clear()
            elif command == "/k":
                handle.k = parsed if (parsed := _number(rest)) is not None else handle.k
            elif command.startswith("/"):
                say(HELP)
            elif line:
                turns.append({"role": "user", "content": line})
                turns.append({"role": "assistant", "content": _reply(lm, turns, max_new_tokens)})


def _read(k: float) -> str | None:
    try:
        return ask(f"[k = {k:g}] you: ").strip()
    except EOFError:
        say()
        return None


def _number(text: str) -> float | None:
    """A finite number, or None after telling what was expected."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        say(f"/k: expected a number, found {text!r}")
        return None
    return value


class _Shown(TextStreamer):
    """Prints a reply as it comes, with what would act on the terminal written out."""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        say(text, end="\n" if stream_end else "", flush=True)


def _reply(lm: LM, turns: list[dict[str, str]], max_new_tokens: int) -> str:
    """The answer, which is printed as it comes; what the model thinks before it is printed and not kept."""
    streamer = _Shown(lm.tokenizer, skip_prompt=True, skip_special_tokens=True)
    return lm.reply_aloud(turns, streamer, max_new_tokens=max_new_tokens).answer or ""
