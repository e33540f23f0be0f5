"""Where everything of a run lies; no other module spells these places out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Side = Literal["positive", "negative"]  # D+ and what follows from it, and D-
FORMER_SIDES = {"positive": "plus", "negative": "minus"}


@dataclass(frozen=True)
class RunFolder:
    """The paths of one run. A run that an older version began keeps the names that it has."""

    path: Path

    def _named(self, name: str, former: str) -> Path:
        """`name` in the folder, or the name that an older version gave it if that is what is there."""
        old = self.path / former
        begun = old.exists() or old.with_name(f"{former}.work").exists()
        return old if begun and not (self.path / name).exists() else self.path / name

    @property
    def recipe(self) -> Path:
        """The recipe that the run was started with (YAML)."""
        return self.path / "recipe.yaml"

    def examples(self, side: Side) -> Path:
        """D+ or D- as it is trained on (JSONL)."""
        return self.path / f"{side}.jsonl"

    @property
    def sampled(self) -> Path:
        """The model's own answers under S+ and S-, and the sides chosen from them."""
        return self._named("sampled", "contrast")

    @property
    def judge_cache(self) -> Path:
        """A served judge's replies (JSONL)."""
        return self.path / "judge.jsonl"

    def finetune(self, side: Side) -> Path:
        """The LoRA fine-tune on one side."""
        return self._named(side, FORMER_SIDES[side])

    def finetune_of(self, training: str, side: Side) -> Path:
        """One side of a method with a training of its own, such as bias, full or DPO."""
        return RunFolder(self.path / training).finetune(side)

    def joint_finetune(self, copies: float) -> Path:
        """The repair target trained again with each desired example so many times among its data."""
        return self.path / "joint" / f"{abs(copies):g}"

    @property
    def first_finetune(self) -> Path:
        """The fine-tune that is made before all else, as an adapter."""
        return self._named("first_finetune", "start")

    @property
    def first_model(self) -> Path:
        """The model with the first fine-tune merged into it."""
        return self._named("first_finetune-model", "start-model")

    @property
    def repair_target(self) -> Path:
        """The fine-tune that is to be repaired, as an adapter."""
        return self._named("repair_target", "drift")

    @property
    def repair_model(self) -> Path:
        """The model with the repair target merged into it."""
        return self._named("repair_target-model", "drift-model")

    @property
    def vector(self) -> Path:
        """The contrastive weight vector."""
        return self.path / "vector"

    def vector_of(self, training: str) -> Path:
        """The vector between the two sides of another kind of training."""
        return self.path / training / "vector"

    def two_way(self, training: str) -> Path:
        """The one adapter of a two-way training."""
        return self.path / training / "both"

    @property
    def random(self) -> Path:
        """The random vector with the norms of the contrastive one."""
        return self.path / "random"

    def dial(self, of: str) -> Path:
        """The vector with learned coefficients: of the contrastive one, or of the random one."""
        return self.path / "dial" / of

    @property
    def trained_activation(self) -> Path:
        """The activation vector that is trained at both signs."""
        return self.path / "trained_activation"

    @property
    def activations(self) -> Path:
        """The activation vector of every layer."""
        return self.path / "activations"

    @property
    def layer(self) -> Path:
        """The layer that activation steering takes (JSON)."""
        return self.path / "layer.json"

    @property
    def strengths(self) -> Path:
        """Each method's strengths k (JSON)."""
        return self.path / "strengths.json"

    @property
    def measurements(self) -> Path:
        """What was measured, a value an item (JSONL)."""
        return self._named("measurements.jsonl", "cells.jsonl")

    @property
    def engine(self) -> Path:
        """The server that measured, and the base's log-probabilities that it was compared with (JSON)."""
        return self.path / "engine.json"

    @property
    def batches(self) -> Path:
        """How many tokens memory allowed at once, for each kind of work (JSON); absent where all went in at once."""
        return self.path / "batches.json"

    @property
    def rows(self) -> Path:
        """Means and standard errors that follow from the measurements (JSONL)."""
        return self.path / "rows.jsonl"

    @property
    def replies(self) -> Path:
        """What the model said where a task asks for open replies (JSONL)."""
        return self.path / "replies.jsonl"

    @property
    def costs(self) -> Path:
        """What each method costs to make and to use (JSONL)."""
        return self.path / "costs.jsonl"

    @property
    def samples(self) -> Path:
        """Replies to the same prompts at several strengths (JSONL)."""
        return self.path / "samples.jsonl"

    @property
    def page(self) -> Path:
        """The report."""
        return self.path / "report.html"

    @property
    def plot(self) -> Path:
        """The report's main chart."""
        return self.path / "behaviour_against_capability.png"
