"""One method at one strength on its tasks: asked, of a model in memory or of a server, and then rated."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from typing import TypedDict

import torch

from ..beside import as_they_end
from ..chat_template import PromptLike
from ..engines.served_model import ServedModel
from ..engines.sweep_engine import SweepEngine
from ..judges.asking import stop_asking
from ..language_model import LanguageModel
from ..lm import LM
from ..progress import Progress, silent
from ..scoring import Score
from ..steering.steering import Steering
from ..thinking import Reply
from ..vectors.handle import SteeringHandle
from .results import BASE, LOCAL_BASE, Key, Measurement
from .tasks.task import Task, without_nan


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

    def without(self, done: Collection[Key]) -> Planned:
        """The same without what has been measured."""
        return replace(self, tasks=[task for task in self.tasks if (self.name, self.k, task.name) not in done])

    def served_by(self, engine: SweepEngine | None, task: Task) -> ServedModel | None:
        """The engine's model that the task is measured on; None where it is measured here."""
        if engine is None or self.in_memory or task.needs_weights:
            return None
        return engine.model_at(self.method, self.k)


Measured = tuple[Measurement, list[dict[str, str]]]  # with what the model was asked and said


Rating = Callable[[], Measured]  # makes a measurement of what was asked; it asks judges alone


def ask_server(
    plan: Sequence[Planned], engine: SweepEngine, batch_size: int, failures: list[Exception]
) -> Iterator[Rating]:
    """Ask the engine's server for all of the plan that it measures, many cells at once; each comes when it has ended.

    The requests of earlier cells go first, and those of later ones fill the places that they leave free. A server that
    does not compute several strengths together is asked at one after the other.

    Args:
        failures: takes the errors of cells, which end no other; once it holds one, no further cell begins.
    """
    cells = [
        (served, planned, task)
        for planned in plan
        for task in planned.tasks
        if (served := planned.served_by(engine, task)) is not None
    ]

    def works(some: Iterable[tuple[ServedModel, Planned, Task]]) -> Iterator[Callable[[], Rating]]:
        for served, planned, task in some:
            if failures:
                return
            yield partial(_asked, served, planned, task, engine.kind, batch_size)

    mixed = engine.served.dialect.mixes_strengths
    with engine.served.connection.shared() as at_once:
        for _, some in groupby(cells, lambda cell: None if mixed else cell[0].strengths):
            with closing(as_they_end(works(some), at_once=at_once, stop=stop_asking)) as all_ended:
                for ended in all_ended:
                    error = ended.exception()
                    if error is None:
                        yield ended.result()
                    elif isinstance(error, Exception):
                        failures.append(error)
                    else:
                        raise error


def ask_here(lm: LM, planned: Planned, engine: SweepEngine | None, batch_size: int) -> Iterator[Rating]:
    """Ask the model in memory for what no server measures."""
    here = [task.against(lm) for task in planned.tasks if planned.served_by(engine, task) is None]
    if not here:
        return
    applied = planned.method.applied(lm, planned.k) if planned.method else nullcontext(SteeringHandle(0.0, lm))
    with applied as handle, torch.no_grad():
        for task in here:
            yield _asked(handle.lm, planned, task, "", batch_size)


def measure_cell(lm: LM, method: Steering | None, k: float, task: Task, batch_size: int) -> Measured:
    """One method at one strength on one task, with what the model said; None is the base."""
    return next(ask_here(lm, Planned(method, k, [task]), None, batch_size))()


def _asked(lm: LanguageModel, planned: Planned, task: Task, engine: str, batch_size: int) -> Rating:
    """Ask the model; what comes back makes the measurement, and asks judges alone."""
    turns: list[dict[str, str]] = []
    said = task.ask(_Recording(lm, turns) if task.is_recorded else lm, batch_size=batch_size)

    def rated() -> Measured:
        measured = without_nan(task.rate(said), task.name, f"{planned.name} at k = {planned.k:g}")
        values = {metric: [_round(v) for v in row] for metric, row in measured.items()}
        place = (planned.name, planned.k, task.name)
        return Measurement(*place, tuple(task.ids), tuple(task.splits), values, engine), turns

    return rated


def _round(value: float | None) -> float | None:
    """Six decimals: beyond what float32 arithmetic can tell, and a fraction of the file's size."""
    return None if value is None else round(value, 6)
