"""How each kind of server is asked for replies and for log-probabilities of given tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, NamedTuple, Protocol, get_args

from ..errors import SteerError
from ..strength_names import strength_name
from .connection import Ask, Connection
from .kinds import Kind

FORCED = 1e4  # added to a logit: no other token is chosen then
ALL_TOKENS = 1 << 20  # more than any vocabulary has


@dataclass(frozen=True)
class Wanted:
    """How a reply is to be written: by the likeliest token at temperature 0, else plainly sampled."""

    tokens: int  # the longest reply
    temperature: float
    seed: int
    stop_ids: Sequence[int]
    stop_texts: Sequence[str] = ()


@dataclass(frozen=True)
class Written:
    """A reply as the server gives it."""

    text: str
    ids: Sequence[int] | None  # None: the server gives the text alone, without control tokens
    ended: bool  # False: it was cut at its longest length


class Scored(NamedTuple):
    """Log-probability of given tokens."""

    total: float  # their sum, in nats
    likeliest: bool  # whether each is the likeliest at its place; known only if it is asked for


class Dialect(Protocol):
    """One kind of server."""

    @property
    def mixes_strengths(self) -> bool:
        """Whether it computes requests of several strengths together."""
        ...

    def base(self, connection: Connection) -> dict[str, Any]:
        """The model that is served, as its list of models has it: what tells it from another."""
        ...

    def vectors(self, connection: Connection) -> list[str] | None:
        """The names of the vectors that it knows; None where it looks for a name only when it is asked for it."""
        ...

    def beside(self, vector: str) -> Dialect:
        """The same server where the base is asked for while it computes strengths of this vector."""
        ...

    async def write(self, ask: Ask, ids: Sequence[int], strengths: Mapping[str, float], wanted: Wanted) -> Written:
        """The reply to a prompt of token ids."""
        ...

    async def score(
        self, ask: Ask, ids: Sequence[int], start: int, strengths: Mapping[str, float], *, rank: bool = False
    ) -> Scored:
        """Summed log-probability of the ids from place `start` on; `rank`: and whether they are the likeliest."""
        ...

    def requests_for(self, scored: int) -> int:
        """How many requests the log-probability of so many tokens takes."""
        ...


def dialect_of(kind: Kind, base: str, plain_token: int) -> Dialect:
    """The dialect of a kind of server.

    Args:
        base: what the server calls the model without a vector.
        plain_token: a token that is a letter.

    Raises:
        SteerError: no such kind.
    """
    if kind == "llama.cpp":
        return LlamaCpp(plain_token)
    if kind not in get_args(Kind):
        raise SteerError(f"engine: kind: expected one of {', '.join(get_args(Kind))}, found {kind!r}")
    return Completions(base, ours=kind == "weightsteer")


def base_of(models: Any) -> dict[str, Any]:
    """The model without a parent in a list of models, with the fields that stay from one request to the next."""
    entry = next(entry for entry in models["data"] if not entry.get("parent"))
    fields = ("id", "root", "max_model_len", "owned_by", "meta")
    found = {name: entry[name] for name in fields if entry.get(name) is not None}
    if not isinstance(found["id"], str):
        raise TypeError("the model's id is no text")
    return found


@dataclass(frozen=True)
class Completions:
    """vLLM, and our own server, which takes vLLM's fields: `/v1/completions` with token ids."""

    base_name: str
    ours: bool = False
    mixes_strengths: ClassVar[bool] = True

    def base(self, connection: Connection) -> dict[str, Any]:
        """See `Dialect.base`."""
        return connection.get("/v1/models", base_of)

    def vectors(self, connection: Connection) -> list[str] | None:
        """See `Dialect.vectors`."""
        if not self.ours:
            return None
        return connection.get("/dial", lambda dial: [str(entry["name"]) for entry in dial["vectors"]])

    def beside(self, vector: str) -> Dialect:
        """See `Dialect.beside`: vLLM is asked for the vector at 0.

        On a CPU vLLM adds some adapter to rows of the base that share a batch with others (vLLM's pull request 48421).
        """
        return self if self.ours else replace(self, base_name=f"{vector}@0")

    async def write(self, ask: Ask, ids: Sequence[int], strengths: Mapping[str, float], wanted: Wanted) -> Written:
        """See `Dialect.write`. Every setting is said, since vLLM fills in the model's own."""
        body = {
            **self._asked(ids, strengths),
            "max_tokens": wanted.tokens,
            "temperature": wanted.temperature,
            "top_p": 1.0,
            "top_k": -1,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "seed": wanted.seed,
            "stop_token_ids": list(wanted.stop_ids),
        }
        if wanted.stop_texts:
            body["stop"] = list(wanted.stop_texts)
        if not self.ours:  # ours hides control tokens as we do
            body |= {"skip_special_tokens": False, "return_token_ids": True, "spaces_between_special_tokens": False}
        found: Written = await ask("/v1/completions", body, self._written)
        return found

    def _written(self, answer: Any) -> Written:
        choice = self._choice(answer)
        reason = choice["finish_reason"]
        if reason not in ("stop", "length"):
            raise ValueError(f"finish_reason {reason!r}")
        ids = choice.get("token_ids")
        return Written(_text(choice["text"]), None if ids is None else _ids(ids), reason == "stop")

    async def score(
        self, ask: Ask, ids: Sequence[int], start: int, strengths: Mapping[str, float], *, rank: bool = False
    ) -> Scored:
        """See `Dialect.score`."""

        def total(answer: Any) -> Scored:
            rows = self._choice(answer)["prompt_logprobs"]
            if len(rows) != len(ids):
                raise ValueError(f"log-probabilities of {len(rows)} tokens, and {len(ids)} were sent")
            chances = [_number(rows[i][str(ids[i])]["logprob"]) for i in range(start, len(ids))]
            others = [max(_number(each["logprob"]) for each in row.values()) for row in rows[start:]]
            return Scored(sum(chances), all(a >= b for a, b in zip(chances, others, strict=True)))

        body = {**self._asked(ids, strengths), "max_tokens": 1, "temperature": 0.0, "prompt_logprobs": int(rank)}
        found: Scored = await ask("/v1/completions", body, total)
        return found

    def requests_for(self, scored: int) -> int:
        """See `Dialect.requests_for`."""
        return 1

    def _asked(self, ids: Sequence[int], strengths: Mapping[str, float]) -> dict[str, Any]:
        return {"model": strength_name(strengths) or self.base_name, "prompt": list(ids)}

    def _choice(self, answer: Any) -> Any:
        """The one choice of an answer; one of another model's is none."""
        (choice,) = answer["choices"]
        return choice


