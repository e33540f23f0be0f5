"""Which examples would push a model along a direction: one backward pass an example, at the base, before any training.

A step of gradient descent on an example moves the weights by -g; along a direction w by -<g, w> / |w|. With w = B A
the product needs no gradient of any weight: <g, w> = sum over tokens of (B^T dL/dy) (A x), where y is a layer's
output and x its input.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from ..batches import batches_by_length, pad_right
from ..behavior import Example
from ..errors import SteerError
from ..lm import LM
from ..model_parts import projecting_only
from ..progress import Progress, silent
from ..schema import shown
from ..training.sft import encode
from ..training.trainer import IGNORED
from ..vectors.delta import read_delta
from ..vectors.low_rank import FactorPanel, LowRank
from ..vectors.steerable import Places
from ..vectors.weight_vector import WeightVector


@dataclass(frozen=True)
class Screened:
    """What an example's gradient says: nats per token and unit of length that the loss falls along each vector."""

    names: tuple[str, ...]
    pushes: np.ndarray  # (examples, vectors)
    losses: np.ndarray  # (examples,) the base's, nats per token
    tokens: np.ndarray  # (examples,) that are trained on

    def ranked(self, name: str) -> list[int]:
        """Examples by how far they push towards a vector, the furthest first."""
        return np.argsort(-self.pushes[:, self.names.index(name)], kind="stable").tolist()


def screen(
    lm: LM,
    examples: Sequence[Example],
    vectors: Mapping[str, WeightVector],
    *,
    max_length: int = 1024,
    batch_size: int = 4,
    progress: Progress = silent,
) -> Screened:
    """The push of each example along each vector of the same base, at the base.

    The loss is that of `train_side`: the mean over an answer's tokens. Factored parts on linear layers count; what a
    vector changes besides is left out.

    Args:
        max_length: longer examples are cut there, as the training cuts them.

    Raises:
        SteerError: no vectors, one of another shape, or one that has no factored part on a linear layer.
    """
    if not vectors:
        raise SteerError("screen: expected at least one vector")
    rows = encode(lm, examples, max_length)
    lengths = torch.tensor([vector.norm() for vector in vectors.values()], dtype=torch.float64)
    if zero := [name for name, length in zip(vectors, lengths, strict=True) if not length]:
        raise SteerError(f"screen: the vector {shown(zero[0])} is zero, so it has no direction; leave it out")
    pushes, losses = np.zeros((len(rows), len(vectors))), np.zeros(len(rows))
    with _watched(lm, vectors) as sums:
        for batch in batches_by_length([len(row["input_ids"]) for row in rows], batch_size, progress):
            picked = [rows[i] for i in batch]
            means = _backward(lm, picked, sums)
            found = -sums.take(len(batch)).cpu() / lengths
            pushes[batch], losses[batch] = found.numpy(), means.double().cpu().numpy()
    tokens = np.array([sum(label != IGNORED for label in row["labels"]) for row in rows])
    return Screened(tuple(vectors), pushes, losses, tokens)


def _backward(lm: LM, rows: Sequence[Mapping[str, list[int]]], sums: _Sums) -> Tensor:
    """Mean loss of each row's answer, (batch,); the sum of all is taken back through the model."""
    ids, mask = pad_right([row["input_ids"] for row in rows], lm.pad_id, lm.device)
    labels, _ = pad_right([row["labels"] for row in rows], IGNORED, lm.device)
    sums.shape = (ids.shape[0], ids.shape[1])
    targets = labels[:, 1:]
    wanted = targets != IGNORED
    with torch.enable_grad(), projecting_only(lm.model, nn.functional.pad(wanted, (0, 1))):
        logits = lm.model(input_ids=ids, attention_mask=mask, use_cache=False).logits[0]
        each = nn.functional.cross_entropy(logits.float(), targets[wanted], reduction="none")
        owner = wanted.nonzero()[:, 0]
        means = torch.zeros(len(rows), device=each.device).index_add(0, owner, each) / wanted.sum(1)
        means.sum().backward()
    return means.detach()


class _Sums:
    """<dL_i/dW, v> of each row of a batch and each vector, added up over the layers."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.shape = (0, 0)  # rows and tokens of the batch that is under way
        self._total: Tensor | None = None

    def add(self, part: Tensor) -> None:
        """Products of one layer, (batch, vectors)."""
        self._total = part.double() if self._total is None else self._total + part.to(self._total)

    def take(self, rows: int) -> Tensor:
        """What was added since the last call."""
        found = torch.zeros(rows, self.count, dtype=torch.float64) if self._total is None else self._total
        self._total = None
        return found


@contextmanager
def _watched(lm: LM, vectors: Mapping[str, WeightVector]) -> Iterator[_Sums]:
    """Hooks on every linear layer that a vector changes; the model's parameters need no gradient meanwhile."""
    sums, places = _Sums(len(vectors)), Places(lm.model)
    trained = [parameter for parameter in lm.model.parameters() if parameter.requires_grad]
    with ExitStack() as stack:
        embedding = lm.model.get_input_embeddings()  # the gradient needs a place to begin
        stack.callback(embedding.register_forward_hook(lambda _m, _a, output: output.requires_grad_()).remove)
        watched = 0
        for name in dict.fromkeys(name for vector in vectors.values() for name in vector.deltas):
            parts = [_factored(vector, name) for vector in vectors.values()]
            for module in places.modules(name):
                if isinstance(module, nn.Linear) and name.endswith(".weight") and any(parts):
                    stack.callback(module.register_forward_hook(_hook(name, module, parts, sums)).remove)
                    watched += 1
        if not watched:
            raise SteerError("screen: no vector has a factored part on a linear layer of this model")
        for parameter in trained:
            parameter.requires_grad_(False)
        try:
            yield sums
        finally:
            for parameter in trained:
                parameter.requires_grad_(True)


def _factored(vector: WeightVector, name: str) -> LowRank | None:
    if name not in vector.deltas:
        return None
    delta = read_delta(name, vector.deltas[name])
    return delta if isinstance(delta, LowRank) and delta.layout == "linear" else None


Hook = Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]


def _hook(name: str, module: nn.Linear, parts: Sequence[LowRank | None], sums: _Sums) -> Hook:
    shape = (module.out_features, module.in_features)
    if wrong := next((part for part in parts if part is not None and tuple(part.shape) != shape), None):
        raise SteerError(f"{name}: a vector's shape is {tuple(wrong.shape)}, the model has {shape}")
    panel = FactorPanel.of(parts, shape, torch.float32).to(module.weight.device, torch.float32)

    def watch(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        if not output.requires_grad:
            return
        rows, length = sums.shape
        if args[0].shape[:-1].numel() != rows * length:
            raise SteerError(
                f"{name}: the layer sees a part of the tokens, apart from their rows; leave it out of the vector"
            )
        inner = args[0].detach().float() @ panel.A.T  # (batch, length, R); of OPT (batch * length, R)

        def add(gradient: Tensor) -> None:
            products = (gradient.float() @ panel.B) * inner
            sums.add(products.view(rows, length, -1).sum(dim=1) @ panel.owners)

        output.register_hook(add)

    return watch
