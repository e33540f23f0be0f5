"""transformers' model of a config without its weights: what it calls its parameters, and where files hold them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..progress import quiet_transformers
from .bounded import require_stored
from .safetensors_file import matrix_shape

Run = tuple[str, int, int, int]  # the fields of a `Place`


def empty_model(folder: Path) -> Any:
    """transformers' model of a folder's config on the meta device: names and shapes, no memory.

    Raises:
        ValueError: a kind of model that transformers does not know, or whatever it raises for the config.
    """
    import transformers
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if config.model_type not in transformers.CONFIG_MAPPING:
        raise ValueError(f"{folder}: its kind of model, {config.model_type}, is not one of transformers")
    named = config.architectures or [None]
    built: Any = getattr(transformers, str(named[0]), None)
    with torch.device("meta"), _default_float32():
        # the config may name anything that transformers has
        known = isinstance(built, type) and issubclass(built, transformers.PreTrainedModel)
        model = built(config) if known else None
        if model is None or model.get_output_embeddings() is None:  # saved without its head, and steered with it
            with suppress(ValueError):
                return transformers.AutoModelForCausalLM.from_config(config)
    if model is None:
        raise ValueError(f"{folder}: its kind of model, {config.model_type}, writes no text")
    return model


@contextmanager
def _default_float32() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def renamings_of(folder: Path) -> list[Any]:
    """transformers' renamings of older names, for the model of a folder's config."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    with quiet_transformers():
        transforms = get_model_conversion_mapping(empty_model(folder))
    return [transform for transform in transforms if isinstance(transform, WeightRenaming)]


def describe(folder: Path) -> dict[str, Any]:
    """The parameters of a folder's model, as fields that JSON holds (see `Architecture`).

    Raises:
        ValueError: see `empty_model`.
    """
    from transformers.pytorch_utils import Conv1D

    model = empty_model(folder)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    every = dict(model.named_parameters(remove_duplicate=False))
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    require_stored(folder, sum(matrix_shape(shape)[0] for shape in shapes.values()))
    return {
        "kind": type(model).__name__,
        "shapes": shapes,
        "tied": {name: names[id(parameter)] for name, parameter in every.items() if names[id(parameter)] != name},
        "transposed": [
            name
            for name, module in model.named_modules()
            if isinstance(module, Conv1D) or getattr(module, "is_transposed", False)
        ],
        "others": [name for name in model.state_dict() if name not in every],
        "files": _files_of(model, shapes),
        "prefix": str(getattr(model, "base_model_prefix", "") or ""),
    }


def _files_of(model: Any, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, list[Run] | None]:
    """The hub's tensors that are called otherwise than the parameters, and which rows of these they hold.

    transformers' own conversion is given numbered rows in the parameters' place; where they come out is where the
    rows lie in a file.
    """
    from transformers.core_model_loading import revert_weight_conversion

    names, numbered, first = list(shapes), {}, 0
    starts = []
    for name in names:
        count = matrix_shape(shapes[name])[0]
        starts.append(first)
        numbered[name] = torch.arange(first, first + count).reshape(_row_shape(shapes[name]))
        first += count
    found = revert_weight_conversion(model, dict(numbered))
    bounds = torch.tensor([*starts, first])
    return {stored: _runs(rows, names, bounds) for stored, rows in found.items() if stored not in shapes}


def _row_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape if len(shape) < 2 else (*shape[:-1], 1)


def _runs(rows: Tensor, names: list[str], bounds: Tensor) -> list[Run] | None:
    """Runs of rows that follow each other in one parameter; None where the last dimension took part."""
    if rows.ndim > 1 and rows.shape[-1] != 1:
        return None
    flat = rows.reshape(-1)
    if not flat.numel():
        return None
    owner = torch.searchsorted(bounds, flat, right=True) - 1
    breaks = (torch.diff(flat) != 1) | (torch.diff(owner) != 0)
    edges = [0, *(torch.nonzero(breaks).flatten() + 1).tolist(), flat.numel()]
    return [
        (names[int(owner[start])], int(flat[start] - bounds[owner[start]]), start, stop - start)
        for start, stop in pairwise(edges)
    ]
