"""Methods x k x tasks -> rows: each measured once, written at once, never measured again."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch
from transformers.generation.streamers import BaseStreamer

from ..chat_template import PromptLike
from ..files import append_jsonl, read_finished, write_jsonl
from ..former_names import METHODS
from ..lm import LM
from ..progress import Progress, silent
from ..run_folder import RunFolder
from ..schema import checked
from ..steering.steering import Steering
from ..thinking import Reply
from ..vectors.handle import SteeringHandle
from .results import BASE, Key, Measurement, MetricRow, measurements_by_key
from .tasks.task import Task, without_nan


def run_sweep(
    lm: LM,
    methods: Sequence[tuple[Steering, Sequence[float]]],
    tasks: Sequence[Task],
    folder: RunFolder,
    *,
    validated: Collection[str] | None = None,
    items_of: Mapping[str, int] | None = None,
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

    Returns:
        All rows, base first.
    """
    plan = _plan(methods, tasks, validated, items_of or {})
    done = _measure_plan(lm, plan, folder, batch_size, progress)
    keys = [(planned.name, planned.k, task.name) for planned in plan for task in planned.tasks]
    rows = [row for key in keys for row in done[key].rows(done[BASE, 0.0, key[2]])]
    write_jsonl(folder.rows, [asdict(row) for row in rows])
    return rows


def _measure_plan(
    lm: LM, plan: Sequence[_Planned], folder: RunFolder, batch_size: int, progress: Progress
) -> dict[Key, Measurement]:
    """Make the measurements that the folder does not hold yet; returns all that it holds then."""
    done = measurements_by_key(read_finished(folder.measurements), str(folder.measurements))
    _drop_unfinished_replies(folder.replies, done.keys())
    total, passed = sum(len(planned.tasks) for planned in plan), 0
    for planned in plan:
        progress(passed, total, f"{planned.name} k = {planned.k:g}")
        recording = _RecordingLM(**{part.name: getattr(lm, part.name) for part in fields(LM)})
        for measurement in _measure(recording, planned, done.keys(), batch_size):
            _keep(measurement, recording.take(), folder)
            done[measurement.key] = measurement
        passed += len(planned.tasks)
    progress(total, total, "done")
    return done


def _plan(
    methods: Sequence[tuple[Steering, Sequence[float]]],
    tasks: Sequence[Task],
    validated: Collection[str] | None,
    items_of: Mapping[str, int],
) -> list[_Planned]:
    """The base on all tasks, then each method at each strength on those that it is measured on."""
    plan = [_Planned(None, 0.0, list(tasks))]
    for method, ks in methods:
        whole = validated is None or method.name in validated
        parts = list(tasks) if whole else [task.of_split("test") for task in tasks if "test" in task.splits]
        if method.name in items_of:
            parts = [task.first(items_of[method.name]) for task in parts]
        plan += [_Planned(method, k, parts) for k in dict.fromkeys(map(float, ks)) if k]
    return plan


def _keep(measurement: Measurement, turns: Sequence[Mapping[str, str]], folder: RunFolder) -> None:
    """Append a measurement to the run's file, after what the model said for it."""
    place = {"method": measurement.method, "k": measurement.k, "task": measurement.task}
    if turns:
        append_jsonl(folder.replies, [{**place, **turn} for turn in turns])
    append_jsonl(folder.measurements, [asdict(measurement)])


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
class _RecordingLM(LM):
    """A model that remembers what it was asked and what it replied."""

    turns: list[dict[str, str]] = field(default_factory=list)

    def replies(
        self,
        prompts: Sequence[PromptLike],
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        seed: int = 0,
        batch_size: int = 8,
        progress: Progress = silent,
        streamer: BaseStreamer | None = None,
    ) -> list[Reply]:
        """See `LM.replies`."""
        replies = super().replies(
            prompts,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            batch_size=batch_size,
            progress=progress,
            streamer=streamer,
        )
        said = [prompt if isinstance(prompt, str) else prompt[-1]["content"] for prompt in prompts]
        self.turns.extend({"prompt": p, "reply": r.answer or ""} for p, r in zip(said, replies, strict=True))
        return replies

    def take(self) -> list[dict[str, str]]:
        """The turns since the last call."""
        taken = list(self.turns)
        self.turns.clear()
        return taken


@dataclass(frozen=True)
class _Planned:
    """One method at one strength, and the tasks that it is measured on."""

    method: Steering | None
    k: float
    tasks: Sequence[Task]

    @property
    def name(self) -> str:
        return self.method.name if self.method else BASE


def _measure(lm: LM, planned: _Planned, done: Collection[Key], batch_size: int) -> Iterator[Measurement]:
    """The planned's measurements that are not done yet, one by one."""
    todo = [task for task in planned.tasks if (planned.name, planned.k, task.name) not in done]
    if not todo:
        return
    applied = planned.method.applied(lm, planned.k) if planned.method else nullcontext(SteeringHandle(0.0, lm))
    with applied as handle, torch.no_grad():
        for task in todo:
            measured = without_nan(task.measure(handle.lm, batch_size=batch_size), task.name)
            values = {metric: [_round(v) for v in row] for metric, row in measured.items()}
            yield Measurement(planned.name, planned.k, task.name, tuple(task.ids), tuple(task.splits), values)


def _round(value: float | None) -> float | None:
    """Six decimals: beyond what float32 arithmetic can tell, and a fraction of the file's size."""
    return None if value is None else round(value, 6)
