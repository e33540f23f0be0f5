"""How far steering moves each token of a reply: KL(base || steered) in nats, as `scoring.mean_kl` has it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..continuations import log_softmax
from ..errors import SteerError
from ..lm import LM, projecting_only
from .asked import Strengths
from .steering_rows import SteeringRows

LOGITS_BYTES = 1 << 27  # of one model's log-probabilities at a time; a longer reply is computed part by part


@torch.no_grad()
def token_kl(lm: LM, steering: SteeringRows, head: Sequence[int], reply: Sequence[int], k: Strengths) -> list[float]:
    """KL(base || steered at k) where each token of the reply is chosen, after the prompt `head`.

    Raises:
        SteerError: the model gives no numbers at these strengths.
    """
    tokens = torch.tensor([[*head, *reply]], device=lm.device)
    found: list[float] = []
    for wanted in _parts(lm, len(head), len(reply)):
        base, steered = _both(lm, steering, tokens, wanted.to(tokens.device), k)
        p = base.exp()
        kl = torch.where(p > 0, p * (base - steered), p).sum(dim=-1)  # a token that cannot come adds nothing
        found += kl.clamp(min=0).tolist()  # of equal distributions rounding may leave less than nothing
        if bool(kl.isnan().any()):
            raise SteerError("the model gives no numbers (NaN) at these strengths; choose ones nearer to 0")
    return found


def _parts(lm: LM, head: int, reply: int) -> Iterator[Tensor]:
    """Masks (1, length) of the places that predict the reply's tokens, so many at a time as fit."""
    vocabulary = lm.model.config.get_text_config().vocab_size
    most = max(1, LOGITS_BYTES // (4 * vocabulary))
    places = torch.arange(head + reply)[None]
    for start in range(head - 1, head + reply - 1, most):
        yield (places >= start) & (places < min(start + most, head + reply - 1))


def _both(lm: LM, steering: SteeringRows, tokens: Tensor, wanted: Tensor, k: Strengths) -> tuple[Tensor, Tensor]:
    """Log-probabilities (places, vocabulary) of the base and of the steered model, in one pass where that can be."""
    together: list[list[Strengths]] = [[{}, k]] if steering.mixed else [[{}], [k]]
    found: list[Tensor] = []
    for strengths in together:
        steering.set(strengths)
        count = len(strengths)
        with projecting_only(lm.model, wanted.expand(count, -1)):
            logits = lm.model(input_ids=tokens.expand(count, -1), use_cache=False).logits[0]
        found += log_softmax(logits).split(logits.shape[0] // count)
    return found[0], found[1]
