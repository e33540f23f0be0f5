"""Replies as token ids: plain greedy decoding or plain sampling, whatever the model's own settings ask for."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypedDict
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

from .batches import batches_by_length, batches_of_one_length, pad_left, rows_of_batch
from .continuous_batching import COLDEST, has_one_k, why_not, write_packed
from .errors import SteerError
from .fitting import in_parts
from .progress import Progress
from .schema import shown
from .thinking import MARKERS, Reply, split_thinking

MOST_NEW_TOKENS = 1_000_000  # no model's context is longer

# How far two computations of the same logits may lie apart, as a share of the largest of them.
EXACT = {torch.float32: 1e-3, torch.float64: 1e-3}
FINER, COARSE = 0.01, 0.03  # in float16; in bfloat16 and what is coarser
LOOSEST = 0.2  # for a model whose own rounding is larger
STEPS = 4  # that a model is tried for


class HowWritten(TypedDict):
    """How replies are written."""

    max_new_tokens: int  # of a reply
    temperature: float  # 0: the likeliest token
    batch_size: int  # prompts at once, at most


class AtText(StoppingCriteria):
    """Ends a row once it has written `text`; `start` is where the replies begin."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, text: str, start: int) -> None:
        self.tokenizer, self.text, self.start = tokenizer, text, start
        self.window = len(text.encode()) + 2  # tokens: no token of it is shorter than a byte

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        """(batch, length) ids -> (batch,) whether each row is done."""
        tails = input_ids[:, max(self.start, input_ids.shape[1] - self.window) :]
        done = [self.text in tail for tail in self.tokenizer.batch_decode(tails)]
        return torch.tensor(done, device=input_ids.device)


class AtWish(StoppingCriteria):
    """Ends all rows once `stopped` says so, which is asked after each token."""

    def __init__(self, stopped: Callable[[], bool]) -> None:
        self.stopped = stopped

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        """(batch, length) ids -> (batch,) whether each row is done."""
        return torch.full((input_ids.shape[0],), self.stopped(), device=input_ids.device)


class TokenCount(BaseStreamer):
    """Tells a progress how many tokens of at most `most` each row of a batch has."""

    def __init__(self, progress: Progress, most: int) -> None:
        self.progress, self.most, self.done = progress, most, -1  # the prompts come first

    def put(self, value: Tensor) -> None:
        """One more token of each row."""
        self.done += 1
        self.progress(self.done, self.most, "tokens")

    def end(self) -> None:
        """No more tokens come."""
        if self.done < self.most:
            self.progress(self.most, self.most, "tokens")


class NotNumbers(LogitsProcessor):
    """Remembers the rows whose logits were not numbers, and lets the others go on."""

    def __init__(self) -> None:
        self.rows: set[int] = set()

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """(batch, vocabulary) logits, as they are where they are numbers."""
        broken = scores.isnan().any(dim=-1)
        if not broken.any():
            return scores
        self.rows |= set(broken.nonzero()[:, 0].tolist())
        return torch.where(broken[:, None], torch.zeros_like(scores), scores)


@contextmanager
def _own_settings_aside(model: PreTrainedModel) -> Iterator[None]:
    """Take the model's generation settings away: `generate` would fill in from them all that it is not told."""
    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


