"""Passes of a model without weights: training steps, reading and writing, each traced with fake tensors."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import SteerError
from ..lm import LM
from ..model_parts import call_on_cache
from ..training.settings import WholeSettings
from ..training.trainables import trainable
from .devices import Device
from .shaped_model import ShapedModel, as_fake
from .tracing import Trace, Tracker

ADAM_BYTES = 8  # a trained number's two moments in float32
ROWS = 4  # of the passes whose time is traced
LEAST_LENGTH = 16
STEP_TRAFFIC = 44  # bytes moved a trained number: clipping the gradients, then Adam


@dataclass(frozen=True)
class Reading:
    """`rows` of `new` tokens each, after `past` cached ones; logits at `projected` positions of them all.

    `rank`: of the low-rank vector that steers; 0: none.
    """

    rows: int
    new: int
    past: int = 0
    projected: int = 0
    rank: int = 0
    cached: bool = False  # keys and values are kept for what follows

    @property
    def tokens(self) -> int:
        """Tokens that are computed, padding included."""
        return self.rows * self.new


@dataclass(frozen=True)
class Step:
    """One forward and backward pass of a training: `rows` of `length` tokens, with the loss at `answers` of them."""

    rows: int
    length: int
    answers: int
    kind: str = "lora"
    rank: int = 32
    bf16: bool = False
    checkpointing: bool = False

    @property
    def tokens(self) -> int:
        """Tokens that are computed, padding included."""
        return self.rows * self.length


@dataclass(frozen=True)
class Cost:
    """One pass: its trace, and the bytes of the keys and values that it leaves."""

    trace: Trace
    cache: float = 0.0


@dataclass(eq=False)
class Passes:
    """The passes of one model on one device."""

    model: ShapedModel
    tokenizer: PreTrainedTokenizerBase
    device: Device

    def __post_init__(self) -> None:
        self.fake = FakeTensorMode()
        self.cost = lru_cache(maxsize=None)(self._cost)
        self._plain = lru_cache(maxsize=None)(self._fake_model)
        self._training = lru_cache(maxsize=None)(self._trained_model)

    def seconds(self, made: Reading | Step) -> float:
        """The time of one pass, between those of shapes whose lengths are powers of four; the head's is added."""
        answers = made.answers if isinstance(made, Step) else made.projected
        return self._body(made) + self._head(answers, trained=isinstance(made, Step))

    def _body(self, made: Reading | Step) -> float:
        rows = min(ROWS, _up(made.rows))  # of the traced shape; more rows take as much more
        if isinstance(made, Step):
            step = replace(made, rows=rows, answers=1)
            return _between(made.length, lambda n: self._timed(replace(step, length=n))) * made.rows / rows
        if made.new == 1:
            form = replace(made, projected=1, cached=True)
            return _between(made.past, lambda n: self._timed(replace(form, past=n)))
        read = replace(made, rows=rows, past=0, projected=1, cached=True)
        alone = _between(made.new, lambda n: self._timed(replace(read, new=n))) * made.rows / rows
        return alone + self._attention(made)

    def _attention(self, made: Reading) -> float:
        """What attending to cached tokens adds to a pass over new ones."""
        config = self.model.config.get_text_config()
        flops = 4.0 * made.rows * made.new * made.past * config.hidden_size * self.model.blocks
        return self.device.seconds_of(flops, 0.0, narrow=self.model.dtype != torch.float32)

    def _timed(self, made: Reading | Step) -> float:
        return self.cost(made).trace.seconds(self.device)

    def _head(self, answers: int, *, trained: bool) -> float:
        """The vocabulary projection and its softmax at so many positions: 2 products with a backward pass, else 1."""
        if not answers:
            return 0.0
        whole: Any = self.model.whole
        rows, width = whole.get_output_embeddings().weight.shape
        size, products = self.model.dtype.itemsize, 2 if trained else 1
        narrow = self.model.dtype != torch.float32
        flops, weights = 2.0 * rows * width * answers, rows * width * size
        softmax = rows * answers * 4 * (10 if trained else 4)  # bytes of float32 rows, read and written
        return products * self.device.seconds_of(flops, weights, narrow=narrow) + softmax / self.device.bandwidth

    def _cost(self, made: Reading | Step) -> Cost:
        run: Callable[[Any, int], Cost] = self._read if isinstance(made, Reading) else self._train
        try:
            found = [run(made, blocks) for blocks in self.model.depths]
        except (RuntimeError, AssertionError, TypeError) as error:
            raise SteerError(
                f"{self.model.name}: its passes cannot be planned without weights ({str(error).splitlines()[0]}); "
                "run the recipe with --dry-run instead"
            ) from None
        if len(found) == 1:
            return found[0]
        (first, second), (few, many), all_ = found, self.model.depths, self.model.blocks
        share = (all_ - few) / (many - few)
        return Cost(
            first.trace.extended(second.trace, few, many, all_),
            first.cache + share * (second.cache - first.cache),
        )

    def trained_parameters(self, kind: str, rank: int) -> int:
        """How many numbers a training of that kind trains."""
        if kind == "full":
            return self.model.parameters
        counts = [
            sum(p.numel() for p in self._training(blocks, kind, rank, False).parameters() if p.requires_grad)
            for blocks in self.model.depths
        ]
        if len(counts) == 1:
            return counts[0]
        few, many = self.model.depths
        return counts[0] + (self.model.blocks - few) * (counts[1] - counts[0]) // (many - few)

    def _fake_model(self, blocks: int) -> PreTrainedModel:
        model = self.model.with_blocks(blocks)
        as_fake(model, self.fake)
        return model

    def _trained_model(self, blocks: int, kind: str, rank: int, checkpointing: bool) -> nn.Module:
        """A model as `training` makes it ready, with fewer blocks."""
        model: Any = self.model.with_blocks(blocks)
        if kind == "full":
            ready: Any = model.requires_grad_(True)
        else:
            lm = LM(model, self.tokenizer, self.model.name)
            with trainable(lm, WholeSettings(kind=kind, rank=rank)) as made:
                ready = copy.deepcopy(made.model)  # what is undone on leaving stays in the copy
            model = ready.get_base_model() if isinstance(ready, PeftModel) else ready
        as_fake(ready, self.fake)
        if checkpointing:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # newer transformers have another name for it
                model.gradient_checkpointing_enable()
            model.enable_input_require_grads()
        ready.train()
        assert isinstance(ready, nn.Module)
        return ready

    def _train(self, made: Step, blocks: int) -> Cost:
        ready: Any = self._training(blocks, made.kind, made.rank, made.checkpointing)
        base = ready.get_base_model() if hasattr(ready, "get_base_model") else ready
        for parameter in ready.parameters():
            parameter.grad = None
        with self.fake:
            ids, mask = _inputs(made.rows, made.length, 0)
            places = torch.zeros(max(1, made.answers), dtype=torch.long)
        tracker = Tracker(ready, self.device)
        precise = torch.autocast("cpu", torch.bfloat16) if made.bf16 else nullcontext()
        with self.fake, tracker, projecting_some(base, places, tracker):
            with precise:
                logits = ready(input_ids=ids, attention_mask=mask, use_cache=False).logits[0]
            nn.functional.cross_entropy(logits.float(), places, reduction="sum").backward()
        return Cost(tracker.trace)

    @torch.no_grad()
    def _read(self, made: Reading, blocks: int) -> Cost:
        model = self._plain(blocks)
        with self.fake:
            ids, mask = _inputs(made.rows, made.new, made.past)
            places = torch.zeros(made.projected, dtype=torch.long)
            cache = self._cache_of(model, made.rows, made.past) if made.past else None
            tracker = Tracker(model, self.device)
            tracker.hold(_tensors_of_cache(cache))
            with steering(model, made.rank), tracker, projecting_some(model, places, tracker):
                if made.cached or made.past:
                    out, cache = call_on_cache(model, cache, input_ids=ids, attention_mask=mask)
                else:
                    out = model(input_ids=ids, attention_mask=mask, use_cache=False)
                if made.projected:
                    torch.log_softmax(out.logits[0].float(), dim=-1)
            return Cost(tracker.trace, _bytes_of_cache(cache))

    def _cache_of(self, model: Any, rows: int, past: int) -> Any:
        ids, mask = _inputs(rows, past, 0)
        _, cache = call_on_cache(model, None, input_ids=ids, attention_mask=mask, logits_to_keep=1)
        return cache


