"""A name -> a local folder: the embedded model, a path, a GGUF file, or a Hugging Face id that is fetched."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

from ..errors import SteerError, first_line
from ..places import expanded, recall
from ..run_card import RunCard
from ..schema import suggestion
from .checkpoint import ADAPTER_CONFIG, fingerprint
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
    if "/" not in name and _in_hub_cache(name, None) is None:  # the hub is not asked: every id there has an owner
        raise SteerError(
            f"{name}: no such model; expected a folder, a Hugging Face id such as owner/{name} or {EMBEDDED_NAME}"
            f"{suggestion(name, [EMBEDDED_NAME, *_models_here()])}"
        )
    return name


def _models_here() -> list[str]:
    """Folders of models below the working folder, for suggestions."""
    return [path.parent.name for path in Path().glob("*/config.json")]


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
    if (folder / ADAPTER_CONFIG).is_file() and not (folder / "config.json").exists():
        raise SteerError(
            f"{folder}: is an adapter, and a whole model is needed here; merge it into its base first: "
            f"`weightsteer export merged {folder} --k=1 -o OUT`"
        )
    if not (folder / "config.json").exists():
        raise SteerError(f"{folder}: not a model folder (no config.json in it)")
    refuse_adapter_beside(folder)


def refuse_adapter_beside(folder: Path) -> None:
    """Raise for a model's folder with an adapter in it, which transformers applies, and a merge does not.

    The weights that a hash names and those that run would not be the same.
    """
    if (folder / ADAPTER_CONFIG).exists():
        raise SteerError(
            f"{folder}: holds an adapter ({ADAPTER_CONFIG}) beside the model, which would be applied to it on loading; "
            "move the adapter into a folder of its own, or merge it into the model first"
        )


def checkpoint_folder(name: str, *, revision: str | None = None) -> Path:
    """A local folder with the model's safetensors: a path, the embedded model, an unpacked GGUF, or a hub snapshot."""
    where = locate_model(name)
    return Path(where) if Path(where).is_dir() else _fetch(where, revision)


def source_folder(name: str | Path, revision: str | None = None) -> Path:
    """A local folder with a fine-tune (adapter, biases, checkpoint) or a vector: a path or a hub snapshot.

    Args:
        revision: hub branch, tag or commit.
    """
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
    return _fetch(str(name), revision)


def base_of(card: RunCard, beside: Path | None = None) -> str:
    """What to load an artifact's base by: the folder on this machine that holds its weights, else the card's name.

    Args:
        beside: the artifact's folder, beside which a run keeps the models that it makes.

    Raises:
        SteerError: the base was a local folder, and is not found here.
    """
    name, revision = card.base_model, card.base_revision
    if name.lower() == EMBEDDED_NAME or not re.fullmatch(r"[0-9a-f]{64}", revision):
        if card.kind == "vector" and not revision and "/" not in name and Path(name).is_dir():
            warnings.warn(
                f"{name}: is taken for the vector's base by its name alone, since the card has no hash of it; say "
                "which it is with --base or --model",
                stacklevel=2,
            )
        return name
    near = [str(beside.absolute().parent / Path(name).name)] if beside and name else []
    own, shared = map(recall, card.place_keys)
    for place in (own, name, *near, shared):
        if place and Path(place).exists() and (folder := local_folder(place)) and fingerprint(folder) == revision:
            return place
    if "/" in name or Path(name).exists():
        return name
    raise SteerError(
        f"the base {name!r} (weights {revision[:12]}) was a folder, and is not found on this machine; say where it is, "
        "with --model or --base"
    )


def local_base(card: RunCard) -> Path | None:
    """The folder of an artifact's base, if it is on this machine."""
    try:
        return local_folder(base_of(card), revision=card.base_commit)
    except SteerError:
        return None


def local_folder(name: str, *, revision: str | None = None) -> Path | None:
    """The model's folder if it is on this machine: a path, the embedded model, or a snapshot in the hub's cache."""
    if not name:
        return None
    path = expanded(name)
    if path.is_dir():
        return path
    if name.lower() == EMBEDDED_NAME or (is_gguf(path) and path.is_file()):
        try:
            return Path(locate_model(name))
        except SteerError:
            return None
    return None if path.is_absolute() or name.count("/") != 1 else _in_hub_cache(name, revision)


def _in_hub_cache(name: str, revision: str | None) -> Path | None:
    """The hub's snapshot of a model, if it was fetched before."""
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
