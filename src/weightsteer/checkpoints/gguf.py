"""GGUF files: unpacked once into the user's cache as safetensors, and a folder like any other from then on."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
import warnings
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import SteerError, first_line
from ..files import refuse_lfs_pointer, sha256_of, write_text
from ..locks import hold
from ..places import cache_folder
from ..progress import Progress, quiet_transformers, show_progress
from ..run_card import RunCard, new_folder
from .bounded import bounded_modules
from .gguf_header import check_gguf_header
from .whole import is_whole

if TYPE_CHECKING:
    from gguf import GGUFReader

MAGIC = b"GGUF"
SPLIT = re.compile(r"-\d{5}-of-(\d{5})$")  # how llama.cpp names the parts of a model
HASHES = "gguf-sha256.json"  # in the cache: which file, by its place on the disk and its times, has which hash
BYTES_PER_WEIGHT = 4  # float32 holds what every GGUF type means, to the last bit
ELSE_SAY = "name the model's safetensors checkpoint instead"
BROKEN = (ValueError, IndexError, KeyError, OSError, OverflowError, AttributeError, TypeError)


def is_gguf(name: str | Path) -> bool:
    """Whether a model's name is that of a GGUF file."""
    return Path(name).suffix.lower() == ".gguf"


def unpacked(path: Path) -> Path:
    """The folder of a GGUF file's model as safetensors, made on the first call.

    The folder is the content's: a copy, a link or another name of the file has the same one, and what lies beside
    the file plays no part.

    Raises:
        SteerError: no such file, none that holds one whole language model, or no room in the cache.
    """
    refuse_other_files(path)
    target = cache_folder() / f"gguf-{hash_of(path)[:16]}"
    return target if is_whole(target) else unpack(path, target, name=path.name)


def refuse_other_files(path: Path) -> None:
    """Raise if a file is, by its name or its first bytes, no GGUF of a whole language model."""
    if not path.is_file():
        raise SteerError(f"{path}: no such file; expected a model's .gguf")
    refuse_lfs_pointer(path)
    with path.open("rb") as file:
        start = file.read(len(MAGIC))
    if start != MAGIC:
        raise SteerError(f"{path}: is not a GGUF file (it does not start with 'GGUF'); download it again")
    if split := SPLIT.search(path.stem):
        raise SteerError(_merge_first(path, int(split[1])))
    if path.name.lower().startswith("mmproj"):
        raise SteerError(f"{path}: is the vision part of a model (mmproj); name the .gguf of its language model")


def _merge_first(path: Path, parts: int) -> str:
    return (
        f"{path}: is one of {parts} parts of a model; merge them with llama.cpp's "
        "`llama-gguf-split --merge FIRST-PART WHOLE.gguf`, and name the whole"
    )


def hash_of(path: Path) -> str:
    """SHA-256 of a file, remembered in the cache as long as the file stays as it is on the disk.

    A file that is written to, or that another one replaces, has another time of change, which no tool can set back.
    """
    kept, stat = cache_folder() / HASHES, path.stat()
    key = " ".join(map(str, (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)))
    known: dict[str, str] = {}
    with suppress(OSError, ValueError):
        read = json.loads(kept.read_text(encoding="utf-8"))
        known = read if isinstance(read, dict) else {}
    if key not in known:
        known[key] = sha256_of(path)
        with suppress(SteerError):  # a cache that cannot be written is told of when something is to be put into it
            write_text(kept, json.dumps(known, indent=1))
    return known[key]


def unpack(path: Path, target: Path, *, name: str) -> Path:
    """Dequantise a GGUF file into float32 safetensors with its tokenizer; the folder appears only when whole.

    Raises:
        SteerError: it holds no whole language model that transformers reads, or the disk has no room.
    """
    reader = _read_header(path)
    size = BYTES_PER_WEIGHT * sum(int(tensor.n_elements) for tensor in reader.tensors)
    scaled = any(tensor.name == "rope_freqs.weight" for tensor in reader.tensors)
    tensors = len(reader.tensors)
    del reader
    with hold(target, wait=True):  # of two commands that need a model, one makes it
        if is_whole(target):
            return target
        _refuse_without_room(path, target, size)
        _unpack_into(path, target, name, size, tensors)
    if scaled:
        _warn_of_lost_scaling(path, target)
    return target


