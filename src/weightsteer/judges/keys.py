"""Keys of judges' servers: which environment variables a recipe may name, and how a key is kept out of all texts."""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import dataclass
from ipaddress import ip_address
from urllib.parse import quote, urlsplit

from ..errors import SteerError

NO_KEY = "none"  # local servers ask for no key, but the client insists on sending one
HIDDEN = "[key]"  # what stands for a key in texts
SHORTEST_HIDDEN = 6  # characters; a shorter key, such as "x", is no secret, and hiding it would garble texts
OWN_SERVERS = {  # environment variable -> the provider's own servers
    "OPENAI_API_KEY": "openai.com",
    "ANTHROPIC_API_KEY": "anthropic.com",
    "GEMINI_API_KEY": "googleapis.com",
    "OPENROUTER_API_KEY": "openrouter.ai",
    "TOGETHER_API_KEY": "together.xyz",
    "GROQ_API_KEY": "groq.com",
    "MISTRAL_API_KEY": "mistral.ai",
    "DEEPSEEK_API_KEY": "deepseek.com",
    "FIREWORKS_API_KEY": "fireworks.ai",
    "XAI_API_KEY": "x.ai",
    "DEEPINFRA_API_KEY": "deepinfra.com",
    "CEREBRAS_API_KEY": "cerebras.ai",
    "NVIDIA_API_KEY": "nvidia.com",
    "VLLM_API_KEY": "localhost",
    "LLAMA_API_KEY": "localhost",
    "WEIGHTSTEER_API_KEY": "localhost",
}


def require_own_key(variable: str, url: str, confirmed: Collection[str] = (), *, what: str = "judge") -> None:
    """Check that a recipe does not send a key where it does not belong.

    A provider's key goes to the provider's own servers over https, and to this machine; any other variable, or any
    other server, is the user's to confirm, since a recipe may be somebody else's.

    Raises:
        SteerError: the variable holds something, and is none of these.
    """
    if not os.environ.get(variable, "").strip() or variable in confirmed:
        return
    parts, own = urlsplit(url), OWN_SERVERS.get(variable)
    host = (parts.hostname or "").rstrip(".").lower()
    if own and (_is_this_machine(host) or (parts.scheme == "https" and (host == own or host.endswith(f".{own}")))):
        return
    raise SteerError(
        f"{what}: the recipe would send the key in the environment variable {variable} to {url}; if you want that, "
        f"say so with --key-env {variable}, or unset the variable if the server takes no key"
    )


def _is_this_machine(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


@dataclass(frozen=True, repr=False)
class Key:
    """A server's key. It goes into the request's header and nowhere else."""

    value: str

    @classmethod
    def read(cls, variable: str) -> Key:
        """The key in an environment variable, without white space around it; `NO_KEY` where there is none.

        Raises:
            SteerError: it holds what no header can.
        """
        value = os.environ.get(variable, "").strip()
        if not (value.isascii() and value.isprintable()):
            raise SteerError(
                f"the environment variable {variable}: expected a key of printable ASCII characters, and it holds "
                "others; set it again"
            )
        return cls(value or NO_KEY)

    def hide(self, text: str) -> str:
        """The text with another word for the key, wherever a server repeats it, also as JSON or in an address."""
        if self.value == NO_KEY or len(self.value) < SHORTEST_HIDDEN:
            return text
        for form in (self.value, quote(self.value, safe="")):
            text = text.replace(form, HIDDEN)
        return text

    def __repr__(self) -> str:
        return f"Key({HIDDEN})"
