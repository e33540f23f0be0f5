"""A talk with the steered model: its turns, the settings that its replies are made with, and its file."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import TextStreamer

from ..errors import SteerError
from ..files import write_json
from ..lm import LM
from ..looping import loops
from ..outputs import refuse_foreign_file
from ..places import public_name
from ..thinking import why_unanswered
from ..vectors.handle import SteeringHandle

REPEATS = (
    "the reply repeats itself, and the next one may follow it; try /again at a k nearer to 0, /temperature 0.7, "
    "or /reset, which forgets the talk"
)
REPLY_TOKENS = 300  # the longest reply, unless more are asked for


@dataclass(frozen=True)
class Turn:
    """What the user said, and what the model replied at k."""

    said: str
    reply: str
    k: float


@dataclass
class Talk:
    """The turns so far, and how the next reply is made. `handle` is that of the running `applied` block."""

    lm: LM
    handle: SteeringHandle
    max_new_tokens: int = REPLY_TOKENS
    temperature: float = 0.0  # 0: the likeliest token
    seed: int = 0
    system: str | None = None  # None: the template's own
    turns: list[Turn] = field(default_factory=list)
    made: int = 0  # replies, so that with a temperature the same turn comes out otherwise

    @property
    def k(self) -> float:
        return float(self.handle.k)

    def say(self, text: str, show: Callable[[str], None], stopped: Callable[[], bool]) -> str:
        """The user's next turn; returns a remark on the reply, or "".

        Args:
            show: gets the reply piece by piece.
            stopped: asked after each token whether to end here; what was written until then is kept.

        Raises:
            SteerError: the template refuses the talk; the turn is not kept.
        """
        reply, remark = self._reply([*self._messages(), {"role": "user", "content": text}], show, stopped)
        self.turns.append(Turn(text, reply, self.k))
        return remark or (REPEATS if loops(reply) else "")

    def again(self, k: float | None, show: Callable[[str], None], stopped: Callable[[], bool]) -> str:
        """Another reply to the last turn in place of the one that is there, at another k if one is given.

        Raises:
            SteerError: nothing was said yet, or the vector cannot be applied at this k.
        """
        if not self.turns:
            raise SteerError("/again: nothing was said yet")
        last, before = self.turns.pop(), self.k
        try:
            self.handle.k = before if k is None else k
            remark = self.say(last.said, show, stopped)
        except BaseException:
            self.turns.append(last)
            raise
        finally:
            self.handle.k = before
        return remark

    def _messages(self) -> list[dict[str, str]]:
        rows = [(("user", turn.said), ("assistant", turn.reply)) for turn in self.turns]
        return [{"role": role, "content": text} for row in rows for role, text in row]

    def _reply(
        self, messages: list[dict[str, str]], show: Callable[[str], None], stopped: Callable[[], bool]
    ) -> tuple[str, str]:
        """The answer, without what the model thinks before it, and a remark where there is none."""
        lm = self.lm.with_system_prompt(self.system)
        seed, self.made = self.seed + self.made, self.made + 1
        found = lm.reply_aloud(
            messages,
            Pieces(lm, show),
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            seed=seed,
            stopped=stopped,
        )
        return found.answer or "", "" if stopped() else why_unanswered([found])

    def save(self, path: Path) -> None:
        """Write the talk as JSON: its messages, the k of each reply, and the settings.

        Raises:
            SteerError: the file is there and is no talk.
        """
        refuse_foreign_file(path, _is_talk)
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        fields: dict[str, Any] = {
            "messages": [*system, *self._messages()],
            "k": [turn.k for turn in self.turns],
            "model": public_name(self.lm.name),
            "temperature": self.temperature,
            "seed": self.seed,
        }
        write_json(path, fields)


def _is_talk(content: bytes) -> bool:
    try:
        found = json.loads(content)
    except ValueError:
        return False
    return isinstance(found, dict) and {"messages", "k"} <= found.keys()


class Pieces(TextStreamer):
    """Hands a reply on as it comes, in pieces that end between words, up to the words that end a base model's reply."""

    def __init__(self, lm: LM, show: Callable[[str], None]) -> None:
        super().__init__(lm.tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.show, self.ending = show, lm.chat_template.stop_text or ""
        self.held, self.over = "", False  # what may be the beginning of the ending, and whether it has come

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """See `TextStreamer`."""
        if self.over:
            return
        text, ending, _ = (self.held + text).partition(self.ending) if self.ending else (self.held + text, "", "")
        self.over = bool(ending)
        begun = 0 if ending or stream_end else _overlap(text, self.ending)
        text, self.held = text[: len(text) - begun], text[len(text) - begun :]
        if text:
            self.show(text)


def _overlap(text: str, ending: str) -> int:
    """How many characters at a text's end may be the first ones of the ending."""
    return next((size for size in range(min(len(text), len(ending)), 0, -1) if text.endswith(ending[:size])), 0)
