"""Log-probabilities of given text: continuations of a prompt, running text, and KL to another model.

What continuations share is computed once: first the prefix that all prompts have in common (system
prompt and template), then each prompt, then its continuations on the cached prompt. Where that would not
give what a plain forward pass gives, every continuation is scored by such a pass (see `shared_prefix`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .batches import batches_by_length, pad_right, rows_of_batch
from .chat_template import PromptLike, last_words, refuse_text, whole_text
from .continuations import (
    log_softmax,
    score_on_cache,
    score_plainly,
    shared_prefix,
    sums_of_rows,
    target_log_probs,
)
from .errors import SteerError
from .fitting import in_parts
from .model_parts import projecting_only
from .progress import Progress, silent

if TYPE_CHECKING:
    from .lm import LM


@dataclass(frozen=True)
class Score:
    """Log-probability of one continuation, in nats."""

    total: float  # sum over its tokens
    tokens: int

    @property
    def mean(self) -> float:
        """Log-probability per token."""
        return self.total / self.tokens


@dataclass(frozen=True)
class Candidates:
    """A prompt's token ids with those of its candidates."""

    prompt: int  # its place among the prompts
    places: list[int]  # those of the candidates among the prompt's
    head: list[int]
    tails: list[list[int]]

    @property
    def most_tokens(self) -> int:
        """The tokens of its rows together, one row for each candidate."""
        return sum(len(self.head) + len(tail) for tail in self.tails)


@torch.no_grad()
def score_choices(
    lm: LM,
    prompts: Sequence[PromptLike],
    choices: Sequence[Sequence[str]],
    *,
    batch_size: int = 8,
    progress: Progress = silent,
) -> list[list[Score]]:
    """Score each prompt's candidate answers as the assistant's reply, in nats.

    Args:
        prompts: user turns, or the turns of talks; the chat template is put around them.
        choices: the candidate answers of each prompt.

    Returns:
        One score a candidate; its total is NaN where the model's logits are.

    Raises:
        SteerError: a prompt without candidates, or a candidate with no tokens.
    """
    refuse_text(prompts)
    if len(prompts) != len(choices):
        raise SteerError(f"score_choices: {len(prompts)} prompts but {len(choices)} lists of choices")
    asked = [part for number, texts in enumerate(choices) for part in candidates_of(lm, number, prompts[number], texts)]
    scores = [[Score(0.0, 1)] * len(texts) for texts in choices]
    prefix = shared_prefix(lm, [part.head for part in asked]) if asked else None

    def totals_of(places: list[int]) -> list[list[float]]:
        parts = [asked[i] for i in places]
        heads, tails = [part.head for part in parts], [part.tails for part in parts]
        if prefix is None or not prefix.fits(heads, tails):
            return score_plainly(lm, heads, tails, [part.prompt for part in parts], len(prompts), batch_size)
        with rows_of_batch([part.prompt for part in parts], len(prompts)):
            return score_on_cache(lm, prefix, heads, tails)

    sizes = [part.most_tokens for part in asked]
    for batch in batches_by_length([len(part.head) for part in asked], batch_size, progress):
        totals = in_parts(lm.model, "score", batch, sizes, totals_of)
        for part, row in zip((asked[i] for i in batch), totals, strict=True):
            for place, total, ids in zip(part.places, row, part.tails, strict=True):
                scores[part.prompt][place] = Score(total, len(ids))
    return scores


def candidates_of(lm: LM, number: int, prompt: PromptLike, texts: Sequence[str]) -> list[Candidates]:
    """A prompt's candidates by the tokens before them: the same for all, unless one's beginning merges with them."""
    refuse_text(texts)
    found: dict[tuple[int, ...], Candidates] = {}
    for place, text in enumerate(texts):
        exchange = lm.exchange(prompt, text)
        lm.require_fitting(exchange.head + exchange.answer)
        if not exchange.answer:
            raise SteerError(f"score_choices: prompt {last_words(prompt)!r} has no candidate, or an empty one")
        part = found.setdefault(tuple(exchange.head), Candidates(number, [], exchange.head, []))
        part.places.append(place)
        part.tails.append(exchange.answer)
    if not found:
        raise SteerError(f"score_choices: prompt {last_words(prompt)!r} has no candidate, or an empty one")
    return list(found.values())


@torch.no_grad()
def score_texts(lm: LM, texts: Sequence[str], *, batch_size: int = 8) -> list[Score]:
    """Log-probability of running text without a chat template; its first token is context only.

    Raises:
        SteerError: a text of fewer than two tokens.
    """
    ids = text_ids(lm, texts)
    scores, lengths = [Score(0.0, 1)] * len(ids), [len(row) for row in ids]

    def totals_of(rows: list[int]) -> list[float]:
        tokens, mask = pad_right([ids[i] for i in rows], lm.pad_id, lm.device)
        wanted = mask[:, 1:].bool()
        with rows_of_batch(rows, len(ids)), projecting_only(lm.model, torch.nn.functional.pad(wanted, (0, 1))):
            logits = lm.model(input_ids=tokens, attention_mask=mask, use_cache=False).logits[0]
        totals: list[float] = sums_of_rows(target_log_probs(logits, tokens[:, 1:][wanted]), wanted).tolist()
        return totals

    for batch in batches_by_length(lengths, batch_size):
        for index, total in zip(batch, in_parts(lm.model, "score", batch, lengths, totals_of), strict=True):
            scores[index] = Score(total, lengths[index] - 1)
    return scores


