"""A run's methods and variants, each made, and the strengths at which they are measured."""

from __future__ import annotations

from ..evaluation.search import k_at_kl, k_at_loss_increase
from ..evaluation.tasks.task import Task
from ..files import read_kept, write_json
from ..former_names import METHODS as FORMER_METHODS
from ..run_folder import RunFolder
from ..steering.methods import METHODS
from ..steering.steering import Direction, Steering, TrainedCheckpoints
from ..vectors.difference import task_vector
from ..vectors.expression import combine
from .artifacts import RunArtifacts
from .recipe import Recipe
from .recipe_fields import VARIANT_VECTORS, SweepRecipe


def make_method(name: str, artifacts: RunArtifacts) -> Steering:
    """The method or variant of that name; what it is made from is trained if it is not yet."""
    expression = artifacts.recipe.sweep.variants.get(name)
    if expression is None:
        return METHODS[name].make(name, artifacts)
    positive, negative = (task_vector(finetune) for finetune in artifacts.finetunes())
    vectors = dict(zip(VARIANT_VECTORS, (artifacts.difference(), positive, negative), strict=True))
    return Direction(name, combine(expression, vectors))


def methods_with_strengths(artifacts: RunArtifacts, texts: Task) -> list[tuple[Steering, list[float]]]:
    """Every variant and method of the recipe with its strengths; those not given are searched on `texts`."""
    path, show = artifacts.folder.strengths, artifacts.show
    known = known_strengths(artifacts.folder, artifacts.recipe.sweep)
    found: list[tuple[Steering, list[float]]] = []
    for name in method_names(artifacts.recipe):
        method = make_method(name, artifacts)
        if name not in known:
            with show(f"strengths of {name}") as progress:
                progress(0, 1)
                known[name] = strengths_of(method, artifacts, texts)
                progress(1, 1)
            write_json(path, known)
        found.append((method, known[name]))
    return found


def method_names(recipe: Recipe) -> list[str]:
    """All that a recipe measures beside the base, in the order of its rows."""
    return [*recipe.sweep.variants, *recipe.sweep.methods]


def known_strengths(folder: RunFolder, sweep: SweepRecipe) -> dict[str, list[float]]:
    """Method -> the strengths that a run has found for it; where they are listed, as they are listed now."""
    kept = read_kept(folder.strengths, dict[str, list[float]]) or {}
    known = {FORMER_METHODS.get(name, name): ks for name, ks in kept.items()}
    listed = {
        name: ks
        for name, ks in sweep.methods.items()
        if ks is not None and not METHODS[name].strengths_from_checkpoints
    }
    return {name: listed.get(name, ks) for name, ks in known.items()}


def strengths_of(method: Steering, artifacts: RunArtifacts, texts: Task) -> list[float]:
    """The recipe's own, or all that was trained, or fractions of the k at its loss increase, or KL, on each side."""
    sweep, lm = artifacts.recipe.sweep, artifacts.lm()
    listed = sweep.methods.get(method.name)
    entry = METHODS.get(method.name)
    if isinstance(method, TrainedCheckpoints) and (listed is None or (entry and entry.strengths_from_checkpoints)):
        return sorted(method.changes)
    if listed is not None:
        return listed
    fractions = sweep.fractions_of.get(method.name, sweep.fractions)
    if sweep.kl is not None:
        read = artifacts.tasks["token_kl"].of_split("validation").first(sweep.search_items)
        ends = [k_at_kl(lm, method, read, kl=sweep.kl, sign=sign) for sign in sweep.sides]
    else:
        rise = sweep.loss_increase
        ends = [k_at_loss_increase(lm, method, texts, loss_increase=rise, sign=sign) for sign in sweep.sides]
    return sorted(float(f"{end * fraction:.3g}") for end in ends for fraction in fractions)
