"""Text as its tokens come: never half a character, and never the beginning of a text that ends the reply."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from transformers import PreTrainedTokenizerBase

UNFINISHED = "\ufffd"  # what bytes decode to that are no character, or not yet


class TextOfTokens:
    """Decodes token by token. A token is decoded after those before it, since it may depend on them."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, hidden: Collection[int]) -> None:
        self.tokenizer, self.hidden = tokenizer, hidden
        self._ids: list[int] = []  # those of the piece that came last, then those of no piece yet
        self._shown = 0  # how many of them are in a piece

    def add(self, token: int) -> str:
        """The text that is whole now; "" while a character lacks bytes."""
        if token in self.hidden:
            return ""
        self._ids.append(token)
        return self._fresh(at_end=False)

    def end(self) -> str:
        """What was held back."""
        return self._fresh(at_end=True)

    def _fresh(self, *, at_end: bool) -> str:
        before, now = self._decode(self._ids[: self._shown]), self._decode(self._ids)
        if len(now) <= len(before) or (now.endswith(UNFINISHED) and not at_end):
            return ""
        self._ids = self._ids[self._shown :]
        self._shown = len(self._ids)
        return now[len(before) :]

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=False))


class StopTexts:
    """Cuts a text before the first of some texts, and holds back what may be the beginning of one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops = [stop for stop in stops if stop]
        self._held = ""

    def add(self, text: str) -> tuple[str, bool]:
        """What may be shown, and whether the text ends there."""
        held = self._held + text
        places = [place for place in (held.find(stop) for stop in self.stops) if place >= 0]
        if places:
            self._held = ""
            return held[: min(places)], True
        keep = self._beginning(held)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep], False

    def end(self) -> str:
        """What was held back, which was no stop."""
        held, self._held = self._held, ""
        return held

    def _beginning(self, text: str) -> int:
        """How long the longest end of the text is with which a stop begins."""
        longest = min(len(text), max((len(stop) - 1 for stop in self.stops), default=0))
        for length in range(longest, 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self.stops):
                return length
        return 0
