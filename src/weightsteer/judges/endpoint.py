"""Who reads a prompt and answers with text: the protocol of judges, and any OpenAI-compatible server."""

from __future__ import annotations

import asyncio
import copy
import importlib.util
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol
from urllib.parse import urlsplit

from ..errors import SteerError
from ..files import digest
from ..progress import Progress, silent
from .asking import Again, all_of, in_own_thread, tried
from .keys import Key
from .reply_cache import ReplyCache
from .request_errors import (
    NEWER_TOKENS,
    TEMPERATURE,
    TOKENS,
    OtherParametersError,
    PassingError,
    meaning_of,
    shorten,
)

if TYPE_CHECKING:
    from openai import AsyncOpenAI

THINKING_ROOM = 4096  # tokens beside the reply's own, for a model that thinks before it replies
LONGER = 5  # times the timeout that such a model gets
THINKS = "<think>"  # how a reply begins whose thinking the server leaves in it
THOUGHT = "</think>"  # ends what a model that reasons says to itself
MAY_THINK = "may think"  # a short reply was cut and is no verdict: the chat template may have begun a thought
AT_ONCE = "answers at once"  # with room it wrote more, and no thought

Arrived = Callable[[str, "Reply"], None]  # called with a prompt's key and its reply


class ChatModel(Protocol):
    """Answers prompts with text: a local model, or a server."""

    @property
    def name(self) -> str:
        """What tells this chat model from another, for the record."""
        ...

    def generate(self, prompts: Sequence[str], *, max_new_tokens: int = 16, progress: Progress = silent) -> list[str]:
        """One reply to each prompt, in their order."""
        ...


class Reply(NamedTuple):
    """A model's text, and why it is empty if it is."""

    text: str
    why_empty: str = ""


