"""Who reads a prompt and answers with text: the protocol of judges, and any OpenAI-compatible server."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from .progress import Progress, silent


class Reader(Protocol):
    """Answers prompts with text: a local model, or a server."""

    @property
    def name(self) -> str:
        """What tells this reader from another, for the record."""
        ...

    def ask(self, prompts: Sequence[str], *, max_tokens: int = 16, progress: Progress = silent) -> list[str]:
        """One reply to each prompt, in their order."""
        ...