@dataclass
class LlamaCpp:
    """llama.cpp's server: `/completion` with token ids, the strengths as scales of its LoRA files.

    It gives no log-probabilities of a prompt, so that given tokens are forced one by one. Its file of a vector is
    known by its name without the ending.
    """

    plain_token: int
    mixes_strengths: ClassVar[bool] = False  # it batches rows of one scale, and a slot's cache is of one scale
    _files: dict[str, int] = field(default_factory=dict)  # a vector's name -> the server's number of it

    def base(self, connection: Connection) -> dict[str, Any]:
        """See `Dialect.base`."""
        return connection.get("/v1/models", base_of)

    def vectors(self, connection: Connection) -> list[str] | None:
        """See `Dialect.vectors`."""

        def named(adapters: Any) -> dict[str, int]:
            return {
                str(entry["path"]).replace("\\", "/").rpartition("/")[2].removesuffix(".gguf"): int(entry["id"])
                for entry in adapters
            }

        self._files = connection.get("/lora-adapters", named)
        return list(self._files)

    def beside(self, vector: str) -> Dialect:
        """See `Dialect.beside`."""
        return self

    async def write(self, ask: Ask, ids: Sequence[int], strengths: Mapping[str, float], wanted: Wanted) -> Written:
        """See `Dialect.write`."""
        body = {
            **self._asked(ids, strengths),
            "n_predict": wanted.tokens,
            "temperature": wanted.temperature,  # 0: the likeliest token
            "samplers": ["temperature"],
            "seed": wanted.seed,
            "stop": list(wanted.stop_texts),
            "return_tokens": True,
        }
        found: Written = await ask("/completion", body, self._written)
        return found

    def _written(self, answer: Any) -> Written:
        kind = answer["stop_type"]
        if kind not in ("eos", "word", "limit"):
            raise ValueError(f"stop_type {kind!r}")
        return Written(_text(answer["content"]), _ids(answer["tokens"]), kind != "limit")

    async def score(
        self, ask: Ask, ids: Sequence[int], start: int, strengths: Mapping[str, float], *, rank: bool = False
    ) -> Scored:
        """See `Dialect.score`: each token is forced, and its log-probability before that is read."""
        found = [await self._next(ask, ids[:i], ids[i], strengths) for i in range(start, len(ids))]
        return Scored(sum(each.total for each in found), all(each.likeliest for each in found))

    async def _next(self, ask: Ask, ids: Sequence[int], token: int, strengths: Mapping[str, float]) -> Scored:
        """Log-probability of the token that follows; of one that is a part of a character, among those of all tokens.

        llama.cpp says nothing of a token that leaves a character unfinished, so a letter is forced in its place.
        """
        found = await ask("/completion", self._forced(ids, token, 1, strengths), lambda answer: _chances(answer, token))
        if found is None:
            body = self._forced(ids, self.plain_token, ALL_TOKENS, strengths)
            found = await ask("/completion", body, lambda answer: _chances(answer, self.plain_token))
        return Scored(float(found[token]), found[token] >= max(found.values()))

    def _forced(self, ids: Sequence[int], token: int, likeliest: int, strengths: Mapping[str, float]) -> dict[str, Any]:
        """Ask for one token after the ids, with the log-probabilities of so many of the likeliest ones."""
        return {
            **self._asked(ids, strengths),
            "n_predict": 1,
            "n_probs": likeliest,
            "temperature": 0.0,
            "samplers": ["temperature"],
            "logit_bias": [[token, FORCED]],
            "post_sampling_probs": False,
        }

    def requests_for(self, scored: int) -> int:
        """See `Dialect.requests_for`."""
        return scored

    def _asked(self, ids: Sequence[int], strengths: Mapping[str, float]) -> dict[str, Any]:
        """The prompt, and a scale for every LoRA file: 0 for those that are not asked for."""
        if missing := sorted(strengths.keys() - self._files.keys()):
            known = ", ".join(self._files) or "none"
            raise SteerError(f"llama.cpp's server has no LoRA file {missing[0]}.gguf; those that it has: {known}")
        scales = [{"id": number, "scale": strengths.get(name, 0.0)} for name, number in self._files.items()]
        return {"prompt": list(ids), "lora": scales, "cache_prompt": True}


def _chances(answer: Any, forced: int) -> dict[int, float] | None:
    """Token -> log-probability of the forced one and of the likeliest; None where llama.cpp leaves them out."""
    if "completion_probabilities" not in answer and answer["tokens_predicted"] == 1:
        return None
    (chance,) = answer["completion_probabilities"]
    if chance["id"] != forced:
        raise ValueError(f"token {chance['id']} instead of {forced}")
    return {row["id"]: _number(row["logprob"]) for row in (*chance["top_logprobs"], chance)}


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"expected a number, found {type(value).__name__}")
    return float(value)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"expected a text, found {type(value).__name__}")
    return value


def _ids(value: Any) -> list[int]:
    if not isinstance(value, list) or not all(isinstance(token, int) and token >= 0 for token in value):
        raise TypeError("expected token ids")
    return value
