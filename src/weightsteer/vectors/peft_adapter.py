"""PEFT's LoRA adapter folders: what each tensor in one changes, and a vector's factors written as one."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path

import torch
from torch import Tensor

from ..checkpoints.architecture import Architecture
from ..checkpoints.checkpoint import ADAPTER_CONFIG, ADAPTER_FILE
from ..checkpoints.embedded_model import public_base
from ..checkpoints.parameters import Whole
from ..checkpoints.plain_names import PEFT_PREFIX, plain_name, without_wrappers
from ..checkpoints.safetensors_file import SafeFile, Stored, same_bytes
from ..errors import SteerError
from ..run_card import RunCard
from .adapter_config import AdapterConfig, read_adapter_config
from .delta import Delta, Part, require_finite
from .experts import ExpertPiece, expert_pieces, is_expert_module, require_parameters, stacked_delta
from .low_rank import Layout, LowRank
from .module_patterns import is_named

FACTOR_ENDINGS = {".lora_A.weight": ".lora_B.weight", ".lora_embedding_A": ".lora_embedding_B"}  # of A and of B
ADAPTER_NAME = re.compile(
    r"(\.lora_(?:A|B|embedding_A|embedding_B|magnitude_vector))\.(?!weight$|bias$).+?(\.weight|\.bias|)$"
)
VOCABULARY = re.compile(r"emb|wte|lm_head")  # in the names of parameters with a row for each token
ROLES = ("modules_to_save", "original_module", "base_layer")  # PEFT's names for copies of a module
MODULE_ROLE = re.compile(r"\.modules_to_save(\.\w+)?|\.original_module|\.base_layer")


@dataclass(frozen=True)
class Adapter:
    """What an adapter changes, by parameter name of the base.

    `deltas` are added to the base; `whole` replace its parameters (`modules_to_save`, trained biases); `dora` give
    the fine-tuned parameter from the base's. Those of `shared` are given for every place that the base ties together.
    """

    deltas: Mapping[str, Callable[[], Delta]]
    whole: Mapping[str, Whole]
    dora: Mapping[str, Callable[[Whole], Part]]
    shared: Mapping[str, str] = field(default_factory=dict)  # the head that is tied to it -> the parameter


def read_adapter(folder: Path, architecture: Architecture | None = None) -> Adapter:
    """Read an adapter folder's names and shapes; factors are read when they are asked for.

    With the base's architecture every parameter gets the name that it has in memory, and a module's class decides how
    its weight is stored; without it the adapter's own names and config do.

    Raises:
        SteerError: no LoRA, a damaged or empty file, or a tensor whose effect has no exact form here.
    """
    source = _Source(SafeFile(folder / ADAPTER_FILE), read_adapter_config(folder), architecture)
    require_parameters(folder, source.config, architecture)
    rest = plain_tensors(source.file)
    deltas: dict[str, Callable[[], Delta]] = {}
    dora: dict[str, Callable[[Whole], Part]] = {}
    experts: dict[str, list[ExpertPiece]] = {}
    for key in sorted(name for name in rest if name.endswith(tuple(FACTOR_ENDINGS))):
        lora = _take_lora(source, rest, key)
        pieces = source.expert_pieces(lora)
        if pieces:
            experts.setdefault(pieces[0].place.name, []).extend(pieces)
            continue
        name = source.parameter(lora.module, "weight")
        source.refuse_misfit(name, lora)
        if name in deltas or name in dora:
            raise SteerError(f"{source.file.path}: {name} has two LoRAs, the second of them {key}; expected one")
        if lora.magnitude is None:
            deltas[name] = lora.factors
        else:
            dora[name] = partial(DoraWeight, lora.factors, lora.magnitude)
        if lora.bias is not None:
            bias = source.parameter(lora.module, "bias")
            deltas[bias] = partial(_bias, bias, lora.bias, lora.scale)
    for name, found in experts.items():
        assert architecture is not None
        deltas[name] = partial(stacked_delta, name, architecture.shapes[name], tuple(found))
    whole = _whole(source, rest, deltas.keys() | dora.keys())
    shared = _trained_as_one(whole, architecture)
    return Adapter(deltas, {n: t for n, t in whole.items() if n not in shared}, dora, shared)


def plain_tensors(file: SafeFile) -> dict[str, Stored]:
    """The adapter's tensors under PEFT's own keys without its prefix: what wrappers and adapter names add is gone.

    Raises:
        SteerError: two tensors of one key.
    """
    found: dict[str, Stored] = {}
    for key, tensor in file.tensors.items():
        plain = ADAPTER_NAME.sub(r"\1\2", without_wrappers(key))
        if plain in found:
            raise SteerError(f"{file.path}: {plain} is stored twice, the second time as {key}; expected it once")
        found[plain] = tensor
    return found


def refuse_empty(path: Path) -> None:
    """Raise for an adapter that parallel training saved without its weights."""
    tensors = SafeFile(path).tensors
    empty = next((name for name, tensor in tensors.items() if 0 in tensor.shape), None)
    if empty or not tensors:
        raise SteerError(
            f"{path}: {f'{empty} has no entries (shape {tensors[empty].shape})' if empty else 'holds no tensors'}; "
            "DeepSpeed ZeRO-3 and FSDP save such empty adapters where the weights were not gathered: save it gathered "
            "(stage3_gather_16bit_weights_on_model_save), or take it from the training's own checkpoint"
        )


@dataclass(frozen=True)
class Lora:
    """One module's LoRA as it is stored."""

    module: str  # without PEFT's prefix, as the adapter calls it
    A: Stored  # (r, d_in)
    B: Stored  # (d_out, r)
    scale: float
    factors: Callable[[], LowRank]
    magnitude: Stored | None  # DoRA's
    bias: Stored | None


