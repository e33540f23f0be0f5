"""A name -> a local folder: the embedded model, a path, a GGUF file, or a Hugging Face id that is fetched."""

from __future__ import annotations

from pathlib import Path

from ..errors import SteerError, first_line
from .checkpoint import ADAPTER_CONFIG
from .embedded_model import EMBEDDED_NAME, embedded_model
from .gguf import is_gguf, refuse_other_files, unpacked

WEIGHTS = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "README.md"]


def locate_model(name: str) -> str:
    """What `from_pretrained` takes: a folder, or a Hugging Face id. A GGUF file is unpacked into the cache first.

    Raises:
        SteerError: a path at which there is no model.
    """
    if name.lower() == EMBEDDED_NAME:
        return str(embedded_model())
    path = Path(name)
    if path.is_dir():
        _refuse_other_folders(path)
        return name
    if is_gguf(name):
        return str(unpacked(path))
    if Path(name).is_absolute() or name.startswith(".") or name.count("/") > 1:
        raise SteerError(f"{name}: no such folder; expected a model folder, a Hugging Face id or {EMBEDDED_NAME}")
    return name


def locate_config(name: str) -> dict[str, str]:
    """The arguments with which `AutoConfig.from_pretrained` reads a model's config; no GGUF file is unpacked for it.

    Raises:
        SteerError: see `locate_model`.
    """
    path = Path(name)
    if is_gguf(name) and not path.is_dir():
        refuse_other_files(path)
        return {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    return {"pretrained_model_name_or_path": locate_model(name)}


def _refuse_other_folders(folder: Path) -> None:
    """Raise if a folder is none that transformers loads a model from."""
    packed = sorted(path.name for path in folder.iterdir() if is_gguf(path))
    if packed and not any(folder.glob("*.safetensors")):
        raise SteerError(f"{folder}: holds GGUF files; name one of them: {', '.join(packed[:5])}")
    if not (folder / "config.json").exists():
        raise SteerError(f"{folder}: not a model folder (no config.json in it)")


def checkpoint_folder(name: str, *, revision: str | None = None) -> Path:
    """A local folder with the model's safetensors: a path, the embedded model, an unpacked GGUF, or a hub snapshot."""
    where = locate_model(name)
    return Path(where) if Path(where).is_dir() else _fetch(where, revision)


def source_folder(name: str | Path) -> Path:
    """A local folder with a fine-tune (adapter, biases, checkpoint) or a vector: a path or a hub snapshot."""
    path = Path(name)
    if path.is_dir():
        return path
    if str(name).lower() == EMBEDDED_NAME:
        return embedded_model()
    if is_gguf(path):
        return unpacked(path)
    if path.is_absolute() or str(name).startswith(".") or str(name).count("/") != 1:
        raise SteerError(
            f"{name}: no such folder; expected a vector, a fine-tune ({ADAPTER_CONFIG} or a checkpoint) or a Hugging "
            "Face id such as owner/name"
        )
    return _fetch(str(name), None)


def local_folder(name: str, *, revision: str | None = None) -> Path | None:
    """The model's folder if it is on this machine: a path, the embedded model, or a snapshot in the hub's cache."""
    if not name:
        return None
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if name.lower() == EMBEDDED_NAME or (is_gguf(path) and path.is_file()):
        try:
            return Path(locate_model(name))
        except SteerError:
            return None
    if path.is_absolute() or name.count("/") != 1:
        return None
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(name, "config.json", revision=revision)
    except HFValidationError:
        return None
    return Path(found).parent if isinstance(found, str) else None


def _fetch(name: str, revision: str | None) -> Path:
    """The hub's snapshot of a model or adapter, weights in safetensors only."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=WEIGHTS))
    except (OSError, ValueError) as error:
        raise SteerError(f"{name}: no such folder, and it cannot be downloaded ({first_line(error)})") from None
