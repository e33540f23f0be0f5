"""What to steer: a behaviour's questions and prompts, and prompts with answers that show both sides."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from .errors import SteerError
from .files import read_json, write_text
from .run_folder import Side
from .schema import checked, refuse_unusual, suggestion

PERSONALITY = (  # 24 pairs each, on the same questions about the assistant itself
    *("personality/evil", "personality/gloomy", "personality/flattering", "personality/rude"),
    *("personality/boastful", "personality/evasive", "personality/impulsive", "personality/anxious"),
    *("personality/sarcastic", "personality/formal", "personality/stubborn", "personality/unhelpful"),
)
SHIPPED = (
    *("sycophancy", "refusal", "evil", "gloomy"),
    *("formal", "concise", "candid", "plain", "cheerful"),  # 20 pairs each, as many as one writes in an afternoon
    "discernment",
    *PERSONALITY,
)
UNFILLED = "FILL IN"  # how a text begins that `init` leaves to be written
SIDES: tuple[Side, Side] = ("positive", "negative")  # D+ and D-, in the order in which they are always given


@dataclass(frozen=True, eq=False)
class Message(Mapping[str, str]):
    """One turn of a talk: a mapping with `role` (system, user or assistant) and `content`, which can be hashed."""

    role: str
    content: str

    def __getitem__(self, key: str) -> str:
        if key not in ("role", "content"):
            raise KeyError(key)
        return str(getattr(self, key))

    def __iter__(self) -> Iterator[str]:
        return iter(("role", "content"))

    def __len__(self) -> int:
        return 2

    def __hash__(self) -> int:
        return hash((self.role, self.content))


Prompt = str | tuple[Message, ...]  # one user turn, or all turns before the answer: system, user, assistant, ..., user


def as_prompt(turns: str | Sequence[Mapping[str, str]]) -> Prompt:
    """Turns in their one form: what is a single user turn is its text, so that equal prompts are equal.

    Raises:
        SteerError: a turn without the texts `role` and `content`.
    """
    if isinstance(turns, str):
        return turns
    for turn in turns:
        if not isinstance(turn, Mapping) or not all(isinstance(turn.get(key), str) for key in ("role", "content")):
            raise SteerError(f"prompt: expected a text or messages with texts 'role' and 'content', found {turn!r}")
    messages = tuple(Message(turn["role"], turn["content"]) for turn in turns)
    if len(messages) == 1 and messages[0].role == "user":
        return messages[0].content
    return messages


def prompt_text(prompt: Prompt) -> str:
    """A prompt to be read or searched: the user's text, or every turn after its role."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{turn.role}: {turn.content}" for turn in prompt)


@dataclass(frozen=True)
class ContrastPair:
    """One prompt with both answers: `positive` shows the behaviour (D+), `negative` its opposite (D-)."""

    prompt: Prompt
    positive: str
    negative: str
    topic: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompt", as_prompt(self.prompt))


@dataclass(frozen=True)
class Example:
    """One training example of one side: the answer is trained on, and the turns before it are only read.

    The paper trains without a system prompt (section 2); a prompt of several turns may have one.
    """

    prompt: Prompt
    answer: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompt", as_prompt(self.prompt))


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
                f"{suggestion(str(name_or_path), SHIPPED)}"
            )
        return _behavior_from(path, read_json(path))


@dataclass(frozen=True)
class _Prompts:
    """Two system prompts: for the behaviour and against it."""

    pos: str
    neg: str


@dataclass(frozen=True)
class _TraitFile:
    """A trait file's fields; what else persona vectors' files hold is passed over."""

    instruction: tuple[_Prompts, ...]
    questions: tuple[str, ...]
    name: str = ""
    description: str = ""
    positive_label: str = "positive"
    negative_label: str = "negative"
    eval_prompt: str = ""


def _behavior_from(path: Path, fields: object) -> Behavior:
    if not isinstance(fields, Mapping):
        raise SteerError(f"{path}: expected a JSON object with 'instruction' and 'questions'")
    known = [field.name for field in dataclasses.fields(_TraitFile)]
    for name in fields:
        if name not in known and (meant := suggestion(name, known)):
            raise SteerError(f"{path}: field {name!r}: is not known{meant}")
    found = checked(_TraitFile, dict(fields), str(path))
    if not found.instruction:
        raise SteerError(
            f"{path}: field 'instruction' must be a list of objects with texts 'pos' and 'neg', found none"
        )
    if not found.questions:
        raise SteerError(f"{path}: field 'questions' must be a list of texts, found none")
    refuse_unusual(dict(fields), str(path))
    if empty := [name for name, value in fields.items() if UNFILLED in json.dumps(value)]:
        raise SteerError(f"{path}: still says {UNFILLED!r} in {', '.join(map(repr, empty))}; write these fields first")
    return Behavior(
        name=found.name or path.stem,
        positive_prompts=tuple(pair.pos for pair in found.instruction),
        negative_prompts=tuple(pair.neg for pair in found.instruction),
        questions=found.questions,
        judge_prompt=found.eval_prompt,
        description=found.description,
        positive_label=found.positive_label,
        negative_label=found.negative_label,
    )


def shipped_file(behavior: str, file: str) -> Path | None:
    """Path of a data file inside the package, or None if the name is not one of ours."""
    if behavior not in SHIPPED:
        return None
    return Path(str(resources.files("weightsteer") / "data" / behavior / file))


def sides_of(pairs: Sequence[ContrastPair]) -> tuple[list[Example], list[Example]]:
    """D+ and D- of a list of pairs, in the same order."""
    positive = [Example(pair.prompt, pair.positive) for pair in pairs]
    negative = [Example(pair.prompt, pair.negative) for pair in pairs]
    return positive, negative


def pairs_of(positive: Sequence[Example], negative: Sequence[Example]) -> list[ContrastPair]:
    """Pairs of answers to one question; sides that were filtered apart pair as many as both have."""
    others: dict[Prompt, list[str]] = {}
    for example in negative:
        others.setdefault(example.prompt, []).append(example.answer)
    waiting = {prompt: iter(answers) for prompt, answers in others.items()}
    matched = ((e, next(waiting.get(e.prompt, iter(())), None)) for e in positive)
    return [ContrastPair(e.prompt, e.answer, answer) for e, answer in matched if answer is not None]


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


def example_rows(examples: Sequence[Example]) -> list[dict[str, Any]]:
    """Examples as JSONL rows that `load_examples` reads: `prompt` and `answer`, or the `messages` of several turns."""
    return [_row_of(example) for example in examples]


def pair_rows(pairs: Sequence[ContrastPair]) -> list[dict[str, Any]]:
    """Pairs as JSONL rows that `load_pairs` reads: `prompt`, a text or its messages, `positive` and `negative`."""
    return [
        {
            "prompt": pair.prompt if isinstance(pair.prompt, str) else [dict(turn) for turn in pair.prompt],
            "positive": pair.positive,
            "negative": pair.negative,
        }
        for pair in pairs
    ]


def _row_of(example: Example) -> dict[str, Any]:
    if isinstance(example.prompt, str):
        return asdict(example)
    return {"messages": [dict(turn) for turn in (*example.prompt, Message("assistant", example.answer))]}
