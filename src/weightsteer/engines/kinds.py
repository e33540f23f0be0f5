"""The kinds of servers that can be asked (no torch)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

Kind = Literal["vllm", "llama.cpp", "weightsteer"]
KEYS: Mapping[str, str] = {  # the environment variable in which each kind of server looks for its own key
    "vllm": "VLLM_API_KEY",
    "llama.cpp": "LLAMA_API_KEY",
    "weightsteer": "WEIGHTSTEER_API_KEY",
}
