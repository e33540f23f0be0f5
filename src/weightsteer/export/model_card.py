"""What stands beside a merged checkpoint's weights: the base's own files, and where it all came from."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ..checkpoints.checkpoint import INDEX
from ..checkpoints.safetensors_file import SafeFile
from ..files import read_json, write_text
from ..run_card import CARD_FILE, RunCard
from .rounding import MergeReport

WEIGHTS = (
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".gguf",
    ".h5",
    ".msgpack",
    ".onnx",
    ".ot",
)  # weights in other forms are not carried over


def carry_over(base: Path, part: Path, dtype: str | None) -> None:
    """Tokenizer, chat template, generation config, index: whatever the base has beside its weights."""
    for file in base.iterdir():
        ours = file.name in ("README.md", "config.json", CARD_FILE)
        if file.is_file() and not ours and file.suffix not in WEIGHTS and not file.name.startswith("pytorch_model"):
            shutil.copyfile(file, part / file.name)
    templates = base / "additional_chat_templates"
    if templates.is_dir():
        shutil.copytree(templates, part / templates.name)
    if dtype and (part / INDEX).is_file():
        index = read_json(part / INDEX)
        sizes = [t.nbytes for shard in part.glob("*.safetensors") for t in SafeFile(shard).tensors.values()]
        index["metadata"] = {**index.get("metadata", {}), "total_size": sum(sizes)}
        (part / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def carry_config(base: Path, part: Path, dtype: str | None) -> None:
    """The base's config.json, with the output's dtype; written last, since nothing loads a folder without it."""
    if dtype is None:
        shutil.copyfile(base / "config.json", part / "config.json")
        return
    config = read_json(base / "config.json")
    key = "torch_dtype" if "torch_dtype" in config else "dtype"
    write_text(part / "config.json", json.dumps({**config, key: dtype}, indent=2) + "\n")


def write_lineage(vector: RunCard, base: Path, part: Path, origin: Mapping[str, Any], report: MergeReport) -> None:
    """Our card and a model card: base, vector, k, and what rounding left of it."""
    card = replace(
        RunCard.now("merged", base_model=vector.base_model, base_revision=vector.base_revision),
        data_sha256={**vector.data_sha256, "vector": report.vector_sha256},
        settings=origin,
        measured=asdict(report),
    )
    card.save(part)
    write_text(part / "README.md", _readme(vector, base, origin["k"], report))


def _readme(vector: RunCard, base: Path, k: float, report: MergeReport) -> str:
    name = vector.base_model or base.name
    return "\n".join(
        [
            "---",
            f"base_model: {name}",
            "library_name: transformers",
            "tags: [weight-steering, merge]",
            "---",
            "",
            f"# {name} + {k:g} w",
            "",
            "Made by weightsteer: theta + k w, contrastive weight steering (arXiv 2511.05408).",
            "",
            f"- base: {name} ({vector.base_revision or 'revision not recorded'}), merged into {base.name}",
            f"- k: {k:g}",
            f"- vector, fingerprint: {report.vector_sha256 or 'none (k = 0)'}",
            f"- written as {report.dtype}, rounding {report.rounding}: the change that was meant is missed by "
            f"{report.delta_error:.1%}, {report.unchanged_share:.1%} of the entries are unchanged",
            "",
        ]
    )
