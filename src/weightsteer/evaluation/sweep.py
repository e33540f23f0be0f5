"""Methods x k x tasks -> rows: each measured once, written at once, never measured again."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TypedDict

import torch

from ..beside import WAITING, beside
from ..chat_template import PromptLike
from ..engines.sweep_engine import SweepEngine, served_cell
from ..files import append_jsonl, read_finished, write_jsonl
from ..former_names import METHODS
from ..judges.asking import stop_asking
from ..language_model import LanguageModel
from ..lm import LM
from ..progress import Progress, silent
from ..run_folder import RunFolder
from ..schema import checked
from ..scoring import Score
from ..steering.steering import Steering
from ..thinking import Reply
from ..vectors.handle import SteeringHandle
from .results import BASE, LOCAL_BASE, Key, Measurement, MetricRow, measurements_by_key
from .tasks.task import Task, without_nan


def run_sweep(
    lm: LM,
    methods: Sequence[tuple[Steering, Sequence[float]]],
    tasks: Sequence[Task],
    folder: RunFolder,
    *,
    validated: Collection[str] | None = None,
    items_of: Mapping[str, int] | None = None,
    engine: SweepEngine | None = None,
    judge_is_served: bool = False,
    batch_size: int = 8,
    progress: Progress = silent,
) -> list[MetricRow]:
    """Measure the base and every method at its strengths on every task.

    Each measurement is appended to the folder's file when it is done, so a killed sweep resumes where it stopped; the
    rows are written at the end. Generated replies are saved too.

    Args:
        validated: methods that are measured on validation items too, since something is to be chosen by them; the
            others are measured on test items only. None: all.
        items_of: methods that are measured on the first so many items of each split.
        engine: a server that measures what it can; the rest is measured here, and compared with the base here.
        judge_is_served: a server judges replies: it is asked while the model goes on to the next measurement.

    Returns:
        All rows, base first.
    """
    plan = planned_cells(methods, tasks, validated, items_of or {}, engine)
    waiting = WAITING if judge_is_served else 0
    done = _measure_plan(lm, plan, folder, engine, batch_size, waiting, progress)
    keys = [(part.name, part.k, task.name) for part in plan for task in part.tasks if part.name != LOCAL_BASE]
    return write_rows(keys, done, folder)


def write_rows(keys: Sequence[Key], done: Mapping[Key, Measurement], folder: RunFolder) -> list[MetricRow]:
    """The rows of these measurements, written into the run's folder in their order."""
    rows = [row for key in keys for row in done[key].rows(done[key].base_among(done))]
    write_jsonl(folder.rows, [asdict(row) for row in rows])
    return rows


def _measure_plan(
    lm: LM,
    plan: Sequence[Planned],
    folder: RunFolder,
    engine: SweepEngine | None,
    batch_size: int,
    waiting: int,
    progress: Progress,
) -> dict[Key, Measurement]:
    """Make the measurements that the folder does not hold yet; returns all that it holds then."""
    done = measurements_of(folder)
    total, kept = sum(len(planned.tasks) for planned in plan), frozenset(done)

    def asked() -> Iterator[Callable[[], Measured]]:
        passed = 0
        for planned in plan:
            progress(passed, total, f"{planned.name} k = {planned.k:g}")
            todo = [task for task in planned.tasks if (planned.name, planned.k, task.name) not in kept]
            yield from _ask(lm, replace(planned, tasks=todo), engine, batch_size)
            passed += len(planned.tasks)

    for measurement, turns in beside(asked(), waiting=waiting, stop=stop_asking):
        keep_measurement(measurement, turns, folder)
        done[measurement.key] = measurement
    progress(total, total, "done")
    return done


def measurements_of(folder: RunFolder) -> dict[Key, Measurement]:
    """What a run has measured; replies whose measurement a kill cut off are taken out."""
    done = measurements_by_key(read_finished(folder.measurements), str(folder.measurements))
    _drop_unfinished_replies(folder.replies, done.keys())
    return done


def planned_cells(
    methods: Sequence[tuple[Steering, Sequence[float]]],
    tasks: Sequence[Task],
    validated: Collection[str] | None,
    items_of: Mapping[str, int],
    engine: SweepEngine | None = None,
) -> list[Planned]:
    """The base on all tasks, then each method at each strength on those that it is measured on; see `run_sweep`."""
    plan: list[Planned] = []
    for method, ks in methods:
        parts = measured_parts(method.name, tasks, validated, items_of)
        plan += [Planned(method, k, parts) for k in strengths_to_measure(ks)]
    base = [Planned(None, 0.0, list(tasks))]
    if engine is not None:
        local = [planned for planned in plan if isinstance(served_cell(planned.method, planned.k), str)]
        here = {task.name for planned in local for task in planned.tasks if not task.needs_weights}
        base.append(Planned(None, 0.0, [task for task in tasks if task.name in here], in_memory=True))
    return [*base, *plan]


def measured_parts(
    name: str, tasks: Sequence[Task], validated: Collection[str] | None, items_of: Mapping[str, int]
) -> list[Task]:
    """The tasks that a method is measured on, with the items that count for it; see `run_sweep`."""
    whole = validated is None or name in validated
    parts = list(tasks) if whole else [task.of_split("test") for task in tasks if "test" in task.splits]
    return [task.first(items_of[name]) for task in parts] if name in items_of else parts


def strengths_to_measure(ks: Sequence[float]) -> list[float]:
    """Each k once, without 0: that is the base, which is measured apart."""
    return [k for k in dict.fromkeys(map(float, ks)) if k]


