"""A model and its tokenizer by transformers, whose errors become one line: the one place where it reads a folder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..errors import SteerError, first_line
from ..files import read_json
from ..progress import quiet_transformers
from .bounded import bounded_modules, count_stored
from .checkpoint import read_config

MOST_TOKENS = 1 << 31  # of a vocabulary
PANIC = "PanicException"  # of libraries in Rust; it is no Exception


@contextmanager
def read_by_others(name: str, what: str = "") -> Iterator[None]:
    """Turn whatever another library raises in the block into a `SteerError`.

    A damaged file makes transformers and tokenizers raise errors of any type, from wherever it is first used.

    Args:
        name: the model, for the message.
        what: what of it is read, such as "its tokenizer".
    """
    try:
        yield
    except SteerError as error:
        raise error if str(error).startswith(name) else SteerError(f"{name}: {error}") from None
    except Exception as error:
        raise SteerError(f"{name}: {what}cannot be loaded ({_reason(error)})") from None
    except BaseException as error:
        if type(error).__name__ != PANIC:
            raise
        raise SteerError(f"{name}: {what}cannot be loaded ({first_line(error)})") from None


def _reason(error: Exception) -> str:
    """An error in words; a bare name, as a KeyError has it, with its type."""
    text = first_line(error)
    if "Unrecognized configuration class" in text:
        return (
            "transformers does not load it as a language model; vectors of it are made, combined, merged and exported "
            "as of others, and in Python `vector.applied(model, k)` steers the model that you have loaded"
        )
    return text if len(text.split()) > 1 else f"{type(error).__name__}: {text}"


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


def load_causal_lm(
    name: str, where: str, *, dtype: torch.dtype | str, placement: str, options: Mapping[str, Any]
) -> PreTrainedModel:
    """A model's weights, on the device `placement`, or spread by accelerate for "auto".

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
            device_map="auto" if placement == "auto" else None,
            use_safetensors=True,  # never a pickle
            output_loading_info=True,
            **options,
        )
        model, report = made
        if missing := sorted(report["missing_keys"]):
            more = f" and {len(missing) - 1} more" if missing[1:] else ""
            raise SteerError(
                f"{name}: its config asks for {missing[0]}{more}, which its files do not hold; they would be random"
            )
        if placement != "auto":
            model = model.to(placement)
    _check_layers(name, model)
    _check_ends(name, model)
    return model


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
