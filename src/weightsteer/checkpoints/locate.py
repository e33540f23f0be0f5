"""A name -> a local folder: the embedded model, a path, or a Hugging Face id that is fetched."""

from __future__ import annotations

from pathlib import Path

from ..errors import SteerError, first_line
from .checkpoint import ADAPTER_CONFIG
from .embedded_model import EMBEDDED_NAME, embedded_model

WEIGHTS = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "README.md"]


def locate_model(name: str) -> tuple[str, str | None]:
    """(what `from_pretrained` takes, GGUF file name or None).

    Raises:
        SteerError: a path at which there is no model.
    """
    if name.lower() == EMBEDDED_NAME:
        return str(embedded_model()), None
    path = Path(name)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise SteerError(f"{name}: no such file")
        return str(path.parent), path.name
    if path.is_dir():
        if not (path / "config.json").exists():
            raise SteerError(f"{name}: not a model folder (no config.json in it)")
        return name, None
    if Path(name).is_absolute() or name.startswith(".") or name.count("/") > 1:
        raise SteerError(f"{name}: no such folder; expected a model folder, a Hugging Face id or {EMBEDDED_NAME}")
    return name, None


def checkpoint_folder(name: str, *, revision: str | None = None) -> Path:
    """A local folder with the model's safetensors: a path, the embedded model, or a hub snapshot."""
    where, gguf = locate_model(name)
    if gguf:
        raise SteerError(
            f"{name}: is quantised (GGUF); expected a safetensors checkpoint, or serve the adapter over it "
            "(`weightsteer export peft`)"
        )
    return Path(where) if Path(where).is_dir() else _fetch(where, revision)


def source_folder(name: str | Path) -> Path:
    """A local folder with a fine-tune (adapter, biases, checkpoint) or a vector: a path or a hub snapshot."""
    path = Path(name)
    if path.is_dir():
        return path
    if str(name).lower() == EMBEDDED_NAME:
        return embedded_model()
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
    if name.lower() == EMBEDDED_NAME:
        try:
            return embedded_model()
        except SteerError:
            return None
    path = Path(name).expanduser()
    if path.is_dir():
        return path
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
