"""Methods x k x tasks -> rows: every cell measured once, written at once, never measured again."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from .cells import BASE, CELLS_FILE, Cell, cell_from
from .lm import LM
from .methods import Steering
from .progress import Progress, silent
from .records import Row, append_jsonl, read_finished, write_jsonl
from .tasks.task import Task, mean_of

ROWS_FILE = "rows.jsonl"
REPLIES_FILE = "replies.jsonl"  # what the model said where a task asks for open replies
FAR_TOO_MUCH = 1e3  # nats of damage that stand for a loss that overflowed


def run_sweep(
    lm: LM,
    methods: Sequence[tuple[Steering, Sequence[float]]],
    tasks: Sequence[Task],
    folder: Path,
    *,
    validated: Collection[str] | None = None,
    items_of: Mapping[str, int] | None = None,
    batch_size: int = 8,
    progress: Progress = silent,
) -> list[Row]:
    """Measure the base and every method at its strengths on every task.

    `validated` names the methods that are measured on validation items too, since something is to
    be chosen by them (None: all); the others are measured on test items only. `items_of` gives methods that
    are measured on the first so many test items. Each cell is appended to `cells.jsonl` when it is done, so a
    killed sweep goes on where it stopped; `rows.jsonl` is written at the end. Open replies are kept in `replies.jsonl`.

    Returns:
        All rows, base first.
    """
    path, limits = folder / CELLS_FILE, items_of or {}
    done = {cell.key: cell for cell in map(cell_from, read_finished(path))}
    _drop_unfinished_replies(folder / REPLIES_FILE, done.keys())
    plan = [_Visit(None, 0.0, list(tasks))]
    for method, ks in methods:
        whole = validated is None or method.name in validated
        parts = list(tasks) if whole else [t.of_split("test") for t in tasks if "test" in t.splits]
        if method.name in limits:
            parts = [task.first(limits[method.name]) for task in parts]
        plan += [_Visit(method, float(k), parts) for k in ks if k]
    total = sum(len(visit.tasks) for visit in plan)
    passed = 0
    for visit in plan:
        progress(passed, total, f"{visit.name} k = {visit.k:g}")
        recorded = _Recorded(lm.model, lm.tokenizer, lm.name, lm.revision, lm.system_prompt)
        for cell in _measured(recorded, visit, done.keys(), batch_size):
            said = [{"method": cell.method, "k": cell.k, "task": cell.task, **turn} for turn in recorded.take()]
            if said:
                append_jsonl(folder / REPLIES_FILE, said)
            append_jsonl(path, [asdict(cell)])
            done[cell.key] = cell
        passed += len(visit.tasks)
    progress(total, total, "done")
    keys = [(visit.name, visit.k, task.name) for visit in plan for task in visit.tasks]
    rows = [row for key in keys for row in done[key].rows(done[BASE, 0.0, key[2]])]
    write_jsonl(folder / ROWS_FILE, [asdict(row) for row in rows])
    return rows


def _drop_unfinished_replies(path: Path, done: Collection[tuple[str, float, str]]) -> None:
    """Take out replies whose cell a kill cut off: it will be measured again."""
    rows = read_finished(path)
    kept = [row for row in rows if (row["method"], row["k"], row["task"]) in done]
    if kept != rows:
        write_jsonl(path, kept)


@dataclass(frozen=True)
class _Recorded(LM):
    """A model that remembers what it was asked and what it replied."""

    turns: list[dict[str, str]] = field(default_factory=list)

    def generate(
        self,
        prompts: Sequence[str],
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        seed: int = 0,
        batch_size: int = 8,
        progress: Progress = silent,
    ) -> list[str]:
        """See `LM.generate`."""
        replies = super().generate(
            prompts,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            batch_size=batch_size,
            progress=progress,
        )
        self.turns.extend({"prompt": p, "reply": r} for p, r in zip(prompts, replies, strict=True))
        return replies

    def take(self) -> list[dict[str, str]]:
        """The turns since the last call."""
        taken = list(self.turns)
        self.turns.clear()
        return taken


@dataclass(frozen=True)
class _Visit:
    """One method at one strength, and the tasks that it is measured on."""

    method: Steering | None
    k: float
    tasks: Sequence[Task]

    @property
    def name(self) -> str:
        return self.method.name if self.method else BASE


def _measured(lm: LM, visit: _Visit, done: Collection[tuple[str, float, str]], batch_size: int) -> Iterator[Cell]:
    """The visit's cells that are not done yet, one by one."""
    todo = [task for task in visit.tasks if (visit.name, visit.k, task.name) not in done]
    if not todo:
        return
    with visit.method.applied(lm, visit.k) if visit.method else nullcontext(lm) as steered, torch.no_grad():
        for task in todo:
            measured = task.measure(steered, batch_size=batch_size)
            values = {metric: [_rounded(v) for v in row] for metric, row in measured.items()}
            yield Cell(visit.name, visit.k, task.name, tuple(task.ids), tuple(task.splits), values)


def _rounded(value: float | None) -> float | None:
    """Six decimals: beyond what float32 arithmetic can tell, and a fraction of the file's size."""
    return None if value is None else round(value, 6)


def strength_at_damage(
    lm: LM, method: Steering, probe: Task, *, damage: float, sign: int, metric: str = "nll", tries: int = 6
) -> float:
    """The k on one side (`sign` 1 or -1) at which `metric` on `probe` has risen by about `damage`.

    Damage grows about with k^2, so each try takes the k that a parabola through the tries on both
    sides of the aim gives (before there are two, k is scaled, by a factor of 4 at most). It stops
    within 15%, or takes the nearest try. This is what makes methods comparable: each is swept over
    the same range of damage whatever its units of k.
    """
    base = mean_of(probe.measure(lm)[metric])
    below, above = (0.0, 0.0), None  # (|k|, damage) of the tries nearest the aim
    tried: dict[float, float] = {}  # |k| -> how far its damage is from the aim
    size = 1.0
    while len(tried) < tries and min(tried.values(), default=damage) > 0.15 * damage:
        with method.applied(lm, sign * size) as steered:
            found = mean_of(probe.measure(steered)[metric]) - base
        found = found if math.isfinite(found) else FAR_TOO_MUCH
        tried[size] = abs(found - damage)
        if found < damage:
            below = (size, found)
        else:
            above = (size, found)
        size = _next_size(below, above, damage)
    nearest = min(tried, key=lambda size: tried[size])
    return float(f"{sign * nearest:.2g}")


def _next_size(below: tuple[float, float], above: tuple[float, float] | None, damage: float) -> float:
    """The |k| to try next, from the tries below and above the damage aimed at."""
    if above is None:
        size, found = below
        return size * min(4.0, math.sqrt(damage / max(found, damage / 16)))
    share = (damage - below[1]) / (above[1] - below[1])
    squares = below[0] ** 2, above[0] ** 2
    return math.sqrt(squares[0] + share * (squares[1] - squares[0]))
