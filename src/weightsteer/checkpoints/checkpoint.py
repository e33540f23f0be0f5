"""Checkpoint folders: their shards as one set of tensors, and what tells one from another."""

from __future__ import annotations

import re
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from ..adapter_files import ADAPTER_CONFIG as ADAPTER_CONFIG
from ..adapter_files import ADAPTER_FILE as ADAPTER_FILE
from ..adapter_files import DENSE_FILE as DENSE_FILE
from ..errors import SteerError
from ..files import digest, read_json
from .safetensors_file import SafeFile, Stored, same_bytes

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """Every tensor of a checkpoint folder by name; nothing is read yet.

    What the shards hold counts, as for transformers: an index may name buffers that are stored no more.

    Raises:
        SteerError: no checkpoint, a missing or damaged shard, or a tensor in two of them.
    """
    tensors: dict[str, Stored] = {}
    for shard in shards_of(folder):
        for name, tensor in SafeFile(shard).tensors.items():
            if name in tensors:
                raise SteerError(
                    f"{shard}: {name} lies in {tensors[name].file.path.name} too; the checkpoint is damaged"
                )
            tensors[name] = tensor
    return tensors


def shards_of(folder: Path) -> list[Path]:
    """The checkpoint's weight files, in order; a single file goes before an index beside it, as for transformers.

    Raises:
        SteerError: the folder holds no safetensors checkpoint, or a shard of its index is missing.
    """
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if not (folder / INDEX).is_file():
        raise SteerError(f"{folder}: no {SINGLE} or {INDEX}; expected a safetensors checkpoint")
    index = read_json(folder / INDEX)
    named = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(named, dict) or not named:
        raise SteerError(f"{folder}: {INDEX} has no weight_map; the checkpoint is damaged")
    names = sorted({str(name) for name in named.values()})
    there = {path.name for path in folder.iterdir() if path.is_file()}  # looked up so, a name may be anything
    missing = [name for name in names if name not in there]
    if missing:
        raise SteerError(f"{folder}: {INDEX} names shards that are missing: {', '.join(missing)[:200]}")
    return [folder / name for name in names]


def is_checkpoint(folder: Path) -> bool:
    """Whether the folder holds a whole model's safetensors."""
    return (folder / SINGLE).is_file() or (folder / INDEX).is_file()


def vocabulary_tables(folder: Path, tensors: Mapping[str, Stored]) -> list[str]:
    """The embeddings, input first: the matrices of `vocab_size` rows. No table of architectures."""
    size = read_config(folder).get("vocab_size")
    tables = [name for name, tensor in tensors.items() if len(tensor.shape) == 2 and tensor.shape[0] == size]
    return sorted(tables, key=lambda name: not re.search("emb|wte", name))  # the input's name says so


def ties(folder: Path, tensors: Mapping[str, Stored]) -> bool:
    """Whether input and output embedding are one: the config says so, or leaves it open and no second one differs."""
    said = read_config(folder).get("tie_word_embeddings")
    tables = vocabulary_tables(folder, tensors)
    return said if isinstance(said, bool) else all(same_bytes(tensors[tables[0]], tensors[name]) for name in tables[1:])


def tied_twins(folder: Path, tensors: Mapping[str, Stored]) -> dict[str, str]:
    """Output embedding -> the input embedding that it repeats, where a tied checkpoint stores both."""
    tables = vocabulary_tables(folder, tensors)
    if len(tables) < 2 or not ties(folder, tensors):
        return {}
    return {name: tables[0] for name in tables[1:] if same_bytes(tensors[tables[0]], tensors[name])}


def read_config(folder: Path) -> dict[str, Any]:
    """The model's config.json, with a text model's own part on top; {} where there is none."""
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    if not isinstance(config, dict):
        raise SteerError(f"{folder / 'config.json'}: expected a JSON object")
    inner = config.get("text_config")
    return {**config, **inner} if isinstance(inner, dict) else config


def fingerprint(folder: Path) -> str:
    """A hash that tells one folder's weights from another's: every tensor's name, form, and first KiB of data.

    Reading gigabytes to name a model would be slow; a fine-tune changes the start of each tensor that it trains.
    "" where there are no weights in safetensors.
    """
    files = shards_of(folder) if is_checkpoint(folder) else sorted(folder.glob("*.safetensors"))
    return digest([_samples(SafeFile(file)) for file in files]) if files else ""


def _samples(file: SafeFile) -> list[object]:
    """Name, dtype, shape and first KiB of every tensor of a safetensors file."""
    return [
        [t.name, t.dtype, list(t.shape), sha256(file.read(file.data_start + t.start, min(1024, t.nbytes))).hexdigest()]
        for _, t in sorted(file.tensors.items())
    ]
