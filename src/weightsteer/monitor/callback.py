"""The same numbers while a model trains, through the Trainer's own logging."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..delta import dense, in_memory, require_same_shape
from ..errors import SteerError
from ..lowrank import LowRank
from ..records import append_jsonl
from ..vector import WeightVector
from .readings import WHOLE, Alert, Products, Reading, described, read_off

LORA_PREFIX = "base_model.model."


class SteeringMonitor(TrainerCallback):
    """Logs `cos/NAME`, `z/NAME`, `projection/NAME` and `tau_norm` of a training run at every so many steps.

    Works for PEFT's LoRA (factored: r x r work a matrix) and for whole parameters that train, of which a copy is kept
    as they were at the start of `train`. Every process of a distributed run computes the same; the Trainer logs once.
    A resumed run of whole parameters compares with the weights that it resumed from, one of LoRA with the base.

    Example:
        monitor = SteeringMonitor({"evil": WeightVector.load("runs/evil/vector")}, every=10, alert="z=4")
        trainer = Trainer(...)
        monitor.watch(trainer)
        trainer.train()

    Args:
        vectors: name -> vector of the model's base.
        every: steps between two readings.
        controls: names among `vectors` that are there for the null band (see `read_off`).
        alert: "z=4" warns when a whole-model reading's |z| reaches 4; None never does.
        stop: end the training at the first alert.
        out: a JSONL file that gets every reading, by layer and kind of module too.

    Raises:
        SteerError: no vectors, or an alert that cannot be read.
    """

    def __init__(
        self,
        vectors: Mapping[str, WeightVector],
        *,
        every: int = 10,
        controls: Sequence[str] = (),
        alert: str | None = None,
        stop: bool = False,
        out: str | Path | None = None,
    ) -> None:
        if not vectors or every < 1:
            raise SteerError(f"SteeringMonitor: expected vectors and every of 1 or more; found {len(vectors)}, {every}")
        self.vectors, self.every, self.controls, self.stop = dict(vectors), every, tuple(controls), stop
        self.alert = Alert.parse(alert) if alert else None
        self.out = Path(out) if out else None
        self.readings: list[Reading] = []  # all of them, whole-model and by part
        self._watched: list[_Watched] = []
        self._fresh: dict[str, float] = {}

    def watch(self, trainer: Trainer) -> None:
        """Join a Trainer, ahead of its reporters, so that TensorBoard, W&B and the others get the numbers too."""
        trainer.callback_handler.callbacks.insert(0, self)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._watched = _watched_parameters(kwargs["model"], self.vectors)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step % self.every and state.global_step != state.max_steps:
            return
        found = self._read(state.global_step)
        if not found:
            return
        self._fresh = {"tau_norm": next(r.norm for r in found if r.part == WHOLE)}
        for reading in found:
            if reading.part == WHOLE:
                self._fresh |= {
                    f"cos/{reading.vector}": reading.cosine,
                    f"z/{reading.vector}": reading.z,
                    f"projection/{reading.vector}": reading.projection,
                }
        control.should_log = True
        if self.out and state.is_world_process_zero:
            append_jsonl(self.out, [asdict(reading) for reading in found])
        alerts = self.alert.raised(r for r in found if r.vector not in self.controls) if self.alert else []
        for reading in alerts:
            if state.is_world_process_zero:
                warnings.warn(described(reading), stacklevel=2)
        if alerts and self.stop:
            control.should_training_stop = True

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
        names, device = list(self.vectors), self._watched[0].owners.device
        with torch.no_grad():
            rows = [watched.products().to(device, non_blocking=True) for watched in self._watched]
            table = torch.stack(rows).cpu()  # one wait for the device
        if not bool(torch.isfinite(table).all()):
            warnings.warn(f"step {step}: the weights hold NaN or infinite entries; the training diverged", stacklevel=3)
            return []
        products = [
            Products(w.name, w.size, row[0], dict(zip(names, row[1:], strict=True)), w.squares)
            for w, row in zip(self._watched, table.tolist(), strict=True)
        ]
        found = read_off(products, checkpoint=f"step-{step}", step=step, controls=self.controls)
        self.readings += found
        return found


@dataclass(frozen=True)
class _Watched:
    """One parameter that trains or that a vector changes, with all vectors' parts of it side by side."""

    name: str
    size: float
    squares: Mapping[str, float]  # vector -> <v, v>
    tau: _LiveLora | _LiveWhole | None  # None: does not train
    B: Tensor  # (d_out, R): all vectors' factors
    A: Tensor  # (R, d_in)
    owners: Tensor  # (R, vectors) of ones
    whole: Tensor | None = None  # (vectors, entries): dense deltas; then B and A are empty

    def products(self) -> Tensor:
        """(1 + vectors,) in float64: <tau, tau>, and <tau, v> of every vector."""
        if self.tau is None:
            return torch.zeros(1 + self.owners.shape[1], dtype=torch.float64, device=self.B.device)
        return self.tau.products(self).double()


@dataclass(frozen=True)
class _LiveLora:
    """tau = scale B A as it stands in the training."""

    B: Tensor  # (d_out, r)
    A: Tensor  # (r, d_in)
    scale: float

    def products(self, vectors: _Watched) -> Tensor:
        B, A = _gathered(self.B).float(), _gathered(self.A).float()
        own = ((B.T @ B) * (A @ A.T)).sum() * self.scale**2
        if vectors.whole is None:
            crossed = ((B.T @ vectors.B) * (A @ vectors.A.T)).sum(dim=0) @ vectors.owners
        else:
            crossed = vectors.whole @ (B @ A).flatten()
        return torch.cat([own[None], crossed * self.scale])