@dataclass(frozen=True)
class Endpoint:
    """A model behind an OpenAI-compatible chat endpoint, asked at temperature 0, several prompts at once.

    A server that refuses `max_tokens` is asked with `max_completion_tokens`, and one that refuses temperature 0 at
    its own, of which a warning tells. A model that thinks first gets room for it, and more time. What a server
    wants is remembered for later requests.

    Lost connections, timeouts, 408, 409, 429, 5xx and replies that end in an error are tried again with
    growing pauses. A reply goes into `cache` as it arrives, and a prompt whose reply is there is not sent:
    after a kill, or once a server that went down is back, the same call goes on where it stopped.
    """

    url: str  # without /chat/completions, such as http://localhost:8000/v1
    model: str
    key_env: str = "OPENAI_API_KEY"  # the environment variable that holds the key; it may be absent
    concurrency: int = 8  # requests under way at once
    retries: int = 5
    timeout: float = 60.0  # seconds for one request, from its start to the last byte of its reply
    cache: Path | None = None  # JSONL; it may serve several models and lengths
    _learned: set[str] = field(default_factory=set, init=False, repr=False, compare=False)  # what the server wants
    _kept: ReplyCache | None = field(default=None, init=False, repr=False, compare=False)
    _usable: Callable[[str], bool] = field(default=bool, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not _is_address(self.url):
            raise SteerError(
                f"judge's url {self.url.rpartition('@')[2]!r}: expected a server's address such as "
                "http://localhost:8000/v1, without user name or password"
            )
        if urlsplit(self.url).query or urlsplit(self.url).fragment or not self.url.isprintable():
            raise SteerError(
                f"judge's url {self.url.partition('?')[0]!r}: expected a plain address, without '?' and '#'; a key "
                "belongs into an environment variable"
            )
        if urlsplit(self.url).path.rstrip("/").endswith("/chat/completions"):
            raise SteerError(f"judge's url {self.url}: leave out /chat/completions, which is added to the address")
        if self.concurrency < 1 or self.retries < 0 or self.timeout <= 0:
            raise SteerError(
                "endpoint: expected concurrency of at least 1, retries of at least 0 and a timeout above 0 s, "
                f"found {self.concurrency}, {self.retries} and {self.timeout:g}"
            )
        if importlib.util.find_spec("openai") is None:
            raise SteerError("a judge behind a url needs the package openai: pip install 'weightsteer[judge]'")
        object.__setattr__(self, "_kept", ReplyCache(self.cache) if self.cache is not None else None)

    @property
    def name(self) -> str:
        """See `ChatModel.name`."""
        return f"{self.model} at {self.url}"

    def keeping(self, usable: Callable[[str], bool]) -> Endpoint:
        """The same endpoint that keeps only replies of use in its cache, so that others are asked for again."""
        other = copy.copy(self)  # it shares what was learned of the server
        object.__setattr__(other, "_usable", usable)
        return other

    def generate(self, prompts: Sequence[str], *, max_new_tokens: int = 16, progress: Progress = silent) -> list[str]:
        """See `ChatModel.generate`; an empty reply is "", and is not kept. A prompt that comes twice is asked once.

        Raises:
            SteerError: the server cannot be reached, refuses, is none of this kind, or spends all tokens on thinking.
        """
        keys = [digest([self.model, self.url, prompt, max_new_tokens]) for prompt in prompts]
        known, wanted = self._cached(), dict(zip(keys, prompts, strict=True))
        empty: Counter[str] = Counter()
        missing = {key: prompt for key, prompt in wanted.items() if key not in known}
        done = len(wanted) - len(missing)
        progress(done, len(wanted), "replies")

        def arrived(key: str, reply: Reply) -> None:
            nonlocal done
            if self._kept is not None and self._usable(reply.text):  # what a filter held back may come another time
                self._kept.add(key, reply.text)
            known[key] = reply.text
            empty.update([reply.why_empty] if reply.why_empty else [])
            done += 1
            progress(done, len(wanted), "replies")

        def again(attempt: int, reason: str) -> None:
            progress(done, len(wanted), f"{reason}; try {attempt + 1} of {self.retries + 1}")

        if missing:
            self._fetch(missing, max_new_tokens, arrived, again)
        if empty:
            reasons = ", ".join(f"{reason}: {count}" for reason, count in empty.most_common())
            warnings.warn(f"{self.name}: {empty.total()} of {len(wanted)} replies are empty ({reasons})", stacklevel=2)
        return [known[key] for key in keys]

    def _cached(self) -> dict[str, str]:
        replies = self._kept.replies() if self._kept is not None else {}
        return {key: reply for key, reply in replies.items() if self._usable(reply)}

    def _fetch(self, prompts: Mapping[str, str], max_new_tokens: int, arrived: Arrived, again: Again) -> None:
        """Ask for all prompts."""
        in_own_thread(self._gathered, prompts, max_new_tokens, arrived, again)

    async def _gathered(self, prompts: Mapping[str, str], max_new_tokens: int, arrived: Arrived, again: Again) -> None:
        from openai import AsyncOpenAI, DefaultAsyncHttpxClient

        gate = asyncio.Semaphore(self.concurrency)
        # Its own timeout is one of each read, and its retries are silent; both are ours. It follows no redirection,
        # which would carry the prompts, or the key, to another server.
        client = AsyncOpenAI(
            api_key=self._key.value,
            base_url=self.url,
            timeout=None,
            max_retries=0,
            http_client=DefaultAsyncHttpxClient(follow_redirects=False),
        )

        async def one(key: str, prompt: str) -> None:
            async with gate:
                arrived(key, await self._reply(client, prompt, max_new_tokens, again))

        async with client, self._kept.writing() if self._kept is not None else nullcontext():
            await all_of(one(key, prompt) for key, prompt in prompts.items())

    async def _reply(self, client: AsyncOpenAI, prompt: str, max_new_tokens: int, again: Again) -> Reply:
        """One reply, tried again after what may pass."""
        try:
            return await tried(lambda: self._once(client, prompt, max_new_tokens), self.retries, again)
        except PassingError as failure:
            raise self._gave_up(failure) from None

    async def _once(self, client: AsyncOpenAI, prompt: str, max_new_tokens: int) -> Reply:
        """One reply, in the way that the server turns out to want."""
        while True:
            learned = frozenset(self._learned)
            try:
                return self._read(await self._send(client, prompt, max_new_tokens, learned), max_new_tokens, learned)
            except (OtherParametersError, SteerError) as error:
                if THINKS not in learned and _has_room(learned):  # the server may have no room for what only may think
                    self._learned.add(AT_ONCE)
                    continue
                if isinstance(error, SteerError):
                    raise
                if error.parameter in learned:  # it is refused in its other form too
                    raise self._refusal(error) from None
                self._learn(error.parameter)

    def _learn(self, parameter: str) -> None:
        if parameter == TEMPERATURE and parameter not in self._learned:
            warnings.warn(
                f"{self.name}: takes no temperature 0, so that its replies may differ each time", stacklevel=2
            )
        self._learned.add(parameter)

    def _refusal(self, error: OtherParametersError) -> SteerError:
        return SteerError(f"{self.url}, model {self.model}: {self._shorten(error)}")

    async def _send(self, client: AsyncOpenAI, prompt: str, max_new_tokens: int, learned: Collection[str]) -> object:
        """One request; what went wrong is raised as what it means."""
        from openai import OpenAIError

        room = max_new_tokens + (THINKING_ROOM if _has_room(learned) else 0)
        options: dict[str, Any] = {NEWER_TOKENS if TOKENS in learned else TOKENS: room}
        if TEMPERATURE not in learned:
            options[TEMPERATURE] = 0.0
        messages: list[Any] = [{"role": "user", "content": prompt}]
        try:
            async with asyncio.timeout(self.timeout * (LONGER if _has_room(learned) else 1)):
                return await client.chat.completions.create(model=self.model, messages=messages, **options)
        except TimeoutError:
            raise PassingError("the request timed out") from None
        except OpenAIError as error:
            raise meaning_of(error, self.url, self.model, self.key_env, self._key) from None
        except ValueError as error:  # the body is not the JSON that its header says it is
            raise self._foreign(self._shorten(error)) from None

    def _read(self, completion: object, max_new_tokens: int, learned: frozenset[str]) -> Reply:
        """The text of a chat completion, or why it has none; that it thinks, or does not, is learned from it."""
        choices, error = getattr(completion, "choices", None), getattr(completion, "error", None)
        first = choices[0] if isinstance(choices, list) and choices else None
        reason, message = getattr(first, "finish_reason", None), getattr(first, "message", None)
        if reason == "error" or (error and first is None):
            raise PassingError(
                f"the reply is an error: {self._shorten(getattr(first, 'error', None) or error or 'unnamed')}"
            )
        if not isinstance(choices, list):
            raise self._foreign("no chat completion in its answer")
        text = self._key.hide(_join(getattr(message, "content", None)))
        cut = reason == "length" and THOUGHT not in text
        if cut and (not text or text.startswith(THINKS)):
            if not _has_room(learned):
                raise OtherParametersError(THINKS)
            raise SteerError(
                f"{self.url}, model {self.model}: {max_new_tokens + THINKING_ROOM} tokens were spent before a reply "
                "began; turn the judge's thinking off, or choose a model that answers at once"
            )
        if not self._usable(text) and learned.isdisjoint((THINKS, AT_ONCE)):
            if cut and MAY_THINK not in learned:
                raise OtherParametersError(MAY_THINK)
            if MAY_THINK in learned and not cut:
                self._learned.add(THINKS if THOUGHT in text else AT_ONCE)
        return Reply(text, "" if text else _why_empty(message, reason))

    @property
    def _key(self) -> Key:
        return Key.read(self.key_env)

    def _shorten(self, error: object) -> str:
        return shorten(error, self._key)

    def _gave_up(self, failure: PassingError) -> SteerError:
        kept = f" Replies so far are kept in {self.cache}; the same command goes on from them." if self.cache else ""
        question = f"is the server running, and quick enough for {self.concurrency} requests at once?"
        return SteerError(
            f"{self.url}, model {self.model}: {failure}, tried {self.retries + 1} times at up to {self.timeout:g} s; "
            f"{failure.advice or question}{kept}"
        )

    def _foreign(self, found: str) -> SteerError:
        return SteerError(
            f"{self.url}: did not answer as an OpenAI-compatible chat server does ({found}); "
            "check the address, which ends in /v1 for most servers"
        )


def _has_room(learned: Collection[str]) -> bool:
    """Whether a server that this was learned of gets room to think."""
    return THINKS in learned or (MAY_THINK in learned and AT_ONCE not in learned)


def _is_address(url: str) -> bool:
    try:
        parts = urlsplit(url)
    except ValueError:
        return False
    return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.username is None


def _why_empty(message: object, reason: object) -> str:
    """Why a reply holds no text."""
    if getattr(message, "refusal", None):
        return "the model refused"
    if getattr(message, "tool_calls", None):
        return "it called a tool"
    return {"content_filter": "held back by a content filter"}.get(str(reason), "no text in it")


def _join(content: object) -> str:
    """A message's text; some servers send it in parts."""
    parts = content if isinstance(content, list) else [{"text": content}]
    texts = [part.get("text") for part in parts if isinstance(part, Mapping)]
    # A lone surrogate, half of a character that was cut, cannot be written to a file.
    return "".join(text for text in texts if isinstance(text, str)).strip().encode("utf-8", "replace").decode()
