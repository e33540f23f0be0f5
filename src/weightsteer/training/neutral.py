"""Neutral prompts with the base's own replies: where a training, or a dial, is to leave the model as it was.

The prompts are about nothing in particular, and no task asks them.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from pathlib import Path

import torch
from torch import Tensor

from ..files import read_jsonl
from ..lm import LM
from .job import Encoded
from .trainer import IGNORED

PROMPTS = 40  # that are used, of those in the file
REPLY_TOKENS = 40  # of the base's reply to each prompt
TOGETHER = 20  # replies that are written in one batch


def neutral_prompts() -> list[str]:
    """The shipped prompts that are used."""
    path = Path(str(resources.files("weightsteer") / "data" / "training" / "neutral.jsonl"))
    return [row["prompt"] for row in read_jsonl(path, required=("prompt",))][:PROMPTS]


def neutral_rows(lm: LM) -> list[Encoded]:
    """The shipped prompts, each with the model's own greedy reply; labels are `IGNORED` outside the reply."""
    prompts = neutral_prompts()
    replies = lm.generate(prompts, max_new_tokens=REPLY_TOKENS, batch_size=TOGETHER)
    rows = []
    for prompt, reply in zip(prompts, replies, strict=True):
        exchange = lm.exchange(prompt, reply or ".")
        ids = [*exchange.head, *exchange.answer]
        labels = [IGNORED] * len(exchange.head) + exchange.answer
        rows.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels})
    return rows


def draw(rows: Sequence[Encoded], count: int, key: int) -> list[Encoded]:
    """So many of the rows, the same ones for the same key: a step that is made again after a kill sees them again."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(key % 2**63))
    return [rows[i] for i in order[:count].tolist()]


def token_kls(base: Tensor, moved: Tensor) -> Tensor:
    """KL(base || moved) of each token, in nats, from logits (tokens, vocabulary): (tokens,)."""
    log_p, log_q = (torch.log_softmax(logits.float(), dim=-1) for logits in (base, moved))
    p = log_p.exp()
    return torch.where(p > 0, p * (log_p - log_q), p).sum(dim=-1)  # a token that cannot come adds nothing
