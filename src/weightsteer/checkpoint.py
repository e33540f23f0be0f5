"""Safetensors checkpoints as tensor sources: one tensor at a time in, sharded and atomic out."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from .errors import SteerError
from .records import digest, read_json

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


def shards_of(folder: Path) -> list[Path]:
    """The checkpoint's weight files, in order.

    Raises:
        SteerError: the folder holds no safetensors checkpoint, or a shard of its index is missing.
    """
    if (folder / INDEX).is_file():
        index = read_json(folder / INDEX)
        names = sorted(set(index.get("weight_map", {}).values()))
        missing = [name for name in names if not (folder / name).is_file()]
        if missing or not names:
            raise SteerError(f"{folder}: {INDEX} names shards that are missing: {', '.join(missing) or 'all'}")
        return [folder / name for name in names]
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    raise SteerError(f"{folder}: no {SINGLE} or {INDEX}; expected a safetensors checkpoint")


def tensors_of(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Every (name, tensor) of a checkpoint, read one at a time by memory map."""
    for shard in shards_of(folder):
        with opened(shard) as file:
            for name in file.keys():  # noqa: SIM118 (not a dict)
                yield name, file.get_tensor(name)


@contextmanager
def opened(shard: Path) -> Iterator[Any]:
    """A safetensors file by memory map; a damaged one is an error that names it."""
    try:
        with safe_open(shard, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise SteerError(f"{shard}: cannot be read as safetensors ({error}); the file is damaged") from None


def header_of(path: Path) -> dict[str, object]:
    """A safetensors file's header: tensor name -> dtype, shape, place in the file."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header: dict[str, object] = json.loads(file.read(length))
    return header


def fingerprint(folder: Path) -> str:
    """A hash that tells one local base from another: tensor headers and a sample of every tensor file.

    Reading gigabytes to name a model would be slow; the last MiB of each shard tells
    fine-tunes of one architecture apart.
    """
    try:
        shards = shards_of(folder)
    except SteerError:
        return ""
    parts = []
    for shard in shards:
        header = header_of(shard)
        header.pop("__metadata__", None)
        with shard.open("rb") as file:
            file.seek(-min(2**20, shard.stat().st_size), 2)
            parts.append([header, file.read().hex()])
    return digest(parts)
