"""What a failed request to a chat server means: it may pass, the server takes other parameters, or a user must act."""

from __future__ import annotations

import random
import re
import ssl
from collections.abc import Iterator
from urllib.parse import urlsplit

from ..errors import SteerError
from .keys import Key

REASON_LENGTH = 200  # characters of a server's own error message that ours repeats
RETRIED = (408, 409, 429)  # and 5xx: the statuses after which a request is tried again
QUOTA = "insufficient_quota"  # the code of a 429 that no waiting mends
ENDING = "check the model's name and the address, which ends in /v1 for most servers"
ADVICE = {  # HTTP status -> what to do; of other refusals the server's own message says enough
    401: "put a valid key into the environment variable {key_env}",
    403: "the key in the environment variable {key_env} may not use this model",
    404: ENDING,
}
TOKENS, NEWER_TOKENS, TEMPERATURE = "max_tokens", "max_completion_tokens", "temperature"
REFUSES = re.compile(
    r"unsupported|not support|not allow|not permit|unrecogni|unknown|unexpected|deprecat|only the default"
)


class PassingError(Exception):
    """A failure that may be gone at the next attempt.

    `pause`: the seconds that the server asks to wait until then; `advice`: what to do if it never passes.
    """

    def __init__(self, reason: str, pause: float | None = None, advice: str = "") -> None:
        super().__init__(reason)
        self.pause, self.advice = pause, advice


class OtherParametersError(Exception):
    """The server refuses a parameter of the request, by its name, that can be left out or replaced.

    `reason`: what it says of that.
    """

    def __init__(self, parameter: str, reason: str = "") -> None:
        super().__init__(reason or parameter)
        self.parameter = parameter


def meaning_of(error: Exception, url: str, model: str, key_env: str, key: Key) -> Exception:
    """What a client's error means: a `SteerError` to be told, a `PassingError`, or an `OtherParametersError`.

    Whatever the server says, the key is not repeated.
    """
    status = getattr(error, "status_code", None)
    where, said = f"{url}, model {model}", shorten(error, key)
    if status is None:
        return _connection_failure(error, url, where, key)
    if 300 <= status < 400:
        return SteerError(f"{where}: sends its visitors to another address, which is not followed; give that address")
    if status in (400, 422) and (parameter := _refused_parameter(str(error).lower())):
        return OtherParametersError(parameter, said)
    if status == 429 and QUOTA in f"{getattr(error, 'code', '')} {error}":
        return SteerError(f"{where}: {said}; the quota of the key in {key_env} is used up")
    if status >= 500 or status in RETRIED:
        advice = "it limits how often it may be asked: lower the judge's concurrency, or wait" if status == 429 else ""
        return PassingError(said, pause_asked_for(error), advice)
    advice = ADVICE[status].format(key_env=key_env) if status in ADVICE else ""
    if status in (404, 405) and not urlsplit(url).path.rstrip("/").endswith("/v1"):
        advice = f"the address may lack its end: try {url.rstrip('/')}/v1"
    if status == 400 and "https" in str(error).lower() and url.startswith("http:"):
        advice = "the server speaks https: write https:// in its address"
    return SteerError(f"{where}: {said}{'; ' if advice else ''}{advice}")


def _refused_parameter(message: str) -> str | None:
    """The parameter of ours that a server names as one that it does not take."""
    if NEWER_TOKENS in message:
        return TOKENS
    named = [name for name in (TOKENS, TEMPERATURE) if name in message]
    return named[0] if named and REFUSES.search(message) else None


def _connection_failure(error: Exception, url: str, where: str, key: Key) -> Exception:
    """What it means that no reply came at all."""
    causes = list(_causes(error))
    reason = next((text for cause in causes[1:] if (text := shorten(cause, key))), "")
    if any(isinstance(cause, ssl.SSLCertVerificationError) for cause in causes):
        return SteerError(
            f"{where}: its certificate is not trusted ({reason}); set the environment variable SSL_CERT_FILE to the "
            "file of the authority that signed it (or of the certificate itself)"
        )
    if any(isinstance(cause, ssl.SSLError) for cause in causes):
        return SteerError(
            f"{where}: does not speak https at this address ({reason}); if it is a plain server, write http://"
        )
    reset = any(isinstance(cause, ConnectionResetError) or "disconnected" in str(cause) for cause in causes)
    advice = "if the server speaks https, write https://" if reset and url.startswith("http:") else ""
    return PassingError(f"{shorten(error, key)}{f' ({reason})' if reason else ''}", advice=advice)


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An error and what caused it, down to the first cause."""
    found: BaseException | None = error
    while found is not None:
        yield found
        found = found.__cause__ or found.__context__


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


def shorten(error: object, key: Key) -> str:
    """An error's message on one line, without a full stop and without the key."""
    return key.hide(" ".join(str(error).split()))[:REASON_LENGTH].rstrip(".")
