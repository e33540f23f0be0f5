"""One reply that is asked for, and what comes back of it, piece by piece."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Strengths = Mapping[str, float]  # a vector's name -> its k; one that is absent is at 0
Finish = Literal["", "stop", "length"]  # "" while the reply goes on


@dataclass(frozen=True)
class Asked:
    """A prompt in token ids, and how its reply is to be written."""

    ids: tuple[int, ...]
    strengths: Strengths
    max_tokens: int  # 0: the prompt is scored, and nothing is written
    temperature: float = 0.0  # 0: the likeliest token
    top_p: float = 1.0  # sample among the likeliest tokens that hold this share
    seed: int = 0
    stop: tuple[str, ...] = ()  # texts that end the reply, and do not belong to it
    stop_ids: frozenset[int] = frozenset()  # tokens that do
    top: int | None = None  # with each token, the log-probability of it and of so many of the likeliest
    prompt_top: int | None = None  # the same for the tokens of the prompt


@dataclass(frozen=True)
class Chance:
    """How likely a token was, before temperature and top-p."""

    token: int
    log_prob: float  # nats
    rank: int  # 1 is the likeliest
    top: tuple[tuple[int, float], ...]  # the likeliest tokens with their log-probabilities, from the first


@dataclass(frozen=True)
class Piece:
    """What a row has written since the piece before."""

    row: int  # its place among the rows of its job
    text: str = ""
    chances: tuple[Chance, ...] = ()  # of its tokens, where they were asked for
    prompt: tuple[Chance | None, ...] | None = None  # of the prompt's tokens, once, where asked for; the first has none
    tokens: int = 0  # written so far, the one that ended it included
    finish: Finish = ""
    error: str = ""  # why the row cannot go on
