"""What a folder that is no fine-tune holds instead, and where to look: for errors that send people the right way."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from .checkpoint import ADAPTER_CONFIG, INDEX, SINGLE

PICKLE = "convert it to safetensors where you trust it (load it with PEFT or transformers, then save_pretrained)"


def what_it_holds(folder: Path) -> str:
    """One sentence on a folder that was given as a fine-tune and is none."""
    for look in (_fine_tunes_inside, _hub_cache, *(_files(*row) for row in KNOWN)):
        found = look(folder)
        if found:
            return found
    names = sorted(path.name for path in folder.iterdir())
    return f"it holds {', '.join(names[:6])}{' and more' if len(names) > 6 else ''}" if names else "it is empty"


def _fine_tunes_inside(folder: Path) -> str:
    """Subfolders that are fine-tunes: a training's checkpoints, an adapter by name, `adapter_model`."""
    marks = (ADAPTER_CONFIG, SINGLE, INDEX)
    below = [path for pattern in ("*", "*/*") for path in sorted(folder.glob(pattern)) if path.is_dir()]
    inside = [str(path.relative_to(folder)) for path in below if any((path / mark).is_file() for mark in marks)]
    if not inside or "snapshots" in {path.name for path in below}:
        return ""
    more = f" and {len(inside) - 4} more" if len(inside) > 4 else ""
    return f"fine-tunes lie inside it: give one of {', '.join(inside[:4])}{more}"


def _hub_cache(folder: Path) -> str:
    """The hub cache's folder of a repository, or the cache itself."""
    snapshots = sorted((folder / "snapshots").glob("*"))
    if snapshots:
        return f"it is a hub cache's folder: give {snapshots[-1]} or the model's id"
    if any(folder.glob("models--*")):
        return "it is a hub cache: give the model's id, or a folder under models--OWNER--NAME/snapshots"
    return ""


# Files that tell what a folder is: patterns, and what to say. The first row that fits counts.
KNOWN: tuple[tuple[tuple[str, ...], str], ...] = (
    (
        ("global_step*", "zero_to_fp32.py", "mp_rank_*", "zero_pp_rank_*"),
        "it is a DeepSpeed checkpoint in pieces: run its zero_to_fp32.py with --safe_serialization, or save gathered "
        "weights",
    ),
    (
        ("*.distcp", "pytorch_model_fsdp_*", ".metadata", "distcp"),
        "it is an FSDP checkpoint in pieces: merge it with `accelerate merge-weights`",
    ),
    (("adapters.npz",), "it is an old mlx-lm adapter (adapters.npz): save it with a current mlx-lm"),
    (
        ("adapter_model-*-of-*.safetensors", "adapter_model.safetensors.index.json"),
        "it is an adapter in several files, which PEFT does not read either: join them to adapter_model.safetensors",
    ),
    (("adapter_model.bin", "adapter_model.pt"), f"it is an adapter as a pickle, which is never opened: {PICKLE}"),
    (
        ("adapter_*.pt",),
        "it is a torchtune adapter as a pickle, which is never opened: save with PEFT's format (its checkpointer "
        "writes adapter_model.safetensors too)",
    ),
    (
        ("adapter_model.safetensors",),
        f"it holds an adapter's tensors without {ADAPTER_CONFIG}, which gives their scale",
    ),
    (
        ("consolidated*.safetensors", "consolidated*.pth", "params.json"),
        "it is a checkpoint in its maker's own form (consolidated): take the one in transformers' form from the hub",
    ),
    (
        ("model.*.safetensors", "model.*.index.json"),
        "it is a checkpoint's variant: rename its files to model.safetensors",
    ),
    (
        ("pytorch_model*.bin", "*.pth", "*.pt", "*.ckpt"),
        f"it is a checkpoint as a pickle, which is never opened: {PICKLE}",
    ),
    (
        ("*.gguf",),
        "it holds a GGUF, which is quantised: `weightsteer export peft` gives an adapter to serve over it",
    ),
    (
        ("tf_model.h5", "flax_model.msgpack", "*.onnx"),
        "it is a checkpoint of another framework: take one in safetensors",
    ),
    (("*.safetensors",), f"its safetensors are not named {SINGLE} or by an index"),
    (("config.json",), "it holds a config without weights"),
    (("trainer_state.json", "optimizer.pt"), "it holds a training's state without weights"),
)


def _files(patterns: tuple[str, ...], sentence: str) -> Callable[[Path], str]:
    def look(folder: Path) -> str:
        found = next((path for pattern in patterns for path in folder.glob(pattern)), None)
        return f"{sentence} ({found.name})" if found else ""

    return look
