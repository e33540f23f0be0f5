"""Whether the hook steers a quantised base rightly: measurements on one are believed only after this check."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from ..engines.check import TEXTS
from ..errors import SteerError
from ..lm import LM
from ..model_parts import is_packed
from ..vectors.delta import read_delta
from ..vectors.layer_kinds import is_linear, is_plain
from ..vectors.low_rank import LowRank
from ..vectors.steerable import Places
from ..vectors.weight_vector import WeightVector

SHARE = {torch.float32: 1e-3}  # of the change's largest entry that rounding may take
COARSE = 0.05  # the same in 16 bits, and with inputs that int8 rounds


@torch.no_grad()
def refuse_unsteered_pack(lm: LM, vector: WeightVector) -> None:
    """Check a quantised model before anything is measured on it; another one needs no check.

    At k = 0 the log-probabilities of a few texts must be those of the base bit for bit. At k = 1 the output of one
    layer of each kind and shape must have moved by the dense product of its input with the vector's matrix.

    Raises:
        SteerError: what differs, and by how much.
    """
    if not is_packed(lm.model):
        return
    texts = TEXTS[:3]
    plain = lm.score_texts(texts)
    layers = list(_one_of_each(lm, vector))
    generator = torch.Generator().manual_seed(0)
    inputs = [
        torch.randn(4, layer.in_features, generator=generator).to(lm.device, lm.model.dtype) for _, layer in layers
    ]
    before = [layer(x) for (_, layer), x in zip(layers, inputs, strict=True)]
    with vector.applied(lm, 0.0) as handle:
        if lm.score_texts(texts) != plain:
            raise SteerError(
                f"{lm.name}: at k = 0 the quantised model does not give what it gives unsteered; load it whole"
            )
        handle.k = 1.0
        after = [layer(x) for (_, layer), x in zip(layers, inputs, strict=True)]
    for (name, _), x, base, moved in zip(layers, inputs, before, after, strict=True):
        _require_dense(lm, vector, name, x, (moved - base).double())


def _one_of_each(lm: LM, vector: WeightVector) -> Iterator[tuple[str, nn.Linear]]:
    """The first packed layer of each class and shape that the vector changes, by its parameter's name."""
    places, known = Places(lm.model), set()
    for name in vector.deltas:
        for module in places.modules(name):
            packed = name.endswith(".weight") and is_linear(module) and not is_plain(module._parameters.get("weight"))
            if not packed or not isinstance(module, nn.Linear):
                continue
            kind = type(module), module.in_features, module.out_features
            if kind not in known:
                known.add(kind)
                yield name, module


def _require_dense(lm: LM, vector: WeightVector, name: str, x: torch.Tensor, change: torch.Tensor) -> None:
    delta = read_delta(name, vector.deltas[name])
    matrix = delta.dense() if isinstance(delta, LowRank) else delta
    expected = x.double() @ matrix.to(x.device).double().T
    far, size = float((change - expected).abs().max()), float(expected.abs().max())
    share = SHARE.get(lm.model.dtype, COARSE)
    if not far <= share * size + 1e-4:
        raise SteerError(
            f"{lm.name}: {name}: at k = 1 the quantised layer moves otherwise than the vector's matrix says ({far:.2g} "
            f"apart, of {size:.2g}); load the model whole, or update bitsandbytes"
        )
