"""Who reads a prompt and answers with text: the protocol of judges, and any OpenAI-compatible server."""

from __future__ import annotations

import asyncio
import importlib.util
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol
from urllib.parse import urlsplit

from .errors import SteerError
from .progress import Progress, silent
from .records import append_jsonl, digest, read_finished

if TYPE_CHECKING:
    from openai import AsyncOpenAI, OpenAIError

NO_KEY = "none"  # local servers ask for no key, but the client insists on sending one
REASON_LENGTH = 200  # characters of a server's own error message that ours repeats
RETRIED = (408, 409, 429)  # and 5xx: the statuses that the client tries again
REFUSED = "check the model's name, and that the prompts fit into its context"
ADVICE = {  # HTTP status -> what to do
    401: "put a valid key into the environment variable {key_env}",
    403: "the key in the environment variable {key_env} may not use this model",
    404: "check the model's name and the address, which ends in /v1 for most servers",
}


class Reader(Protocol):
    """Answers prompts with text: a local model, or a server."""

    @property
    def name(self) -> str:
        """What tells this reader from another, for the record."""
        ...

    def ask(self, prompts: Sequence[str], *, max_tokens: int = 16, progress: Progress = silent) -> list[str]:
        """One reply to each prompt, in their order."""
        ...


@dataclass(frozen=True)
class Endpoint:
    """A model behind an OpenAI-compatible chat endpoint, asked at temperature 0, several prompts at once.

    Lost connections, timeouts, 408, 409, 429 and 5xx are tried again with growing pauses. A reply goes into
    `cache` as it arrives, and a prompt whose reply is there is not sent: after a kill, or once a server
    that went down is back, the same call goes on where it stopped.
    """

    url: str  # without /chat/completions, such as http://localhost:8000/v1
    model: str
    key_env: str = "OPENAI_API_KEY"  # the environment variable that holds the key; it may be absent
    concurrency: int = 8  # requests under way at once
    retries: int = 5
    timeout: float = 60.0  # seconds for one request
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
        """See `Reader.name`."""
        return f"{self.model} at {self.url}"

    def ask(self, prompts: Sequence[str], *, max_tokens: int = 16, progress: Progress = silent) -> list[str]:
        """See `Reader.ask`; an empty reply is "". A prompt that comes twice is asked once.

        Raises:
            SteerError: the server cannot be reached, refuses, or is none of this kind.
        """
        keys = [digest([self.model, self.url, prompt, max_tokens]) for prompt in prompts]
        known, wanted = self._cached(), dict(zip(keys, prompts, strict=True))
        missing = {key: prompt for key, prompt in wanted.items() if key not in known}
        done = len(wanted) - len(missing)
        progress(done, len(wanted), "replies")

        def arrived(key: str, reply: str) -> None:
            nonlocal done
            if self.cache is not None:
                append_jsonl(self.cache, [{"key": key, "reply": reply}])
            known[key] = reply
            done += 1
            progress(done, len(wanted), "replies")

        if missing:
            self._fetch(missing, max_tokens, arrived)
        return [known[key] for key in keys]

    def _cached(self) -> dict[str, str]:
        rows = read_finished(self.cache) if self.cache is not None else []
        if not all(isinstance(row.get("key"), str) and isinstance(row.get("reply"), str) for row in rows):
            raise SteerError(f"{self.cache}: expected lines with texts 'key' and 'reply'; name another file as cache")
        return {row["key"]: row["reply"] for row in rows}

    def _fetch(self, prompts: Mapping[str, str], max_tokens: int, arrived: Callable[[str, str], None]) -> None:
        """Ask for all prompts. The event loop has a thread of its own, since a notebook's thread runs one already.

        Ctrl-C or an error leaves the block, which cancels the requests under way instead of waiting for them.
        """
        from anyio.from_thread import start_blocking_portal

        with start_blocking_portal() as portal:
            portal.call(self._gathered, prompts, max_tokens, arrived)

    async def _gathered(self, prompts: Mapping[str, str], max_tokens: int, arrived: Callable[[str, str], None]) -> None:
        from openai import AsyncOpenAI

        gate = asyncio.Semaphore(self.concurrency)
        secret = os.environ.get(self.key_env) or NO_KEY
        client = AsyncOpenAI(api_key=secret, base_url=self.url, timeout=self.timeout, max_retries=self.retries)

        async def one(key: str, prompt: str) -> None:
            async with gate:
                arrived(key, await self._reply(client, prompt, max_tokens))

        async with client:
            tasks = [asyncio.create_task(one(key, prompt)) for key, prompt in prompts.items()]
            try:
                await asyncio.gather(*tasks)
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    async def _reply(self, client: AsyncOpenAI, prompt: str, max_tokens: int) -> str:
        from openai import OpenAIError

        try:
            completion = await client.chat.completions.create(
                model=self.model,
                messages=[{"role": "user", "content": prompt}],
                temperature=0.0,
                max_tokens=max_tokens,
            )
        except OpenAIError as error:
            raise self._failure(error) from None
        except ValueError as error:  # the body is not the JSON that its header says it is
            raise self._foreign(_shortened(error)) from None
        content = _content(completion)
        if content is None:
            raise self._foreign("no chat completion in its answer")
        return content

    def _failure(self, error: OpenAIError) -> SteerError:
        """What a user is told when a request was refused, or failed to the last retry."""
        status = getattr(error, "status_code", None)
        reason = f"{self.url}, model {self.model}: {_shortened(error)}"
        if status is not None and status < 500 and status not in RETRIED:
            return SteerError(f"{reason}; {ADVICE.get(status, REFUSED).format(key_env=self.key_env)}")
        detail = f" ({_shortened(error.__cause__)})" if status is None and str(error.__cause__ or "") else ""
        kept = f" Replies so far are kept in {self.cache}; the same command goes on from them." if self.cache else ""
        return SteerError(
            f"{reason}{detail}, tried {self.retries + 1} times at up to {self.timeout:g} s; "
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


def _shortened(error: BaseException | None) -> str:
    """An error's message on one line, without a full stop."""
    return " ".join(str(error).split())[:REASON_LENGTH].rstrip(".")


def _content(completion: object) -> str | None:
    """The text of a chat completion, "" if it has none; None if this is no chat completion."""
    choices = getattr(completion, "choices", None)
    if not isinstance(choices, list):
        return None
    message = getattr(choices[0], "message", None) if choices else None
    content = getattr(message, "content", None)
    # A lone surrogate, half of a character that was cut, cannot be written to a file.
    return content.strip().encode("utf-8", "replace").decode() if isinstance(content, str) else ""
