"""How far a method moves the model on ordinary text, token by token: KL(base || steered), in nats.

The loss on text may fall while the model moves, as it does where training teaches a style; the KL never does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from ...errors import SteerError
from ...files import digest, read_jsonl
from ...language_model import LanguageModel
from ...lm import LM
from ...progress import Progress, silent
from ...scoring import text_kls, text_log_probs
from ..metrics import Metric
from ..task_spec import TaskSpec
from .data import task_file
from .task import ItemTask, TaskKind, Values, alternate_splits

SHARE = 0.95  # of a text's tokens that are moved less than its `p95`
TOKENS = 64  # of each text, since a distribution over the vocabulary is held for each
METRICS = (
    Metric("p95", "Token KL to the base, 95th percentile", "nats", "lower"),
    Metric("mean", "Token KL to the base, mean", "nats", "lower", detail=True),
)


@dataclass(frozen=True)
class TokenKLTask(ItemTask):
    """KL of the unsteered to the steered model on the first `TOKENS` tokens of running text, without a template.

    Metrics, a value a text: `p95`, the 95th percentile over its tokens; `mean`, their mean. `against` gives the task
    the unsteered model's distributions.
    """

    items: tuple[str, ...]
    reference: tuple[Tensor, ...] = field(default=(), compare=False, repr=False)
    is_recorded: ClassVar[bool] = False

    @property
    def needs_weights(self) -> bool:
        """See `Task.needs_weights`: it compares distributions over all tokens."""
        return True

    @property
    def sha256(self) -> str:
        """See `Task.sha256`."""
        return digest([self.name, self.items, self.splits, self.ids, TOKENS, SHARE])

    def against(self, lm: LM) -> Self:
        """See `Task.against`."""
        return replace(self, reference=tuple(text_log_probs(lm, self.items, most=TOKENS)))

    def ask(self, lm: LanguageModel, *, batch_size: int = 8, progress: Progress = silent) -> Values:
        """See `Task.ask`.

        Raises:
            SteerError: the task was not given the unsteered model, or has no model in memory.
        """
        if not self.reference or not isinstance(lm, LM):
            raise SteerError(f"task {self.name}: compares a model in memory with itself unsteered; give it `against`")
        kls = text_kls(self.reference, lm, self.items)
        p95 = [float(torch.quantile(row, SHARE)) if bool(row.isfinite().all()) else float("nan") for row in kls]
        return {"p95": list(p95), "mean": [float(row.mean()) for row in kls]}

    def _selected(self, indices: Sequence[int]) -> Self:
        kept = tuple(self.reference[i] for i in indices) if self.reference else ()
        return replace(super()._selected(indices), reference=kept)


def load_token_kl(spec: TaskSpec) -> TokenKLTask:
    """Ordinary text: shipped passages, or JSONL with `text`. See `TokenKLTask` for the metrics."""
    rows: list[dict[str, Any]] = read_jsonl(task_file("prose.jsonl", spec.data), required=("text",))
    texts = tuple(row["text"] for row in rows)
    return TokenKLTask("token_kl", texts, alternate_splits(len(texts)))


TASKS = {"token_kl": TaskKind(load_token_kl, METRICS)}
