"""Whether a llama.cpp server steers by the scale that a request asks for; by default it does not always.

llama.cpp's server takes one scale for each LoRA with every request (`lora: [{"id": 0, "scale": -0.7}]`). It also keeps
the states of earlier prompts in memory, and finds them again by their tokens alone: a prompt that was computed at one
scale is then continued at another, without an error. `--cache-ram 0` turns this off. The check below brings the server
into this case with one short prompt of its own, and compares.
"""

from __future__ import annotations

import json
import math
import secrets
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from .errors import SteerError
from .schema import shown

SCALES = (-1.0, 1.0)
TIMEOUT = 120.0  # seconds for one request
MOST_BYTES = 1 << 22  # of a reply that is read
TOKENS = 40  # whose log-probabilities are compared
LEAST_CHANGE = 1e-3  # nats by which the two scales must differ somewhere, above what rounding does
STALE_SHARE = 0.25  # of that change: what a right answer asked for again may differ by
RESTART = "start it with --cache-ram 0 (`weightsteer serve-command llama.cpp VECTOR` prints the command)"

LogProbs = Mapping[int, float]  # token -> nats


def refuse_blind_server(
    url: str,
    *,
    adapter: int = 0,
    scales: tuple[float, float] = SCALES,
    api_key: str | None = None,
    timeout: float = TIMEOUT,
) -> None:
    """Check, before any work, that a llama.cpp server applies the scale of each request, whatever came before.

    Four requests of one token each: a fresh prompt at one scale, the same at the other, another prompt at the first,
    and the first once more as it began. They ask for one slot, so that the server's other work does not matter.

    Args:
        url: the server's address, with or without /v1.
        adapter: the number of the LoRA among those with which the server was started.
        scales: two strengths at which the model differs.
        api_key: what the server was started with as --api-key, if it was.
        timeout: seconds for one request.

    Raises:
        SteerError: the server cannot be reached or is no llama.cpp server, has no such LoRA, gives the same at both
            scales, or answers at one scale from what it computed at another.
    """
    server = _Server(_root_of(url), adapter, api_key, timeout)
    server.require_adapter()
    prompt, other = _fresh_prompt(), _fresh_prompt()
    first, second = scales
    right = server.next_token(prompt, first, afresh=True)
    elsewhere = server.next_token(prompt, second, afresh=True)
    server.next_token(other, first)
    again = server.next_token(prompt, first)
    change, staleness = _distance(right, elsewhere), _distance(right, again)
    if change < LEAST_CHANGE:
        raise SteerError(
            f"{server.root}: gives the same at scale {first:g} and at {second:g} of LoRA {adapter} (within "
            f"{change:.1e} nats); expected two answers that differ: it does not take a request's scale, or the vector "
            "is of another base"
        )
    if staleness > STALE_SHARE * change:
        raise SteerError(
            f"{server.root}: answers at one scale from what it computed at another: the same request at scale "
            f"{first:g} came out {staleness:.2g} nats apart once the prompt had been asked at {second:g}, expected "
            f"none; its prompt cache does not know of scales: {RESTART}"
        )


def _root_of(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.query:
        raise SteerError(f"server's address {shown(url.rpartition('@')[2])}: expected one like http://127.0.0.1:8080")
    return url.rstrip("/").removesuffix("/v1")


def _fresh_prompt() -> str:
    """A prompt that no server has seen, and that has no beginning in common with another one."""
    return f"{secrets.token_hex(12)} is the number of my order. Please tell me what you think about it, and why:"


def _distance(first: LogProbs, second: LogProbs) -> float:
    """The largest difference at a token that both name, in nats."""
    return max((abs(first[token] - second[token]) for token in first.keys() & second.keys()), default=math.inf)


class _Server:
    def __init__(self, root: str, adapter: int, api_key: str | None, timeout: float) -> None:
        self.root, self.adapter, self.api_key, self.timeout = root, adapter, api_key, timeout

    def require_adapter(self) -> None:
        """Raise unless the server holds a LoRA of this number."""
        rows = self._answer("/lora-adapters")
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise self._other_kind("/lora-adapters")
        known = [row.get("id") for row in rows]
        if self.adapter not in known:
            raise SteerError(
                f"{self.root}: has no LoRA {self.adapter} (it has {', '.join(map(shown, known)) or 'none'}); start it "
                "with --lora-scaled FILE:0, one FILE for each vector"
            )

    def next_token(self, prompt: str, scale: float, *, afresh: bool = False) -> LogProbs:
        """The log-probabilities of what follows a prompt: those of the likeliest tokens.

        Args:
            afresh: compute the whole prompt, so that answers differ by their scale and not by rounding.
        """
        found = self._answer(
            "/completion",
            {
                "prompt": prompt,
                "n_predict": 1,
                "n_probs": TOKENS,
                "temperature": 0.0,
                "lora": [{"id": self.adapter, "scale": scale}],
                "id_slot": 0,
                "cache_prompt": not afresh,
                "logit_bias": [["a", 1e4]],  # what is chosen; of an end or a part of a letter no probabilities are told
            },
        )
        rows = found.get("completion_probabilities") if isinstance(found, dict) else None
        if not isinstance(rows, list) or not rows or not isinstance(rows[0], dict):
            raise self._other_kind("/completion")
        return self._likeliest(rows[0].get("top_logprobs"))

    def _likeliest(self, rows: Sequence[Any] | None) -> LogProbs:
        found = {}
        for row in rows if isinstance(rows, list) else []:
            token, value = (row.get("id"), row.get("logprob")) if isinstance(row, dict) else (None, None)
            if isinstance(token, int) and isinstance(value, int | float) and math.isfinite(value):
                found[token] = float(value)
        if not found:
            raise self._other_kind("/completion")
        return found

    def _answer(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        headers = {"Content-Type": "application/json"}
        if self.api_key:
            headers["Authorization"] = f"Bearer {self.api_key}"
        content = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.root + path, content, headers)
        try:
            with _OPENER.open(request, timeout=self.timeout) as reply:
                return json.loads(reply.read(MOST_BYTES))
        except urllib.error.HTTPError as error:
            raise SteerError(
                f"{self.root}{path}: answered {error.code}, expected 200; check that this is a llama.cpp server that "
                f"has loaded its model{', and its API key' if error.code in (401, 403) else ''}"
            ) from None
        except (OSError, TimeoutError) as error:
            reason = shown(str(getattr(error, "reason", error)))
            raise SteerError(f"{self.root}: cannot be reached ({reason}); check that the server runs") from None
        except ValueError:
            raise self._other_kind(path) from None

    def _other_kind(self, path: str) -> SteerError:
        return SteerError(
            f"{self.root}{path}: did not answer as llama.cpp's server does; expected a llama-server's address"
        )


class _NoRedirection(urllib.request.HTTPRedirectHandler):
    """A redirection would carry the key to another server."""

    def redirect_request(self, *_: Any) -> None:
        return None


_OPENER = urllib.request.build_opener(_NoRedirection, urllib.request.ProxyHandler({}))
