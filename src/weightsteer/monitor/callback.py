"""The same numbers while a model trains, through the Trainer's own logging."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..errors import SteerError
from ..files import append_jsonl, read_finished, write_jsonl
from ..vectors.weight_vector import WeightVector
from .alerts import Alert, describe
from .dictionary import Dictionary
from .hold import Held, Pull
from .live import Watched, watched_parameters
from .readings import WHOLE, Products, Reading, read_off, refuse_zero, require_known


class SteeringMonitor(TrainerCallback):
    """Logs `cos/NAME`, `z/NAME`, `projection/NAME` and `tau_norm` of a training run at every so many steps.

    Works for PEFT's LoRA on linear layers, embeddings and fused experts (factored: r x r work a matrix), and for whole
    parameters that train, of which a copy is kept as they were at the start of `train`. What trains in another form is
    left out, with a warning. Every process of a distributed run computes the same; the Trainer logs once.
    A resumed run of whole parameters compares with the weights that it resumed from, one of LoRA with the base.

    Example:
        monitor = SteeringMonitor({"evil": WeightVector.load("runs/evil/vector")}, every=10, alert="z=4")
        trainer = Trainer(...)
        monitor.watch(trainer)
        trainer.train()

    Args:
        vectors: name -> vector of the model's base, or a dictionary of directions, whose benign fine-tunes are then the
            controls, and which adds `share/NAME`.
        every: steps between two readings.
        controls: names among `vectors` that are there for the null band (see `read_off`).
        alert: "z=4" warns when a whole-model reading's |z| reaches 4, "evil: fpr=0.01" at the threshold of a
            dictionary; None never does.
        stop: end the training at the first alert.
        out: a JSONL file that gets every reading, by layer and kind of module too.
        hold: name -> k: k times the vector stays applied while the model trains, and is taken away at the end, so that
            the data need not push the model there (see `hold`).
        resist: name -> weight: a penalty of weight * projection^2, in the units of the loss.

    Raises:
        SteerError: no vectors, an alert that cannot be read, or a name that is not among the vectors.
    """

    def __init__(
        self,
        vectors: Mapping[str, WeightVector] | Dictionary,
        *,
        every: int = 10,
        controls: Sequence[str] = (),
        alert: str | None = None,
        stop: bool = False,
        out: str | Path | None = None,
        hold: Mapping[str, float] | None = None,
        resist: Mapping[str, float] | None = None,
    ) -> None:
        self.dictionary = vectors if isinstance(vectors, Dictionary) else None
        named = vectors.vectors if isinstance(vectors, Dictionary) else vectors
        if not named or every < 1:
            raise SteerError(f"SteeringMonitor: expected vectors and every of 1 or more; found {len(named)}, {every}")
        benign = self.dictionary.controls if self.dictionary else ()
        self.vectors, self.every, self.controls, self.stop = dict(named), every, (*benign, *controls), stop
        self.alert = Alert.parse(alert, self.dictionary) if alert else None
        self.out = Path(out) if out else None
        self.hold, self.resist = dict(hold or {}), dict(resist or {})
        require_known(self.hold, self.vectors, "hold")
        require_known(self.resist, self.vectors, "resist")
        require_known(self.controls, self.vectors, "controls")
        self._held: Held | None = None
        self._pulls: list[Pull] = []
        self.readings: list[Reading] = []  # all of them, whole-model and by part
        self._watched: list[Watched] = []
        self._fresh: dict[str, float] = {}

    def watch(self, trainer: Trainer) -> None:
        """Join a Trainer, ahead of its reporters, so that TensorBoard, W&B and the others get the numbers too."""
        trainer.callback_handler.callbacks.insert(0, self)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model = kwargs["model"]
        self._watched = watched_parameters(model, self.vectors)
        refuse_zero(watched.squares for watched in self._watched)
        self._pulls = [Pull(model, self.vectors[name], weight) for name, weight in self.resist.items()]
        self._held = Held(model, self.vectors, self.hold)
        if self.out and state.is_world_process_zero and state.global_step:
            _forget_after(self.out, state.global_step)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        for pull in self._pulls:
            pull.add_gradient()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.release()

    def release(self) -> None:
        """Take held vectors off the model; the end of `train` does it, and after an error the caller may."""
        if self._held:
            self._held.release()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step % self.every and state.global_step != state.max_steps:
            return
        found = self._read(state.global_step)
        if not found:
            return
        self._fresh = _logs_of([reading for reading in found if reading.part == WHOLE])
        control.should_log = True
        if self.out and state.is_world_process_zero:
            append_jsonl(self.out, [asdict(reading) for reading in found])
        alerts = self._alerts(found)
        if state.is_world_process_zero:
            for reading in alerts:
                warnings.warn(describe(reading), stacklevel=2)
        if alerts and self.stop:
            control.should_training_stop = True

    def _alerts(self, found: Sequence[Reading]) -> list[Reading]:
        """The readings that call for a warning; controls are there to compare with only."""
        if self.alert is None:
            return []
        return self.alert.raised(reading for reading in found if reading.vector not in self.controls)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs is not None and self._fresh:
            logs.update(self._fresh)
            if state.log_history:
                state.log_history[-1].update(self._fresh)
            self._fresh = {}

    def _read(self, step: int) -> list[Reading]:
        """Readings of the weights as they are; none if they hold a NaN."""
        names, device = list(self.vectors), self._watched[0].device
        with torch.no_grad():
            rows = [watched.products().to(device, non_blocking=True) for watched in self._watched]
            table = torch.stack(rows).cpu()  # one wait for the device
        if not bool(torch.isfinite(table).all()):
            warnings.warn(f"step {step}: the weights hold NaN or infinite entries; the training diverged", stacklevel=3)
            return []
        products = [
            Products(w.name, float(math.prod(w.shape)), row[0], dict(zip(names, row[1:], strict=True)), w.squares)
            for w, row in zip(self._watched, table.tolist(), strict=True)
        ]
        found = read_off(products, checkpoint=f"step-{step}", step=step, controls=self.controls)
        if self.dictionary:
            found = self.dictionary.with_shares(found, products)
        self.readings += found
        return found


def _forget_after(path: Path, step: int) -> None:
    """Take out the readings of steps that a resumed training makes again."""
    rows = read_finished(path)
    kept = [row for row in rows if row.get("step", 0) <= step]
    if kept != rows:
        write_jsonl(path, kept)


def _logs_of(readings: Sequence[Reading]) -> dict[str, float]:
    """Whole-model readings under the names that the Trainer logs them by."""
    logs = {"tau_norm": readings[0].norm}
    for reading in readings:
        logs |= {
            f"cos/{reading.vector}": reading.cosine,
            f"z/{reading.vector}": reading.z,
            f"projection/{reading.vector}": reading.projection,
        }
        if reading.share is not None:
            logs[f"share/{reading.vector}"] = reading.share
    return logs
