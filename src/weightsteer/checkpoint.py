"""Safetensors checkpoints as tensor sources: one tensor at a time in, sharded and atomic out."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
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
    with by_name(folder) as tensors:
        for name, read in tensors.items():
            yield name, read()


@contextmanager
def by_name(folder: Path) -> Iterator[Mapping[str, Callable[[], Tensor]]]:
    """Name -> a function that reads the tensor, whatever the shards; the files are open inside the block."""
    with ExitStack() as stack:
        files = [stack.enter_context(opened(shard)) for shard in shards_of(folder)]
        yield {name: partial(file.get_tensor, name) for file in files for name in file.keys()}  # noqa: SIM118


@contextmanager
def opened(shard: Path) -> Iterator[Any]:
    """A safetensors file by memory map; a damaged one is an error that names it."""
    try:
        with safe_open(shard, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise SteerError(f"{shard}: cannot be read as safetensors ({error}); the file is damaged") from None


def fingerprint(folder: Path) -> str:
    """A hash that tells one local base from another: every tensor's name, form, and first KiB of data.

    Reading gigabytes to name a model would be slow; a fine-tune changes the start of each tensor that it trains.
    """
    try:
        shards = shards_of(folder)
    except SteerError:
        return ""
    return digest([_samples(shard) for shard in shards])


def _samples(shard: Path) -> list[object]:
    """Name, dtype, shape and first KiB of every tensor of a safetensors file."""
    found: list[object] = []
    with shard.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        for name, entry in sorted(header.items()):
            start, end = entry["data_offsets"]
            file.seek(8 + length + start)
            sample = hashlib.sha256(file.read(min(1024, end - start))).hexdigest()
            found.append([name, entry["dtype"], entry["shape"], sample])
    return found
