"""A model's tokenizer, chat template and end tokens without its weights: all that a served model needs here."""

from __future__ import annotations

from pathlib import Path

from transformers import GenerationConfig

from ..checkpoints.checkpoint import fingerprint
from ..checkpoints.empty_model import empty_model
from ..checkpoints.load_model import load_tokenizer, read_by_others
from ..checkpoints.locate import checkpoint_folder
from ..lm import LM


def tokens_of(name: str | Path) -> LM:
    """An `LM` that renders and counts tokens, and cannot compute: its model lies on the meta device.

    Raises:
        SteerError: no such model on this machine, or it cannot be read.
    """
    folder = checkpoint_folder(str(name))
    with read_by_others(str(name)):
        model = empty_model(Path(folder))
        if (Path(folder) / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(folder)
    tokenizer = load_tokenizer(str(name), str(folder))
    return LM.wrap(model, tokenizer, name=str(name), revision=fingerprint(Path(folder)))
