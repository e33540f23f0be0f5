"""How a model is put into memory: quantised or not, by which attention, over which devices, and how it writes."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from ..errors import SteerError
from ..schema import parse_json, shown

Quantize = Literal["nf4", "int8"]
Attention = Literal["sdpa", "flash_attention_2", "eager"]
Batching = Literal["padded", "continuous"]

QUANTIZED = get_args(Quantize)
ATTENTIONS = get_args(Attention)
BATCHINGS = get_args(Batching)
NAMES = ("quantize", "attention", "device_map", "batching")  # of options that a card keeps as they are
SPREADS = ("auto", "balanced", "balanced_low_0", "sequential")  # accelerate's ways to spread a model
SIZE = re.compile(r"\d+(\.\d+)?\s*([KMGT]i?B)", re.IGNORECASE)


@dataclass(frozen=True)
class LoadOptions:
    """How to load a model, beside its device and dtype. Without any, the weights are loaded whole, as they are stored.

    Args:
        quantize: "nf4" packs the weights of the linear layers into 4 bits, "int8" into 8, by bitsandbytes, as they
            are loaded. LoRA trains over them (QLoRA), and vectors steer them by the hook.
        attention: transformers' attention; None takes its own choice, which is sdpa for most models.
        max_memory: device -> the most that the weights may take there, such as {0: "20GiB", "cpu": "60GiB"}.
        device_map: "auto", "balanced", "balanced_low_0" or "sequential", by which accelerate spreads the model, or
            module name -> device.
        batching: "continuous" writes replies by transformers' continuous batching where the model and the strengths
            allow it; "padded", or None, in padded batches.

    Raises:
        SteerError: a value of another kind; the message names the field.
    """

    quantize: Quantize | None = None
    attention: Attention | None = None
    max_memory: Mapping[Any, str | int] | None = None
    device_map: str | Mapping[str, int | str] | None = None
    batching: Batching | None = None

    def __post_init__(self) -> None:
        _one_of("quantize", self.quantize, QUANTIZED)
        _one_of("attention", self.attention, ATTENTIONS)
        _one_of("batching", self.batching, BATCHINGS)
        if self.max_memory is not None:
            object.__setattr__(self, "max_memory", _checked_memory(self.max_memory))
        if isinstance(self.device_map, str):
            _one_of("device_map", self.device_map, SPREADS)
        elif self.device_map is not None and not isinstance(self.device_map, Mapping):
            raise SteerError(f"device_map: expected {', '.join(SPREADS)} or modules, found {shown(self.device_map)}")

    @property
    def described(self) -> dict[str, Any]:
        """The options that are set, as a card keeps them; none, if all is as transformers does it."""
        found: dict[str, Any] = {name: getattr(self, name) for name in NAMES}
        found["max_memory"] = self.max_memory and {str(device): size for device, size in self.max_memory.items()}
        return {name: value for name, value in found.items() if value is not None}

    @property
    def identity(self) -> dict[str, Any]:
        """What of them changes a result: where the weights lie does not, and how attention is summed only rounds."""
        return {"quantize": self.quantize} if self.quantize else {}

    @classmethod
    def of_texts(
        cls,
        quantize: str | None,
        attention: str | None,
        max_memory: str | None,
        device_map: str | None,
        batching: str | None,
    ) -> LoadOptions:
        """The options as they are typed: `--max-memory 0=20GiB,cpu=60GiB`, `--device-map auto` or a JSON object."""
        given: Any = device_map
        if device_map and device_map.lstrip().startswith("{"):
            given = parse_json(device_map, "--device-map")
        return cls(quantize, attention, max_memory and _memory_of(max_memory), given, batching)  # type: ignore[arg-type]


def refuse_missing_packages(options: LoadOptions) -> None:
    """Raise, before a weight is read, if what the options ask for is not installed.

    Raises:
        SteerError: the package, and how to install it.
    """
    if options.quantize and importlib.util.find_spec("bitsandbytes") is None:
        raise SteerError(
            f"quantize {options.quantize}: needs bitsandbytes, which is not installed; pip install "
            "'weightsteer[quantized]', or load the model without quantize"
        )
    if options.attention == "flash_attention_2" and not _has_flash_attention():
        raise SteerError(
            "attention flash_attention_2: needs the package flash-attn and a GPU, which are not here; pip install "
            "flash-attn, or use attention sdpa"
        )


def _has_flash_attention() -> bool:
    """Whether transformers can use the installed flash-attn; without it, it would fetch code from the hub."""
    from transformers.utils.import_utils import is_flash_attn_2_available

    return bool(is_flash_attn_2_available())


def _one_of(name: str, value: object, known: tuple[str, ...]) -> None:
    if value is not None and value not in known:
        raise SteerError(f"{name}: expected one of {', '.join(known)}, found {shown(value)}")


def _checked_memory(given: object) -> dict[int | str, str | int]:
    """Device -> size; GPUs go by their number, which YAML or a command line may have as text."""
    if not isinstance(given, Mapping) or not given:
        raise SteerError(f"max_memory: expected devices and sizes, such as 0: 20GiB, found {shown(given)}")
    found: dict[int | str, str | int] = {}
    for device, size in given.items():
        number = int(device) if str(device).isdecimal() else device
        if not (isinstance(number, int) and not isinstance(number, bool)) and number not in ("cpu", "mps"):
            raise SteerError(f"max_memory: expected the number of a GPU, cpu or mps, found {shown(device)}")
        whole = isinstance(size, int) and not isinstance(size, bool) and size > 0
        if not whole and not (isinstance(size, str) and SIZE.fullmatch(size.strip())):
            raise SteerError(f"max_memory: {number}: expected a size such as 20GiB, found {shown(size)}")
        found[number] = size
    return found


def _memory_of(text: str) -> dict[int | str, str | int]:
    """`0=20GiB,cpu=60GiB` as a mapping."""
    parts = [part.partition("=") for part in text.split(",")]
    if not all(device and size for device, _, size in parts):
        raise SteerError(f"--max-memory: expected DEVICE=SIZE, such as 0=20GiB,cpu=60GiB, found {shown(text)}")
    return {device.strip(): size.strip() for device, _, size in parts}
