"""Methods x k x tasks -> rows: each measured once, written at once, never measured again."""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain
from pathlib import Path

from ..beside import WAITING, beside
from ..engines.sweep_engine import SweepEngine, served_cell
from ..files import append_jsonl, read_finished, write_jsonl
from ..former_names import METHODS
from ..judges.asking import stop_asking
from ..lm import LM
from ..progress import Progress, silent
from ..run_folder import RunFolder
from ..schema import checked
from ..steering.steering import Steering
from .cells import Measured, Planned, Rating, ask_here, ask_server
from .results import LOCAL_BASE, Key, Measurement, MetricRow, measurements_by_key
from .tasks.task import Task


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
    done, failures = measurements_of(folder), list[Exception]()
    todo = [planned.without(done) for planned in plan]
    total = sum(len(planned.tasks) for planned in plan)
    passed = total - sum(len(planned.tasks) for planned in todo)

    def works() -> Generator[Callable[[], Measured | None]]:
        ratings = ask_server(todo, engine, batch_size, failures) if engine is not None else iter(())
        for rating in chain(ratings, _asked_here(lm, todo, engine, batch_size, failures)):
            yield partial(_rated, rating, failures)

    progress(passed, total, "at the server" if engine is not None else "")
    with closing(works()) as asked, closing(beside(asked, waiting=waiting, stop=stop_asking)) as measured:
        for measurement, turns in filter(None, measured):
            keep_measurement(measurement, turns, folder)
            done[measurement.key] = measurement
            passed += 1
            progress(passed, total, f"{measurement.method} k = {measurement.k:g}, {measurement.task}")
    if failures:
        raise failures[0]
    progress(total, total, "done")
    return done


def _asked_here(
    lm: LM, plan: Sequence[Planned], engine: SweepEngine | None, batch_size: int, failures: Sequence[Exception]
) -> Iterator[Rating]:
    for planned in plan:
        if not failures:
            yield from ask_here(lm, planned, engine, batch_size)


def _rated(rating: Rating, failures: list[Exception]) -> Measured | None:
    """The measurement; None, and its error among the failures, where there is none."""
    try:
        return rating()
    except Exception as error:
        failures.append(error)
        return None


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