def keep_measurement(measurement: Measurement, turns: Sequence[Mapping[str, str]], folder: RunFolder) -> None:
    """Append a measurement to the run's file, after what the model said for it."""
    place = {"method": measurement.method, "k": measurement.k, "task": measurement.task}
    if turns:
        append_jsonl(folder.replies, [{**place, **turn} for turn in turns])
    append_jsonl(folder.measurements, [measurement.as_json()])


def _drop_unfinished_replies(path: Path, done: Collection[Key]) -> None:
    """Take out replies whose measurement a kill cut off: it will be made again."""
    rows = read_finished(path)
    turns = [checked(_Turn, row, f"{path}, row {number}") for number, row in enumerate(rows, start=1)]
    keys = [(METHODS.get(turn.method, turn.method), turn.k, turn.task) for turn in turns]
    kept = [row for row, key in zip(rows, keys, strict=True) if key in done]
    if kept != rows:
        write_jsonl(path, kept)


@dataclass(frozen=True)
class _Turn:
    """A row of the file of replies."""

    method: str
    k: float
    task: str
    prompt: str
    reply: str


@dataclass(frozen=True)
class _Recording(LanguageModel):
    """A `LanguageModel` that remembers what it was asked and what it replied."""

    lm: LanguageModel
    turns: list[dict[str, str]]

    @property
    def name(self) -> str:
        return self.lm.name

    @property
    def revision(self) -> str:
        return self.lm.revision

    def with_system_prompt(self, text: str | None) -> _Recording:
        return replace(self, lm=self.lm.with_system_prompt(text))

    def chat_ids(self, prompt: PromptLike) -> list[int]:
        return self.lm.chat_ids(prompt)

    def replies(
        self,
        prompts: Sequence[PromptLike],
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        seed: int = 0,
        batch_size: int = 8,
        progress: Progress = silent,
    ) -> list[Reply]:
        how: _HowWritten = {"temperature": temperature, "seed": seed, "batch_size": batch_size, "progress": progress}
        replies = self.lm.replies(prompts, max_new_tokens=max_new_tokens, **how)
        said = [prompt if isinstance(prompt, str) else prompt[-1]["content"] for prompt in prompts]
        self.turns.extend({"prompt": p, "reply": r.answer or ""} for p, r in zip(said, replies, strict=True))
        return replies

    def score_choices(
        self,
        prompts: Sequence[PromptLike],
        choices: Sequence[Sequence[str]],
        *,
        batch_size: int = 8,
        progress: Progress = silent,
    ) -> list[list[Score]]:
        return self.lm.score_choices(prompts, choices, batch_size=batch_size, progress=progress)

    def score_texts(self, texts: Sequence[str], *, batch_size: int = 8) -> list[Score]:
        return self.lm.score_texts(texts, batch_size=batch_size)


class _HowWritten(TypedDict):
    """How replies are written, beside their length."""

    temperature: float
    seed: int
    batch_size: int
    progress: Progress


@dataclass(frozen=True)
class Planned:
    """One method at one strength, and the tasks that it is measured on."""

    method: Steering | None  # None: the base
    k: float
    tasks: Sequence[Task]
    in_memory: bool = False  # of the base: measured here, beside the one that an engine measures

    @property
    def name(self) -> str:
        """What its measurements are kept under."""
        return self.method.name if self.method else LOCAL_BASE if self.in_memory else BASE

    def served_by(self, engine: SweepEngine | None, task: Task) -> LanguageModel | None:
        """The engine's model that the task is measured on; None where it is measured here."""
        if engine is None or self.in_memory or task.needs_weights:
            return None
        return engine.model_at(self.method, self.k)


Measured = tuple[Measurement, list[dict[str, str]]]  # with what the model was asked and said


def _ask(lm: LM, planned: Planned, engine: SweepEngine | None, batch_size: int) -> Iterator[Callable[[], Measured]]:
    """Ask the model for the planned's measurements, those of the engine first; each is still to be rated."""
    here = []
    for task in planned.tasks:
        served = planned.served_by(engine, task)
        if served is None:
            here.append(task)
        else:
            assert engine is not None
            yield _asked(served, planned, task, engine.kind, batch_size)
    if not here:
        return
    here = [task.against(lm) for task in here]
    applied = planned.method.applied(lm, planned.k) if planned.method else nullcontext(SteeringHandle(0.0, lm))
    with applied as handle, torch.no_grad():
        for task in here:
            yield _asked(handle.lm, planned, task, "", batch_size)


def measure_cell(lm: LM, method: Steering | None, k: float, task: Task, batch_size: int) -> Measured:
    """One method at one strength on one task, with what the model said; None is the base."""
    return next(_ask(lm, Planned(method, k, [task]), None, batch_size))()


def _asked(lm: LanguageModel, planned: Planned, task: Task, engine: str, batch_size: int) -> Callable[[], Measured]:
    """Ask the model; what comes back makes the measurement, and asks judges alone."""
    turns: list[dict[str, str]] = []
    said = task.ask(lm if task.needs_weights else _Recording(lm, turns), batch_size=batch_size)

    def rated() -> Measured:
        measured = without_nan(task.rate(said), task.name)
        values = {metric: [_round(v) for v in row] for metric, row in measured.items()}
        place = (planned.name, planned.k, task.name)
        return Measurement(*place, tuple(task.ids), tuple(task.splits), values, engine), turns

    return rated


def _round(value: float | None) -> float | None:
    """Six decimals: beyond what float32 arithmetic can tell, and a fraction of the file's size."""
    return None if value is None else round(value, 6)
