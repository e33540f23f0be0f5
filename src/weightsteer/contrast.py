"""LM + behaviour + judge -> D+ and D-: the model answers its own questions under S+ and S-."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .behavior import Behavior, Example, example_rows
from .errors import SteerError
from .judge import Judge
from .lm import LM
from .progress import Progress, silent
from .records import CARD_FILE, RunCard, append_jsonl, digest, is_empty, read_finished, write_jsonl

ANSWERS_FILE = "answers.jsonl"
JUDGE_FILE = "judge.jsonl"  # a judge's replies may be kept in the output folder under this name
SIDES = ("positive", "negative")


@dataclass(frozen=True)
class ContrastSettings:
    """How D+ and D- are sampled and filtered (METHOD: 10 samples a question and prompt)."""

    samples: int = 10
    temperature: float = 1.0
    max_new_tokens: int = 160
    positive_from: float = 75.0  # judge's score from which an answer shows the behaviour
    negative_to: float = 25.0  # judge's score up to which it clearly does not
    seed: int = 0
    batch_size: int = 8
    questions: int | None = None  # use the first so many


def build_sides(
    lm: LM,
    behavior: Behavior,
    judge: Judge,
    out: str | Path,
    *,
    settings: ContrastSettings | None = None,
    progress: Progress = silent,
) -> tuple[int, int]:
    """Write `positive.jsonl` and `negative.jsonl` into `out`; the system prompt is dropped from both.

    Every answer and its score is kept in `answers.jsonl`, whose finished parts are not made again
    after a kill.

    Returns:
        How many examples D+ and D- have.

    Raises:
        SteerError: `out` was made with other settings, or the judge left a side empty.
    """
    settings, out = settings or ContrastSettings(), Path(out)
    identity = {
        "behavior": digest(asdict(behavior)),
        "settings": digest(asdict(settings)),
        "models": digest([lm.name, lm.revision, judge.name]),
    }
    card = RunCard.now(
        "contrast",
        base_model=lm.name,
        base_revision=lm.revision,
        data_sha256=identity,
        settings=asdict(settings),
        seed=settings.seed,
    )
    if (out / CARD_FILE).exists() and RunCard.load(out).data_sha256 != identity:
        raise SteerError(
            f"{out}: was made with another behaviour, model, judge or other settings; choose another output"
        )
    if not (out / CARD_FILE).exists():
        if out.exists() and not is_empty(out):
            raise SteerError(f"{out}: exists and was not made by weightsteer; choose another output")
        out.mkdir(parents=True, exist_ok=True)
        card.save(out)
    rows = _answers(lm, behavior, judge, out / ANSWERS_FILE, settings, progress)
    return _write_sides(rows, settings, out)


def unusable_verdicts(out: str | Path) -> int:
    """How many answers of a folder that `build_sides` made are on neither side because the judge gave no score."""
    parts = read_finished(Path(out) / ANSWERS_FILE)
    return sum(row["score"] is None for part in parts for row in part["answers"])


def _answers(
    lm: LM, behavior: Behavior, judge: Judge, path: Path, settings: ContrastSettings, progress: Progress
) -> list[dict[str, Any]]:
    """One line a part, which is one system prompt and sample over all questions: its side and answers."""
    questions = behavior.questions[: settings.questions]
    prompts = {"positive": behavior.positive_prompts, "negative": behavior.negative_prompts}
    parts = [
        (f"{side} {number} {sample}", side, text)
        for side in SIDES
        for number, text in enumerate(prompts[side])
        for sample in range(settings.samples)
    ]
    done = {row["part"] for row in read_finished(path)}
    for index, (part, side, system_prompt) in enumerate(parts):
        progress(index, len(parts), f"{side} answers")
        if part in done:
            continue
        replies = lm.with_system_prompt(system_prompt).generate(
            questions,
            max_new_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            seed=settings.seed * len(parts) + index,
            batch_size=settings.batch_size,
        )
        examples = [Example(q, a) for q, a in zip(questions, replies, strict=True) if a]
        scores = judge.scores(examples)
        answers = [{**row, "score": score} for row, score in zip(example_rows(examples), scores, strict=True)]
        append_jsonl(path, [{"part": part, "side": side, "answers": answers}])
    progress(len(parts), len(parts), "done")
    return read_finished(path)


def _write_sides(parts: Sequence[dict[str, Any]], settings: ContrastSettings, out: Path) -> tuple[int, int]:
    """Keep what the judge is sure of; answers without a usable verdict are on neither side."""
    answers = {side: [row for part in parts if part["side"] == side for row in part["answers"]] for side in SIDES}
    kept = {
        "positive": [r for r in answers["positive"] if r["score"] is not None and r["score"] >= settings.positive_from],
        "negative": [r for r in answers["negative"] if r["score"] is not None and r["score"] <= settings.negative_to],
    }
    for side in SIDES:
        if not kept[side]:
            unusable = sum(row["score"] is None for row in answers[side])
            raise SteerError(
                f"{out}: of {len(answers[side])} {side} answers the judge kept none ({unusable} verdicts unusable); "
                f"see {ANSWERS_FILE} for its scores, and widen positive_from / negative_to or change the prompts"
            )
    for side in SIDES:
        write_jsonl(out / f"{side}.jsonl", [{"prompt": r["prompt"], "answer": r["answer"]} for r in kept[side]])
    return len(kept["positive"]), len(kept["negative"])
