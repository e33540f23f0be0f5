"""How a side is trained."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import SteerError

KINDS = ("lora", "bias", "full")


@dataclass(frozen=True)
class TrainSettings:
    """How a side is trained; the defaults are the paper's (LoRA of rank 32, alpha 16; AdamW, weight decay 0.01)."""

    kind: str = "lora"
    rank: int = 32
    alpha: int = 16
    learning_rates: tuple[float, ...] = (1e-4, 2e-4)  # each is tried; the lowest validation loss wins
    epochs: float = 1.0
    max_steps: int | None = None
    batch_size: int = 8
    accumulation: int = 1
    weight_decay: float = 0.01
    warmup_steps: int = 5
    validation: float = 0.05  # share of the examples held out to choose the stopping point
    evaluations: int = 5  # validation points (and checkpoints) over the run
    patience: int = 3  # evaluations without improvement before stopping; a run that keeps snapshots goes on to its end
    snapshots: int = 0  # equally spaced points of the run to keep besides the best one, the last of them its end
    bf16: bool = False  # autocast: the products in bfloat16, the weights as they are (for a model in float32)
    max_length: int = 1024  # tokens; longer examples are cut at the end
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise SteerError(f"kind: expected one of {', '.join(KINDS)}, found {self.kind!r}")
        if not self.learning_rates:
            raise SteerError("learning_rates: expected at least one, found none")
        for name in ("rank", "alpha", "batch_size", "accumulation", "evaluations", "max_length", "epochs"):
            if getattr(self, name) <= 0:
                raise SteerError(f"{name}: expected a number above 0, found {getattr(self, name)}")
        if self.max_steps is not None and self.max_steps < 1:
            raise SteerError(f"max_steps: expected 1 or more, found {self.max_steps}")
        if self.snapshots < 0:
            raise SteerError(f"snapshots: expected 0 or more, found {self.snapshots}")
