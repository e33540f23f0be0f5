"""Two fine-tunes -> the weight vector between them."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .checkpoint import INDEX, SINGLE, by_name
from .errors import SteerError
from .lowrank import LowRank
from .records import CARD_FILE, RunCard, read_json, sha256_of
from .vector import (
    ADAPTER_CONFIG,
    ADAPTER_FILE,
    DENSE_FILE,
    Delta,
    WeightVector,
    load_tensors,
    lora_factors,
    require_finite,
    require_same_base,
)

# Adapter features whose delta is not (alpha / r) B A, or that change more than linear weights.
UNSUPPORTED = (
    "use_dora",
    "lora_bias",
    "modules_to_save",
    "trainable_token_indices",
    "target_parameters",
    "layer_replication",
    "use_bdlora",
    "use_qalora",
    "fan_in_fan_out",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "velora_config",
)


def contrast_vector(plus: str | Path, minus: str | Path) -> WeightVector:
    """w = tau+ - tau- = theta+ - theta- (paper, section 2), exact.

    Two LoRA adapters give rank r+ + r- in every matrix, nothing dense; two bias fine-tunes give
    their difference; two full checkpoints are read a tensor at a time.

    Raises:
        SteerError: a folder that is not a fine-tune, two kinds, two bases, a NaN, or an adapter
            feature that has no exact factored form.
    """
    plus, minus = Path(plus), Path(minus)
    if _is_checkpoint(plus) and _is_checkpoint(minus):
        require_same_base(_card_of(plus), _card_of(minus))
        deltas = _checkpoint_difference(plus, minus)
        require_finite(deltas)
        return WeightVector(deltas, _vector_card(_card_of(plus), plus, minus))
    if _is_checkpoint(plus) != _is_checkpoint(minus):
        raise SteerError(f"{plus} and {minus}: one is a checkpoint and one an adapter; expected two of a kind")
    positive, negative = task_vector(plus), task_vector(minus)
    require_same_base(positive.card, negative.card)
    difference = positive - negative
    return WeightVector(difference.deltas, _vector_card(positive.card, plus, minus))


def task_vector(folder: str | Path) -> WeightVector:
    """tau = theta_ft - theta_pre of one LoRA adapter or bias fine-tune; LoRA's (alpha/r) is folded into B.

    Raises:
        SteerError: not such a folder, a NaN, or an adapter feature without an exact factored form.
    """
    folder = Path(folder)
    deltas: dict[str, Delta]
    if (folder / ADAPTER_CONFIG).is_file():
        deltas = dict(_adapter_deltas(folder))
    elif (folder / DENSE_FILE).is_file():
        deltas = dict(load_tensors(folder / DENSE_FILE))
    else:
        raise SteerError(
            f"{folder}: not a fine-tune; expected {ADAPTER_CONFIG} (a PEFT adapter), {DENSE_FILE} (biases) "
            "or a checkpoint"
        )
    require_finite(deltas)
    return WeightVector(deltas, _vector_card(_card_of(folder), folder))


def _is_checkpoint(folder: Path) -> bool:
    return (folder / SINGLE).is_file() or (folder / INDEX).is_file()


def _card_of(folder: Path) -> RunCard:
    """The fine-tune's card; an adapter from elsewhere has none, but its config names the base."""
    if (folder / CARD_FILE).is_file():
        return RunCard.load(folder)
    config = read_json(folder / ADAPTER_CONFIG) if (folder / ADAPTER_CONFIG).is_file() else {}
    return RunCard(
        "finetune", base_model=config.get("base_model_name_or_path") or "", base_revision=config.get("revision") or ""
    )


def _vector_card(side: RunCard, *folders: Path) -> RunCard:
    """The vector's card: base, training settings and data of its side(s), and hashes of their weights."""
    data = {}
    for label, folder in zip(("positive", "negative"), folders, strict=False):
        card = _card_of(folder)
        data.update({f"{label} {name}": value for name, value in card.data_sha256.items()})
        weights = [path for path in (folder / ADAPTER_FILE, folder / DENSE_FILE) if path.is_file()]
        data.update({f"{label} {path.name}": sha256_of(path) for path in weights})
    return RunCard.now(
        "vector",
        base_model=side.base_model,
        base_revision=side.base_revision,
        data_sha256=data,
        settings=side.settings,
        seed=side.seed,
        measured={"sides": [_card_of(folder).measured for folder in folders]},
    )


def _adapter_deltas(folder: Path) -> dict[str, LowRank]:
    config = read_json(folder / ADAPTER_CONFIG)
    _refuse_unsupported(folder, config)
    return {
        f"{module}.weight": LowRank(B.float() * _scale(config, module, A.shape[0]), A.float())
        for module, (B, A) in lora_factors(folder / ADAPTER_FILE).items()
    }


def _refuse_unsupported(folder: Path, config: Mapping[str, Any]) -> None:
    if config.get("peft_type") != "LORA":
        raise SteerError(f"{folder}: peft_type is {config.get('peft_type')}, expected LORA")
    for name in UNSUPPORTED:
        if config.get(name):
            raise SteerError(
                f"{folder}: {ADAPTER_CONFIG} has {name}={json.dumps(config[name])}, whose change is not a plain "
                "(alpha/r) B A; retrain without it"
            )
    if config.get("bias", "none") != "none":
        raise SteerError(f"{folder}: trained with bias={config['bias']!r}; expected bias='none'")
    init = config.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower() not in ("gaussian", "eva", "orthogonal"):
        raise SteerError(
            f"{folder}: init_lora_weights={init!r} changes the base weights; convert it to plain LoRA first"
        )


def _scale(config: Mapping[str, Any], module: str, rank: int) -> float:
    """alpha/r, or alpha/sqrt(r) for rsLoRA, with the module's own alpha where a pattern gives one."""
    alpha = config.get("lora_alpha", 8)
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):  # as PEFT reads it
            alpha = value
            break
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _checkpoint_difference(plus: Path, minus: Path) -> dict[str, Tensor]:
    """Dense float32 theta+ - theta-; a parameter that is equal in both is left out (zero)."""
    deltas = {}
    with by_name(plus) as ours, by_name(minus) as theirs:
        odd = sorted(ours.keys() ^ theirs.keys())
        if odd:
            raise SteerError(f"{odd[0]}: is in one of {plus} and {minus} only; expected two fine-tunes of one model")
        for name, read in ours.items():
            theta_plus, theta_minus = read(), theirs[name]()
            if theta_plus.shape != theta_minus.shape:
                raise SteerError(
                    f"{name}: has shape {tuple(theta_plus.shape)} in {plus} and {tuple(theta_minus.shape)} in {minus}; "
                    "expected two fine-tunes of one model"
                )
            if not torch.equal(theta_plus, theta_minus):
                deltas[name] = theta_plus.float() - theta_minus.float()
    if not deltas:
        raise SteerError(f"{plus} and {minus}: the checkpoints are identical; there is no direction between them")
    return deltas