@contextmanager
def steering(model: PreTrainedModel, rank: int) -> Iterator[None]:
    """Add a low-rank product to every linear layer but the head, with the operations of `vectors.hooks`."""
    head, hooks = model.get_output_embeddings(), []

    def adding(layer: nn.Linear) -> Callable[..., Tensor]:
        into = torch.zeros(layer.in_features, rank, dtype=layer.weight.dtype)
        out = torch.zeros(rank, layer.out_features, dtype=layer.weight.dtype)

        def add(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            hidden = torch.mm(args[0].to(output).reshape(-1, into.shape[0]), into)
            return output.reshape(-1, output.shape[-1]).addmm_(hidden, out).view_as(output)

        return add

    if rank:
        layers = [m for m in model.modules() if isinstance(m, nn.Linear) and m is not head]
        hooks = [layer.register_forward_hook(adding(layer)) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def projecting_some(model: Any, places: Tensor, tracker: Tracker) -> Iterator[None]:
    """Project so many positions onto the vocabulary, as `projecting_only` does; the tracker notes what lives before."""

    def select(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        tracker.mark()
        hidden = args[0]
        return (hidden.reshape(-1, hidden.shape[-1]).index_select(0, places).unsqueeze(0), *args[1:])

    handle = model.get_output_embeddings().register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()


def _inputs(rows: int, new: int, past: int) -> tuple[Tensor, Tensor]:
    """Ids and a mask as batches with padding have it: to be called with fake tensors on."""
    return torch.zeros(rows, new, dtype=torch.long), torch.ones(rows, 1, new, past + new, dtype=torch.bool)


def _tensors_of_cache(cache: Any) -> list[Tensor]:
    found = [getattr(layer, name, None) for layer in getattr(cache, "layers", ()) for name in ("keys", "values")]
    return [tensor for tensor in found if isinstance(tensor, Tensor)]


def _bytes_of_cache(cache: Any) -> float:
    return float(sum(tensor.numel() * tensor.element_size() for tensor in _tensors_of_cache(cache)))


def _up(number: int) -> int:
    """The next power of two."""
    return 1 << max(0, number - 1).bit_length()


def _between(length: int, seconds: Callable[[int], float]) -> float:
    """The time at a length, from those at the powers of four around it."""
    high = LEAST_LENGTH
    while high < length:
        high *= 4
    low = high // 4
    return seconds(low) + (seconds(high) - seconds(low)) * (length - low) / (high - low)
