"""A talk with the steered model in the terminal."""

from __future__ import annotations

import math

import torch
from transformers import TextStreamer

from ..lm import LM
from ..vectors.weight_vector import WeightVector

HELP = "/k NUMBER changes the strength, /reset forgets the talk, /quit ends"


def talk(vector: WeightVector, lm: LM, *, k: float, max_new_tokens: int = 300) -> None:
    """Read lines from stdin until /quit or end of file; replies are streamed."""
    turns: list[dict[str, str]] = []
    print(f"k = {k:g}. {HELP}")
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
                print(HELP)
            elif line:
                turns.append({"role": "user", "content": line})
                turns.append({"role": "assistant", "content": _reply(lm, turns, max_new_tokens)})


def _read(k: float) -> str | None:
    try:
        return input(f"[k = {k:g}] you: ").strip()
    except EOFError:
        print()
        return None


def _number(text: str) -> float | None:
    """A finite number, or None after telling what was expected."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        print(f"/k: expected a number, found {text!r}")
        return None
    return value


@torch.no_grad()
def _reply(lm: LM, turns: list[dict[str, str]], max_new_tokens: int) -> str:
    tokens = torch.tensor([lm.chat_ids(turns)], device=lm.device)
    out = lm.model.generate(  # type: ignore[operator]
        input_ids=tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=lm.pad_id,
        eos_token_id=lm.stops,
        streamer=TextStreamer(lm.tokenizer, skip_prompt=True, skip_special_tokens=True),
    )
    return str(lm.tokenizer.decode(out[0, tokens.shape[1] :], skip_special_tokens=True)).strip()
