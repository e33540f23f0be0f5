"""A recipe's methods, each made from what the run trained, and the strengths at which they are measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
from .records import read_json
from .sweep import strength_at_damage
from .tasks.task import Task
from .vector import WeightVector
from .workshop import Workshop

SIDES = {"plus": 1.0, "minus": -1.0}
KINDS = {"bias-only": "bias", "full": "full"}  # methods whose two sides are trained otherwise than by LoRA
SNAPSHOTS = 4  # points of a training that are kept for the methods that need them
FROM_SNAPSHOTS = ("fine-tuned", "contrastive half", "DPO")


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
            "undo": lambda: Direction("undo", -task_vector(self.folder / "drift")),
        }

    def steering(self, name: str) -> Steering:
        """The method or variant of that name, trained if it is not yet."""
        return self._variant(name) if name in self.recipe.sweep.variants else self._makers[name]()

    def _variant(self, name: str) -> Steering:
        """An expression of the vector and its two sides, such as lines(w, alpha=0.5, beta=1)."""
        plus, minus = (task_vector(side) for side in self._sides())
        vectors = {"w": self.vector(), "plus": plus, "minus": minus}
        return Direction(name, combine(self.recipe.sweep.variants[name], vectors))

    def trainings(self, name: str) -> list[Path]:
        """The fine-tunes that a method is made from, for its cost."""
        folder = self.folder
        own = {"bias-only": folder / "bias", "full": folder / "full", "DPO": folder / "DPO"}
        match name:
            case "bias-only" | "full" | "DPO":
                return [own[name] / side for side in SIDES]
            case "contrastive" | "contrastive half" | "fine-tuned":
                return [folder / side for side in SIDES]
            case "tau+" | "tau-":
                return [folder / ("plus" if name == "tau+" else "minus")]
            case "joint":
                return [folder / "joint" / f"{k:g}" for k in self._copies()]
        return [folder / side for side in SIDES] if name in self.recipe.sweep.variants else []

    def vector(self) -> WeightVector:
        """w = tau+ - tau-, saved as an adapter."""
        path = self.folder / "vector"
        if not path.exists():
            contrast_vector(*self._sides()).save(path)
        return WeightVector.load(path)

    def _sides(self) -> list[Path]:
        train = dict(self.recipe.train)
        if any(name in self.recipe.sweep.methods for name in FROM_SNAPSHOTS[:2]):
            train["snapshots"] = SNAPSHOTS
        sides = zip(SIDES, self.shop.sides, strict=True)
        return [self.shop.fine_tuned(self.shop.base, examples, name, train) for name, examples in sides]

    def _other_kind(self, name: str) -> Steering:
        path = self.folder / KINDS[name] / "vector"
        if not path.exists():
            train = {**self.recipe.train, "kind": KINDS[name], **self._train_of(name)}
            sides = zip(SIDES, self.shop.sides, strict=True)
            plus, minus = [
                self.shop.fine_tuned(self.shop.precise, examples, f"{KINDS[name]}/{side}", train)
                for side, examples in sides
            ]
            contrast_vector(plus, minus).save(path)
        return Direction(name, WeightVector.load(path))

    def _train_of(self, name: str) -> Mapping[str, Any]:
        return {str(method): train for method, train in self.recipe.train_of.items()}.get(name, {})

    def _half_trained(self) -> Steering:
        """The contrast of both sides half way through: together they cost what one whole fine-tune does."""
        halves = [snapshots_of(side)[0.5] for side in self._sides()]
        return Direction("contrastive half", contrast_vector(*halves))

    def _preferred(self) -> list[Path]:
        """DPO towards each side, on the pairs that the two sides form."""
        positive, negative = self.shop.sides
        if [e.prompt for e in positive] != [e.prompt for e in negative]:
            raise SteerError(f"recipe {self.recipe.name}: DPO needs pairs: the same prompts in D+ and D-")
        pairs = [ContrastPair(p.prompt, p.answer, n.answer) for p, n in zip(positive, negative, strict=True)]
        settings = self.recipe.train_settings({**self.recipe.train, "snapshots": SNAPSHOTS, **self._train_of("DPO")})
        folders = []
        for side, wanted in zip(
            SIDES, (preferences_of(pairs, "positive"), preferences_of(pairs, "negative")), strict=True
        ):
            with self.shop.show(f"train DPO {side}") as progress:
                out = self.folder / "DPO" / side
                folders.append(train_preference(self.shop.base, wanted, out, settings=settings, progress=progress))
        return folders

    def _copies(self) -> list[float]:
        ks = self.recipe.sweep.methods.get("joint") or []
        return [abs(k) for k in ks]

    def _joint(self) -> Steering:
        """The drift's fine-tune made again with desired examples mixed in, |k| times each."""
        drift = self.recipe.drift
        assert drift is not None
        task = self.recipe.tune_examples(drift)
        desired = self.shop.sides[0 if drift.joint_side == "positive" else 1][: drift.joint_examples]
        sign = 1.0 if drift.joint_side == "positive" else -1.0
        drifted = task_vector(self.folder / "drift")
        changes = {}
        for copies in self._copies():
            mixed: list[Example] = [*task, *desired * round(copies)]
            path = self.shop.fine_tuned(self.shop.base, mixed, f"joint/{copies:g}", drift.train)
            changes[sign * copies] = task_vector(path) - drifted
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


def snapshots_of(side: Path) -> dict[float, Path]:
    """A fine-tune's snapshots by the share of the training that is done, in quarters."""
    folders = list(list_snapshots(side).values())
    return {number / len(folders): folder for number, folder in enumerate(folders, start=1)}


def _steps(plus: Path, minus: Path) -> dict[float, WeightVector]:
    """The change at each snapshot: k > 0 towards D+, k < 0 towards D-."""
    sides = zip((1.0, -1.0), (plus, minus), strict=True)
    return {sign * share: task_vector(path) for sign, side in sides for share, path in snapshots_of(side).items()}
