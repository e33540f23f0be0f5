"""What the processes that train together are told: which model, which examples, which settings, and where it goes."""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from ..checkpoints.adapted import adapted_model
from ..checkpoints.checkpoint import fingerprint
from ..checkpoints.load_model import dtype_named, load_tokenizer
from ..checkpoints.load_options import LoadOptions
from ..checkpoints.locate import locate_model
from ..checkpoints.others_errors import read_by_others
from ..errors import SteerError
from ..files import digest, read_json, write_json
from ..lm import LM
from ..progress import quiet_transformers
from ..ranks import join, own_device, world
from ..run_card import RunCard
from ..schema import checked
from .combinations import refuse_crowded
from .job import any_outcome_counts
from .mean import refuse_empty_parts
from .settings import TrainSettings, WholeSettings

COMPARED = ("weightsteer", "torch", "transformers", "peft", "accelerate")  # packages that decide what is computed


@dataclass(frozen=True)
class Order:
    """One fine-tune, as the processes that make it are told; a JSON file of these fields, with the data beside it."""

    model: dict[str, Any]  # what `LM.load` is asked, without its options
    system_prompt: str | None
    revision: str  # which state of the model is expected
    out: str
    settings: TrainSettings  # as who asked has said
    parent: int  # the process that has asked; when it is gone, the work ends
    loading: LoadOptions | None = None  # the options that `LM.load` is asked
    beta: float | None = None  # DPO's, for data that are preferences
    any_outcome: bool = False  # see `job.without_gain`

    @classmethod
    def load(cls, path: Path) -> Order:
        """Read an order.

        Raises:
            SteerError: the file is none.
        """
        return checked(cls, read_json(path), str(path))

    def save(self, path: Path) -> None:
        """Write the order as a file."""
        write_json(path, asdict(self))

    def asked(self) -> dict[str, Any]:
        """The arguments of `LM.load`."""
        return {**self.model, "options": self.loading}


def order_of(lm: LM, out: Path, settings: TrainSettings, *, beta: float | None = None) -> Order:
    """The order to train, on data that are handed over beside it.

    Raises:
        SteerError: the model was made in memory, where other processes do not find it.
    """
    if lm.origin is None:
        raise SteerError(
            "processes: each loads the model by itself, and this one was made in memory; save it, and give what "
            "LM.load makes of the folder"
        )
    asked = {name: value for name, value in lm.origin.items() if name != "options"}
    return Order(
        model={**asked, "name": str(asked["name"])},
        system_prompt=lm.system_prompt,
        revision=lm.revision,
        out=str(out.absolute()),
        settings=settings,
        parent=os.getpid(),
        beta=beta,
        loading=lm.origin.get("options"),
        any_outcome=any_outcome_counts(),
    )


def load_together(asked: Mapping[str, Any], *, shard: str) -> LM:
    """Load a model in each of several processes, where it is to train.

    With fsdp it comes into the CPU's memory first, and accelerate gives each process its part on its accelerator.

    Args:
        asked: arguments of `LM.load`; where the model is put follows from the process.

    Raises:
        SteerError: as `LM.load`.
    """
    join(on_cpu=asked.get("device") == "cpu" or not torch.accelerator.is_available())
    own = own_device()
    device = "cpu" if shard == "fsdp" or own.type == "cpu" else str(own)
    return replace(LM.load(**{**asked, "device": device}), origin=dict(asked))


def load_to_train(settings: TrainSettings, asked: Mapping[str, Any]) -> LM:
    """A model for `train_side`, of which this process loads no more than it needs.

    Args:
        asked: arguments of `LM.load`.

    Raises:
        SteerError: as `LM.load`.
    """
    if world() > 1:
        return load_together(asked, shard=settings.shard)
    return LM.load(**asked) if settings.processes == 1 else _load_light(asked)


def _load_light(asked: Mapping[str, Any]) -> LM:
    """A model as `LM.load` would name it, without its weights, which may fit on no single device."""
    name = str(asked["name"])
    if adapted_model(name, asked.get("revision")):  # it is what it is merged into
        return without_weights(LM.load(**{**asked, "device": "cpu"}))
    where, trust = locate_model(name), bool(asked.get("trust_remote_code"))
    options: dict[str, Any] = {"revision": asked.get("revision"), "trust_remote_code": trust}
    dtype = dtype_named(str(asked.get("dtype") or "auto"))
    stated = {} if dtype == "auto" else {"dtype": dtype}
    with read_by_others(name), quiet_transformers():
        config = AutoConfig.from_pretrained(where, **options)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust, **stated)
        with suppress(OSError):  # not every model has such a file
            model.generation_config = GenerationConfig.from_pretrained(where, revision=asked.get("revision") or "main")
    tokenizer = load_tokenizer(name, where, **options)
    revision = getattr(config, "_commit_hash", None) or fingerprint(Path(where))
    variables = asked.get("chat_template_kwargs")
    lm = LM.wrap(model, tokenizer, name=name, revision=revision, chat_template_kwargs=variables)
    return replace(lm, origin=dict(asked))


def without_weights(lm: LM) -> LM:
    """A model's tokenizer and config, its shapes and its name, which is all that starting other processes takes."""
    with torch.device("meta"):
        empty = type(lm.model)(lm.model.config)
    empty.generation_config = lm.model.generation_config
    return replace(lm, model=empty.eval())


def refuse_idle(examples: int, settings: WholeSettings) -> None:
    """Check that each fine-tune, and in it each process, has something to do.

    Args:
        examples: that are trained on.

    Raises:
        SteerError: more fine-tunes than examples, or more processes than a batch or a fine-tune's part has rows.
    """
    refuse_empty_parts(examples, settings.finetunes)
    processes, most = max(settings.processes, world()), examples // settings.finetunes
    if processes > most:
        each = " for each of its finetunes" if settings.finetunes > 1 else ""
        raise SteerError(f"processes: expected at most {most}, the examples to train on{each}, found {processes}")
    refuse_crowded(settings, settings.batch_size)


def known_of(card: RunCard) -> dict[str, str]:
    """What all processes must have alike: versions of packages, the base, the data, and the settings."""
    versions = {name: importlib.metadata.version(name) for name in COMPARED}
    data, settings = digest(dict(card.data_sha256)), digest([dict(card.settings), card.seed])
    return {**versions, "base": card.base_revision or card.base_model, "data": data[:12], "settings": settings[:12]}
