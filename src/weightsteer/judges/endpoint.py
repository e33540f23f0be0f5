"""Who reads a prompt and answers with text: the protocol of judges, and any OpenAI-compatible server."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol
from urllib.parse import urlsplit

from ..errors import SteerError
from ..files import append_jsonl, digest, read_finished
from ..progress import Progress, silent

if TYPE_CHECKING:
    from openai import AsyncOpenAI

NO_KEY = "none"  # local servers ask for no key, but the client insists on sending one
REASON_LENGTH = 200  # characters of a server's own error message that ours repeats
RETRIED = (408, 409, 429)  # and 5xx: the statuses after which a request is tried again
LONGEST_PAUSE = 60.0  # seconds before a request is tried again, whatever the server asks for
ADVICE = {  # HTTP status -> what to do; of other refusals the server's own message says enough
    401: "put a valid key into the environment variable {key_env}",
    403: "the key in the environment variable {key_env} may not use this model",
    404: "check the model's name and the address, which ends in /v1 for most servers",
}


Arrived = Callable[[str, str], None]  # called with a prompt's key and its reply
Again = Callable[[int, str], None]  # called with the number of the attempt to come, and why


class ChatModel(Protocol):
    """Answers prompts with text: a local model, or a server."""

    @property
    def name(self) -> str:
        """What tells this chat model from another, for the record."""
        ...

    def generate(self, prompts: Sequence[str], *, max_new_tokens: int = 16, progress: Progress = silent) -> list[str]:
        """One reply to each prompt, in their order."""
        ...


class _PassingError(Exception):
    """A failure that may be gone at the next attempt, and the seconds that the server asks to wait until then."""

    def __init__(self, reason: str, pause: float | None = None) -> None:
        super().__init__(reason)
        self.pause = pause


@dataclass(frozen=True)
class Endpoint:
    """A model behind an OpenAI-compatible chat endpoint, asked at temperature 0, several prompts at once.

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

    def __post_init__(self) -> None:
        if not _is_address(self.url):
            raise SteerError(
                f"judge's url {self.url.rpartition('@')[2]!r}: expected a server's address such as "
                "http://localhost:8000/v1, without user name or password"
            )
        if self.concurrency < 1 or self.retries < 0 or self.timeout <= 0:
            raise SteerError(
                "endpoint: expected concurrency of at least 1, retries of at least 0 and a timeout above 0 s, "
                f"found {self.concurrency}, {self.retries} and {self.timeout:g}"
            )
        if importlib.util.find_spec("openai") is None:
            raise SteerError("a judge behind a url needs the package openai: pip install 'weightsteer[judge]'")

    @property
    def name(self) -> str:
        """See `ChatModel.name`."""
        return f"{self.model} at {self.url}"

    def generate(self, prompts: Sequence[str], *, max_new_tokens: int = 16, progress: Progress = silent) -> list[str]:
        """See `ChatModel.generate`; an empty reply is "", and is not kept. A prompt that comes twice is asked once.

        Raises:
            SteerError: the server cannot be reached, refuses, is none of this kind, or spends all tokens on thinking.
        """
        keys = [digest([self.model, self.url, prompt, max_new_tokens]) for prompt in prompts]
        known, wanted = self._cached(), dict(zip(keys, prompts, strict=True))
        missing = {key: prompt for key, prompt in wanted.items() if key not in known}
        done = len(wanted) - len(missing)
        progress(done, len(wanted), "replies")

        def arrived(key: str, reply: str) -> None:
            nonlocal done
            if self.cache is not None and reply:  # what a filter held back may come another time
                append_jsonl(self.cache, [{"key": key, "reply": reply}])
            known[key] = reply
            done += 1
            progress(done, len(wanted), "replies")

        def again(attempt: int, reason: str) -> None:
            progress(done, len(wanted), f"{reason}; try {attempt + 1} of {self.retries + 1}")

        if missing:
            self._fetch(missing, max_new_tokens, arrived, again)
        return [known[key] for key in keys]

    def _cached(self) -> dict[str, str]:
        rows = read_finished(self.cache) if self.cache is not None else []
        if not all(isinstance(row.get("key"), str) and isinstance(row.get("reply"), str) for row in rows):
            raise SteerError(f"{self.cache}: expected lines with texts 'key' and 'reply'; name another file as cache")
        return {row["key"]: row["reply"] for row in rows}

    def _fetch(self, prompts: Mapping[str, str], max_new_tokens: int, arrived: Arrived, again: Again) -> None:
        """Ask for all prompts. The event loop has a thread of its own, since a notebook's thread runs one already.

        Ctrl-C or an error leaves the block, which cancels the requests under way instead of waiting for them.
        """
        from anyio.from_thread import start_blocking_portal

        with start_blocking_portal() as portal:
            portal.call(self._gathered, prompts, max_new_tokens, arrived, again)

    async def _gathered(self, prompts: Mapping[str, str], max_new_tokens: int, arrived: Arrived, again: Again) -> None:
        from openai import AsyncOpenAI

        gate = asyncio.Semaphore(self.concurrency)
        secret = os.environ.get(self.key_env) or NO_KEY
        # Its own timeout is one of each read, and its retries are silent; both are ours.
        client = AsyncOpenAI(api_key=secret, base_url=self.url, timeout=None, max_retries=0)

        async def one(key: str, prompt: str) -> None:
            async with gate:
                arrived(key, await self._reply(client, prompt, max_new_tokens, again))

        async with client:
            tasks = [asyncio.create_task(one(key, prompt)) for key, prompt in prompts.items()]
            try:
                await asyncio.gather(*tasks)
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    async def _reply(self, client: AsyncOpenAI, prompt: str, max_new_tokens: int, again: Again) -> str:
        """One reply, tried again after what may pass."""
        for attempt in range(self.retries + 1):
            try:
                return await self._once(client, prompt, max_new_tokens)
            except _PassingError as error:
                reason, asked_for = str(error), error.pause
            if attempt < self.retries:
                again(attempt + 1, reason)
                await asyncio.sleep(min(pause_before(attempt) if asked_for is None else asked_for, LONGEST_PAUSE))
        raise self._gave_up(reason)

    async def _once(self, client: AsyncOpenAI, prompt: str, max_new_tokens: int) -> str:
        from openai import OpenAIError

        try:
            async with asyncio.timeout(self.timeout):
                completion = await client.chat.completions.create(
                    model=self.model,
                    messages=[{"role": "user", "content": prompt}],
                    temperature=0.0,
                    max_tokens=max_new_tokens,
                )
        except TimeoutError:
            raise _PassingError("the request timed out") from None
        except OpenAIError as error:
            raise self._failure(error) from None
        except ValueError as error:  # the body is not the JSON that its header says it is
            raise self._foreign(_shorten(error)) from None
        return self._text(completion, max_new_tokens)

    def _text(self, completion: object, max_new_tokens: int) -> str:
        """The text of a chat completion, "" if it has none."""
        choices, error = getattr(completion, "choices", None), getattr(completion, "error", None)
        first = choices[0] if isinstance(choices, list) and choices else None
        reason = getattr(first, "finish_reason", None)
        if reason == "error" or (error and first is None):
            raise _PassingError(
                f"the reply is an error: {_shorten(getattr(first, 'error', None) or error or 'unnamed')}"
            )
        if not isinstance(choices, list):
            raise self._foreign("no chat completion in its answer")
        text = _join(getattr(getattr(first, "message", None), "content", None))
        if not text and reason == "length":
            raise SteerError(
                f"{self.url}, model {self.model}: its {max_new_tokens} tokens were spent before a reply began; a judge "
                "that thinks first needs more of them: turn its thinking off, or choose a model that answers at once"
            )
        return text

    def _failure(self, error: Exception) -> SteerError | _PassingError:
        """What a failed request means: one that may pass, or what a user is told."""
        status = getattr(error, "status_code", None)
        if status is None or status >= 500 or status in RETRIED:
            cause = f" ({_shorten(error.__cause__)})" if status is None and str(error.__cause__ or "") else ""
            return _PassingError(f"{_shorten(error)}{cause}", pause_asked_for(error))
        advice = f"; {ADVICE[status].format(key_env=self.key_env)}" if status in ADVICE else ""
        return SteerError(f"{self.url}, model {self.model}: {_shorten(error)}{advice}")

    def _gave_up(self, reason: str) -> SteerError:
        kept = f" Replies so far are kept in {self.cache}; the same command goes on from them." if self.cache else ""
        return SteerError(
            f"{self.url}, model {self.model}: {reason}, tried {self.retries + 1} times at up to {self.timeout:g} s; "
            f"is the server running, and quick enough for {self.concurrency} requests at once?{kept}"
        )

    def _foreign(self, found: str) -> SteerError:
        return SteerError(
            f"{self.url}: did not answer as an OpenAI-compatible chat server does ({found}); "
            "check the address, which ends in /v1 for most servers"
        )


def _is_address(url: str) -> bool:
    try:
        parts = urlsplit(url)
    except ValueError:
        return False
    return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.username is None


def pause_before(attempt: int) -> float:
    """Seconds to wait after the attempt of this number, from 0; not the same for all requests under way."""
    return min(0.5 * 2.0**attempt, 8.0) * random.uniform(0.75, 1.0)


def pause_asked_for(error: Exception) -> float | None:
    """The seconds that a server asks to be left alone for."""
    headers = getattr(getattr(error, "response", None), "headers", {})
    for name, unit in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        try:
            return max(0.0, float(headers[name]) * unit)
        except (KeyError, ValueError):  # it is not there, or is a date
            continue
    return None


def _shorten(error: object) -> str:
    """An error's message on one line, without a full stop."""
    return " ".join(str(error).split())[:REASON_LENGTH].rstrip(".")


def _join(content: object) -> str:
    """A message's text; some servers send it in parts."""
    parts = content if isinstance(content, list) else [{"text": content}]
    texts = [part.get("text") for part in parts if isinstance(part, Mapping)]
    # A lone surrogate, half of a character that was cut, cannot be written to a file.
    return "".join(text for text in texts if isinstance(text, str)).strip().encode("utf-8", "replace").decode()
