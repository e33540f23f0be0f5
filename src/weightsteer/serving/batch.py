"""The decode loop: rows join a running batch, each at its own strengths, and leave it when they are done.

transformers' own continuous batching packs the tokens of all requests into one row, where nothing tells which k is
whose. Here each request is a row: its prompt is computed beside other new ones, and its keys and values are put below
those of the rows that run.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import DynamicCache

from ..batches import pad_left
from ..generation import agree, positions, rounding_of, rows_together, sample_ids, takes_positions
from ..lm import LM, projecting_only
from ..model_parts import call_on_cache
from .asked import Chance, Piece
from .choose import chances, choose
from .kv_cache import can_join, fresh_cache, join, keep_rows
from .rows import NOT_NUMBERS, Row
from .steering_rows import SteeringRows

# How rows share a batch: they may join one that runs; they start together; those of one length do; none does.
Sharing = Literal["joined", "padded", "of one length", "alone"]

LOGITS_BYTES = 1 << 28  # of the logits of a prompt that is scored: longer prompts are computed part by part
PROMPT_TOKENS = 8192  # of all prompts that are computed at once, padding included, if they are more than one
TRIED = RuntimeError, ValueError, IndexError, TypeError, AttributeError  # of a model that does not take what is tried


class Batch:
    """The rows that run."""

    def __init__(self, lm: LM, steering: SteeringRows, sharing: Sharing) -> None:
        self.lm, self.steering, self.sharing = lm, steering, sharing
        self.rows: list[Row] = []
        self._cache: Any = None
        self._mask: Tensor = torch.empty(0)
        self._tells_positions = takes_positions(lm.model)

    def admissible(self, waiting: Sequence[Row], most: int) -> list[Row]:
        """Which of the waiting rows can start now, in their order; `most`: rows in the batch at most.

        Rows of one job that belong side by side start together, if the batch can ever hold them all.
        """
        free = (1 if self.sharing == "alone" else most) - len(self.rows)
        if not waiting or free <= 0 or (self.rows and self.sharing != "joined"):
            return []
        first = waiting[0]
        if self.rows and not self._suits(self.rows[0], first):
            return []
        found: list[Row] = []
        for row in waiting:
            if len(found) == free:
                break
            if self._suits(first, row):
                found.append(row)
            elif self.rows:  # rows that pass others by would keep these waiting for ever
                break
        return self._whole_jobs(found, waiting, most)

    def _suits(self, first: Row, other: Row) -> bool:
        """Whether two rows can be in one batch."""
        if not self.steering.mixed and first.asked.strengths != other.asked.strengths:
            return False
        return self.sharing != "of one length" or len(first.asked.ids) == len(other.asked.ids)

    def _whole_jobs(self, found: list[Row], waiting: Sequence[Row], most: int) -> list[Row]:
        """Without the last job's rows, if not all of them have room and they are to run side by side."""
        if not found or not found[-1].job.together or not self.steering.mixed or self.sharing != "joined":
            return found
        job = found[-1].job
        started = any(row.job is job for row in self.rows)
        total = sum(row.job is job for row in waiting)
        if started or total > most or sum(row.job is job for row in found) == total:
            return found
        return [row for row in found if row.job is not job]

    @torch.no_grad()
    def add(self, rows: Sequence[Row]) -> Iterator[list[tuple[Row, Piece]]]:
        """Compute the prompts of new rows, some at a time, and choose their first tokens; yields what they write."""
        for part in self._parts(rows):
            yield self._start(part)

    def _parts(self, rows: Sequence[Row]) -> Iterator[list[Row]]:
        """Rows whose prompts, padded to the longest, are not too much for one pass; all if they cannot join later."""
        if self.sharing != "joined":
            yield list(rows)
            return
        part: list[Row] = []
        for row in sorted(rows, key=lambda each: len(each.asked.ids)):
            if part and (len(part) + 1) * len(row.asked.ids) > PROMPT_TOKENS:
                yield part
                part = []
            part.append(row)
        if part:
            yield part

    def _start(self, rows: list[Row]) -> list[tuple[Row, Piece]]:
        ids = [row.asked.ids for row in rows]
        tokens, mask = pad_left(ids, self.lm.pad_id, self.lm.device)
        self.steering.set([row.asked.strengths for row in rows])
        logits, cache, scored = self._read(rows, tokens, mask)
        written: list[tuple[Row, Piece]] = []
        for row, prompt in zip(rows, scored, strict=True):
            if prompt is not None and any(chance is not None and math.isnan(chance.log_prob) for chance in prompt):
                written.append((row, row.fail(NOT_NUMBERS)))
            elif prompt is not None:
                written.append((row, row.scored(prompt)))
            elif row.asked.max_tokens == 0:
                written.append((row, row.nothing_to_write()))
        written += self._choose(logits, rows)
        if self.rows:
            self._mask = join(self._cache, self._mask, cache, mask)
        else:
            self._cache, self._mask = cache, mask
        self.rows += rows
        return written

    def _read(
        self, rows: Sequence[Row], tokens: Tensor, mask: Tensor
    ) -> tuple[Tensor, Any, list[tuple[Chance | None, ...] | None]]:
        """The prompts (batch, length): the logits after each, their cache, and how likely their tokens were."""
        scored = torch.tensor([row.asked.prompt_top is not None for row in rows], device=mask.device)
        wanted = mask.bool() & scored[:, None]
        wanted[:, -1] = True
        cache = fresh_cache() if self.sharing == "joined" else None
        length, found = tokens.shape[1], []
        last = torch.empty(0)
        for start, stop in self._spans(wanted):
            with projecting_only(self.lm.model, wanted[:, start:stop]):
                out, cache = self._call(tokens[:, start:stop], mask[:, :stop], cache)
            logits = out.logits[0]
            if stop == length:
                ends = wanted[:, start:stop].sum(dim=1).cumsum(dim=0) - 1
                last = logits[ends.to(logits.device)].float()
            found += self._score(rows, tokens, wanted[:, start:stop], logits, start)
        prompts: list[list[Chance | None]] = [[None] for _ in rows]
        for place, chance in found:
            prompts[place].append(chance)
        return (
            last,
            cache,
            [
                tuple(prompt) if row.asked.prompt_top is not None else None
                for row, prompt in zip(rows, prompts, strict=True)
            ],
        )

    def _spans(self, wanted: Tensor) -> Iterator[tuple[int, int]]:
        """Where to cut prompts whose logits would not fit; one that cannot join is computed whole."""
        length = wanted.shape[1]
        if self.sharing != "joined":
            yield 0, length
            return
        vocabulary = self.lm.model.config.get_text_config().vocab_size
        width = max(1, LOGITS_BYTES // (4 * vocabulary * wanted.shape[0])) if bool(wanted[:, :-1].any()) else length
        for start in range(0, length, width):
            yield start, min(start + width, length)

    def _score(
        self, rows: Sequence[Row], tokens: Tensor, wanted: Tensor, logits: Tensor, start: int
    ) -> list[tuple[int, Chance]]:
        """How likely the tokens were that follow the wanted places, each with its row."""
        places = wanted.nonzero().tolist()
        chosen = [
            (at, row, start + place + 1)
            for at, (row, place) in enumerate(places)
            if start + place + 1 < tokens.shape[1] and rows[row].asked.prompt_top is not None
        ]
        if not chosen:
            return []
        index = torch.tensor([at for at, _, _ in chosen], device=logits.device)
        targets = [int(tokens[row, place]) for _, row, place in chosen]
        tops = [rows[row].asked.prompt_top or 0 for _, row, _ in chosen]
        return list(zip([row for _, row, _ in chosen], chances(logits[index], targets, tops), strict=True))

    def _call(self, tokens: Tensor, mask: Tensor, cache: Any) -> tuple[Any, Any]:
        """The model's output on the next tokens (batch, n), with which the mask (batch, length) ends, and the cache."""
        placed = {"position_ids": positions(mask)[:, -tokens.shape[1] :]} if self._tells_positions else {}
        return call_on_cache(self.lm.model, cache, input_ids=tokens, attention_mask=mask, **placed)

    @torch.no_grad()
    def step(self) -> list[tuple[Row, Piece]]:
        """One more token of each row that is not done; returns what they have written."""
        self.steering.set([row.asked.strengths for row in self.rows])
        tokens = torch.tensor([[row.last] for row in self.rows], device=self.lm.device)
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(self.rows), 1)], dim=1)
        out, self._cache = self._call(tokens, self._mask, self._cache)
        return self._choose(out.logits[:, -1].float(), self.rows)

    def _choose(self, logits: Tensor, rows: Sequence[Row]) -> list[tuple[Row, Piece]]:
        """The next token of each row by logits (batch, vocabulary)."""
        broken = logits.isnan().any(dim=-1).tolist()
        lost = [place for place, row in enumerate(rows) if broken[place] and not row.is_done]
        going = [place for place, row in enumerate(rows) if not broken[place] and not row.is_done]
        written = [(rows[place], rows[place].fail(NOT_NUMBERS)) for place in lost]
        if not going:
            return written
        mine, theirs = [rows[place] for place in going], logits[torch.tensor(going, device=logits.device)]
        tokens = choose(theirs, [row.asked for row in mine], [row.generator for row in mine])
        likely: list[Chance | None] = [None] * len(mine)
        asking = [at for at, row in enumerate(mine) if row.asked.top is not None]
        if asking:
            found = chances(
                theirs[torch.tensor(asking, device=theirs.device)],
                [tokens[at] for at in asking],
                [mine[at].asked.top or 0 for at in asking],
            )
            for at, chance in zip(asking, found, strict=True):
                likely[at] = chance
        taken = [(row, row.take(token, chance)) for row, token, chance in zip(mine, tokens, likely, strict=True)]
        return written + taken

    def drop_done(self) -> None:
        """Free the places of the rows that are done; where rows cannot join, all are freed with the last."""
        kept = [place for place, row in enumerate(self.rows) if not row.is_done]
        if not kept:
            self.rows, self._cache, self._mask = [], None, torch.empty(0)
        elif self.sharing == "joined" and len(kept) < len(self.rows):
            self._mask = keep_rows(self._cache, self._mask, kept)
            self.rows = [self.rows[place] for place in kept]

    def clear(self) -> list[Row]:
        """Give all rows up; returns those that were not done."""
        lost = [row for row in self.rows if not row.is_done]
        self.rows, self._cache, self._mask = [], None, torch.empty(0)
        return lost


