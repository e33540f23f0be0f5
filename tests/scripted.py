"""Stand-ins for a model and a judge whose replies are known."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from transformers.generation.streamers import BaseStreamer

from conftest import tiny_lm
from weightsteer.chat_template import PromptLike
from weightsteer.lm import LM
from weightsteer.progress import Progress, silent
from weightsteer.thinking import Reply


@dataclass(frozen=True)
class Scripted(LM):
    """A model whose replies are a function of the prompt."""

    reply: Callable[[str], str] = str

    def replies(
        self,
        prompts: Sequence[PromptLike],
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        seed: int = 0,
        batch_size: int = 8,
        progress: Progress = silent,
        streamer: BaseStreamer | None = None,
    ) -> list[Reply]:
        return [Reply(self.reply(prompt if isinstance(prompt, str) else prompt[-1]["content"])) for prompt in prompts]


def scripted(reply: Callable[[str], str]) -> Scripted:
    lm = tiny_lm()
    return Scripted(lm.model, lm.tokenizer, "scripted", reply=reply)


class MarkReader:
    """Gives the mark that the reply holds, as in `mark 100`; keeps the prompts that it has read."""

    def __init__(self, name: str = "marks") -> None:
        self.name = name
        self.read: list[str] = []

    def generate(self, prompts: Sequence[str], *, max_new_tokens: int = 16, progress: Progress = silent) -> list[str]:
        self.read += prompts
        return [match[1] if (match := re.search(r"mark (\w+)", prompt)) else "?" for prompt in prompts]
