"""What a method costs: tokens and seconds of training, parameters it trains, extra time for each generated token."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from ..files import append_jsonl, read_finished, write_jsonl
from ..lm import LM
from ..progress import Progress, silent
from ..run_card import RunCard
from ..run_folder import RunFolder
from ..steering.steering import Steering
from .results import MetricRow, row_from, summary

TASK = "cost"
TRAINED = "training tokens"  # the metric that each strength has
PROMPT = "Tell me about the town that you grew up in, its streets, its people and its weather."
BATCH, NEW_TOKENS, TRIALS = 4, 8, 3
Trainings = Callable[[str, RunFolder, float], Sequence[tuple[Path, float]]]  # see `measure_costs`


def measure_costs(
    lm: LM,
    methods: Sequence[tuple[Steering, Sequence[float]]],
    trainings: Trainings,
    folder: RunFolder,
    *,
    progress: Progress = silent,
) -> list[MetricRow]:
    """Rows of what each method costs at each of its strengths; what is kept there is not measured again.

    Metrics: `training tokens` and `training seconds` of all that was tried, how many `settings tried` that were (in
    the training that tried most), and `parameters` that were trained (of one fine-tune); and at the strongest k
    `time per token`, decoding time over the base's, paired.

    Args:
        trainings: (method, run, k) -> the fine-tunes it takes, and the share of each that is used.
    """
    path, rows = folder.costs, costs_still_of(folder, {method.name: ks for method, ks in methods})
    known = {row.method for row in rows}
    if any(ks and method.name not in known for method, ks in methods):
        warm_up(lm)
    for number, (method, ks) in enumerate(methods):
        progress(number, len(methods), method.name)
        if method.name not in known and ks:
            found = costs_at(lm, method, ks, trainings, folder)
            append_jsonl(path, [asdict(row) for row in found])
            rows += found
    progress(len(methods), len(methods), "done")
    return rows


def known_costs(folder: RunFolder) -> list[MetricRow]:
    """The rows that a run has kept."""
    return [row_from(row, str(folder.costs)) for row in read_finished(folder.costs)]


def costs_still_of(folder: RunFolder, strengths: Mapping[str, Sequence[float]]) -> list[MetricRow]:
    """The rows that a run has kept; those of a method whose strengths are others now are taken out of the file."""
    rows, told = known_costs(folder), dict[str, set[float]]()
    for row in rows:
        if row.metric == TRAINED:
            told.setdefault(row.method, set()).add(row.k)
    changed = {name for name, ks in strengths.items() if name in told and told[name] != set(ks)}
    kept = [row for row in rows if row.method not in changed]
    if changed:
        write_jsonl(folder.costs, [asdict(row) for row in kept])
    return kept


def costs_at(lm: LM, method: Steering, ks: Sequence[float], trainings: Trainings, folder: RunFolder) -> list[MetricRow]:
    """The rows of one method; see `measure_costs`."""
    found = [row for k in ks for row in _training(method.name, k, trainings(method.name, folder, k))]
    return [*found, _overhead(lm, method, max(ks, key=abs))]


def warm_up(lm: LM) -> None:
    """Decode once, so that the first method does not pay for what is made ready by it."""
    _decode_seconds(lm)


def _training(name: str, k: float, fine_tunes: Sequence[tuple[Path, float]]) -> list[MetricRow]:
    """Sums over the fine-tunes, read from their cards."""
    cards = [(RunCard.load(folder), share) for folder, share in fine_tunes]
    totals = {
        TRAINED: sum(share * card.measured_number("search_tokens") for card, share in cards),
        "training seconds": sum(share * card.measured_number("search_seconds") for card, share in cards),
        "settings tried": max((_settings_tried(card) for card, _ in cards), default=0),
        "parameters": max((card.measured_number("parameters") for card, _ in cards), default=0),
    }
    return [MetricRow(name, k, TASK, metric, float(value), 1, 0.0) for metric, value in totals.items()]


def _settings_tried(card: RunCard) -> float:
    """How many learning rates were tried, or what the card says of a training without a choice of them."""
    losses = card.measured.get("validation_loss")
    return len(losses) if isinstance(losses, Mapping) else card.measured_number("settings")


def _overhead(lm: LM, method: Steering, k: float) -> MetricRow:
    """Time to generate with the method over time without, decoding by turns so that drift of the machine cancels."""
    ratios = []
    for _ in range(TRIALS):
        base = _decode_seconds(lm)
        with method.applied(lm, k) as handle:
            ratios.append(_decode_seconds(handle.lm) / base)
    return MetricRow(method.name, k, TASK, "time per token", *summary(ratios))


def _decode_seconds(lm: LM) -> float:
    ids = torch.tensor([lm.chat_ids(PROMPT)] * BATCH, device=lm.device)
    start = time.perf_counter()
    lm.model.generate(  # type: ignore[operator]
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        do_sample=False,
        pad_token_id=lm.pad_id,
    )
    return time.perf_counter() - start