@dataclass(frozen=True)
class Writer:
    """A model that writes replies, and what ends them."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    pad: int
    device: torch.device
    stops: Sequence[int]  # tokens that end a reply
    stop_text: str | None  # words that do
    continuous: bool = False  # by continuous batching, where the model and the strengths allow it
    context: int | None = None  # places of the model's context, where it says how many

    def room(self, row: Sequence[int], wanted: int) -> int:
        """How many of the wanted tokens have a place after a row; the last one is not read, so it needs none."""
        if not 0 < wanted <= MOST_NEW_TOKENS:
            raise SteerError(f"max_new_tokens: expected 1 to {MOST_NEW_TOKENS}, found {shown(wanted)}")
        return wanted if self.context is None else min(wanted, self.context - len(row) + 1)

    def batches(self, lengths: Sequence[int], batch_size: int, progress: Progress) -> Iterator[list[int]]:
        """Batches of indices of prompts: of like length, of one length, or of one, as the model takes them."""
        several = len(lengths) > 1 and batch_size > 1
        together = rows_together(self.model, self.pad, self.device) if several else "padded"
        if together == "of one length":
            return batches_of_one_length(lengths, batch_size, progress)
        return batches_by_length(lengths, 1 if together == "alone" else batch_size, progress)

    def replies(
        self,
        rows: Sequence[Sequence[int]],
        opened: Sequence[bool],
        *,
        max_new_tokens: int,
        temperature: float,
        batch_size: int,
        progress: Progress,
        streamer: BaseStreamer | None,
    ) -> list[Reply]:
        """A reply to each row of ids, in batches that memory allows; `opened`: the prompt has begun its thinking.

        A row that is too long for all the tokens gets those that fit, in a batch of its own: beside others it would
        be padded beyond the context.
        """
        found = [Reply("")] * len(rows)
        sizes = [len(row) + max_new_tokens for row in rows]
        rooms = [self.room(row, max_new_tokens) for row in rows]
        whole = [i for i, room in enumerate(rooms) if room == max_new_tokens]

        def write(part: list[int]) -> list[Reply]:
            with rows_of_batch(part, len(rows)):
                written = self.write([rows[i] for i in part], rooms[part[0]], temperature, streamer=streamer)
            ends = zip(*written, (opened[i] for i in part), strict=True)
            return [self.reply(ids, opened=begun, broken=broken) for ids, broken, begun in ends]

        if rows and len(whole) == len(rows) and streamer is None and self._packs():
            progress(0, len(rows))
            packed = self._packed(rows, max_new_tokens, temperature, batch_size)
            if packed is not None:
                progress(len(rows), len(rows))
                ends = zip(packed, opened, strict=True)
                return [self.reply(ids, opened=begun, broken=broken) for (ids, broken), begun in ends]
        for numbers in self.batches([len(rows[i]) for i in whole], batch_size, progress):
            batch = [whole[number] for number in numbers]
            for index, reply in zip(batch, in_parts(self.model, "generate", batch, sizes, write), strict=True):
                found[index] = reply
        for index in sorted({*range(len(rows))} - {*whole}):
            (found[index],) = write([index])
        return found

    def _packs(self) -> bool:
        """Whether replies are written by continuous batching; a warning says why a model is not."""
        if not self.continuous or self.stop_text is not None:
            return False
        row = sample_ids(self.model, 11)

        def plainly() -> list[Tensor]:
            return _first_steps(self.model, *pad_left([row], self.pad, self.device), self.pad)

        if not has_one_k(self.model, row):
            return False
        if reason := why_not(self.model, self.pad, row, plainly, rounding_of(self.model)):
            warnings.warn(f"{reason}; padded batches are used", stacklevel=2)
        return not reason

    def _packed(
        self, rows: Sequence[Sequence[int]], max_new_tokens: int, temperature: float, most: int
    ) -> list[tuple[list[int], bool]] | None:
        """What follows each row, by continuous batching; None, with a warning, where transformers gives up."""
        try:
            return write_packed(
                self.model,
                rows,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                stops=self.stops,
                pad=self.pad,
                most=most,
            )
        except SteerError as error:
            warnings.warn(f"{error}; padded batches are used", stacklevel=2)
            return None

    @torch.no_grad()
    def write(
        self,
        rows: Sequence[Sequence[int]],
        max_new_tokens: int,
        temperature: float = 0.0,
        *,
        streamer: BaseStreamer | None = None,
        stopped: Callable[[], bool] | None = None,
    ) -> tuple[list[list[int]], list[bool]]:
        """The ids that follow each row, and whether its logits were not numbers; the likeliest at temperature 0.

        Rows that end early are filled up. `stopped` is asked after each token whether to end there.
        """
        tokens, mask = pad_left(rows, self.pad, self.device)
        sampling: Mapping[str, Any] = {"do_sample": False}
        if temperature >= COLDEST:
            sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        endings: list[StoppingCriteria] = [AtWish(stopped)] if stopped else []
        if self.stop_text:
            endings.append(AtText(self.tokenizer, self.stop_text, tokens.shape[1]))
        checked = NotNumbers()
        with _own_settings_aside(self.model):
            out = self.model.generate(  # type: ignore[operator]
                input_ids=tokens,
                attention_mask=mask,
                max_new_tokens=max_new_tokens,
                pad_token_id=self.pad,
                eos_token_id=list(self.stops) or None,
                logits_processor=LogitsProcessorList([checked]),
                stopping_criteria=StoppingCriteriaList(endings),
                streamer=streamer,
                **sampling,
            )
        return out[:, tokens.shape[1] :].tolist(), [row in checked.rows for row in range(len(rows))]

    def reply(self, ids: Sequence[int], *, opened: bool, broken: bool) -> Reply:
        """What the model wrote, up to its end; `opened`: the prompt has begun its thinking."""
        if broken:
            return Reply(None, ended=False, broken=True)
        end = next((place for place, token in enumerate(ids) if token in self.stops), None)
        text, ended = visible_text(self.tokenizer, ids[:end]), end is not None
        if self.stop_text and self.stop_text in text:
            text, ended = text.partition(self.stop_text)[0], True
        thinking, answer = split_thinking(text, opened=opened)
        return Reply(answer, thinking, ended)


def visible_text(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """Text without control tokens, but with those that mark thinking."""
    hidden = hidden_tokens(tokenizer)
    return str(tokenizer.decode([token for token in ids if token not in hidden], skip_special_tokens=False))


def hidden_tokens(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The control tokens, which are no part of a reply; those that mark thinking are."""
    marks = "".join(mark for pair in MARKERS for mark in pair)
    added = tokenizer.added_tokens_decoder
    hidden = {i for i, token in added.items() if token.special} | set(tokenizer.all_special_ids)
    return hidden - {i for i in hidden if i in added and str(added[i]) in marks}