def _unpack_into(path: Path, target: Path, name: str, size: int, tensors: int) -> None:
    with show_progress(f"unpack {name}") as progress:
        progress(0, 2, f"once, {size / 1e9:.2g} GB into {target}")
        with tempfile.TemporaryDirectory() as alone:  # transformers would read what lies beside the file
            (Path(alone) / "model.gguf").symlink_to(path.resolve())
            try:
                _convert(Path(alone), target, name, hash_of(path), tensors, progress)
            except SteerError:
                raise
            except Exception as error:  # of any type: tokenizers raises it bare
                raise SteerError(f"{path}: transformers cannot read it ({first_line(error)}); {ELSE_SAY}") from None
        progress(2, 2, "done")


def _read_header(path: Path) -> GGUFReader:
    from gguf import GGUFReader

    check_gguf_header(path)
    try:
        reader = GGUFReader(path)
        fields = {name: reader.fields[name].contents() for name in reader.fields if name.startswith(("general", "spl"))}
    except BROKEN as error:
        raise SteerError(f"{path}: is damaged or cut short ({first_line(error)}); download it again") from None
    kind, architecture = fields.get("general.type", "model"), fields.get("general.architecture", "")
    if kind == "mmproj" or architecture == "clip":
        raise SteerError(f"{path}: is the vision part of a model (mmproj); name the .gguf of its language model")
    if kind != "model" or not reader.tensors:
        raise SteerError(f"{path}: holds no model (its general.type is {kind!r}); name a model's .gguf")
    parts = fields.get("split.count", 1)
    if isinstance(parts, int) and parts > 1:
        raise SteerError(_merge_first(path, parts))
    return reader


def _refuse_without_room(path: Path, target: Path, size: int) -> None:
    place = next(folder for folder in target.parents if folder.exists())
    free = shutil.disk_usage(place).free
    if size > free:
        raise SteerError(
            f"{path}: unpacked it takes {size / 1e9:.1f} GB, and {place} has {free / 1e9:.1f} GB free; "
            "make room, or set WEIGHTSTEER_CACHE to a folder on a larger disk"
        )


def _convert(alone: Path, target: Path, name: str, sha256: str, tensors: int, progress: Progress) -> None:
    """Unpack `model.gguf`, of so many tensors, in the folder `alone` into `target`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    options: dict[str, Any] = {"gguf_file": "model.gguf", "trust_remote_code": False}
    with quiet_transformers(), bounded_modules(tensors):
        tokenizer = AutoTokenizer.from_pretrained(alone, **options)
        made: Any = AutoModelForCausalLM.from_pretrained(
            alone,
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),
            output_loading_info=True,
            **options,
        )
        loaded, report = made
        if missing := sorted(report["missing_keys"]):
            raise ValueError(f"it lacks {missing[0]}{f' and {len(missing) - 1} more' if missing[1:] else ''}")
        progress(1, 2, f"writing {target}")
        with new_folder(target, "model") as part:
            loaded.save_pretrained(part)
            tokenizer.save_pretrained(part)
            RunCard.now("model", base_model=name, data_sha256={"gguf": sha256}).save(part)


def _warn_of_lost_scaling(path: Path, target: Path) -> None:
    """llama.cpp keeps Llama 3.1's scaling of positions as a tensor, which transformers does not read."""
    rope = json.loads((target / "config.json").read_text(encoding="utf-8")).get("rope_parameters") or {}
    if rope.get("rope_type", "default") == "default":
        warnings.warn(
            f"{path}: its scaling of positions (rope_freqs.weight) is not carried over, so that its numbers differ "
            f"from llama.cpp's; {ELSE_SAY}",
            stacklevel=2,
        )
