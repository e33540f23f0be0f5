"""A vector on disk: a folder that PEFT loads as an adapter, what no adapter can hold beside it, and our card."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Literal

from torch import Tensor

from ..checkpoints.checkpoint import ADAPTER_CONFIG, ADAPTER_FILE, DENSE_FILE
from ..checkpoints.safetensors_file import FLOATS, Planned, SafeFile, write_stream
from ..errors import SteerError
from ..files import write_text
from ..run_card import CARD_FILE, RunCard, lost_file, new_folder, require_files
from ..schema import checked, parse_json
from .delta import Delta, LazyDeltas, Streamed, blocks, layout_of, require_finite, rows_of
from .low_rank import Layout, LowRank
from .manifest import drop_manifest, require_as_packed
from .peft_adapter import adapter_config, adapter_tensors, read_adapter
from .readme import README, vector_readme


def write_vector(deltas: Mapping[str, Delta], card: RunCard, folder: Path) -> Path:
    """Write a vector's deltas so that `PeftModel.from_pretrained(base, folder)` is theta + 1 w.

    Factored weights go to `adapter_model.safetensors` with lora_alpha = r (scale 1, everything in
    B; lower ranks are padded with zeros, since engines differ in how they scale them), other deltas
    to `delta.safetensors` in float32, which PEFT ignores; the card to `weightsteer.json`. One parameter is in memory
    at a time.

    Raises:
        SteerError: a NaN or infinite entry, or a folder that holds something else.
    """
    factored: dict[str, LowRank] = {}  # the shapes only: meta tensors
    dense: dict[str, tuple[int, ...]] = {}
    layouts: dict[str, str] = {}
    for name, delta in deltas.items():
        if isinstance(delta, LowRank):
            require_finite(name, delta)
            assert name.endswith(".weight"), f"{name}: an adapter's factors belong to a weight"
            factored[name] = LowRank(delta.B.to("meta"), delta.A.to("meta"), delta.layout)
        else:
            dense[name] = tuple(delta.shape)
            if layout_of(delta) != "linear":
                layouts[name] = layout_of(delta)
    with new_folder(folder, "vector") as part:
        if factored or not dense:
            _write_adapter(deltas, card, factored, part)
        if dense:
            plan = {name: Planned("F32", shape) for name, shape in dense.items()}
            write_stream(part / DENSE_FILE, plan, _dense_blocks(deltas, plan), layouts=json.dumps(layouts))
        save_card(card, part)
    return folder


def save_card(card: RunCard, folder: Path) -> None:
    """Write a vector's card, and the README that says the same to people; a pack is an ordinary vector from then on."""
    drop_manifest(folder)
    card.save(folder)
    adapter, dense = ((folder / name).is_file() for name in (ADAPTER_FILE, DENSE_FILE))
    write_text(folder / README, vector_readme(card, adapter=adapter, dense=dense))


def _write_adapter(deltas: Mapping[str, Delta], card: RunCard, factored: Mapping[str, LowRank], part: Path) -> None:
    rank = max([1, *(delta.rank for delta in factored.values())])
    plan = {
        key: Planned("F32", tuple(tensor.shape))
        for name, delta in factored.items()
        for key, tensor in adapter_tensors(name, delta, rank).items()
    }
    layouts = {name: delta.layout for name, delta in factored.items()}
    mixed = {"conv1d", "linear"} <= set(layouts.values())  # the config has one flag for all
    marks = {"layouts": json.dumps({n: layout for n, layout in layouts.items() if layout == "linear"})} if mixed else {}
    write_stream(part / ADAPTER_FILE, plan, _adapter_blocks(deltas, factored, rank), **marks)
    config = adapter_config(layouts, rank, card)
    (part / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def _adapter_blocks(deltas: Mapping[str, Delta], names: Mapping[str, LowRank], rank: int) -> Iterator[Tensor]:
    for name in names:
        delta = deltas[name]
        assert isinstance(delta, LowRank)
        yield from adapter_tensors(name, delta, rank).values()


def _dense_blocks(deltas: Mapping[str, Delta], plan: Mapping[str, Planned]) -> Iterator[Tensor]:
    for name in plan:
        delta = deltas[name]
        for start, stop in blocks(delta.shape):
            block = rows_of(delta, start, stop)
            require_finite(name, block)
            yield block


def open_vector(folder: Path) -> tuple[Mapping[str, Delta], RunCard]:
    """Open what `write_vector` wrote (see `WeightVector.load`)."""
    require_as_packed(folder)
    if not folder.exists():
        raise SteerError(f"{folder}: no such folder; expected a saved weight vector")
    if not (folder / CARD_FILE).is_file():
        raise SteerError(
            f"{folder}: not a saved weight vector (no {CARD_FILE}); "
            "make one with `weightsteer subtract POSITIVE NEGATIVE -o OUT`"
        )
    card = RunCard.load(folder)
    if card.kind != "vector":
        raise SteerError(f"{folder}: holds a {card.kind}, expected a vector; see `weightsteer show`")
    named = require_files(folder)  # the cards of older versions do not name them
    expected = (folder / ADAPTER_CONFIG).is_file() or not (folder / DENSE_FILE).is_file()
    if not named and expected and not (folder / ADAPTER_FILE).is_file():
        raise lost_file(folder / ADAPTER_FILE)
    makers = _factored(folder) if (folder / ADAPTER_FILE).exists() else {}
    if (folder / DENSE_FILE).exists():
        dense = dense_file(folder / DENSE_FILE)
        makers |= {name: partial(dense.__getitem__, name) for name in dense}
    return LazyDeltas(makers), card


def _factored(folder: Path) -> dict[str, Callable[[], Delta]]:
    """What makes the factored deltas; where linear ones lie beside those of Conv1D, the file names them."""
    found: dict[str, Callable[[], Delta]] = dict(read_adapter(folder).deltas)
    path = folder / ADAPTER_FILE
    text = SafeFile(path).metadata.get("layouts", "{}")
    for name in checked(dict[str, Literal["linear"]], parse_json(text, f"{path}: layouts"), str(path)):
        if name in found:
            found[name] = partial(_as_linear, found[name])
    return found


def _as_linear(make: Callable[[], Delta]) -> Delta:
    """A delta that was read in the orientation of Conv1D."""
    delta = make()
    return LowRank(delta.A.T, delta.B.T) if isinstance(delta, LowRank) else delta


def dense_file(path: Path) -> dict[str, Streamed]:
    """The deltas of a file of dense deltas, which stay there until they are used."""
    file = SafeFile(path)
    layouts = checked(dict[str, Layout], parse_json(file.metadata.get("layouts", "{}"), f"{path}: layouts"), str(path))
    if unknown := sorted(layouts.keys() - file.tensors.keys()):
        raise SteerError(f"{path}: layouts names {unknown[0]}, of which there is no tensor; make the vector again")
    for name, tensor in file.tensors.items():
        if tensor.dtype not in {*FLOATS, "F64"}:
            raise SteerError(f"{path}: {name}: expected floating-point numbers, found {tensor.dtype}")
    return {
        name: Streamed(((1.0, tensor),), tensor.shape, layouts.get(name, "linear"))
        for name, tensor in file.tensors.items()
    }
