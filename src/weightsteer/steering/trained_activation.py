"""An activation vector that is trained at both signs at once: x_l + k v fits D+ at k = 1 and D- at k = -1.

This is the rival on the side of activations: representation fine-tuning (ReFT, Wu et al., arXiv 2404.03592) with one
vector at one layer, trained both ways as reference-free preference steering is (RePS, arXiv 2505.20809). It takes the
likelihood of the answers where RePS takes a preference loss, so that it sees what two-way training of weights sees.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, pad

from ..batches import pad_right
from ..behavior import ContrastPair, pair_rows
from ..errors import SteerError
from ..files import digest
from ..lm import LM
from ..model_parts import projecting_only
from ..progress import Progress, silent
from ..training.job import Encoded
from ..training.trainer import IGNORED
from ..training.two_way import encode_pairs
from ..training.weighted_trainer import SIDE
from .activations import ActivationVector

MAX_LENGTH = 1024  # tokens of a pair's conversation
STEP = 0.1  # Adam's learning rate, in root mean squares of the vector at the start


def train_activation(
    lm: LM,
    start: ActivationVector,
    pairs: Sequence[ContrastPair],
    *,
    epochs: int = 1,
    batch_size: int = 4,
    seed: int = 0,
    progress: Progress = silent,
) -> ActivationVector:
    """Train the vector of one layer from `start` on; its own weights are the only ones that move.

    Args:
        start: a vector of a single layer, such as the difference of mean activations there.
        progress: called with steps done, steps in all, and the loss in nats per token.

    Raises:
        SteerError: a vector of several layers, or a loss that is no number.
    """
    if len(start.layers) != 1:
        raise SteerError(f"activation training: expected a vector of one layer, found {len(start.layers)}")
    ((layer, before),) = start.layers.items()
    vector = before.detach().clone().float().to(lm.device).requires_grad_(True)
    begun, tokens = time.perf_counter(), 0
    rows, generator = encode_pairs(lm, pairs, MAX_LENGTH), torch.Generator().manual_seed(seed)
    order = [i for _ in range(epochs) for i in torch.randperm(len(rows), generator=generator).tolist()]
    steps = -(-len(order) // batch_size)
    optimizer = torch.optim.Adam([vector], lr=STEP * float(before.float().square().mean().sqrt()))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    required = {name: p.requires_grad for name, p in lm.model.named_parameters()}
    lm.model.requires_grad_(False)
    try:
        for step in range(steps):
            chosen = [rows[i] for i in order[step * batch_size : (step + 1) * batch_size]]
            loss, read = _loss(lm, replace(start, layers={layer: vector}), chosen)
            loss.backward()
            if vector.grad is None or not bool(torch.isfinite(vector.grad).all()):
                raise SteerError("activation training: the loss is no number; check the base in another dtype")
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            tokens += read
            progress(step + 1, steps, f"loss {float(loss.detach()):.3f}")
    finally:
        for name, parameter in lm.model.named_parameters():
            parameter.requires_grad_(required[name])
    costs = {"search_tokens": tokens, "search_seconds": time.perf_counter() - begun, "parameters": vector.numel()}
    made = {"method": "activation two-way", "layer": layer, "epochs": epochs, "batch_size": batch_size}
    data = {**start.card.data_sha256, "pairs": digest(pair_rows(pairs))}
    card = replace(start.card, settings=made, data_sha256=data, measured={**costs, "settings": 1}, seed=seed)
    return ActivationVector({layer: vector.detach().cpu()}, card)


def _loss(lm: LM, vector: ActivationVector, rows: Sequence[Encoded]) -> tuple[Tensor, int]:
    """Mean over the answers' tokens of -log p, of D+ at k = 1 and D- at k = -1; and how many tokens were read."""
    names = [("input_ids", "labels"), (f"{SIDE}input_ids", f"{SIDE}labels")]
    ids, mask = pad_right([row[name] for name, _ in names for row in rows], lm.pad_id, lm.device)
    targets, _ = pad_right([row[name] for _, name in names for row in rows], IGNORED, lm.device)
    wanted = targets[:, 1:] != IGNORED
    ks = torch.tensor([1.0] * len(rows) + [-1.0] * len(rows))
    with vector.applied(lm, ks), projecting_only(lm.model, pad(wanted, (0, 1))):
        logits = lm.model(input_ids=ids, attention_mask=mask, use_cache=False).logits[0]
    return cross_entropy(logits.float(), targets[:, 1:][wanted]), int(mask.sum())
