"""LM + behaviour + judge -> D+ and D-: the model answers its own questions under S+ and S-."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Annotated, Any, Protocol

from pydantic import Field

from ..behavior import SHIPPED, SIDES, Behavior, Example, example_rows
from ..beside import WAITING, as_they_end, beside
from ..chat_template import turns_of
from ..errors import SteerError
from ..example_files.rows import has_content
from ..files import append_jsonl, digest, is_empty, read_finished, write_jsonl
from ..fitting import ON_CPU, rows_by_default
from ..judges.asking import stop_asking
from ..judges.judge import Judge, is_served
from ..language_model import LanguageModel
from ..lm import LM
from ..locks import hold
from ..progress import Progress, silent
from ..run_card import CARD_FILE, RunCard
from ..run_folder import Side
from ..schema import checked
from ..thinking import Reply
from .sampling_settings import SamplingSettings

ANSWERS_FILE = "answers.jsonl"


class Answering(LanguageModel, Protocol):
    """The model that answers: one in memory, or one behind a server."""

    @property
    def template_identity(self) -> dict[str, str]:
        """See `LM.template_identity`."""
        ...


def sample_sides(
    lm: Answering,
    behavior: Behavior,
    judge: Judge,
    out: str | Path,
    *,
    settings: SamplingSettings | None = None,
    at_once: int = 1,
    progress: Progress = silent,
) -> tuple[int, int]:
    """Write `positive.jsonl` and `negative.jsonl` into `out`; the system prompt is dropped from both.

    The examples of a side come in an order of which any first n are of all system prompts, and spread
    over the questions.

    Every answer and its score is kept in `answers.jsonl`, whose finished parts are not made again
    after a kill. Verdicts that were unusable are asked for again by the next call.

    Args:
        at_once: under how many system prompts a served model is asked at once; one in memory answers as many together
            as fill a batch.

    Returns:
        How many examples D+ and D- have.

    Raises:
        SteerError: `out` was made with other settings, or the judge left a side empty.
    """
    settings, out = settings or SamplingSettings(), Path(out)
    behavior = replace(behavior, questions=asked_questions(behavior, settings.questions))
    identity = {
        "behavior": digest(asdict(behavior)),
        "settings": digest(_identity(settings)),
        "models": _models(lm, judge),
        **lm.template_identity,
    }
    card = RunCard.now(
        "sampled data",
        base_model=lm.name,
        base_revision=lm.revision,
        data_sha256=identity,
        settings=asdict(settings),
        seed=settings.seed,
    )
    former = {**identity, "models": digest([lm.name, lm.revision, judge.name])}
    with hold(out):
        _claim(out, card, former)
        rows = _answers(lm, behavior, judge, out / ANSWERS_FILE, settings, at_once, progress)
        return _write_sides(rows, settings, out)


def _claim(out: Path, card: RunCard, former: Mapping[str, str]) -> None:
    """Make the folder of a sampling, or take up the one that was begun in the same way.

    Raises:
        SteerError: the folder is another sampling's, or something else.
    """
    if (out / CARD_FILE).exists() and RunCard.load(out).data_sha256 not in (card.data_sha256, former):
        raise SteerError(
            f"{out}: was made with another behaviour, model, judge or other settings; choose another output"
        )
    if not (out / CARD_FILE).exists():
        if out.exists() and not is_empty(out):
            raise SteerError(f"{out}: exists and was not made by weightsteer; choose another output")
        card.save(out)


def _models(lm: LanguageModel, judge: Judge) -> str:
    """Who answers and who judges; a model is its weights, wherever they lie, or its name where these are not known."""
    return digest([lm.revision or lm.name, judge.name.replace(lm.name, "") if lm.revision else judge.name])


def _identity(settings: SamplingSettings) -> dict[str, Any]:
    """The settings that tell one sampling from another; dropping cut answers is what was always meant.

    The size of a batch was 8 where nobody said it, and stands so in folders that were begun then.
    """
    fields = asdict(settings)
    fields["batch_size"] = settings.batch_size or 8
    if settings.cut_answers == "drop":
        del fields["cut_answers"]
    return fields


def unusable_verdicts(out: str | Path) -> int:
    """How many answers of a folder that `sample_sides` made are on neither side because the judge gave no score."""
    return sum(row["score"] is None and not row.get("dropped") for row in _answer_rows(out))


def cut_answers(out: str | Path) -> int:
    """How many answers of a folder that `sample_sides` made are on neither side because `max_new_tokens` cut them."""
    return sum(row.get("dropped", False) for row in _answer_rows(out))


def _answer_rows(out: str | Path) -> list[dict[str, Any]]:
    return [row for part in _parts(Path(out) / ANSWERS_FILE) for row in part["answers"]]


@dataclass(frozen=True)
class _Answer:
    """One answer of a part as the file keeps it."""

    prompt: str
    answer: str
    score: Annotated[float | None, Field(allow_inf_nan=False)]
    dropped: bool = False


@dataclass(frozen=True)
class _Part:
    """One line of the file of answers."""

    part: str
    side: Side
    answers: Sequence[_Answer]


@dataclass(frozen=True)
class _Asked:
    """A part that the model is asked for."""

    seed: int
    name: str
    side: str
    system_prompt: str


def _parts(path: Path) -> list[dict[str, Any]]:
    """The finished parts of a file of answers; of one that was judged again, what it came to last."""
    rows = read_finished(path)
    for number, row in enumerate(rows, start=1):
        checked(_Part, row, f"{path}, row {number}")
    return list({row["part"]: row for row in rows}.values())


def asked_questions(behavior: Behavior, count: int | None) -> tuple[str, ...]:
    """The questions that the sides are made from; a shipped behaviour's second half is kept for the task `trait`."""
    shipped = behavior.name in SHIPPED and behavior.questions == Behavior.load(behavior.name).questions
    half = len(behavior.questions) // 2 if shipped else None  # a trait file holds only what is meant for one use
    return behavior.questions[: count or half]


