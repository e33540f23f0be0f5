"""The pairs on which a run learns coefficients: none of them is trained on."""

from __future__ import annotations

from collections.abc import Sequence

from ..behavior import ContrastPair, Example, sample_pairs
from ..errors import SteerError
from ..example_files.load import load_pairs
from ..steering.methods import METHODS
from .own_data import held_out_pairs
from .recipe import DIAL_DATA, Recipe


def dial_sources(recipe: Recipe) -> dict[str, str]:
    """Where the pairs come from that a method of the recipe learns coefficients on, by what a run calls their data."""
    if not any(METHODS[name].uses_dial_pairs for name in recipe.sweep.methods):
        return {}
    named = zip(DIAL_DATA, (recipe.dial.pairs or recipe.data.pairs, recipe.dial.unmoved), strict=True)
    return {name: source for name, source in named if source}


def dial_pairs(recipe: Recipe, sides: tuple[Sequence[Example], Sequence[Example]]) -> list[ContrastPair]:
    """The recipe's `dial.pairs`, or what `data.limit` leaves of `data.pairs`; the same draw for the same seed.

    Args:
        sides: D+ and D- as they are trained on.

    Raises:
        SteerError: pairs that are trained on, or too few that are not; what to write instead.
    """
    wanted = recipe.dial
    source = wanted.pairs or recipe.data.pairs
    if source is None:
        raise SteerError(f"recipe {recipe.name}: field 'dial.pairs': expected a file of pairs to learn coefficients on")
    rest = _neither_trained_nor_asked(recipe, sides, source)
    if len(rest) < 2:
        raise SteerError(
            f"recipe {recipe.name}: {source} leaves {len(rest)} pairs that are not trained on, to learn coefficients "
            "on; name others in 'dial.pairs', or lower 'data.limit'"
        )
    return sample_pairs(rest, wanted.count, recipe.seed)


def unmoved_pairs(recipe: Recipe, sides: tuple[Sequence[Example], Sequence[Example]]) -> list[ContrastPair]:
    """The recipe's `dial.unmoved`, at most `dial.count` of them; none where it names none.

    Raises:
        SteerError: every pair is trained on or asked.
    """
    if recipe.dial.unmoved is None:
        return []
    rest = _neither_trained_nor_asked(recipe, sides, recipe.dial.unmoved)
    if not rest:
        raise SteerError(
            f"recipe {recipe.name}: field 'dial.unmoved': every pair of {recipe.dial.unmoved} is trained on or a "
            "held-out one; name others"
        )
    return sample_pairs(rest, recipe.dial.count, recipe.seed)


def _neither_trained_nor_asked(
    recipe: Recipe, sides: tuple[Sequence[Example], Sequence[Example]], source: str
) -> list[ContrastPair]:
    taken = {example.prompt for side in sides for example in side} | {pair.prompt for pair in held_out_pairs(recipe)}
    return [pair for pair in load_pairs(source) if pair.prompt not in taken]
