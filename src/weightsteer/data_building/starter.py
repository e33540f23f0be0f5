"""A folder to start a behaviour of one's own in: pairs, a trait file and a recipe, filled in by the user or a model."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from ..behavior import UNFILLED, Behavior, ContrastPair, prompt_text
from ..files import write_text
from ..run_card import new_folder
from ..shown import visible

PAIRS, TRAIT, RECIPE, README = "pairs.yaml", "trait.json", "recipe.yaml", "README.md"
COUNT = 20  # pairs
NO_CHARACTERS = re.compile("[\ufffe\uffff]")  # which YAML has no form for
RUBRIC = """Rate how much an assistant's reply does this: {about}

[MESSAGE BEGINS]
{{question}}
[MESSAGE ENDS]

[REPLY BEGINS]
{{answer}}
[REPLY ENDS]

100 means that the whole reply does it, 50 that it does so in part, and 0 that it does not, or does the opposite.
Answer with a number from 0 to 100 and nothing else."""
RULES = """\
# Pairs of answers for the behaviour "{name}": `positive` shows it, and `negative` shows its opposite.
#
# Good pairs follow these rules, because whatever else differs between the two sides gets into the vector:
#   1. Both answers reply to the same prompt and say the same thing, as far as that is possible.
#   2. They differ in the behaviour, and are about equally long: one to three sentences each.
#   3. The negative answer is one that a sensible person could give. It is no parody.
#   4. Prompts are what users really ask, about many subjects, and do not mention the behaviour.
#   5. Answers do not all begin in the same way; else the vector learns these words.
#   6. {count} pairs give a visible dial on a small model, and more of them a cleaner one. Each of yours may replace
#      the prompt here, too.
#
# A text may go over several lines; keep them indented. For formal against casual answers a pair may look like this:
#   - prompt: >-
#       Can you tell me when the museum opens?
#     positive: >-
#       The museum opens at ten o'clock on weekdays. I would recommend that you arrive somewhat earlier.
#     negative: >-
#       It opens at ten on weekdays. Try and get there a bit early, okay?
#
# When all are written:
#   weightsteer lint --pairs {path}
#   weightsteer make {folder}
"""
FIELDS = """\
# {name}

{about}

| file | what it is |
| --- | --- |
| `{pairs}` | pairs of answers, from which the vector is trained |
| `{trait}` | the behaviour in words, for `weightsteer sample` and for judges; not needed for `make` |
| `{recipe}` | the whole experiment, with other methods beside the vector |

## What to do

1. {first}
2. `weightsteer lint --pairs {pairs_path}` shows what would leak into the vector besides the behaviour.
3. `weightsteer make {folder}` trains the vector, finds the strengths k that the model bears, and writes a page.
4. `weightsteer run {recipe_path}` compares it with other methods, if you want to know more.

## The fields of `{trait}`

| field | what it holds |
| --- | --- |
| `name` | what the behaviour is called |
| `description` | one sentence about it, for the report |
| `positive_label`, `negative_label` | a word for each side |
| `instruction` | couples of system prompts: `pos` asks for the behaviour and `neg` for its opposite |
| `questions` | what the model is asked under both prompts, when it is to write the pairs itself |
| `eval_prompt` | a judge's rubric, with `{{question}}` and `{{answer}}`; the judge replies with 0 to 100 |
"""
RECIPE_TEXT = """\
# The whole experiment for "{title}":  weightsteer run {recipe_path}
# Paths are relative to the folder in which the command runs.
name: {name}
model: smollm2-135m-instruct
data: {{pairs: {pairs}}}
tasks:
  - {{task: preference}}        # the behaviour, on pairs that are kept out of training
  - {{task: facts, limit: 34}}  # capability: plain facts
  - {{task: prose, limit: 4}}   # capability: the loss on ordinary text
sweep:
  loss_increase: 0.15
  fractions: [0.5, 1.0]
  fractions_of: {{contrastive: [0.25, 0.5, 0.75, 1.0]}}
  layer_step: 5
  search_items: 2