def text_ids(lm: LM, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of running text, with the BOS of models that have one.

    Raises:
        SteerError: a text of fewer than two tokens, or longer than the model's context.
    """
    refuse_text(texts)
    ids = [lm.require_fitting(list(lm.tokenizer(whole_text(text))["input_ids"])) for text in texts]
    if any(len(row) < 2 for row in ids):
        raise SteerError("score_texts: a text has fewer than two tokens, so there is nothing to predict")
    return ids


@torch.no_grad()
def prompt_log_probs(lm: LM, prompts: Sequence[PromptLike]) -> list[Tensor]:
    """Next-token log-probabilities at every position of each prompt's chat form: (length, vocabulary).

    Kept whole for `mean_kl`: vocabulary x 4 bytes a token (0.2 MB for a vocabulary of 49k).
    """
    rows = []
    for number, prompt in enumerate(prompts):
        tokens = torch.tensor([lm.chat_ids(prompt)], device=lm.device)
        with rows_of_batch([number], len(prompts)):
            rows.append(log_softmax(lm.model(input_ids=tokens, use_cache=False).logits[0]))
    return rows


def mean_kl(reference: Sequence[Tensor], lm: LM, prompts: Sequence[PromptLike]) -> float:
    """Mean over tokens of KL(reference || lm) on `prompts`, in nats.

    `reference` is `prompt_log_probs` of the other model, or of the same one before it was steered.

    Raises:
        SteerError: the two do not see the same tokens (another tokenizer or another template).
    """
    sums, count = [], 0
    for log_p, log_q in zip(reference, prompt_log_probs(lm, prompts), strict=True):
        if log_p.shape != log_q.shape:
            raise SteerError(
                f"mean_kl: shapes differ, {tuple(log_p.shape)} and {tuple(log_q.shape)}; "
                "both models need the same tokenizer, template and prompts"
            )
        log_p = log_p.to(log_q.device)
        p = log_p.exp()
        sums.append(torch.where(p > 0, p * (log_p - log_q), p).sum())  # a token that cannot come adds nothing
        count += log_p.shape[0]
    total = float(torch.stack(sums).double().sum()) if sums else 0.0  # one wait for the device, not one a prompt
    if math.isnan(total):
        raise SteerError("mean_kl: the model gives no numbers (NaN); it is broken, or steered too far")
    return total / count


@torch.no_grad()
def text_log_probs(lm: LM, texts: Sequence[str], *, most: int | None = None) -> list[Tensor]:
    """Next-token log-probabilities along running text without a template: (tokens - 1, vocabulary) for each text.

    Args:
        most: only the first so many tokens of each.

    Raises:
        SteerError: a text of fewer than two tokens.
    """
    rows = []
    for row in text_ids(lm, texts):
        tokens = torch.tensor([row[:most]], device=lm.device)
        rows.append(log_softmax(lm.model(input_ids=tokens, use_cache=False).logits[0, :-1]))
    return rows


@torch.no_grad()
def text_kls(reference: Sequence[Tensor], lm: LM, texts: Sequence[str]) -> list[Tensor]:
    """KL(reference || lm) of each token of running text, in nats: (tokens - 1,) for each text; NaN of a broken model.

    `reference` is `text_log_probs` of the unsteered model, which says how much of each text is read.
    """
    found = []
    for number, (log_p, text) in enumerate(zip(reference, texts, strict=True)):
        with rows_of_batch([number], len(texts)):
            (log_q,) = text_log_probs(lm, [text], most=len(log_p) + 1)
        found.append(token_kls(log_p, log_q))
    return found


def token_kls(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) of each token from log-probabilities (tokens, vocabulary), in nats: (tokens,)."""
    p = log_p.exp()
    kl = torch.where(p > 0, p * (log_p - log_q), p).sum(dim=-1)
    return kl.clamp(min=0)  # of equal distributions rounding may leave less than nothing


def loss_and_log_probs(lm: LM, text: str) -> tuple[float, Tensor]:
    """Nats per token of one running text, and the log-probabilities (tokens - 1, vocabulary), from one pass."""
    (log_q,) = text_log_probs(lm, [text])
    (ids,) = text_ids(lm, [text])
    targets = torch.tensor(ids[1:], device=log_q.device)
    return -float(log_q.gather(1, targets[:, None]).double().mean()), log_q
