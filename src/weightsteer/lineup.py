"""A recipe's methods, each made from what the run trained, and the strengths at which they are measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from .activations import ActivationVector, activation_vector
from .behavior import Behavior, ContrastPair, Example
from .errors import SteerError
from .expression import combine
from .extract import contrast_vector, task_vector
from .finetune import list_snapshots, preferences_of, train_preference
from .methods import Direction, Steering, Steps, SystemPrompt, best_layer
from .recipe import metric_key, save_json
from .recipe_fields import SNAPSHOTS
from .records import read_json
from .sweep import strength_at_damage
from .tasks.task import Task
from .vector import WeightVector
from .workshop import Workshop

SIDES = ("plus", "minus")
KINDS = {"bias-only": "bias", "full": "full"}  # methods whose two sides are trained otherwise than by LoRA
FROM_SNAPSHOTS = ("fine-tuned", "contrastive half")


class Lineup:
    """The methods of one run by name."""

    def __init__(self, shop: Workshop, behavior: Behavior, tasks: Mapping[str, Task]) -> None:
        self.shop, self.behavior, self.tasks = shop, behavior, tasks
        self.recipe, self.folder = shop.recipe, shop.folder
        self._makers: Mapping[str, Callable[[], Steering]] = {
            "contrastive": lambda: Direction("contrastive", self.vector()),
            "contrastive half": self._half_trained,
            "tau+": lambda: Direction("tau+", task_vector(self._sides()[0])),
            "tau-": lambda: Direction("tau-", -task_vector(self._sides()[1])),  # k > 0 adds: away from tau-
            "bias-only": partial(self._other_kind, "bias-only"),
            "full": partial(self._other_kind, "full"),
            "activation": self._activation,
            "activation all layers": lambda: Direction("activation all layers", self._activations().increments()),
            "system prompt": lambda: SystemPrompt("system prompt", behavior),
            "fine-tuned": lambda: Steps("fine-tuned", _steps(*self._sides())),
            "DPO": lambda: Steps("DPO", _steps(*self._preferred())),
            "joint": self._joint,
            "undo": lambda: Direction("undo", -self._repairing_sign * task_vector(self.folder / "drift")),
        }

    def steering(self, name: str) -> Steering:
        """The method or variant of that name, trained if it is not yet."""
        return self._variant(name) if name in self.recipe.sweep.variants else self._makers[name]()

    def _variant(self, name: str) -> Steering:
        """An expression of the vector and its two sides, such as lines(w, alpha=0.5, beta=1)."""
        plus, minus = (task_vector(side) for side in self._sides())
        vectors = {"w": self.vector(), "plus": plus, "minus": minus}
        return Direction(name, combine(self.recipe.sweep.variants[name], vectors))

    def trainings(self, name: str, k: float) -> list[tuple[Path, float]]:
        """The fine-tunes that a method is made from at k, each with the share of its training that is used."""
        side = "plus" if k > 0 else "minus"
        match name:
            case "bias-only" | "full":
                return [(self.folder / KINDS[name] / one, 1.0) for one in SIDES]
            case "contrastive half":
                return [(self.folder / one, 0.5) for one in SIDES]
            case "tau+" | "tau-":
                return [(self.folder / ("plus" if name == "tau+" else "minus"), 1.0)]
            case "fine-tuned":
                return [(self.folder / side, abs(k))]
            case "DPO":
                return [(self.folder / "DPO" / side, abs(k))]
            case "joint":
                return [(self.folder / "joint" / f"{abs(k):g}", 1.0)]
            case "activation" | "activation all layers" | "system prompt" | "undo":
                return []
        return [(self.folder / one, 1.0) for one in SIDES]  # contrastive and its variants

    def vector(self) -> WeightVector:
        """w = tau+ - tau-, saved as an adapter."""
        path = self.folder / "vector"
        if not path.exists():
            contrast_vector(*self._sides()).save(path)
        return WeightVector.load(path)

    def _sides(self) -> list[Path]:
        train = dict(self.recipe.train)
        if any(name in self.recipe.sweep.methods for name in FROM_SNAPSHOTS):
            train["snapshots"] = SNAPSHOTS
        sides = zip(SIDES, self.shop.sides, strict=True)
        return [self.shop.fine_tuned(self.shop.base, examples, name, train) for name, examples in sides]

    def _other_kind(self, name: str) -> Steering:
        path = self.folder / KINDS[name] / "vector"
        if not path.exists():
            passes = {"bf16": self.recipe.dtype == "bfloat16"}
            train = {**self.recipe.train, "kind": KINDS[name], **passes, **self._train_of(name)}
            sides = zip(SIDES, self.shop.sides, strict=True)
            plus, minus = [
                self.shop.fine_tuned(self.shop.precise, examples, f"{KINDS[name]}/{side}", train)
                for side, examples in sides
            ]
            contrast_vector(plus, minus).save(path)
        return Direction(name, WeightVector.load(path))

    def _train_of(self, name: str) -> Mapping[str, Any]:
        return next((train for method, train in self.recipe.train_of.items() if method == name), {})

    def _half_trained(self) -> Steering:
        """The contrast of both sides half way through: together they cost what one whole fine-tune does."""
        halves = [snapshots_of(side)[0.5] for side in self._sides()]
        return Direction("contrastive half", contrast_vector(*halves))

    def _preferred(self) -> list[Path]:
        """DPO towards each side, on the pairs that the two sides form."""
        pairs = pairs_of(*self.shop.sides)
        if len(pairs) < 2:
            raise SteerError(f"recipe {self.recipe.name}: DPO needs pairs: questions that D+ and D- have in common")
        settings = self.recipe.train_settings({**self.recipe.train, "snapshots": SNAPSHOTS, **self._train_of("DPO")})
        folders = []
        for side, wanted in zip(
            SIDES, (preferences_of(pairs, "positive"), preferences_of(pairs, "negative")), strict=True
        ):
            with self.shop.show(f"train DPO {side}") as progress:
                out = self.folder / "DPO" / side
                folders.append(train_preference(self.shop.base, wanted, out, settings=settings, progress=progress))
        return folders

    @property
    def _repairing_sign(self) -> float:
        """Which way k goes to repair the drift: towards the side of the desired examples."""
        return -1.0 if self.recipe.drift and self.recipe.drift.joint_side == "negative" else 1.0

    def _joint(self) -> Steering:
        """The drift's fine-tune made again with desired examples mixed in, |k| times each."""
        drift = self.recipe.drift
        assert drift is not None
        task = self.recipe.tune_examples(drift)
        desired = self.shop.sides[0 if drift.joint_side == "positive" else 1][: drift.joint_examples]
        drifted = task_vector(self.folder / "drift")
        changes = {}
        for copies in sorted({abs(round(k)) for k in self.recipe.sweep.methods["joint"] or []}):
            mixed: list[Example] = [*task, *desired * copies]
            path = self.shop.fine_tuned(self.shop.base, mixed, f"joint/{copies}", drift.train)
            changes[self._repairing_sign * copies] = task_vector(path) - drifted
        return Steps("joint", changes)

    def _activations(self) -> ActivationVector:
        path, pairs = self.folder / "activations", self.recipe.sweep.activation_pairs
        if not path.exists():
            positive, negative = (side[:pairs] for side in self.shop.sides)
            with self.shop.show("activations") as progress:
                activation_vector(self.shop.base, positive, negative, progress=progress).save(path)
        return ActivationVector.load(path)

    def _activation(self) -> Steering:
        """The single-layer baseline, its layer chosen by a scan on validation items."""
        vector, scan, sweep = self._activations(), self.folder / "layer.json", self.recipe.sweep
        if not scan.exists():
            task, metric = metric_key(sweep.behavior)
            items = self.tasks[task].of_split("validation").first(sweep.probe_items)
            with self.shop.show("activations: layer") as progress:
                layer = best_layer(self.shop.lm, vector, items, metric=metric, step=sweep.layer_step, progress=progress)
            save_json(scan, layer)
        return Direction("activation", vector.only(int(read_json(scan))))

    def all(self, probe: Task) -> list[tuple[Steering, list[float]]]:
        """Every method of the recipe with its strengths; those not given are searched on `probe`."""
        path = self.folder / "strengths.json"
        known: dict[str, list[float]] = read_json(path) if path.exists() else {}
        sweep = self.recipe.sweep
        wanted: dict[str, list[float] | None] = dict.fromkeys(sweep.variants)
        wanted |= {str(name): ks for name, ks in sweep.methods.items()}
        found: list[tuple[Steering, list[float]]] = []
        for number, (name, ks) in enumerate(wanted.items()):
            method = self.steering(name)
            if name not in known:
                with self.shop.show(f"strengths of {name}") as progress:
                    progress(number, len(wanted), name)
                    known[name] = self._strengths(method, ks, probe)
                    progress(number + 1, len(wanted), name)
                save_json(path, known)
            found.append((method, known[name]))
        return found

    def _strengths(self, method: Steering, ks: list[float] | None, probe: Task) -> list[float]:
        """The recipe's own, or all that was trained, or fractions of the k that reach its damage on each side."""
        if isinstance(method, Steps) and (ks is None or method.name == "joint"):
            return sorted(method.changes)
        if ks is not None:
            return ks
        sweep = self.recipe.sweep
        fractions = sweep.fractions_of.get(method.name, sweep.fractions)
        lm = self.shop.lm
        ends = [strength_at_damage(lm, method, probe, damage=sweep.damage, sign=sign) for sign in sweep.sides]
        return sorted(float(f"{end * fraction:.3g}") for end in ends for fraction in fractions)


def pairs_of(positive: Sequence[Example], negative: Sequence[Example]) -> list[ContrastPair]:
    """Pairs of answers to one question; sides that were filtered apart pair as many as both have."""
    others: dict[str, list[str]] = {}
    for example in negative:
        others.setdefault(example.prompt, []).append(example.answer)
    waiting = {prompt: iter(answers) for prompt, answers in others.items()}
    matched = ((e, next(waiting.get(e.prompt, iter(())), None)) for e in positive)
    return [ContrastPair(e.prompt, e.answer, answer) for e, answer in matched if answer is not None]


def snapshots_of(side: Path) -> dict[float, Path]:
    """A fine-tune's snapshots by the share of the training that is done, in quarters."""
    folders = list(list_snapshots(side).values())
    return {number / len(folders): folder for number, folder in enumerate(folders, start=1)}


def _steps(plus: Path, minus: Path) -> dict[float, WeightVector]:
    """The change at each snapshot: k > 0 towards D+, k < 0 towards D-."""
    sides = zip((1.0, -1.0), (plus, minus), strict=True)
    return {sign * share: task_vector(path) for sign, side in sides for share, path in snapshots_of(side).items()}
