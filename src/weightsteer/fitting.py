"""How many rows a model takes at once: begun from an estimate of memory, halved each time that does not suffice.

A limit is a number of tokens, rows times the longest of them, since that is what memory goes by. What was found holds
for the model until the program ends, and in `kept_in` it stays in a file of the run, so that a later call begins there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar
from weakref import WeakKeyDictionary

import psutil
import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import nn

from .errors import SteerError
from .files import read_kept, write_json
from .model_parts import decoder_blocks

Work = Literal["score", "generate", "activations", "validate", "train"]
Part = TypeVar("Part")

USED = 0.8  # of the free memory: what an estimate leaves out takes the rest
ON_CPU, ON_ACCELERATOR = 16, 256  # prompts in a batch where no number is given; memory may allow fewer
FLOAT32 = 4  # bytes


@dataclass
class Limits:
    """What worked so far: the most tokens at once for each kind of work, of one run."""

    path: Path | None = None
    tokens: dict[str, int] = field(default_factory=dict)

    def lower(self, work: Work, tokens: int) -> None:
        """Never take more again."""
        self.tokens[work] = min(tokens, self.tokens.get(work, tokens))
        if self.path is not None:
            write_json(self.path, self.tokens)


_KEPT: ContextVar[Limits | None] = ContextVar("the limits of this run", default=None)
_OF_MODEL: WeakKeyDictionary[nn.Module, Limits] = WeakKeyDictionary()
_ESTIMATES: WeakKeyDictionary[nn.Module, dict[str, float]] = WeakKeyDictionary()


@contextmanager
def kept_in(path: Path) -> Iterator[None]:
    """Inside, limits come from a file and go there; a run around this one keeps them instead."""
    if _KEPT.get() is not None:
        yield
        return
    token = _KEPT.set(Limits(path, read_kept(path, dict[str, int]) or {}))
    try:
        yield
    finally:
        _KEPT.reset(token)


def in_parts(
    model: nn.Module,
    work: Work,
    batch: Sequence[int],
    lengths: Sequence[int],
    compute: Callable[[list[int]], Sequence[Part]],
) -> list[Part]:
    """What `compute` gives for the rows of a batch, together or in as many parts as memory asks for, in their order.

    Args:
        batch: indices of rows.
        lengths: tokens of every row that there is, by index; those that it is yet to write count too.
        compute: called with a part of the batch; called again with less of it where memory did not suffice.

    Raises:
        SteerError: memory does not suffice for one row.
    """
    found: list[Part] = []
    todo = list(batch)
    while todo:
        most = tokens_within(model, work)
        count = max(1, min(len(todo), _rows_within(most, [lengths[i] for i in todo])))
        part = todo[:count]
        longest = max(lengths[i] for i in part)
        try:
            found += compute(part)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if count == 1:
                raise SteerError(
                    f"memory does not suffice to {work} one text of {longest} tokens; load the model with quantize "
                    "nf4, spread it with device auto, or shorten the text"
                ) from None
        else:
            todo = todo[count:]
            continue
        lower(model, work, count // 2 * longest)  # outside the except: the error holds on to the memory
        free_memory()
    return found


def _rows_within(most: float, lengths: Sequence[int]) -> int:
    """How many of the first rows fit, padded to the longest of them."""
    longest, count = 0, 0
    for length in lengths:
        longest = max(longest, length)
        if (count + 1) * longest > most:
            break
        count += 1
    return count


def tokens_within(model: nn.Module, work: Work, *, checkpointing: bool = False) -> float:
    """The most tokens at once: what worked, or before anything failed an estimate, made once for each model."""
    kept = _limits_of(model).tokens.get(work)
    known, key = _ESTIMATES.setdefault(model, {}), f"{work} {checkpointing}"
    if key not in known:
        free = free_bytes(_device_of(model))
        known[key] = USED * free / bytes_per_token(model, work, checkpointing=checkpointing)
    return known[key] if kept is None else min(kept, known[key])


def lower(model: nn.Module, work: Work, tokens: int) -> None:
    """Never take more tokens at once again."""
    _limits_of(model).lower(work, max(1, tokens))


def _limits_of(model: nn.Module) -> Limits:
    return _KEPT.get() or _OF_MODEL.setdefault(model, Limits())


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device, or the machine, has too little memory."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, Exception) and should_reduce_batch_size(error)


def free_memory() -> None:
    """Give back what a failed computation has left."""
    clear_device_cache(garbage_collection=True)


def rows_by_default(device: torch.device) -> int:
    """Prompts in a batch where the user gives no number; on an accelerator memory decides."""
    return ON_CPU if device.type == "cpu" else ON_ACCELERATOR


def free_bytes(device: torch.device) -> float:
    """Memory that can be taken on a device: infinite where it does not tell."""
    if device.type == "cpu":
        return float(psutil.virtual_memory().available)
    module: Any = getattr(torch, device.type, None)
    if not hasattr(module, "mem_get_info"):
        return math.inf
    free, _ = module.mem_get_info(device)
    return float(free + module.memory_reserved(device) - module.memory_allocated(device))  # torch's own reserve


def _device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def bytes_per_token(model: nn.Module, work: Work, *, checkpointing: bool = False) -> float:
    """An estimate of the memory that a token takes while the model computes, its weights apart.

    A layer of a block holds its input and output; a training keeps those of all blocks, in float32 where LoRA is
    trained, and with checkpointing those of one block and each block's input.
    """
    sized: Any = model
    config = sized.config.get_text_config()
    item = torch.finfo(sized.dtype).bits / 8
    blocks = [sum(map(_width, block.modules())) for block in _blocks(model)]
    logits = 2 * FLOAT32 * float(getattr(config, "vocab_size", 0))
    if work == "train":
        kept = max(blocks) if checkpointing else sum(blocks)
        inputs = len(blocks) * float(getattr(config, "hidden_size", 0)) * item if checkpointing else 0.0
        return max(1.0, FLOAT32 * kept + inputs + 1.5 * logits)
    cache = 0.0 if work in ("activations", "validate") else 2 * len(blocks) * _kv_width(config) * item
    return max(1.0, item * max(blocks) + cache + (logits if work in ("score", "validate") else 0.0))


def _blocks(model: nn.Module) -> Sequence[nn.Module]:
    """The decoder blocks; the whole model where it has none that are known."""
    try:
        return list(decoder_blocks(model))
    except SteerError:
        return [model]


def _width(module: nn.Module) -> int:
    """Inputs and outputs of a linear layer, 0 of anything else."""
    pairs = (("in_features", "out_features"), ("nx", "nf"))
    sizes = [getattr(module, name, 0) for pair in pairs for name in pair]
    return sum(size for size in sizes if isinstance(size, int))


def _kv_width(config: Any) -> float:
    """Numbers in one token's keys of one layer."""
    hidden, heads = getattr(config, "hidden_size", 0) or 0, getattr(config, "num_attention_heads", 0) or 1
    head = getattr(config, "head_dim", None) or hidden / heads
    return float(head * (getattr(config, "num_key_value_heads", None) or heads))
