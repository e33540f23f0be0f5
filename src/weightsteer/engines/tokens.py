"""A model's tokenizer, chat template and end tokens without its weights: all that a served model needs here."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from ..checkpoints.checkpoint import fingerprint
from ..checkpoints.empty_model import empty_model
from ..checkpoints.load_model import load_tokenizer
from ..checkpoints.locate import checkpoint_folder
from ..checkpoints.others_errors import read_by_others
from ..lm import LM


def tokens_of(name: str | Path, chat_template_kwargs: Mapping[str, Any] | None = None) -> LM:
    """An `LM` that renders and counts tokens, and cannot compute: its model lies on the meta device.

    Args:
        chat_template_kwargs: variables of the chat template.

    Raises:
        SteerError: no such model on this machine, it cannot be read, or its template has no such variable.
    """
    folder = checkpoint_folder(str(name))
    with read_by_others(str(name)):
        model = empty_model(Path(folder))
        if (Path(folder) / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(folder)
    tokenizer = load_tokenizer(str(name), str(folder))
    revision = fingerprint(Path(folder))
    return LM.wrap(model, tokenizer, name=str(name), revision=revision, chat_template_kwargs=chat_template_kwargs)
