"""What stands beside a merged checkpoint's weights: the base's own files, and where it all came from."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ..checkpoints.checkpoint import INDEX, SINGLE, fingerprint
from ..checkpoints.embedded_model import public_base
from ..checkpoints.links import file_within
from ..checkpoints.safetensors_file import SafeFile
from ..files import read_json, write_text
from ..places import is_private, public_name
from ..run_card import RunCard
from ..shown import markdown_text, yaml_text
from ..vectors.base_identity import is_same_base
from .rounding import MergeReport, describe_rounding

# What a model has beside its weights: configuration, tokenizer and processors, templates, licence. Nothing else is
# carried over: no weights in other forms, no adapters, no code, no pickles.
CARRIED = (
    "generation_config.json",
    "tokenizer*.json",
    "tokenizer*.model",
    "tokenizer*.jsonl",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.tiktoken",
    "tekken.json",
    "spiece.model",
    "sentencepiece*.model",
    "chat_template*",
    "preprocessor_config.json",
    "processor_config.json",
    "image_processor_config.json",
    "video_preprocessor_config.json",
    "audio_tokenizer_config.json",
    "LICENSE*",
    "LICENCE*",
    "NOTICE*",
    "USE_POLICY*",
)
TEMPLATES = "additional_chat_templates"


def carry_over(base: Path, part: Path, dtype: str | None) -> None:
    """Tokenizer, chat templates, generation config, licence and index: what a model has beside its weights."""
    for pattern in (*CARRIED, f"{TEMPLATES}/*.jinja"):
        for file in sorted(base.glob(pattern)):
            _carry(file, part / file.relative_to(base), base)
    if not (base / SINGLE).is_file():
        _carry(base / INDEX, part / INDEX, base)
    if dtype and (part / INDEX).is_file():
        index = read_json(part / INDEX)
        sizes = [t.nbytes for shard in part.glob("*.safetensors") for t in SafeFile(shard).tensors.values()]
        index["metadata"] = {**index.get("metadata", {}), "total_size": sum(sizes)}
        (part / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _carry(file: Path, target: Path, base: Path) -> None:
    """Copy a file of the model; what a link outside the model's own folders points to is none.

    Raises:
        SteerError: a link that leads out.
    """
    real = file_within(file, base)
    if real.is_file():
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(real, target)


def carry_config(base: Path, part: Path, dtype: str | None) -> None:
    """The base's config.json, with the output's dtype; written last, since nothing loads a folder without it."""
    config = read_json(file_within(base / "config.json", base))
    private = is_private(str(config.get("_name_or_path") or ""))  # where somebody had the model once
    if dtype is None and not private:
        _carry(base / "config.json", part / "config.json", base)
        return
    if private:
        config["_name_or_path"] = public_name(config["_name_or_path"])
    if dtype is not None:
        config["torch_dtype" if "torch_dtype" in config else "dtype"] = dtype
    write_text(part / "config.json", json.dumps(config, indent=2) + "\n")


def write_lineage(vector: RunCard, base: Path, part: Path, origin: Mapping[str, Any], report: MergeReport) -> None:
    """Our card and a model card: base, vector, k, and what rounding left of it.

    The card's base is the model that was merged into: what was added to it is the difference to that one.
    """
    own = RunCard("merged", base_model=str(base.absolute()), base_revision=fingerprint(base))
    known = vector if is_same_base(vector, own) else own
    card = replace(
        RunCard.now("merged", base_model=known.base_model, base_revision=known.base_revision),
        data_sha256={**vector.data_sha256, "vector": report.vector_sha256},
        settings=origin,
        measured=asdict(report),
    )
    card.save(part)
    write_text(part / "README.md", _readme(vector, base, origin["k"], report))


def _readme(vector: RunCard, base: Path, k: float, report: MergeReport) -> str:
    into = public_name(str(base.absolute()))
    name = public_base(vector.base_model) or into
    shown, expression = markdown_text(name), vector.settings.get("expression")
    return "\n".join(
        [
            "---",
            f"base_model: {yaml_text(name)}",
            "library_name: transformers",
            "tags: [weight-steering, merge]",
            "---",
            "",
            f"# {shown} + {k:g} w",
            "",
            "Made by weightsteer: theta + k w, contrastive weight steering (arXiv 2511.05408).",
            "",
            f"- base: {shown} ({markdown_text(vector.base_revision) or 'revision not recorded'}), merged into "
            f"{markdown_text(into)}",
            f"- k: {k:g}",
            f"- vector, fingerprint: {report.vector_sha256 or 'none (k = 0)'}",
            *([f"- made from: {markdown_text(str(expression))}"] if expression else []),
            f"- written as {report.dtype}, rounding {report.rounding}: {describe_rounding(report.delta_error)}, and "
            f"{report.unchanged_share:.1%} of the entries are as they were",
            "",
            "## How to use it",
            "",
            "It is a whole model: transformers, vLLM and other engines load the folder as they load its base.",
            "",
            "```python",
            "from transformers import AutoModelForCausalLM",
            "",
            'model = AutoModelForCausalLM.from_pretrained("FOLDER")',
            "```",
            "",
        ]
    )