def _answers(
    lm: LanguageModel,
    behavior: Behavior,
    judge: Judge,
    path: Path,
    settings: SamplingSettings,
    at_once: int,
    progress: Progress,
) -> list[dict[str, Any]]:
    """One line a part, which is one system prompt and sample over all questions: its side and answers."""
    questions = behavior.questions
    batch = settings.batch_size or (rows_by_default(lm.device) if isinstance(lm, LM) else ON_CPU)
    prompts = {"positive": behavior.positive_prompts, "negative": behavior.negative_prompts}
    named = [
        (f"{side} {number} {sample}", side, text)
        for side in SIDES
        for number, text in enumerate(prompts[side])
        for sample in range(settings.samples)
    ]
    parts = [_Asked(settings.seed * len(named) + index, *part) for index, part in enumerate(named)]
    done = {row["part"]: row for row in _parts(path)}

    def ask(pool: Sequence[_Asked]) -> list[Callable[[], dict[str, Any] | None]]:
        """What is left to do of each part. If one is new all are answered, since a reply hangs on its whole batch."""
        left: list[Callable[[], dict[str, Any] | None]] = [
            partial(_judged_again, judge, done[part.name]) for part in pool if part.name in done
        ]
        if len(left) == len(pool):
            return left
        replies = lm.replies(
            [turns_of(question, part.system_prompt) for part in pool for question in questions],
            max_new_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            seed=pool[0].seed,
            batch_size=batch,
        )
        count = len(questions)
        return left + [
            partial(_judged_part, part.name, part.side, questions, replies[i * count :][:count], judge, settings)
            for i, part in enumerate(pool)
            if part.name not in done
        ]

    def asked() -> Generator[Callable[[], dict[str, Any] | None]]:
        if at_once == 1:
            size = max(1, batch // max(1, len(questions)))
            for start in range(0, len(parts), size):
                progress(start, len(parts), f"{parts[start].side} answers")
                yield from ask(parts[start : start + size])
            return
        works = [partial(ask, [part]) for part in parts]  # the server makes the batches
        with closing(as_they_end(works, at_once=at_once, stop=stop_asking)) as all_ended:
            for number, ended in enumerate(all_ended):
                progress(number, len(parts), "answers")
                yield from ended.result()

    waiting = WAITING if is_served(judge) else 0
    with closing(asked()) as works, closing(beside(works, waiting=waiting, stop=stop_asking)) as rows:
        for row in filter(None, rows):
            append_jsonl(path, [row])
    progress(len(parts), len(parts), "done")
    found = {row["part"]: row for row in _parts(path)}
    return [found[part.name] for part in parts if part.name in found]


def _judged_again(judge: Judge, part: dict[str, Any]) -> dict[str, Any] | None:
    """A finished part whose unusable verdicts were asked for once more; None if nothing came of it."""
    lacking = [row for row in part["answers"] if row["score"] is None and not row.get("dropped")]
    examples = [Example(row["prompt"], row["answer"]) for row in lacking]
    scores = judge.scores(examples) if examples else []
    for row, score in zip(lacking, scores, strict=True):
        row["score"] = score
    return part if any(score is not None for score in scores) else None


def _judged_part(
    part: str, side: str, questions: Sequence[str], replies: Sequence[Reply], judge: Judge, settings: SamplingSettings
) -> dict[str, Any]:
    """A part as a line of the file."""
    return {"part": part, "side": side, "answers": _judged(questions, replies, judge, settings)}


def _judged(
    questions: Sequence[str], replies: Sequence[Reply], judge: Judge, settings: SamplingSettings
) -> list[dict[str, Any]]:
    """Answers with their scores; one that was cut off and is to be dropped is not judged."""
    texts = [(reply.answer or "").replace("\0", "") for reply in replies]  # a file of examples may not hold it
    given = [
        (Example(question, text), reply)
        for question, text, reply in zip(questions, texts, replies, strict=True)
        if has_content(text) or reply.answer is None
    ]
    kept = settings.cut_answers == "keep"
    wanted = [example for example, reply in given if reply.answer is not None and (reply.ended or kept)]
    scores = dict(zip(map(id, wanted), judge.scores(wanted) if wanted else (), strict=True))
    return [
        {**row, "score": scores[id(example)]} if id(example) in scores else {**row, "score": None, "dropped": True}
        for (example, _), row in zip(given, example_rows([example for example, _ in given]), strict=True)
    ]


def _write_sides(parts: Sequence[dict[str, Any]], settings: SamplingSettings, out: Path) -> tuple[int, int]:
    """Keep what the judge is sure of; answers without a usable verdict are on neither side."""
    shows: dict[str, Callable[[float], bool]] = {
        "positive": lambda score: score >= settings.positive_from,
        "negative": lambda score: score <= settings.negative_to,
    }
    kept = {}
    for side in SIDES:
        answers = [part["answers"] for part in parts if part["side"] == side]
        kept[side] = _interleave(answers, settings.samples, shows[side])
        if not kept[side]:
            raise _nothing_kept(out, side, [row for part in answers for row in part], settings.max_new_tokens)
    for side in SIDES:
        write_jsonl(out / f"{side}.jsonl", [{"prompt": r["prompt"], "answer": r["answer"]} for r in kept[side]])
    return len(kept["positive"]), len(kept["negative"])


def _nothing_kept(out: Path, side: str, rows: Sequence[dict[str, Any]], max_new_tokens: int) -> SteerError:
    cut = sum(row.get("dropped", False) for row in rows)
    unusable = sum(row["score"] is None for row in rows) - cut
    limit = f"raise max_new_tokens (now {max_new_tokens}), " if cut else ""
    return SteerError(
        f"{out}: of {len(rows)} {side} answers the judge kept none ({unusable} verdicts unusable, {cut} answers cut "
        f"off); see {ANSWERS_FILE} for its scores, and {limit}widen positive_from / negative_to or change the prompts"
    )


def _interleave(
    parts: Sequence[Sequence[dict[str, Any]]], samples: int, shows: Callable[[float], bool]
) -> list[dict[str, Any]]:
    """One side's kept answers, sample by sample: the system prompts take turns, each from another question on.

    `parts`: the answers of one system prompt and sample each, all samples of a prompt in a row.
    """
    rows: list[dict[str, Any]] = []
    for sample in range(samples):
        prompts = parts[sample::samples]
        starts = [len(part) * number // len(prompts) for number, part in enumerate(prompts)]
        turned = [[*part[start:], *part[:start]] for part, start in zip(prompts, starts, strict=True)]
        kept = [[row for row in part if row["score"] is not None and shows(row["score"])] for part in turned]
        rows += [row for turn in zip_longest(*kept) for row in turn if row is not None]
    return rows
