from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from conftest import tiny_lm
from weightsteer.behavior import Behavior, Example
from weightsteer.cli import app
from weightsteer.data_building.sampling import (
    SamplingSettings,
    _interleave,
    asked_questions,
    cut_answers,
    sample_sides,
    unusable_verdicts,
)
from weightsteer.engines.served_model import ServedModel
from weightsteer.engines.tokens import tokens_of
from weightsteer.errors import SteerError
from weightsteer.example_files.load import load_examples
from weightsteer.files import write_jsonl
from weightsteer.generation import Writer
from weightsteer.judges.endpoint import Endpoint
from weightsteer.judges.judge import LikelihoodJudge, LocalChatModel, RubricJudge, rubric_of
from weightsteer.lm import LM
from weightsteer.progress import Progress, silent
from xllama_server import MODEL, served

BEHAVIOR = Behavior(
    name="loud",
    positive_prompts=("Shout!", "BE LOUD"),
    negative_prompts=("Whisper.", "be quiet"),
    questions=("How are you?", "What is tea?", "Who sings?"),
    judge_prompt="[Q]\n{question}\n[A]\n{answer}\n[END]\nNumber?",
)
SETTINGS = SamplingSettings(samples=1, max_new_tokens=6, positive_from=60.0, negative_to=90.0, cut_answers="keep")


def test_sides_hold_what_the_judge_kept_without_system_prompts(tmp_path: Path) -> None:
    lm = tiny_lm()
    counts = sample_sides(lm, BEHAVIOR, LikelihoodJudge(lm, BEHAVIOR), tmp_path / "d", settings=SETTINGS)
    parts = [json.loads(line) for line in (tmp_path / "d" / "answers.jsonl").read_text().splitlines()]
    assert len({part["part"] for part in parts}) == 4
    rows = [{**row, "side": part["side"]} for part in parts for row in part["answers"]]
    for side, count in zip(("positive", "negative"), counts, strict=True):
        kept = load_examples(tmp_path / "d" / f"{side}.jsonl")
        assert len(kept) == count > 0
        assert {e.prompt for e in kept} <= set(BEHAVIOR.questions)
        for row in rows:
            shows = row["score"] >= 60 if side == "positive" else row["score"] <= 90
            assert (Example(row["prompt"], row["answer"]) in kept) or not (shows and row["side"] == side)


def test_any_first_examples_are_of_all_prompts_and_spread_over_the_questions() -> None:
    prompts, samples, questions = 5, 2, 20
    parts = [
        [{"prompt": q, "of": p, "sample": s, "score": 90.0} for q in range(questions)]
        for p in range(prompts)
        for s in range(samples)
    ]
    rows = _interleave(parts, samples, lambda score: score > 50)
    assert len(rows) == prompts * samples * questions
    assert [row["of"] for row in rows] == [*range(prompts)] * (samples * questions)
    assert [row["sample"] for row in rows] == [0] * 100 + [1] * 100
    assert {row["prompt"] for row in rows[:questions]} == set(range(questions))
    for row in parts[0][:19]:
        row["score"] = None  # the judge has no verdict on a prompt's answers, or does not keep them
    for row in parts[2]:
        row["score"] = 10.0
    rows = _interleave(parts, samples, lambda score: score > 50)
    assert [row["of"] for row in rows[:8]] == [0, 2, 3, 4, 2, 3, 4, 2]
    assert len(rows) == 200 - 19 - 20


def test_the_first_half_of_a_shipped_behaviours_questions_is_asked() -> None:
    shipped = Behavior.load("evil")
    assert asked_questions(shipped, None) == shipped.questions[:20]
    assert asked_questions(shipped, 30) == shipped.questions[:30]
    assert asked_questions(replace(shipped, questions=("Why?", "How?")), None) == ("Why?", "How?")
    assert asked_questions(BEHAVIOR, None) == BEHAVIOR.questions
    assert asked_questions(BEHAVIOR, 2) == BEHAVIOR.questions[:2]


