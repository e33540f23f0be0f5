"""What a request may hold: OpenAI's fields as far as we serve them, vLLM's for scoring, and our own field `k`.

A field that is none of these is refused, so that a misspelt one does not go unnoticed. Fields that ask for what this
server cannot do are refused unless they ask for nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

MOST_STOPS = 16
MOST_TOP = 20  # likeliest tokens beside each one
MOST_CHOICES = 128
MOST_ROWS = 1024  # prompts of one request
LARGEST_SEED = (1 << 63) - 1

Number = Annotated[float, Field(allow_inf_nan=False)]
Ids = list[Annotated[int, Field(ge=0, strict=True)]]


def _without_switches(value: Any) -> Any:
    """Strengths as they came; pydantic takes true for 1."""
    if any(isinstance(k, bool) for k in (value.values() if isinstance(value, Mapping) else [value])):
        raise ValueError("expected a number, found true or false")
    return value


Strengths = Annotated[dict[str, float], BeforeValidator(_without_switches)]
Ks = Annotated[float | dict[str, float], BeforeValidator(_without_switches)]


def _as_list(value: Any) -> Any:
    return [] if value is None else [value] if isinstance(value, str) else value


Stops = Annotated[list[Annotated[str, Field(min_length=1)]], BeforeValidator(_as_list), Field(max_length=MOST_STOPS)]

# OpenAI's fields that change nothing here, and those of which only the value that asks for nothing is taken.
IGNORED = (
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "parallel_tool_calls",
)
NOTHING: Mapping[str, Sequence[Any]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "suffix": ("",),
    "best_of": (1,),
    "top_k": (-1, 0),
    "min_p": (0,),
    "use_beam_search": (False,),
    "skip_special_tokens": (True,),
}


class StreamOptions(BaseModel):
    """What a stream is to hold beside its pieces."""

    model_config = ConfigDict(extra="forbid")

    include_usage: bool = False
    include_obfuscation: bool = False  # taken, and never done


class Form(BaseModel):
    """The fields that both kinds of request share."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    model: str | None = None  # the base, a vector, a vector at a strength, or a sum; None: the base
    k: Ks | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] = 1.0
    top_p: Annotated[float, Field(ge=0, le=1)] = 1.0
    seed: Annotated[int, Field(ge=-LARGEST_SEED, le=LARGEST_SEED)] | None = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] = 1
    stop: Stops = Field(default_factory=list)
    stop_token_ids: Ids = Field(default_factory=list)
    ignore_eos: bool = False
    stream: bool = False
    stream_options: StreamOptions | None = None
    prompt_logprobs: Annotated[int, Field(ge=0, le=MOST_TOP)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_what_is_ignored(cls, fields: Any) -> Any:
        """Drop the fields that ask for nothing, and nulls, which stand for a default."""
        if not isinstance(fields, Mapping):
            return fields
        found = {name: value for name, value in fields.items() if value is not None and name not in IGNORED}
        for name, values in NOTHING.items():
            if name in found and found[name] in values:
                del found[name]
            elif name in found and name not in cls.model_fields:
                raise ValueError(f"{name}: this server cannot do what it asks for; leave it out")
        return found


class Part(BaseModel):
    """A part of a turn; only text is read here."""

    model_config = ConfigDict(extra="ignore")

    type: Literal["text"]
    text: str


class Turn(BaseModel):
    """A turn of the talk."""

    model_config = ConfigDict(extra="ignore")

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Part] | None = None

    @property
    def plain(self) -> dict[str, str]:
        """As chat templates take it."""
        text = "".join(part.text for part in self.content) if isinstance(self.content, list) else self.content or ""
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


Turns = Annotated[list[Turn], Field(min_length=1)]


class ChatForm(Form):
    """`/v1/chat/completions`"""

    messages: Turns
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_TOP)] | None = None

    @property
    def longest(self) -> int | None:
        """The most tokens of a reply."""
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    @property
    def top(self) -> int | None:
        """How many likeliest tokens stand beside each one; None: no log-probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None


class TextForm(Form):
    """`/v1/completions`: a text, or token ids, or several of either."""

    prompt: str | Ids | list[str] | list[Ids]
    max_tokens: Annotated[int, Field(ge=0)] = 16
    logprobs: Annotated[int, Field(ge=0, le=MOST_TOP)] | None = None
    echo: bool = False
    add_special_tokens: bool = True


class FanForm(BaseModel):
    """`/dial/fan`: one prompt at several strengths."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    messages: Turns
    strengths: Annotated[list[Strengths], Field(min_length=1, max_length=MOST_CHOICES)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] = 0.0
    top_p: Annotated[float, Field(ge=0, le=1)] = 1.0
    seed: Annotated[int, Field(ge=-LARGEST_SEED, le=LARGEST_SEED)] = 0


class KlForm(BaseModel):
    """`/dial/kl`: a reply whose tokens are compared between the base and the steered model."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    messages: Turns
    reply: str
    strengths: Strengths
