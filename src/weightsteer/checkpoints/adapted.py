"""A PEFT adapter that is named as a model: its base is loaded, and the adapter is merged into it in memory."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import SteerError
from ..files import read_json
from ..places import public_name
from ..progress import quiet_transformers
from ..run_card import CARD_FILE, RunCard, require_files
from .checkpoint import ADAPTER_CONFIG, ADAPTER_FILE, DENSE_FILE
from .embedded_model import EMBEDDED_HUB_ID, EMBEDDED_NAME
from .load_options import LoadOptions
from .locate import base_of, local_folder, locate_model, source_folder
from .others_errors import read_by_others
from .recognise import what_it_holds

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Adapted:
    """An adapter's folder, and what its base is loaded by."""

    folder: Path
    base: str
    revision: str | None  # of the base: its hub commit, where that is known

    @property
    def has_tokenizer(self) -> bool:
        """Whether the adapter brings a tokenizer of its own, as PEFT's trainers leave one beside it."""
        return (self.folder / "tokenizer_config.json").is_file()

    def refuse_packed_base(self, name: str, load: LoadOptions) -> None:
        """Raise where the base is to be quantised: a merge would round the adapter into 4 or 8 bits.

        Raises:
            SteerError: with two ways out.
        """
        if load.quantize:
            raise SteerError(
                f"{name}: is an adapter, and it cannot be merged into a base in {load.quantize}; load the base "
                f"{public_name(self.base)} so and steer it with the adapter as a vector at k = 1, or merge it with "
                "`weightsteer export merged` first"
            )


def card_of(folder: Path) -> RunCard:
    """A fine-tune's card; an adapter from elsewhere has none, but its config names the base.

    A branch in PEFT's `revision` ("main") tells nothing: only a commit does.
    """
    if (folder / CARD_FILE).is_file():
        return RunCard.load(folder)
    path = folder / ADAPTER_CONFIG
    config = read_json(path) if path.is_file() else {}
    if not isinstance(config, dict):
        raise SteerError(f"{path}: expected a JSON object with PEFT's fields, found a {type(config).__name__}")
    named = config.get("base_model_name_or_path") or config.get("model") or ""
    revision = str(config.get("revision") or "")
    commit = revision if re.fullmatch(r"[0-9a-f]{40}", revision) else ""
    return RunCard("finetune", base_model=str(named), base_revision=commit)


def adapted_model(name: str, revision: str | None = None) -> Adapted | None:
    """The adapter that a name means: a folder, or a hub id whose repository holds one. None for a model of its own.

    Args:
        revision: hub branch, tag or commit of the adapter.

    Raises:
        SteerError: an adapter that names no base, whose base is not found here, or whose tensors are not there.
    """
    if not is_adapter(name, revision):
        return None
    folder = source_folder(name, revision)
    require_files(folder)
    if not (folder / ADAPTER_FILE).is_file() or (folder / DENSE_FILE).is_file():
        held = "it holds changes that no adapter can" if (folder / DENSE_FILE).is_file() else what_it_holds(folder)
        raise SteerError(f"{name}: cannot be loaded as a model ({held}); merge it with `weightsteer export merged`")
    card = card_of(folder)
    if not card.base_model:
        raise SteerError(f"{name}: the adapter names no base model; set base_model_name_or_path in {ADAPTER_CONFIG}")
    base = _base_here(card, folder)
    if Path(base).resolve() == folder.resolve():
        raise SteerError(f"{name}: the adapter names itself as its base; correct it in {ADAPTER_CONFIG}")
    return Adapted(folder, base, card.base_commit if base == card.base_model else None)


def is_adapter(name: str, revision: str | None = None) -> bool:
    """Whether a name is that of an adapter without a model beside it."""
    folder = Path(name)
    if folder.is_dir():
        return (folder / ADAPTER_CONFIG).is_file() and not (folder / "config.json").is_file()
    if name.count("/") != 1 or folder.is_absolute() or folder.exists() or name.startswith((".", "~")):
        return False
    if local_folder(name, revision=revision) is not None:  # the hub's cache has a config of it: a model
        return False
    from huggingface_hub.errors import HFValidationError
    from transformers.utils.peft_utils import find_adapter_config_file

    try:
        return find_adapter_config_file(name, revision=revision) is not None
    except (OSError, ValueError, HFValidationError):  # not to be reached: loading the model says why
        return False


def _base_here(card: RunCard, folder: Path) -> str:
    """What to load the base by. Offline, the embedded model stands for the one on the hub that it was made from."""
    base = base_of(card, folder)
    if base.lower() != EMBEDDED_HUB_ID.lower() or local_folder(base) is not None:
        return base
    from huggingface_hub import is_offline_mode

    if not is_offline_mode():
        return base
    warnings.warn(
        f"{folder.name}: its base {EMBEDDED_HUB_ID} is not on this machine; the embedded model takes its place: "
        "the same model, its weights rounded to 4 bits",
        stacklevel=3,
    )
    return EMBEDDED_NAME


def without_adapters(name: str) -> str:
    """The model at the bottom of what a name means: the base of an adapter, or the name itself."""
    found = adapted_model(name)
    return without_adapters(found.base) if found else name


def tokenizer_folder(name: str) -> str:
    """What a model's tokenizer is loaded from: its own place, or an adapter's if one lies there."""
    found = adapted_model(name)
    if found is None:
        return locate_model(name)
    return str(found.folder) if found.has_tokenizer else tokenizer_folder(found.base)


def _untie(adapted: PeftModel) -> None:
    """Give each layer with a LoRA a weight that no other place of the model has."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from torch import nn

    places = Counter(id(module._parameters.get("weight")) for module in adapted.modules())
    for layer in [module for module in adapted.modules() if isinstance(module, BaseTunerLayer)]:
        base = layer.get_base_layer()
        weight = base._parameters.get("weight")
        if weight is None or places[id(weight)] < 2:
            continue
        places[id(weight)] -= 1
        base.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
        for config in (adapted.config, adapted.config.get_text_config()):
            config.tie_word_embeddings = False


def merge_adapter(model: PreTrainedModel, adapter: Adapted, name: str) -> PreTrainedModel:
    """The model with the adapter merged into its weights, in the dtype that they have.

    Where the adapter changes one of two tied places, each gets a matrix of its own: PEFT would merge into both.

    Raises:
        SteerError: PEFT cannot load or merge it, or knows its tensors by other names.
    """
    from peft import PeftModel

    with (
        read_by_others(name, "its adapter "),
        quiet_transformers(),
        warnings.catch_warnings(record=True) as told,
    ):
        warnings.simplefilter("always")
        adapted = PeftModel.from_pretrained(model, str(adapter.folder))
        if any("missing adapter keys" in str(one.message) for one in told):
            raise SteerError(
                f"{name}: cannot be loaded as a model, since PEFT does not know all of its tensors by name; steer "
                "its base with it as a vector at k = 1, or merge it with `weightsteer export merged`: both read them"
            )
        _untie(adapted)
        merged: PreTrainedModel = adapted.merge_and_unload()
    if hasattr(merged, "peft_config"):
        del merged.peft_config
    if (dtype := str(merged.dtype).removeprefix("torch.")) in ("bfloat16", "float16"):
        warnings.warn(
            f"{name}: the adapter is merged into a base in {dtype}, whose rounding it takes part in; --dtype float32 "
            "merges it exactly",
            stacklevel=4,
        )
    return merged
