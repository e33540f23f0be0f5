"""What a task asks of a language model, whether that is in memory or behind a server."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Protocol, Self

from .chat_template import PromptLike
from .progress import Progress, silent
from .scoring import Score
from .thinking import Reply, why_unanswered


class LanguageModel(Protocol):
    """Replies to prompts, and log-probabilities of given text.

    `LM` is one in memory, and `ServedModel` one behind a server. Tasks and judges see nothing else of either. A class
    that names this one as its base gets `generate`.
    """

    @property
    def name(self) -> str: ...
    @property
    def revision(self) -> str:
        """Which state of the model this is; see `LM`."""
        ...

    def with_system_prompt(self, text: str | None) -> Self:
        """The same model under another system prompt (None: the template's own default)."""
        ...

    def chat_ids(self, prompt: PromptLike) -> list[int]:
        """Token ids of a user turn (or of a talk's turns), up to where the assistant's answer starts."""
        ...

    def generate(
        self,
        prompts: Sequence[PromptLike],
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        seed: int = 0,
        batch_size: int = 8,
        progress: Progress = silent,
    ) -> list[str]:
        """The answers to each prompt, without what the model thinks before them.

        Where a reply has none it is "", and a warning says so.
        """
        found = self.replies(
            prompts,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            batch_size=batch_size,
            progress=progress,
        )
        if missing := why_unanswered(found):
            warnings.warn(f"{self.name}: {missing}", stacklevel=2)
        return [reply.answer or "" for reply in found]

    def replies(
        self,
        prompts: Sequence[PromptLike],
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        seed: int = 0,
        batch_size: int = 8,
        progress: Progress = silent,
    ) -> list[Reply]:
        """Reply to each prompt: by the likeliest token at temperature 0, else plainly sampled from `seed`."""
        ...

    def score_choices(
        self,
        prompts: Sequence[PromptLike],
        choices: Sequence[Sequence[str]],
        *,
        batch_size: int = 8,
        progress: Progress = silent,
    ) -> list[list[Score]]:
        """Log-probability of each prompt's candidate answers as the assistant's reply, in nats."""
        ...

    def score_texts(self, texts: Sequence[str], *, batch_size: int = 8) -> list[Score]:
        """Log-probability of running text without a chat template; its first token is context only."""
        ...
