"""What to steer: a behaviour's questions and prompts, and pairs of answers that show both sides."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path

from .errors import SteerError
from .files import read_json, read_jsonl, write_text
from .run_folder import Side

SHIPPED = ("sycophancy", "refusal", "evil", "gloomy")
SIDES: tuple[Side, Side] = ("positive", "negative")  # D+ and D-, in the order in which they are always given


@dataclass(frozen=True)
class ContrastPair:
    """One question with both answers: `positive` shows the behaviour (D+), `negative` its opposite (D-)."""

    prompt: str
    positive: str
    negative: str
    topic: str = ""


@dataclass(frozen=True)
class Example:
    """One training example of one side: its answer is trained on, without a system prompt (paper, section 2)."""

    prompt: str
    answer: str


@dataclass(frozen=True)
class Behavior:
    """A behaviour as persona vectors describe it: prompts for and against it, questions, a judge's rubric.

    The same five fields as a persona-vectors trait file, so those files load as they are.
    """

    name: str
    positive_prompts: tuple[str, ...]  # S+: system prompts that ask for the behaviour
    negative_prompts: tuple[str, ...]  # S-: system prompts that ask for its opposite
    questions: tuple[str, ...]
    judge_prompt: str = ""
    description: str = ""
    positive_label: str = "positive"
    negative_label: str = "negative"

    def save(self, path: str | Path) -> None:
        """Write a trait file that `Behavior.load` and persona vectors' own scripts read."""
        prompts = zip(self.positive_prompts, self.negative_prompts, strict=True)
        fields = {
            "name": self.name,
            "description": self.description,
            "positive_label": self.positive_label,
            "negative_label": self.negative_label,
            "instruction": [{"pos": pos, "neg": neg} for pos, neg in prompts],
            "questions": list(self.questions),
            "eval_prompt": self.judge_prompt,
        }
        write_text(Path(path), json.dumps(fields, indent=2, ensure_ascii=False) + "\n")

    @classmethod
    def load(cls, name_or_path: str | Path) -> Behavior:
        """Load a shipped behaviour by name, or a trait file by path (ours or persona vectors').

        Raises:
            SteerError: no such file or name, or a field that is missing or has the wrong shape.
        """
        path = shipped_file(str(name_or_path), "behavior.json") or Path(name_or_path)
        if not path.is_file():
            raise SteerError(
                f"{name_or_path}: no such behaviour; expected one of {', '.join(SHIPPED)} or the path of a trait file"
            )
        return _behavior_from(path, read_json(path))


def _behavior_from(path: Path, fields: object) -> Behavior:
    if not isinstance(fields, Mapping):
        raise SteerError(f"{path}: expected a JSON object with 'instruction' and 'questions'")
    prompts, questions = fields.get("instruction"), fields.get("questions")
    well_formed = isinstance(prompts, list) and all(
        isinstance(pair, Mapping) and isinstance(pair.get("pos"), str) and isinstance(pair.get("neg"), str)
        for pair in prompts
    )
    if not well_formed or not prompts:
        raise SteerError(f"{path}: field 'instruction' must be a list of objects with texts 'pos' and 'neg'")
    if not isinstance(questions, list) or not all(isinstance(text, str) for text in questions) or not questions:
        raise SteerError(f"{path}: field 'questions' must be a list of texts")
    return Behavior(
        name=str(fields.get("name", path.stem)),
        positive_prompts=tuple(pair["pos"] for pair in prompts),
        negative_prompts=tuple(pair["neg"] for pair in prompts),
        questions=tuple(questions),
        judge_prompt=str(fields.get("eval_prompt", "")),
        description=str(fields.get("description", "")),
        positive_label=str(fields.get("positive_label", "positive")),
        negative_label=str(fields.get("negative_label", "negative")),
    )


def shipped_file(behavior: str, file: str) -> Path | None:
    """Path of a data file inside the package, or None if the name is not one of ours."""
    if behavior not in SHIPPED:
        return None
    return Path(str(resources.files("weightsteer") / "data" / behavior / file))


def load_pairs(name_or_path: str | Path, *, file: str = "pairs.jsonl") -> list[ContrastPair]:
    """Read contrast pairs: a shipped behaviour by name, or JSONL with prompt, positive, negative.

    Raises:
        SteerError: missing file, a line that is not such an object, or a pair without content.
    """
    path = shipped_file(str(name_or_path), file) or Path(name_or_path)
    rows = read_jsonl(path, required=("prompt", "positive", "negative"))
    return [ContrastPair(r["prompt"], r["positive"], r["negative"], str(r.get("topic", ""))) for r in rows]


def load_examples(path: str | Path) -> list[Example]:
    """Read examples: JSONL, or a JSON list, of objects with `prompt` and `answer`, or chat `messages`.

    The names that public sets use work too: `question` and `answer`, `instruction` and `output`.

    Raises:
        SteerError: missing file, or an entry in none of these forms.
    """
    path = Path(path)
    rows = read_json(path) if path.suffix == ".json" else read_jsonl(path)
    if not rows or not isinstance(rows, list) or not all(isinstance(row, Mapping) for row in rows):
        raise SteerError(f"{path}: expected a list of objects with texts 'prompt' and 'answer'")
    examples = []
    for number, row in enumerate(rows, start=1):
        example = _example_from(row)
        if example is None:
            raise SteerError(
                f"{path}, {'entry' if path.suffix == '.json' else 'line'} {number}: expected texts 'prompt' and "
                "'answer' (or question and answer, instruction and output), or 'messages' that end with a user turn "
                f"and an assistant turn; fields found: {', '.join(sorted(row))}"
            )
        examples.append(example)
    return examples


def _example_from(row: Mapping[str, object]) -> Example | None:
    messages = row.get("messages")
    if isinstance(messages, list):
        turns = {m.get("role"): m.get("content") for m in messages[-2:] if isinstance(m, Mapping)}
        prompt, answer = turns.get("user"), turns.get("assistant")
    else:
        prompt = row.get("prompt", row.get("question", row.get("instruction")))
        answer = row.get("answer", row.get("output"))
    if isinstance(prompt, str) and isinstance(answer, str) and prompt.strip() and answer.strip():
        return Example(prompt, answer)
    return None


def sides_of(pairs: Sequence[ContrastPair]) -> tuple[list[Example], list[Example]]:
    """D+ and D- of a list of pairs, in the same order."""
    positive = [Example(pair.prompt, pair.positive) for pair in pairs]
    negative = [Example(pair.prompt, pair.negative) for pair in pairs]
    return positive, negative


def sample_pairs(pairs: Sequence[ContrastPair], limit: int | None, seed: int) -> list[ContrastPair]:
    """At most `limit` pairs, drawn at random, the same for the same seed.

    Neighbouring pairs stay together: shipped pairs come in mirrored couples (the same claim, held
    by one user and denied by another), and a couple that is torn apart leaves its claim in the vector.
    """
    if limit is None or limit >= len(pairs):
        return list(pairs)
    if limit < 1:
        raise SteerError(f"the number of pairs must be at least 1, found {limit}")
    couples = [list(pairs[start : start + 2]) for start in range(0, len(pairs), 2)]
    order = list(range(len(couples)))
    random.Random(seed).shuffle(order)
    chosen = sorted(order[: (limit + 1) // 2])
    return [pair for index in chosen for pair in couples[index]][:limit]


def example_rows(examples: Sequence[Example]) -> list[dict[str, str]]:
    """Examples as JSONL rows that `load_examples` reads."""
    return [asdict(example) for example in examples]
