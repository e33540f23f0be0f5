"""A model and its tokenizer by transformers, whose errors become one line: the one place where it reads a folder."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..errors import SteerError
from ..files import read_json
from ..progress import quiet_transformers
from .bounded import bounded_modules, count_stored
from .checkpoint import read_config
from .device import warn_if_slow
from .load_options import LoadOptions
from .others_errors import read_by_others

MOST_TOKENS = 1 << 31  # of a vocabulary


def load_tokenizer(name: str, where: str, **options: Any) -> PreTrainedTokenizerBase:
    """A model's tokenizer.

    Raises:
        SteerError: it cannot be loaded, or its chat template is no text.
    """
    with read_by_others(name, "its tokenizer "), quiet_transformers():
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(where, **options)
        tokenizer("Hi", add_special_tokens=False)  # fields of a wrong type show only in use
    template = getattr(tokenizer, "chat_template", None)
    texts = list(template.values()) if isinstance(template, dict) else [template]
    if not all(text is None or isinstance(text, str) for text in texts):
        raise SteerError(f"{name}: expected a text as its tokenizer's chat_template, found {type(template).__name__}")
    return tokenizer


def dtype_named(name: str) -> torch.dtype | str:
    """The dtype of that name; "auto" stays.

    Raises:
        SteerError: no such dtype.
    """
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name != "auto" and name not in dtypes:
        raise SteerError(f"dtype: expected auto, {', '.join(dtypes)}, found {name!r}")
    return dtypes.get(name, "auto")


def load_causal_lm(
    name: str, where: str, *, dtype: torch.dtype | str, placement: str, load: LoadOptions, options: Mapping[str, Any]
) -> PreTrainedModel:
    """A model's weights, on the device `placement`, or spread by accelerate for "auto".

    Args:
        load: quantisation, attention, and how it is spread.
        options: for `from_pretrained`.

    Raises:
        SteerError: it cannot be loaded, its config does not belong to its weights, or a parameter is stored nowhere.
    """
    folder = Path(where)
    if folder.is_dir():
        read_config(folder)  # names the file and the mistake where it is no JSON
        _check_generation_config(folder / "generation_config.json")
    with (
        read_by_others(name),
        quiet_transformers(),
        bounded_modules(count_stored(folder) if folder.is_dir() else None),
    ):
        made: Any = AutoModelForCausalLM.from_pretrained(
            where,
            dtype=dtype,
            use_safetensors=True,  # never a pickle
            output_loading_info=True,
            **_how_to_load(load, placement),
            **options,
        )
        model, report = made
        if missing := sorted(report["missing_keys"]):
            more = f" and {len(missing) - 1} more" if missing[1:] else ""
            raise SteerError(
                f"{name}: its config asks for {missing[0]}{more}, which its files do not hold; they would be random"
            )
        if load.quantize:
            _check_packed(name, model, load.quantize)
        elif placement != "auto":
            model = model.to(placement)
    _check_layers(name, model)
    _check_ends(name, model)
    warn_if_slow(model.dtype, "float32 as the dtype avoids that, and takes twice the memory")
    return model


def _how_to_load(load: LoadOptions, placement: str) -> dict[str, Any]:
    """The options in `from_pretrained`'s names."""
    found: dict[str, Any] = {"device_map": (load.device_map or "auto") if placement == "auto" else None}
    if load.max_memory:
        found["max_memory"] = dict(load.max_memory)
    if load.attention:
        found["attn_implementation"] = load.attention
    if load.quantize:
        packed = {"nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}}
        found["quantization_config"] = BitsAndBytesConfig(**packed.get(load.quantize, {"load_in_8bit": True}))
        if placement != "auto":  # packed weights do not move afterwards
            found["device_map"] = {"": _device_for_accelerate(placement)}
    return found


def _device_for_accelerate(placement: str) -> int | str:
    """A device as accelerate's maps name it: a GPU by its number, which its check before a training expects."""
    device = torch.device(placement)
    return placement if device.type in ("cpu", "mps") else device.index or 0


def _check_packed(name: str, model: PreTrainedModel, wanted: str) -> None:
    """Raise if the weights were quantised already; else let products be computed in the dtype that the model has."""
    quantizer: Any = getattr(model, "hf_quantizer", None)
    if quantizer is None or quantizer.pre_quantized:
        raise SteerError(f"{name}: its weights are quantised already; load it without quantize {wanted}")
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)  # int8 would tell of every product
    module: Any
    for module in model.modules():
        if hasattr(module, "compute_dtype"):  # transformers' default is float32, whatever the model's dtype
            module.compute_dtype = model.dtype


def _check_generation_config(path: Path) -> None:
    """Raise for a damaged file of end tokens, which transformers passes over without a word."""
    if path.is_file() and not isinstance(read_json(path), dict):
        raise SteerError(f"{path}: expected a JSON object")


def _check_layers(name: str, model: PreTrainedModel) -> None:
    """Raise for a number of layers below 0: such a model is built, without layers, and fails in its first reply."""
    layers = getattr(model.config.get_text_config(), "num_hidden_layers", 0)
    if isinstance(layers, int) and layers < 0:
        raise SteerError(f"{name}: its config has num_hidden_layers {layers}; expected how many layers its files hold")


def _check_ends(name: str, model: PreTrainedModel) -> None:
    """Raise if what the model says of its end tokens is no token ids."""
    ends = getattr(model.generation_config, "eos_token_id", None)
    listed = ends if isinstance(ends, list) else [] if ends is None else [ends]
    if not all(isinstance(end, int) and not isinstance(end, bool) and 0 <= end < MOST_TOKENS for end in listed):
        raise SteerError(
            f"{name}: its eos_token_id: expected token ids, found {ends!r}; see its generation_config.json"
        )