@dataclass(frozen=True)
class _Source:
    """An adapter's file and config, and the architecture of its base where that is known."""

    file: SafeFile
    config: AdapterConfig
    architecture: Architecture | None

    def parameter(self, module: str, leaf: str) -> str:
        """The base's name of a module's parameter.

        Raises:
            SteerError: the base has no such parameter.
        """
        name = plain_name(f"{module}.{leaf}")
        if self.architecture is None:
            return name
        own = self.architecture.alias_of(name)
        found = own or self.architecture.name_of(name)
        if found is None and leaf == "bias" and self.architecture.name_of(plain_name(f"{module}.weight")):
            return name  # a bias that the base lacks can be added
        if found is None:
            raise SteerError(
                f"{self.file.path}: changes {name}, which its base ({self.architecture.kind}) does not have; give the "
                "base that was trained (--base)"
            )
        return found

    def refuse_misfit(self, name: str, lora: Lora) -> None:
        """Raise if the factors are of another size than the base's parameter; a vocabulary may have grown."""
        expected = None if self.architecture is None else self.architecture.shapes.get(name)
        found = (lora.B.shape[0], lora.A.shape[1])
        if expected is None or expected in (found, found[::-1]):
            return
        if VOCABULARY.search(name) and {*expected} & {*found}:
            return
        raise SteerError(
            f"{self.file.path}: {name}: was trained on a base of shape {found}, this one has {expected}; give the base "
            "that was trained (--base)"
        )

    def layout(self, module: str, ending: str) -> Layout:
        """How the module's weight is stored: its class says so; PEFT's flag only where the base is not known."""
        if ending == ".lora_embedding_A":
            return "embedding"
        if self.architecture is None:
            return "conv1d" if self.config.fan_in_fan_out else "linear"
        return (
            "conv1d"
            if self.parameter(module, "weight").removesuffix(".weight") in self.architecture.transposed
            else "linear"
        )

    def refuse_unconfigured(self, module: str, rank: int, *, has_magnitude: bool, has_bias: bool) -> None:
        """Raise where PEFT would not load a module's tensors, or not in this way: its config says something else."""
        config = self.config
        spellings = [module]
        if self.architecture is not None:
            spellings.append(self.parameter(module, "weight").removesuffix(".weight"))
        reason = config.targets.refusal(spellings, sure=self.architecture is not None)
        if config.keeps_tied and VOCABULARY.search(module):
            reason = ""
        if reason and not is_named(module, [name.rpartition(".")[0] for name in config.target_parameters]):
            raise self._mismatch(module, f"a LoRA, but {reason}: PEFT would leave it out")
        if rank != config.rank_of(module):
            raise self._mismatch(module, f"rank {rank}, but r or rank_pattern gives it {config.rank_of(module)}")
        if has_magnitude != config.use_dora:
            raise self._mismatch(
                module, f"{'' if has_magnitude else 'no '}magnitude, but use_dora is {config.use_dora}"
            )
        if has_bias and not config.lora_bias:
            raise self._mismatch(module, "a bias in its LoRA, but lora_bias is false: PEFT would leave it out")

    def _mismatch(self, module: str, reason: str) -> SteerError:
        return SteerError(
            f"{self.file.path}: {module} has {reason}; give the {ADAPTER_CONFIG} that was saved with these tensors"
        )

    def expert_pieces(self, lora: Lora) -> list[ExpertPiece]:
        """The rows of fused experts that the LoRA changes; [] for an ordinary module."""
        if self.architecture is None:
            return []
        return expert_pieces(lora, self.architecture, self.config)


