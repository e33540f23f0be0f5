"""Replies in OpenAI's shapes, whole or in pieces, and vLLM's for a prompt's log-probabilities."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from .asked import Chance, Piece
from .text_of_tokens import UNFINISHED

Kind = Literal["chat", "text"]


@dataclass
class Choice:
    """What one row has written so far."""

    texts: list[str] = field(default_factory=list)
    chances: list[Chance] = field(default_factory=list)
    prompt: tuple[Chance | None, ...] | None = None
    tokens: int = 0
    finish: str = ""

    def take(self, piece: Piece) -> None:
        """One more piece."""
        self.texts.append(piece.text)
        self.chances += piece.chances
        self.prompt = piece.prompt if piece.prompt is not None else self.prompt
        self.tokens = max(self.tokens, piece.tokens)
        self.finish = piece.finish or self.finish

    @property
    def text(self) -> str:
        """All of it."""
        return "".join(self.texts)


@dataclass(frozen=True)
class Answers:
    """Makes the answers to one request.

    Args:
        prompts: the token ids of each row's prompt; rows of one prompt have the same list.
        distinct: how many prompts were sent, of which the rows are.
    """

    kind: Kind
    model: str
    tokenizer: PreTrainedTokenizerBase
    prompts: Sequence[Sequence[int]]
    distinct: int
    warning: str = ""
    echo: bool = False  # the prompt's text, and its log-probabilities, before the reply's
    asked_chances: bool = False
    prompt_chances: bool = False  # in vLLM's shape
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def head(self, *, streamed: bool) -> dict[str, Any]:
        """The fields of an answer, or of a streamed piece of one, without its choices."""
        kinds = {
            ("chat", False): "chat.completion",
            ("chat", True): "chat.completion.chunk",
        }
        prefix = "chatcmpl" if self.kind == "chat" else "cmpl"
        warned = {"warning": self.warning} if self.warning else {}
        kind = kinds.get((self.kind, streamed), "text_completion")
        return {"id": f"{prefix}-{self.id}", "object": kind, "created": self.created, "model": self.model, **warned}

    def whole(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """The finished answer."""
        made = [self._choice(index, choice) for index, choice in enumerate(choices)]
        return {**self.head(streamed=False), "choices": made, "usage": self.usage(choices)}

    def usage(self, choices: Iterable[Choice]) -> dict[str, int]:
        """Tokens read and written; several replies to one prompt read it once."""
        rows = len(self.prompts) // self.distinct
        read = sum(len(prompt) for prompt in self.prompts[::rows])
        written = sum(choice.tokens for choice in choices)
        return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}

    def _choice(self, index: int, choice: Choice) -> dict[str, Any]:
        found: dict[str, Any] = {"index": index, "finish_reason": choice.finish or None, "logprobs": None}
        if self.kind == "chat":
            found["message"] = {"role": "assistant", "content": choice.text}
            if self.asked_chances:
                found["logprobs"] = {"content": [self._chat_chance(chance) for chance in choice.chances]}
        else:
            before = self._prompt_text(index) if self.echo else ""
            found["text"] = before + choice.text
            if self.asked_chances:
                found["logprobs"] = self._text_chances(choice.chances, self._before(index, choice), 0)
        if self.prompt_chances and choice.prompt is not None:
            found["prompt_logprobs"] = [None if chance is None else self._by_id(chance) for chance in choice.prompt]
        return found

    def _before(self, index: int, choice: Choice) -> list[tuple[int, Chance | None]]:
        """The prompt's tokens, where they are to be shown."""
        if not self.echo or choice.prompt is None:
            return []
        return list(zip(self.prompts[index], choice.prompt, strict=True))

    def _prompt_text(self, index: int) -> str:
        return str(self.tokenizer.decode(list(self.prompts[index]), skip_special_tokens=True))

    def pieces(self, index: int, pieces: Sequence[Piece], so_far: Choice) -> dict[str, Any]:
        """A choice of a streamed piece: what the row has written since the last one; `so_far` is what came before."""
        text, chances = "".join(piece.text for piece in pieces), [c for piece in pieces for c in piece.chances]
        finish = next((piece.finish for piece in pieces if piece.finish), None)
        found: dict[str, Any] = {"index": index, "finish_reason": finish, "logprobs": None}
        if self.kind == "chat":
            found["delta"] = {"content": text}
            if self.asked_chances:
                found["logprobs"] = {"content": [self._chat_chance(chance) for chance in chances]}
            return found
        before: list[tuple[int, Chance | None]] = []
        if self.echo and not so_far.tokens and not so_far.finish:
            text = self._prompt_text(index) + text
            scored = next((piece.prompt for piece in pieces if piece.prompt is not None), None)
            before = [] if scored is None else list(zip(self.prompts[index], scored, strict=True))
        found["text"] = text
        if self.asked_chances:
            echoed = len(self._prompt_text(index)) if self.echo and (so_far.tokens or so_far.finish) else 0
            found["logprobs"] = self._text_chances(chances, before, echoed + len(so_far.text))
        return found

    def _chat_chance(self, chance: Chance) -> dict[str, Any]:
        return {
            **self._token(chance.token, chance.log_prob),
            "top_logprobs": [self._token(token, log_prob) for token, log_prob in chance.top],
        }

    def _token(self, token: int, log_prob: float) -> dict[str, Any]:
        """A token; its bytes are null where it is a part of a character."""
        text = token_text(self.tokenizer, token)
        shown = None if UNFINISHED in text else list(text.encode())
        return {"token": text, "logprob": _finite(log_prob), "bytes": shown}

    def _text_chances(
        self, chances: Sequence[Chance], before: Sequence[tuple[int, Chance | None]], offset: int
    ) -> dict[str, Any]:
        """The older shape: lists over tokens, those of an echoed prompt first."""
        rows = [*before, *((chance.token, chance) for chance in chances)]
        found: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token, chance in rows:
            text = token_text(self.tokenizer, token)
            found["tokens"].append(text)
            found["token_logprobs"].append(None if chance is None else _finite(chance.log_prob))
            found["top_logprobs"].append(None if chance is None else self._top(chance))
            found["text_offset"].append(offset)
            offset += len(text)
        return found

    def _top(self, chance: Chance) -> dict[str, float]:
        """By text; where two tokens have one text the likelier stays, and the chosen one is always there."""
        found: dict[str, float] = {}
        for token, log_prob in (*chance.top, (chance.token, chance.log_prob)):
            found.setdefault(token_text(self.tokenizer, token), _finite(log_prob))
        return found

    def _by_id(self, chance: Chance) -> dict[str, Any]:
        """vLLM's shape: by token id, the prompt's own token first."""
        rows = [(chance.token, chance.log_prob, chance.rank)]
        rows += [(token, p, rank) for rank, (token, p) in enumerate(chance.top, 1) if token != chance.token]
        return {
            str(token): {"logprob": _finite(p), "rank": rank, "decoded_token": token_text(self.tokenizer, token)}
            for token, p, rank in rows
        }


@lru_cache(maxsize=1 << 16)
def token_text(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    """A token's text, alone."""
    return str(tokenizer.decode([token], skip_special_tokens=False))


def _finite(log_prob: float) -> float:
    """JSON has no minus infinity; OpenAI writes -9999 for it."""
    return max(log_prob, -9999.0)


def error_body(message: str, status: int, param: str | None = None, code: str | None = None) -> Mapping[str, Any]:
    """An error as OpenAI's client expects it."""
    kinds = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