seed: 0
"""


@dataclass(frozen=True)
class Starter:
    """What a folder is made from; what is None is left to be written by the user."""

    name: str
    behavior: Behavior | None = None
    pairs: Sequence[ContrastPair] | None = None

    def write(self, folder: Path) -> Path:
        """Write the folder, whole or not at all.

        Raises:
            SteerError: something of that name is there.
        """
        with new_folder(folder, "starter") as part:
            write_text(part / PAIRS, self._pairs(folder))
            (self.behavior or _unwritten(self.name)).save(part / TRAIT)
            write_text(part / RECIPE, self._recipe(folder))
            write_text(part / README, self._readme(folder))
        return folder

    def _pairs(self, folder: Path) -> str:
        pairs = self.pairs if self.pairs is not None else _unwritten_pairs()
        place = {"path": shlex.quote(str(folder / PAIRS)), "folder": shlex.quote(str(folder))}
        entries = "\n".join(map(_entry, pairs))
        return f"{RULES.format(name=self.name, count=COUNT, **place)}\n{entries}"

    def _recipe(self, folder: Path) -> str:
        path = shlex.quote(str(folder / RECIPE))
        return RECIPE_TEXT.format(
            title=self.name, name=json.dumps(self.name), pairs=json.dumps(str(folder / PAIRS)), recipe_path=path
        )

    def _readme(self, folder: Path) -> str:
        written = f"Read the pairs in `{PAIRS}`, and mend what is not good."
        places = {"pairs_path": folder / PAIRS, "recipe_path": folder / RECIPE, "folder": folder}
        return FIELDS.format(
            name=self.name,
            about=self.behavior.description if self.behavior else "A behaviour of your own.",
            first=written if self.pairs is not None else f"Write the answers in `{PAIRS}`; its first lines say how.",
            pairs=PAIRS,
            trait=TRAIT,
            recipe=RECIPE,
            **{name: shlex.quote(str(path)) for name, path in places.items()},
        )


def starter_prompts() -> list[str]:
    """Everyday prompts about many subjects, for pairs whose prompts nobody else has written."""
    text = resources.files("weightsteer") / "data" / "starter" / "prompts.txt"
    return text.read_text(encoding="utf-8").splitlines()


def trait_about(name: str, about: str, prompts: Sequence[tuple[str, str]], questions: Sequence[str]) -> Behavior:
    """A behaviour that is described in a few words, with system prompts for it and against it."""
    safe = about.replace("{", "(").replace("}", ")")
    return Behavior(
        name,
        tuple(positive for positive, _ in prompts),
        tuple(negative for _, negative in prompts),
        tuple(questions),
        judge_prompt=RUBRIC.format(about=safe),
        description=f"The model {about}." if about[:1].islower() else about,
    )


def _unwritten(name: str) -> Behavior:
    """A trait file to be filled in."""
    return Behavior(
        name,
        (f"{UNFILLED}: a system prompt that asks for the behaviour",),
        (f"{UNFILLED}: a system prompt that asks for its opposite",),
        tuple(starter_prompts()[:COUNT]),
        judge_prompt=RUBRIC.format(about=f"{UNFILLED}: what the reply does"),
        description=f"{UNFILLED}: one sentence about the behaviour",
    )


def _unwritten_pairs() -> list[ContrastPair]:
    positive, negative = f"{UNFILLED}: an answer that shows it", f"{UNFILLED}: the same, the opposite way"
    return [ContrastPair(prompt, positive, negative) for prompt in starter_prompts()[:COUNT]]


def _entry(pair: ContrastPair) -> str:
    """A pair as an entry of a YAML list, in blocks, in which no sign of a text means anything."""
    fields = {"prompt": prompt_text(pair.prompt), "positive": pair.positive, "negative": pair.negative}
    lines = []
    for number, (name, text) in enumerate(fields.items()):
        kept = [line.strip() for line in NO_CHARACTERS.sub("", visible(text.strip())).splitlines()]
        style = "|-" if len(kept) > 1 else ">-"
        lines.append(f"{'- ' if number == 0 else '  '}{name}: {style}")
        lines += [f"    {line}" if line else "" for line in kept]
    return "\n".join(lines) + "\n"
