"""The rows that a recipe's trainings see: its own, or stand-ins of assumed lengths for data that are not here."""

from __future__ import annotations

from ..behavior import Behavior, ContrastPair, Example, pairs_of, sides_of
from ..data_building.sampling import asked_questions
from ..lm import LM
from ..runs.dial_pairs import dial_pairs, unmoved_pairs
from ..runs.recipe import Recipe
from ..runs.recipe_fields import FinetuneRecipe
from ..steering.method import Training
from ..training.job import Encoded
from ..training.settings import RESOURCES, TrainSettings
from .assumed import examples_or_stand_ins, is_here
from .trainings import encoded, rows_of_lengths

Sides = tuple[list[Encoded], list[Encoded]]


class PlannedRows:
    """The rows of D+ and D-, and of the other data that a recipe trains on."""

    def __init__(self, recipe: Recipe, lm: LM, behavior: Behavior, notes: list[str]) -> None:
        """What is assumed is added to `notes`."""
        self.recipe, self.lm, self.behavior, self.notes = recipe, lm, behavior, notes
        self._sides: Sides | None = None

    def of(self, training: Training, settings: TrainSettings) -> Sides:
        """What a training's two sides see; a dial's pairs that cannot be read count as the sides do."""
        if training != "dial-pairs" or not self.has_pairs:
            return self.sides()
        positive, negative = (encoded(self.lm, side, settings) for side in sides_of(self.dial_pairs()[0]))
        return positive, negative

    def sides(self) -> Sides:
        """The rows of D+ and D-; where the model writes them, all answers at their longest."""
        if self._sides is None:
            fields = {name: value for name, value in self.recipe.train.items() if name not in RESOURCES}
            settings = self.recipe.train_settings(fields)
            if sampling := self.recipe.data.sampling:
                questions = asked_questions(self.behavior, sampling.questions)
                prompts = [len(self.lm.chat_ids(q)) for q in questions]
                number = len(self.behavior.positive_prompts) * sampling.samples
                lengths = (prompts * number)[: self.recipe.data.limit]
                made = rows_of_lengths(lengths, sampling.max_new_tokens, settings.max_length)
                self._sides = (made, made)
            else:
                stand_ins = not self._are_here()
                positive, negative = (encoded(self.lm, side, settings, stand_ins=stand_ins) for side in self._given())
                self._sides = (positive, negative)
        return self._sides

    @property
    def has_pairs(self) -> bool:
        """Whether the pairs of the sides, and those of a dial, can be read."""
        dial = [name for name in (self.recipe.dial.pairs, self.recipe.dial.unmoved) if name]
        return not self.recipe.data.sampling and all(map(is_here, [*self._files(), *dial]))

    def pairs(self) -> list[ContrastPair]:
        """The pairs that the sides form."""
        return pairs_of(*self._given())

    def dial_pairs(self) -> tuple[list[ContrastPair], list[ContrastPair]]:
        """The pairs that coefficients are learned on, and those whose margins are to stay."""
        given = self._given()
        return dial_pairs(self.recipe, given), unmoved_pairs(self.recipe, given)

    def examples(self, wanted: FinetuneRecipe) -> tuple[list[Example], bool]:
        """What a fine-tune beside the two sides is trained on, and whether it stands in for data that are not here."""
        if wanted.generate or all(map(is_here, wanted.data)):
            return self.recipe.finetune_examples(wanted), False
        return [e for name in wanted.data for e in examples_or_stand_ins(name, self.notes)[: wanted.limit]], True

    def _files(self) -> list[str]:
        data = self.recipe.data
        return [name for name in (data.pairs, data.positive, data.negative) if name]

    def _are_here(self) -> bool:
        return all(map(is_here, self._files()))

    def _given(self) -> tuple[list[Example], list[Example]]:
        """D+ and D-, or examples that stand in for them."""
        if self._are_here():
            found = self.recipe.sides()
            assert found is not None
            return found
        names, limit = (self._files() * 2)[:2], self.recipe.data.limit
        positive, negative = (examples_or_stand_ins(name, self.notes)[:limit] for name in names)
        return positive, negative
