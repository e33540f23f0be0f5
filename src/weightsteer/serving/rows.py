"""A row of the running batch: what was asked, and what it has written so far."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from transformers import PreTrainedTokenizerBase

from .asked import Asked, Chance, Finish, Piece
from .choose import generator_of
from .text_of_tokens import StopTexts, TextOfTokens

if TYPE_CHECKING:
    from .worker import Job

NOT_NUMBERS = "the model gives no numbers (NaN) at these strengths; choose ones nearer to 0"


class Row:
    """One reply on its way. `job` is what it belongs to, `place` its place among the job's rows."""

    def __init__(
        self, asked: Asked, job: Job, place: int, tokenizer: PreTrainedTokenizerBase, hidden: Collection[int]
    ) -> None:
        self.asked, self.job, self.place = asked, job, place
        self.generator = generator_of(asked)
        self.last = asked.ids[-1]  # the token that the model is given next
        self.written = 0
        self.finish: Finish = ""
        self.failed = False
        self._text, self._stops = TextOfTokens(tokenizer, hidden), StopTexts(asked.stop)

    @property
    def is_done(self) -> bool:
        """Whether it takes no more tokens."""
        return bool(self.finish) or self.failed or self.job.cancelled

    def take(self, token: int, chance: Chance | None) -> Piece:
        """The next token was chosen; returns what can be shown of it."""
        self.last = token
        self.written += 1
        if token in self.asked.stop_ids:
            text, self.finish = self._rest(), "stop"
        else:
            text = self._shown(self._text.add(token))
        return self._piece(text, () if chance is None else (chance,))

    def scored(self, prompt: tuple[Chance | None, ...]) -> Piece:
        """The prompt's tokens were scored; of a row that writes nothing that is all."""
        if self.asked.max_tokens == 0:
            self.finish = "length"
        return Piece(self.place, prompt=prompt, finish=self.finish)

    def nothing_to_write(self) -> Piece:
        """A row that was to write nothing is done."""
        self.finish = "length"
        return Piece(self.place, finish=self.finish)

    def fail(self, reason: str) -> Piece:
        """It cannot go on."""
        self.failed = True
        return Piece(self.place, error=reason)

    def _shown(self, text: str) -> str:
        """The text up to a stop, or up to what may be one; at the last token all of it."""
        shown, stopped = self._stops.add(text)
        if stopped:
            self.finish = "stop"
        elif self.written >= self.asked.max_tokens:
            self.finish = "length"
            shown += self._rest()
        return shown

    def _rest(self) -> str:
        """What was held back."""
        shown, stopped = self._stops.add(self._text.end())
        if stopped:
            self.finish = "stop"
        return shown if stopped else shown + self._stops.end()

    def _piece(self, text: str, chances: tuple[Chance, ...]) -> Piece:
        return Piece(self.place, text, chances, tokens=self.written, finish=self.finish)