def test_a_killed_contrast_does_not_answer_twice(tmp_path: Path) -> None:
    lm = tiny_lm()
    judge = LikelihoodJudge(lm, BEHAVIOR)
    sample_sides(lm, BEHAVIOR, judge, tmp_path / "whole", settings=SETTINGS)
    sample_sides(lm, BEHAVIOR, judge, tmp_path / "cut", settings=SETTINGS)
    path = tmp_path / "cut" / "answers.jsonl"
    text = path.read_text()
    path.write_text(text[: text.index('"part": "negative') + 40])  # in the middle of a part
    (tmp_path / "cut" / "positive.jsonl").unlink()
    sample_sides(lm, BEHAVIOR, judge, tmp_path / "cut", settings=SETTINGS)
    for name in ("answers.jsonl", "positive.jsonl", "negative.jsonl"):
        assert (tmp_path / "cut" / name).read_text() == (tmp_path / "whole" / name).read_text()


def test_system_prompts_share_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lm, settings = tiny_lm(), replace(SETTINGS, temperature=0.0, samples=2)
    judge, parts, asked = LikelihoodJudge(lm, BEHAVIOR), 8, list[int]()
    write = Writer.write

    def counted(self: Writer, rows: Any, *args: Any, **more: Any) -> Any:
        asked.append(len(rows))
        return write(self, rows, *args, **more)

    monkeypatch.setattr(Writer, "write", counted)
    for size, folder in ((1, "alone"), (3 * len(BEHAVIOR.questions), "together")):
        asked.clear()
        sample_sides(lm, BEHAVIOR, judge, tmp_path / folder, settings=replace(settings, batch_size=size))
        assert sum(asked) == parts * len(BEHAVIOR.questions)
        assert len(asked) == (sum(asked) if size == 1 else 3)
    for name in ("answers.jsonl", "positive.jsonl", "negative.jsonl"):
        assert (tmp_path / "alone" / name).read_text() == (tmp_path / "together" / name).read_text()


def test_other_settings_or_a_foreign_folder_are_refused(tmp_path: Path) -> None:
    lm = tiny_lm()
    judge = LikelihoodJudge(lm, BEHAVIOR)
    sample_sides(lm, BEHAVIOR, judge, tmp_path / "d", settings=SETTINGS)
    other = replace(SETTINGS, samples=2)
    with pytest.raises(SteerError, match="other settings"):
        sample_sides(lm, BEHAVIOR, judge, tmp_path / "d", settings=other)
    for models in ((tiny_lm(seed=7), judge), (lm, RubricJudge(LocalChatModel(lm), rubric_of(BEHAVIOR)))):
        with pytest.raises(SteerError, match="another behaviour, model, judge"):
            sample_sides(models[0], BEHAVIOR, models[1], tmp_path / "d", settings=SETTINGS)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "x").write_text("")
    with pytest.raises(SteerError, match="not made by weightsteer"):
        sample_sides(lm, BEHAVIOR, judge, tmp_path / "mine", settings=SETTINGS)


def test_an_empty_side_is_an_error(tmp_path: Path, lm: LM) -> None:
    strict = SamplingSettings(samples=1, max_new_tokens=4, positive_from=101.0)
    with pytest.raises(SteerError, match="kept none"):
        sample_sides(lm, BEHAVIOR, LikelihoodJudge(lm, BEHAVIOR), tmp_path / "d", settings=strict)
    assert not (tmp_path / "d" / "positive.jsonl").exists()
    assert not (tmp_path / "d" / "negative.jsonl").exists()