def _take_lora(source: _Source, rest: dict[str, Stored], key: str) -> Lora:
    """Take the tensors of one module's LoRA out of `rest`; `key` is that of its A.

    Raises:
        SteerError: half of it is missing, or it has no exact form here.
    """
    file = source.file
    ending = next(ending for ending in FACTOR_ENDINGS if key.endswith(ending))
    module = key.removesuffix(ending)
    A, B = rest.pop(key), rest.pop(module + FACTOR_ENDINGS[ending], None)
    if B is None:
        raise SteerError(f"{file.path}: {key} has no lora_B beside it; the adapter is damaged")
    if len(A.shape) != 2 or len(B.shape) != 2:
        raise SteerError(f"{file.path}: {module} is a convolution's LoRA, which is not supported; retrain without it")
    if A.shape[0] != B.shape[1]:
        raise SteerError(f"{file.path}: {module}: lora_A {A.shape} and lora_B {B.shape} do not share their rank")
    magnitude = rest.pop(f"{module}.lora_magnitude_vector", None) or rest.pop(
        f"{module}.lora_magnitude_vector.weight", None
    )
    bias = rest.pop(f"{module}.lora_B.bias", None)
    scale = source.config.scale(module, A.shape[0])
    is_expert = source.architecture is not None and is_expert_module(module, source.architecture)
    if not is_expert:
        source.refuse_unconfigured(module, A.shape[0], has_magnitude=magnitude is not None, has_bias=bias is not None)
    layout = "linear" if is_expert else source.layout(module, ending)
    if magnitude is not None and layout != "linear":
        raise SteerError(f"{file.path}: {module} is DoRA on a {layout}, which is not supported; retrain without DoRA")
    factors = partial(_factors, f"{module}.weight", A, B, scale, layout)
    return Lora(module, A, B, scale, factors, magnitude, bias)


def _factors(name: str, A: Stored, B: Stored, scale: float, layout: Layout) -> LowRank:
    if layout == "linear":
        delta = LowRank(_times(B.read().float(), scale), A.read().float(), layout)
    else:  # the parameter is stored transposed: (B A)^T = A^T B^T
        delta = LowRank(_times(A.read().float(), scale).T, B.read().float().T, layout)
    require_finite(name, delta)
    return delta


def _times(tensor: Tensor, scale: float) -> Tensor:
    return tensor if scale == 1.0 else tensor * scale


def _bias(name: str, bias: Stored, scale: float) -> Tensor:
    delta = bias.read().float() * scale
    require_finite(name, delta)
    return delta


