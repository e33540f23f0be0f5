"""A weight vector as a LoRA file for llama.cpp (GGUF): its scale there is k.

The names are those of gguf's tensor map. llama.cpp turns pairs of neighbouring rows of q and k where transformers turns
two halves of a head, so that for some architectures its converter reorders these rows; B's rows are reordered alike.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor
from torch.nn.functional import pad

from ..checkpoints.embedded_model import public_base
from ..errors import SteerError
from ..files import new_file
from ..outputs import refuse_foreign_file
from ..run_card import RunCard
from ..schema import require_finite_k
from ..vectors.delta import Delta, require_finite
from ..vectors.low_rank import LowRank
from ..vectors.weight_vector import WeightVector

if TYPE_CHECKING:
    from gguf import TensorNameMap
    from transformers import PretrainedConfig

MARK = "weightsteer"  # begins the names of our own fields in the file
CONVERTER = "llama.cpp's convert_lora_to_gguf.py, on what `weightsteer export peft` writes"
EMBEDDING = "token_embd.weight"  # whose factors llama.cpp looks up by token, and takes the other way round


@dataclass(frozen=True)
class Dialect:
    """What llama.cpp calls a kind of model, and whether its converter reorders the rows of q and k."""

    name: str
    reorders: bool = False


# transformers' model type -> llama.cpp's. Only those that were compared with its converter, tensor by tensor.
DIALECTS = {
    "llama": Dialect("llama", reorders=True),
    "mistral": Dialect("llama", reorders=True),
    "mixtral": Dialect("llama", reorders=True),
    "smollm3": Dialect("smollm3", reorders=True),
    "granite": Dialect("granite", reorders=True),
    "qwen2": Dialect("qwen2"),
    "qwen3": Dialect("qwen3"),
    "qwen3_moe": Dialect("qwen3moe"),
    "gemma": Dialect("gemma"),
    "gemma2": Dialect("gemma2"),
    "gemma3": Dialect("gemma3"),
    "gemma3_text": Dialect("gemma3"),
    "olmo2": Dialect("olmo2"),
    "phi3": Dialect("phi3"),
}


@dataclass(frozen=True)
class LoraFile:
    """What was written: how much `max_rank` cut off, |cut - w| / |w|, and which parameters were left out."""

    path: Path
    rank: int
    error: float = 0.0
    left_out: tuple[str, ...] = ()


def export_gguf_lora(
    vector: WeightVector,
    path: str | Path,
    *,
    config: PretrainedConfig,
    k: float = 1.0,
    max_rank: int | None = None,
    leave_out: bool = False,
) -> LoraFile:
    """Write k w as a LoRA for llama.cpp (`--lora FILE`, and `lora: [{id, scale}]` in a request).

    Every scale is folded into B, and the file's alpha is its rank, to which smaller ones are padded with zeros. So a
    scale s in llama.cpp means s k w; with k = 1 its scale is the dial itself.

    Args:
        config: the base's, which says how llama.cpp names and orders its tensors.
        max_rank: cut what is above this rank, and dense matrices, to the nearest of this rank.
        leave_out: write the file without what llama.cpp's LoRA cannot hold, instead of refusing.

    Raises:
        SteerError: an architecture that is not known here, or a vector with parts that no such file can hold.
    """
    require_finite_k(k)
    path = Path(path)
    refuse_foreign_file(path, lambda content: content[:4] == b"GGUF" and MARK.encode() in content[:4096])
    cut = vector if max_rank is None else vector.truncate(rank=max_rank)
    names = _Names(_dialect_of(config), config)
    placed, why_not = _places(cut, names)
    if why_not and not leave_out:
        raise SteerError(_refusal(why_not))
    rank = max((delta.rank for _, delta in placed.values()), default=0)
    if not rank:
        raise SteerError("nothing of the vector can be written: " + (_refusal(why_not) if why_not else "it is zero"))
    with new_file(path) as part:
        _write(part, placed, cut, names, k, rank)
    error = 0.0 if max_rank is None else float(cut.card.measured["truncation_error"])
    return LoraFile(path, rank, error, tuple(why_not))


def _dialect_of(config: PretrainedConfig) -> Dialect:
    kind = str(config.model_type)
    if kind not in DIALECTS:
        raise SteerError(
            f"{kind}: how llama.cpp names and orders the weights of this architecture is not known here (known: "
            f"{', '.join(DIALECTS)}); use {CONVERTER}"
        )
    return DIALECTS[kind]


@dataclass(frozen=True)
class _Names:
    """The base's tensors as llama.cpp names and orders them."""

    dialect: Dialect
    config: PretrainedConfig

    @cached_property
    def inner(self) -> PretrainedConfig:
        """The config of the language model, where the model has other parts besides."""
        return self.config.get_text_config()

    @cached_property
    def map(self) -> TensorNameMap:
        """gguf's own table of names."""
        import gguf

        number = next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == self.dialect.name)
        return gguf.get_tensor_name_map(number, int(self.inner.num_hidden_layers))

    def of(self, parameter: str) -> str | None:
        """llama.cpp's name of a parameter; None where its language model has none."""
        return self.map.get_name(parameter.replace("language_model.", ""), try_suffixes=(".weight", ".bias"))

    @property
    def ties(self) -> bool:
        """Whether the base's input embedding and head are one matrix, which llama.cpp then keeps once."""
        return bool(self.config.tie_word_embeddings)

    def reordered(self, parameter: str, B: Tensor) -> Tensor:
        """B (d_out, r) with its rows in llama.cpp's order, head by head."""
        if not self.dialect.reorders or not parameter.endswith(("q_proj.weight", "k_proj.weight")):
            return B
        heads = int(self.inner.num_attention_heads)
        if parameter.endswith("k_proj.weight"):
            heads = int(getattr(self.inner, "num_key_value_heads", None) or heads)
        return B.reshape(heads, 2, B.shape[0] // heads // 2, B.shape[1]).transpose(1, 2).reshape(B.shape)


Places = dict[str, tuple[str, LowRank]]  # parameter -> llama.cpp's name, and the factors' shapes (meta tensors)


def _places(vector: WeightVector, names: _Names) -> tuple[Places, dict[str, str]]:
    """Where each part of the vector goes, and why the others cannot go anywhere."""
    placed: Places = {}
    why_not: dict[str, str] = {}
    for parameter in vector.deltas:
        delta, name = vector.deltas[parameter], names.of(parameter)
        if reason := _why_not(delta, name, names):
            why_not[parameter] = reason
        elif isinstance(delta, LowRank) and delta.rank:
            assert name is not None
            placed[parameter] = name, LowRank(delta.B.to("meta"), delta.A.to("meta"), delta.layout)
    return placed, why_not


def _why_not(delta: Delta, name: str | None, names: _Names) -> str:
    """Why a change cannot be part of the file; "" if it can."""
    if name is None:
        return "llama.cpp's language model has no such tensor"
    if not isinstance(delta, LowRank):
        return "is dense; a LoRA holds products of thin matrices alone"
    if delta.layout == "conv1d" or delta.layout == "shared":
        return f"is stored as {delta.layout}, which is not supported here"
    if names.ties and name in (EMBEDDING, "output.weight"):
        return "llama.cpp keeps one matrix for input embedding and head, and its LoRA cannot change one of them"
    return ""


def _refusal(why_not: dict[str, str]) -> str:
    """One sentence on the first part that cannot be written, how many there are, and the ways out."""
    first, reason = next(iter(why_not.items()))
    more = f" (and {len(why_not) - 1} more such parameters)" if why_not.keys() - {first} else ""
    return (
        f"{first}: {reason}{more}; a dense matrix inside a block can be cut to factors with --max-rank, all goes into "
        "`weightsteer export merged`, and --leave-out writes the rest"
    )


def _write(path: Path, placed: Places, vector: WeightVector, names: _Names, k: float, rank: int) -> None:
    """Write the file with one parameter in memory at a time."""
    from gguf import GGUFWriter

    writer = GGUFWriter(path, names.dialect.name)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", float(rank))
    for field, text in _origin(vector.card, k).items():
        writer.add_string(f"{MARK}.{field}", text)
    for parameter, (name, shape) in placed.items():
        for suffix, tensor in zip(("a", "b"), _pair(parameter, name, shape, names, k, rank), strict=True):
            size = 4 * tensor.numel()
            writer.add_tensor_info(f"{name}.lora_{suffix}", tuple(tensor.shape), np.dtype(np.float32), size)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in _tensors(placed, vector, names, k, rank):
            writer.write_tensor_data(tensor.numpy())
    finally:
        writer.close()


def _origin(card: RunCard, k: float) -> dict[str, str]:
    """What the file says of where it comes from, in fields that llama.cpp passes over."""
    return {"base": public_base(card.base_model), "base_revision": card.base_revision, "k": f"{k:g}"}


def _tensors(placed: Places, vector: WeightVector, names: _Names, k: float, rank: int) -> Iterator[Tensor]:
    for parameter, (name, _) in placed.items():
        delta = vector.deltas[parameter]
        assert isinstance(delta, LowRank)
        pair = _pair(parameter, name, delta, names, k, rank)
        require_finite(f"{parameter} at k = {k:g}", LowRank(pair[1], pair[1].new_zeros(pair[1].shape[1], 0)))
        yield from pair


def _pair(parameter: str, name: str, delta: LowRank, names: _Names, k: float, rank: int) -> tuple[Tensor, Tensor]:
    """llama.cpp's A and B of a parameter in float32: (rank, d_in) and (d_out, rank); of an embedding (vocabulary, rank)
    and (width, rank).
    """
    missing = rank - delta.rank
    B = pad(names.reordered(parameter, (delta.B.double() * k).float()), (0, missing))
    A = pad(delta.A.float(), (0, 0, 0, missing))
    pair = (B, A.T) if name == EMBEDDING else (A, B)
    return pair[0].contiguous(), pair[1].contiguous()