def sharing_of(lm: LM) -> Sharing:
    """How rows may share a batch of this model, found by trying."""
    try:
        if takes_positions(lm.model) and not getattr(lm.model, "_is_stateful", False) and _joins(lm):
            return "joined"
    except TRIED:
        pass
    return rows_together(lm.model, lm.pad_id, lm.device)


@torch.no_grad()
def _joins(lm: LM) -> bool:
    """Whether a row that joins a longer one goes on as it does alone."""
    short, longer = sample_ids(lm.model, 5), sample_ids(lm.model, 12, 30)

    def read(ids: Sequence[int]) -> tuple[Any, Tensor]:
        tokens, mask = pad_left([ids], lm.pad_id, lm.device)
        placed = positions(mask)
        _, cache = call_on_cache(lm.model, fresh_cache(), input_ids=tokens, attention_mask=mask, position_ids=placed)
        return cache, mask

    def go_on(cache: DynamicCache, mask: Tensor) -> Tensor:
        rows = mask.shape[0]
        token = sample_ids(lm.model, 1, 50)
        tokens, mask = pad_left([token] * rows, lm.pad_id, lm.device)[0], torch.cat([mask, mask[:, -1:]], dim=1)
        placed = positions(mask)[:, -1:]
        out, _ = call_on_cache(lm.model, cache, input_ids=tokens, attention_mask=mask, position_ids=placed)
        logits: Tensor = out.logits[:, -1]
        return logits

    cache, mask = read(longer)
    if not can_join(cache):
        return False
    together = go_on(cache, join(cache, mask, *read(short)))
    rounding = rounding_of(lm.model)
    return all(agree(together[place], go_on(*read(ids))[0], rounding) for place, ids in enumerate((longer, short)))