def test_answers_without_a_verdict_are_counted_and_on_neither_side(tmp_path: Path) -> None:
    class Moody:
        """A judge that has a verdict on every other answer."""

        name = "moody"

        def scores(self, examples: list[Example], *, progress: Progress = silent) -> list[float | None]:
            return [None if i % 2 else 70.0 for i in range(len(examples))]

    counts = sample_sides(tiny_lm(), BEHAVIOR, Moody(), tmp_path / "d", settings=SETTINGS)
    parts = [json.loads(line) for line in (tmp_path / "d" / "answers.jsonl").read_text().splitlines()]
    assert unusable_verdicts(tmp_path / "d") == sum(len(part["answers"]) // 2 for part in parts) > 0
    assert sum(counts) + unusable_verdicts(tmp_path / "d") == sum(len(part["answers"]) for part in parts)


def test_cut_answers_are_on_neither_side_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer that ends at the limit of tokens would be taught to end in mid-sentence."""

    class Generous:
        name = "generous"

        def scores(self, examples: list[Example], *, progress: Progress = silent) -> list[float | None]:
            return [70.0] * len(examples)

    lm, limit = tiny_lm(), 6
    stop = lm.stops[0]

    def generate(input_ids: torch.Tensor, **options: object) -> torch.Tensor:
        """Of each three rows: one cut, one that ends early, one that ends with the last token allowed."""
        made = torch.full((len(input_ids), limit), 100)
        made[1::3, 3:] = stop
        made[2::3, -1] = stop
        return torch.cat([input_ids, made], dim=1)

    monkeypatch.setattr("weightsteer.generation.rows_together", lambda *_: "padded")
    monkeypatch.setattr(lm.model, "generate", generate)
    settings = replace(SETTINGS, cut_answers="drop", max_new_tokens=limit, batch_size=3)
    assert sample_sides(lm, BEHAVIOR, Generous(), tmp_path / "d", settings=settings) == (4, 4)
    assert cut_answers(tmp_path / "d") == 4
    assert unusable_verdicts(tmp_path / "d") == 0
    kept = replace(settings, cut_answers="keep")
    assert sample_sides(lm, BEHAVIOR, Generous(), tmp_path / "k", settings=kept) == (6, 6)
    assert cut_answers(tmp_path / "k") == 0
    with pytest.raises(SteerError, match="other settings"):
        sample_sides(lm, BEHAVIOR, Generous(), tmp_path / "d", settings=kept)
    monkeypatch.setattr(lm.model, "generate", lambda input_ids, **_: torch.cat([input_ids, 0 * input_ids + 100], dim=1))
    with pytest.raises(
        SteerError,
        match=r"kept none \(0 verdicts unusable, 6 answers cut off.*raise max_new_tokens \(now 6\)",
    ):
        sample_sides(lm, BEHAVIOR, Generous(), tmp_path / "all", settings=settings)


def test_unusable_verdicts_are_asked_for_again(tmp_path: Path) -> None:
    class Mended:
        """A judge that has no verdicts at first, and then one for each answer."""

        name, mended, asked = "mended", False, 0

        def scores(self, examples: list[Example], *, progress: Progress = silent) -> list[float | None]:
            self.asked += len(examples)
            return [70.0 if self.mended or not i else None for i in range(len(examples))]

    judge, out = Mended(), tmp_path / "d"
    before = sample_sides(tiny_lm(), BEHAVIOR, judge, out, settings=SETTINGS)
    answers, lost = judge.asked, unusable_verdicts(out)
    assert 0 < lost < answers
    judge.mended = True
    after = sample_sides(tiny_lm(), BEHAVIOR, judge, out, settings=SETTINGS)
    assert judge.asked == answers + lost
    assert sum(after) == sum(before) + lost == answers
    assert unusable_verdicts(out) == 0
    assert sample_sides(tiny_lm(), BEHAVIOR, judge, out, settings=SETTINGS) == after
    assert judge.asked == answers + lost


def test_a_served_judge_needs_its_models_name_and_a_rubric(tmp_path: Path) -> None:
    Behavior("bare", ("p",), ("n",), ("q",)).save(tmp_path / "bare.json")
    url = ("--judge-url", "http://127.0.0.1:9/v1")
    for arguments, says in (((*url,), "by --judge"), ((*url, "--judge", "m"), "eval_prompt")):
        with pytest.raises(SteerError, match=says):
            app(["sample", str(tmp_path / "bare.json"), "-o", str(tmp_path / "d"), *arguments], standalone_mode=False)
    assert not (tmp_path / "d").exists()


@pytest.mark.slow
@pytest.mark.embedded
def test_a_served_judge_filters_and_its_replies_are_kept(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    loud = Behavior("loud", ("Shout!",), ("Whisper.",), ("Why?", "How?"), judge_prompt="{question} {answer} Number?")
    loud.save(tmp_path / "loud.json")
    out = tmp_path / "d"
    command = ["sample", str(tmp_path / "loud.json"), "-o", str(out), "-m", str(checkpoint), "--device", "cpu"]
    command += ["--samples", "1", "--max-new-tokens", "6", "--keep-cut", "--judge", MODEL, "--judge-url"]
    # So small a judge gives few numbers: its words are kept all the same, and whether it keeps an answer is chance.
    with served() as (url, _), suppress(SteerError), monkeypatch.context() as patched:
        patched.setattr(Endpoint, "keeping", lambda self, usable: self)
        app([*command, url], standalone_mode=False)
    kept = [json.loads(line) for line in (out / "judge.jsonl").read_text().splitlines()]
    assert len(kept) == 4
    (out / "answers.jsonl").unlink()
    write_jsonl(out / "judge.jsonl", [{**k, "reply": r} for k, r in zip(kept, ("90", "80", "10", "5"), strict=True)])
    app([*command, url], standalone_mode=False)  # the server is down: the verdicts are those that were kept
    assert unusable_verdicts(out) == 0
    assert "0 verdicts were unusable" in capsys.readouterr().out
    assert [len(load_examples(out / f"{side}.jsonl")) for side in ("positive", "negative")] == [2, 2]


def test_a_server_answers_as_the_model_here_does(checkpoint: Path, tmp_path: Path) -> None:
    pytest.importorskip("weightsteer.serving.server")
    from served import served as our_server

    lm, settings = LM.load(checkpoint, device="cpu"), replace(SETTINGS, temperature=0.0)
    here, there = tmp_path / "here", tmp_path / "there"
    counts = sample_sides(lm, BEHAVIOR, LikelihoodJudge(lm, BEHAVIOR), here, settings=settings)
    trait = tmp_path / "loud.json"
    pairs = [{"pos": p, "neg": n} for p, n in zip(BEHAVIOR.positive_prompts, BEHAVIOR.negative_prompts, strict=True)]
    fields = {"instruction": pairs, "questions": list(BEHAVIOR.questions), "eval_prompt": BEHAVIOR.judge_prompt}
    trait.write_text(json.dumps(fields))
    with our_server(lm, {}) as address:
        local = tokens_of(checkpoint)
        model = ServedModel.connect(address.url, "weightsteer", local, concurrency=8)
        with model.connection.shared() as at_once:
            judge = LikelihoodJudge(model, BEHAVIOR)
            assert sample_sides(model, BEHAVIOR, judge, there, settings=settings, at_once=at_once) == counts
        command = ["sample", str(trait), "-m", str(checkpoint), "--max-new-tokens", "4", "--samples", "5", "--keep-cut"]
        asked = ["--engine", "weightsteer", "--engine-url", address.url, "-o", str(tmp_path / "by-command")]
        found = CliRunner().invoke(app, [*command, *asked])
        assert found.exit_code == 0, found.output
    for name in ("positive.jsonl", "negative.jsonl"):
        assert (there / name).read_bytes() == (here / name).read_bytes()
        assert (tmp_path / "by-command" / name).exists()
    found = CliRunner().invoke(app, [*command, "--engine", "vllm", "-o", str(tmp_path / "none")])
    assert "by --engine-url" in str(found.exception)
    served = ["--engine", "vllm", "--engine-url", "http://127.0.0.1:9", "--device", "cpu", "-o", str(tmp_path / "no")]
    assert "the server computes" in str(CliRunner().invoke(app, [*command, *served]).exception)