Together = Literal["padded", "of one length", "alone"]  # the batches in which a row is written as it is alone
_TOGETHER: WeakKeyDictionary[PreTrainedModel, Together] = WeakKeyDictionary()


def rows_together(model: PreTrainedModel, pad: int, device: torch.device) -> Together:
    """In which batches a model writes what it writes alone, tried once for each model.

    A model that keeps a state and takes no mask does not forget what padding on the left does to it; with some a
    state is not kept row by row either.
    """
    if model not in _TOGETHER:
        _TOGETHER[model] = _try_together(model, pad, device)
    return _TOGETHER[model]


def _try_together(model: PreTrainedModel, pad: int, device: torch.device) -> Together:
    """Write a few tokens after a short row: alone, beside a longer one, and beside one of its length."""
    row, longer, other = sample_ids(model, 11), sample_ids(model, 20), sample_ids(model, 11, 40)
    tries: tuple[tuple[Together, list[int]], ...] = (("padded", longer), ("of one length", other))
    for how, second in tries:
        try:
            rounding = rounding_of(model)
            alone = _first_steps(model, *pad_left([row], pad, device), pad)
            taken = [int(logits.argmax()) for logits in alone]
            beside = _first_steps(model, *pad_left([row, second], pad, device), pad, taken)
            if all(agree(one, other, rounding) for one, other in zip(alone, beside, strict=True)):
                return how
        except (RuntimeError, ValueError, IndexError, TypeError, AttributeError):  # it does not even take that
            continue
    return "alone"


class Taken(LogitsProcessor):
    """Has every row take the given tokens, whatever its logits say; `start` is where they begin."""

    def __init__(self, tokens: Sequence[int], start: int) -> None:
        self.tokens, self.start = tokens, start

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """(batch, vocabulary) logits of which one alone is possible."""
        only = torch.full_like(scores, -torch.inf)
        only[:, self.tokens[input_ids.shape[1] - self.start]] = 0.0
        return only


@torch.no_grad()
def _first_steps(
    model: PreTrainedModel, tokens: Tensor, mask: Tensor, pad: int, taken: Sequence[int] | None = None
) -> list[Tensor]:
    """Logits (vocabulary,) of the first row's next tokens: the likeliest, or those `taken` before.

    Where each prompt has a k of its own, all rows take the first.
    """
    with _own_settings_aside(model), rows_of_batch([0] * len(tokens)):
        out = model.generate(  # type: ignore[operator]
            input_ids=tokens,
            attention_mask=mask,
            max_new_tokens=STEPS,
            pad_token_id=pad,
            do_sample=False,
            logits_processor=LogitsProcessorList([Taken(taken, tokens.shape[1])] if taken else []),
            output_logits=True,
            return_dict_in_generate=True,
        )
    return [logits[0] for logits in out.logits]


def sample_ids(model: PreTrainedModel, count: int, start: int = 0) -> list[int]:
    """Ids that the model has, the same each time."""
    weight: Tensor = model.get_input_embeddings().weight  # type: ignore[assignment]
    return [(7919 * (start + i) + 13) % weight.shape[0] for i in range(count)]


_ROUNDING: WeakKeyDictionary[PreTrainedModel, float] = WeakKeyDictionary()


def rounding_of(model: PreTrainedModel) -> float:
    """How far two computations of the same logits may lie apart in this model, as a share of the largest; tried once.

    Some models round far more than others: Gemma 3 of 270M in bfloat16 is 6% off where a row is computed beside copies
    of itself. The logits' own dtype does not tell it, since `generate` gives float32 for every model. In float32 what
    copies of a row change is no rounding.
    """
    if model.dtype in EXACT:
        return EXACT[model.dtype]
    if model not in _ROUNDING:
        usual, noise = FINER if model.dtype == torch.float16 else COARSE, _noise(model)
        if noise is None:
            return usual
        _ROUNDING[model] = max(usual, min(LOOSEST, 3 * noise))
    return _ROUNDING[model]


@torch.no_grad()
def _noise(model: PreTrainedModel) -> float | None:
    """How far a row's logits are moved by copies of it in the batch; None where that is no number now."""
    row = sample_ids(model, 11)
    found = []
    for copies in (1, 3):
        with rows_of_batch([0] * copies):
            tokens = torch.tensor([row] * copies, device=model.device)
            found.append(model(input_ids=tokens).logits[0, -1].float())
    noise = float((found[0] - found[1]).abs().max() / found[0].abs().max())
    return noise if math.isfinite(noise) else None


def agree(first: Tensor, second: Tensor, rounding: float) -> bool:
    """Whether two computations of the same logits differ by a model's rounding alone."""
    return float((first - second).abs().max()) <= rounding * float(first.abs().max())


def positions(mask: Tensor) -> Tensor:
    """Position ids (batch, length) that count real tokens only; padding takes position 0 or repeats."""
    return (mask.cumsum(dim=1) - 1).clamp(min=0)


def takes_positions(model: PreTrainedModel) -> bool:
    """Whether the model can be told the tokens' positions; one that cannot counts them itself, padding included."""
    return "position_ids" in inspect.signature(model.forward).parameters
