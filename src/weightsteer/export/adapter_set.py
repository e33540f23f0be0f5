"""A vector at several strengths as a set of adapters, for engines that know an adapter by its folder."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, get_args

from torch import Tensor
from torch.nn.functional import pad

from ..adapter_files import ADAPTER_CONFIG
from ..checkpoints.safetensors_file import Planned, write_stream
from ..errors import SteerError
from ..files import link_or_copy
from ..run_card import RunCard, new_folder
from ..schema import shown
from ..strength_names import is_name, on_grid, strength_name
from ..vectors.low_rank import LowRank
from ..vectors.mlx_adapter import MLX_FILE
from ..vectors.weight_vector import WeightVector

SET = "adapter set"  # on the card of a set's folder
Layout = Literal["peft", "mlx"]
LAYER = re.compile(r"\.(\d+)\.")


def export_adapter_set(
    vector: WeightVector, folder: str | Path, *, ks: Sequence[float], name: str = "", layout: Layout = "peft"
) -> dict[float, Path]:
    """Write one adapter folder for each k, called as the engines will call it: `syc@-0.5`. Returns k -> folder.

    In PEFT's layout k is folded into B: SGLang passes over `alpha_pattern`, and any engine reads this form alike. In
    mlx-lm's layout k is the `scale` of the config, and all folders share the tensors of one.

    Args:
        ks: strengths on the grid of `strength_names`; 0 is refused, since it is the base without an adapter.
        name: what the vector is called; default: its own name.

    Raises:
        SteerError: no k, 0 or one twice, a name that no model can have, or a vector with parts that no adapter holds.
    """
    called = name or vector.name
    strengths = _checked(ks, called, layout)
    target = Path(folder)
    with new_folder(target, SET) as part:
        named = {k: strength_name({called: k}) for k in strengths}
        if layout == "peft":
            for k, each in named.items():
                vector.export_peft(part / each, k=k)
        else:
            _write_mlx(vector, {each: k for k, each in named.items()}, part)
        settings = {"vector": called, "layout": layout, "k": strengths, "rank": rank_of(vector)}
        replace(vector.card, kind=SET, settings=settings, strength=None, held_out=()).save(part)
    return {k: target / each for k, each in named.items()}


def read_adapter_set(folder: Path) -> tuple[RunCard, dict[str, Path]]:
    """The card of a set, and the name and folder of each of its adapters.

    Raises:
        SteerError: it is none.
    """
    card = RunCard.load(folder)
    if card.kind != SET:
        raise SteerError(f"{folder}: holds a {card.kind}, expected what `weightsteer export adapters` wrote")
    inner = sorted(path for path in folder.iterdir() if (path / ADAPTER_CONFIG).is_file())
    strengths = card.settings.get("k")
    if isinstance(strengths, list) and len(inner) != len(strengths):
        raise SteerError(f"{folder}: expected {len(strengths)} adapters, found {len(inner)}; write the set again")
    return card, {path.name: path.absolute() for path in inner}


def rank_of(vector: WeightVector) -> int:
    """The rank of the parameter that has the most.

    Raises:
        SteerError: a part of the vector is dense.
    """
    return max((factors.rank for _, factors in _factors(vector)), default=1)


def _checked(ks: Iterable[float], name: str, layout: str) -> list[float]:
    if layout not in get_args(Layout):
        raise SteerError(f"layout: expected {' or '.join(get_args(Layout))}, found {shown(layout)}")
    if not is_name(name):
        raise SteerError(f"name: {shown(name)} cannot stand in syc@-0.72; give another (letters, digits, _ . -)")
    found = [on_grid(k) for k in ks]
    if not found or 0.0 in found:
        raise SteerError("k: expected strengths other than 0, which is the base without an adapter")
    if len(set(found)) < len(found):
        raise SteerError(f"k: one strength is given twice ({', '.join(f'{k:g}' for k in found)}); give it once")
    return found


def _factors(vector: WeightVector) -> Iterator[tuple[str, LowRank]]:
    """Parameter by parameter, one at a time.

    Raises:
        SteerError: one is dense.
    """
    for name in vector.deltas:
        delta = vector.deltas[name]
        if not isinstance(delta, LowRank):
            raise SteerError(f"{name}: is dense, which an adapter cannot hold; merge it (`weightsteer export merged`)")
        yield name, delta


def _write_mlx(vector: WeightVector, strengths: Mapping[str, float], part: Path) -> None:
    """mlx-lm's layout: the tensors once, a config for each strength."""
    rank = rank_of(vector)
    shapes = {
        key: Planned("F32", tuple(tensor.shape))
        for name, delta in _factors(vector)
        for key, tensor in _mlx_tensors(name, delta, rank).items()
    }
    first: Path | None = None
    for called, k in strengths.items():
        folder = part / called
        folder.mkdir()
        if first is None:
            first = folder / MLX_FILE
            blocks = (t for name, delta in _factors(vector) for t in _mlx_tensors(name, delta, rank).values())
            write_stream(first, shapes, blocks)
        else:
            link_or_copy(first, folder / MLX_FILE)
        (folder / ADAPTER_CONFIG).write_text(json.dumps(_mlx_config(vector, rank, k), indent=2) + "\n")


def _mlx_tensors(name: str, delta: LowRank, rank: int) -> dict[str, Tensor]:
    """lora_a (d_in, r) and lora_b (r, d_out), padded with zeros; of an embedding (rows, r) and (r, columns).

    Raises:
        SteerError: a module that mlx-lm has in another form.
    """
    module, missing = name.removesuffix(".weight"), rank - delta.rank
    if delta.layout not in ("linear", "embedding"):
        raise SteerError(f"{name}: is stored as {delta.layout}, which mlx-lm's adapters do not have; merge the vector")
    into, out = pad(delta.B, (0, missing)), pad(delta.A, (0, 0, 0, missing))
    if delta.layout == "linear":
        into, out = out.T, into.T
    return {f"{module}.lora_a": into.contiguous(), f"{module}.lora_b": out.contiguous()}


def _mlx_config(vector: WeightVector, rank: int, k: float) -> dict[str, object]:
    """`keys` are whole names: mlx-lm takes them for modules of the model, wherever they are."""
    modules = sorted(name.removesuffix(".weight") for name in vector.deltas)
    layers = {int(match[1]) for module in modules if (match := LAYER.search(module))}
    return {
        "fine_tune_type": "lora",
        "num_layers": len(layers),
        "lora_parameters": {"rank": rank, "scale": k, "dropout": 0.0, "keys": modules},
    }
