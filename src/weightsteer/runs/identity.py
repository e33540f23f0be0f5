"""What a run is known by: content, and names of files, but no folder in which something lies on some machine."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..behavior import SIDES
from ..errors import SteerError
from ..places import expanded, public_name
from ..run_card import RunCard
from ..run_folder import RunFolder

LONGEST_NAME = 200  # bytes; file systems take 255, and we add endings


def content_of(model: str) -> str:
    """The hash of a local model's weights; "" for a model that is named otherwise."""
    from ..checkpoints.checkpoint import fingerprint

    folder = expanded(model)
    return fingerprint(folder) if folder.is_dir() else ""


def same_model(found: RunCard, wanted: RunCard, folder: RunFolder) -> bool:
    """Whether a run that is there was begun on the model that is named now, wherever that lies.

    Runs of older versions say by what name they were begun, and their fine-tunes on which weights.
    """
    made = [RunCard.load(path) for path in map(folder.finetune, SIDES) if path.is_dir()]
    known = found.base_revision or ("" if folder.first_model.exists() else made[0].base_revision if made else "")
    if known and wanted.base_revision:
        return known == wanted.base_revision
    return public_name(found.base_model) == public_name(wanted.base_model)


def without_folders(fields: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's fields with the files and models that they name by their last part; what is in them is hashed."""
    found = dict(fields)
    found["behavior"] = _last_part(found["behavior"])
    found["data"] = {**found["data"], **{n: _last_part(found["data"][n]) for n in ("pairs", "positive", "negative")}}
    found["dial"] = {**found["dial"], **{n: _last_part(found["dial"][n]) for n in ("pairs", "unmoved")}}
    for name in ("first_finetune", "repair_target"):
        if found[name]:
            found[name] = {**found[name], "data": [_last_part(text) for text in found[name]["data"]]}
    found["tasks"] = [
        {**task, "data": _last_part(task["data"]), "behavior": _last_part(task["behavior"])} for task in found["tasks"]
    ]
    if found["engine"]:  # what kind of server measures; where it is may change
        found["engine"] = found["engine"]["kind"]
    if found["judge"] and not found["judge"]["url"]:
        found["judge"] = {**found["judge"], "model": public_name(found["judge"]["model"])}
    return found


def without_resources(fields: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's fields, its trainings without what changes no result, such as checkpointing."""
    from ..training.settings import deciding

    parts = {
        n: fields[n] and {**fields[n], "train": deciding(fields[n]["train"])}
        for n in ("first_finetune", "repair_target")
    }
    alone = {method: deciding(train) for method, train in fields["train_of"].items()}
    return {**fields, **parts, "train": deciding(fields["train"]), "train_of": alone}


def _last_part(text: str | None) -> str | None:
    return text and ",".join(Path(part).name or part for part in text.split(","))


def refuse_path(name: str) -> None:
    """Raise for a recipe's name that is no plain name of a folder: it would lead out of `runs/`."""
    plain = name == Path(name).name and name not in ("", ".", "..") and "\\" not in name and name.isprintable()
    if not plain or name.startswith(("-", "~")) or len(name.encode()) > LONGEST_NAME:
        raise SteerError(
            f"field 'name': expected a plain name, without '/', which becomes that of a folder; found {name[:80]!r}"
        )