@dataclass(frozen=True)
class _LiveWhole:
    """tau = theta - theta at the start, of a parameter that trains itself."""

    now: Tensor
    start: Tensor

    def products(self, vectors: _Watched) -> Tensor:
        tau = _gathered(self.now).float() - self.start.float()
        if vectors.whole is not None:
            crossed = vectors.whole @ tau.flatten()
        else:
            crossed = ((tau @ vectors.A.T) * vectors.B).sum(dim=0) @ vectors.owners
        return torch.cat([tau.square().sum()[None], crossed])


def _gathered(tensor: Tensor) -> Tensor:
    """The whole tensor, where a distributed run holds a piece of it."""
    gather = getattr(tensor, "full_tensor", None)
    return tensor.detach() if gather is None else gather().detach()


def _watched_parameters(model: nn.Module, vectors: Mapping[str, WeightVector]) -> list[_Watched]:
    """Every parameter that trains or that a vector changes.

    Raises:
        SteerError: a kind of adapter that is not plain LoRA, another shape, or nothing in common.
    """
    model = getattr(model, "module", model)  # a distributed wrapper's own model
    live = {**_lora_of(model), **_whole_of(model)}
    changed = {name for vector in vectors.values() for name in vector.deltas}
    if not live:
        raise SteerError("SteeringMonitor: the model has no parameters that train")
    if not live.keys() & changed:
        raise SteerError(
            f"SteeringMonitor: the vectors change {min(changed, default='nothing')} and the like, the training "
            f"{min(live)} and the like: no parameter in common; were they made on another model?"
        )
    return [_watch(name, live.get(name), vectors) for name in dict.fromkeys([*live, *sorted(changed)])]


def _lora_of(model: nn.Module) -> dict[str, _LiveLora | _LiveWhole]:
    found: dict[str, _LiveLora | _LiveWhole] = {}
    for path, module in model.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        name = f"{path.removeprefix(LORA_PREFIX)}.weight"
        active = [adapter for adapter in module.active_adapters if adapter in module.lora_A]
        if len(active) != 1 or module.use_dora.get(active[0]) or getattr(module, "fan_in_fan_out", False):
            raise SteerError(f"SteeringMonitor: {name}: expected one plain LoRA on a linear layer (no DoRA, no Conv1D)")
        (adapter,) = active
        factors: Any = module.lora_B[adapter], module.lora_A[adapter]
        found[name] = _LiveLora(factors[0].weight, factors[1].weight, float(module.scaling[adapter]))
    return found


def _whole_of(model: nn.Module) -> dict[str, _LiveLora | _LiveWhole]:
    found: dict[str, _LiveLora | _LiveWhole] = {}
    for path, parameter in model.named_parameters():
        if parameter.requires_grad and "lora_" not in path:
            name = path.removeprefix(LORA_PREFIX).replace(".modules_to_save.default.", ".").replace(".base_layer.", ".")
            found[name] = _LiveWhole(parameter, _gathered(parameter).clone())
    return found


def _watch(name: str, tau: _LiveLora | _LiveWhole | None, vectors: Mapping[str, WeightVector]) -> _Watched:
    """The vectors' parts of one parameter, side by side on its device, in float32."""
    deltas = {v: in_memory(name, vector.deltas[name]) for v, vector in vectors.items() if name in vector.deltas}
    shape: tuple[int, ...]
    if isinstance(tau, _LiveLora):
        shape, device = (tau.B.shape[0], tau.A.shape[1]), tau.B.device
    elif tau is not None:
        shape, device = tuple(tau.start.shape), tau.start.device
    else:
        shape, device = tuple(next(iter(deltas.values())).shape), torch.device("cpu")
    for delta in deltas.values():
        require_same_shape(name, torch.empty(shape, device="meta"), delta)
    size = float(torch.Size(shape).numel())
    squares = dict.fromkeys(vectors, 0.0)
    for vector, delta in deltas.items():
        squares[vector] = delta.dot(delta) if isinstance(delta, LowRank) else float(delta.double().square().sum())
    order = list(vectors)
    if all(isinstance(delta, LowRank) for delta in deltas.values()) and len(shape) == 2:
        factors = {v: delta for v, delta in deltas.items() if isinstance(delta, LowRank)}
        B = torch.cat([torch.empty(shape[0], 0), *(d.B.float() for d in factors.values())], dim=1)
        A = torch.cat([torch.empty(0, shape[1]), *(d.A.float() for d in factors.values())])
        owner = [order.index(v) for v, d in factors.items() for _ in range(d.rank)]
        owners = torch.nn.functional.one_hot(torch.tensor(owner, dtype=torch.long), len(order)).float()
        return _Watched(name, size, squares, tau, B.to(device), A.to(device), owners.to(device))
    whole = torch.stack([dense(deltas[v]).float().flatten() if v in deltas else torch.zeros(int(size)) for v in order])
    none = torch.empty(0, 0, device=device)
    return _Watched(name, size, squares, tau, none, none, torch.zeros(0, len(order), device=device), whole.to(device))