def _whole(source: _Source, rest: Mapping[str, Stored], factored: set[str]) -> dict[str, Stored]:
    """Whole tensors by parameter name; anything else that is left over is an error.

    PEFT keeps a module that was trained whole up to three times: as itself, as `modules_to_save`, which is what it
    loads, and as `original_module`, the base's own.
    """
    found: dict[str, dict[str, Stored]] = {}
    for key, tensor in rest.items():
        module, _, leaf = key.rpartition(".")
        if "lora_" in key or leaf not in ("weight", "bias"):
            raise SteerError(
                f"{source.file.path}: {key} is not part of a plain LoRA, so it cannot be taken over; retrain without it"
            )
        role = next((role for role in ROLES if f".{role}" in f".{module}"), "")
        if role == "base_layer" and leaf == "bias":
            role = ""  # a trained bias: it stays in the layer that LoRA wraps
        name = source.parameter(MODULE_ROLE.sub("", module), leaf)
        if role in found.setdefault(name, {}):
            raise SteerError(f"{source.file.path}: {name} is stored twice; the adapter is damaged")
        found[name][role] = tensor
    whole = {}
    for name, copies in found.items():
        trained = copies.get("modules_to_save") or copies.get("")
        if trained is None or name in factored:
            continue  # the base's own weight, which PEFT stores beside a LoRA on an embedding
        if "" in copies and not same_bytes(trained, copies[""]):
            raise SteerError(f"{source.file.path}: {name} is stored twice, with different numbers; expected one")
        whole[name] = trained
    return whole


def _trained_as_one(whole: Mapping[str, Stored], architecture: Architecture | None) -> dict[str, str]:
    """Head -> embedding, where the base ties the two and the adapter keeps them equal (`ensure_weight_tying`)."""
    tied = architecture.tied if architecture else {}
    return {
        head: keeper
        for head, keeper in tied.items()
        if head in whole and keeper in whole and same_bytes(whole[head], whole[keeper])
    }


@dataclass(frozen=True, eq=False)
class DoraWeight:
    """DoRA's fine-tuned weight, row by row: m (W + s B A) / |W + s B A| (Liu et al., arXiv 2402.09353)."""

    factors: Callable[[], LowRank]
    magnitude: Stored  # (d_out,)
    base: Whole  # (d_out, d_in)

    @cached_property
    def low(self) -> LowRank:
        """The LoRA inside, read once."""
        return self.factors()

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows in float32: (stop - start, d_in)."""
        low = self.low
        if low.shape != self.base.shape:
            raise SteerError(
                f"{self.base.name}: the DoRA adapter was trained on a base of shape {low.shape}, this one has "
                f"{self.base.shape}; give the base that was trained"
            )
        direction = self.base.rows(start, stop).float() + low.B[start:stop] @ low.A
        magnitude = self.magnitude.rows(start, stop).float()  # (rows, 1)
        return direction * (magnitude / torch.linalg.vector_norm(direction, dim=1, keepdim=True))


def adapter_config(layouts: Mapping[str, Layout], rank: int, card: RunCard) -> dict[str, object]:
    """The few fields that PEFT, vLLM and llama.cpp's converter read; lora_alpha = r, so that scale 1 is k = 1."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": public_base(card.base_model),
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "target_modules": sorted(name.removesuffix(".weight") for name in layouts),
        "fan_in_fan_out": "conv1d" in layouts.values(),
        "use_rslora": False,
        "bias": "none",
        "inference_mode": True,
    }


def adapter_tensors(name: str, delta: LowRank, rank: int) -> dict[str, Tensor]:
    """A delta's two matrices under PEFT's names, padded with zeros to `rank`: engines differ in how they scale."""
    module = PEFT_PREFIX + name.removesuffix(".weight")
    missing = rank - delta.rank
    B = torch.nn.functional.pad(delta.B, (0, missing))
    A = torch.nn.functional.pad(delta.A, (0, 0, 0, missing))
    if delta.layout == "embedding":
        return {f"{module}.lora_embedding_A": B.T, f"{module}.lora_embedding_B": A.T}
    if delta.layout == "conv1d":
        return {f"{module}.lora_A.weight": B.T, f"{module}.lora_B.weight": A.T}
    return {f"{module}.lora_A.weight": A, f"{module}.lora_B.weight": B}
