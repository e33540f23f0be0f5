"""What makes two sides unfit to train on is found by `lint`, by `train`, by a recipe and in Python."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest

from conftest import tiny_lm
from test_cli import run
from test_runs import make_run, small_recipe
from weightsteer.behavior import ContrastPair, Example, Message, sides_of
from weightsteer.data_building.lint import lint_sides
from weightsteer.errors import SteerError
from weightsteer.example_files.checks import check_sides, refuse_unfit, special_tokens, warn_unfit
from weightsteer.training import TrainSettings, train_side, train_vector

POSITIVE = [Example(f"Is plan {i} good?", f"Yes, plan {i} is very good.") for i in range(6)]
NEGATIVE = [Example(f"Is plan {i} good?", f"No, plan {i} is too weak.") for i in range(6)]
TALK = (Message("user", "Hi"), Message("assistant", "Hello"), Message("user", "Is it good?"))


def kinds(positive: list[Example], negative: list[Example], tokens: tuple[str, ...] = ()) -> set[str]:
    return {finding.kind for finding in check_sides(positive, negative, tokens)}


def test_sound_sides_have_no_finding() -> None:
    assert kinds(POSITIVE, NEGATIVE) == set()
    assert kinds([*POSITIVE, Example("x < y | z?", "a [b] <c> <think>no</think> done")], NEGATIVE) == set()


@pytest.mark.parametrize("positive", [NEGATIVE, NEGATIVE[::-1], [*NEGATIVE, NEGATIVE[0]], [], [Example("Q?", " ")]])
def test_sides_that_teach_nothing_are_refused(positive: list[Example]) -> None:
    with pytest.raises(SteerError, match="equal sides|empty side|empty answer"):
        refuse_unfit(positive, NEGATIVE)
    with pytest.raises(SteerError, match="equal sides|empty side|empty answer"):
        refuse_unfit(NEGATIVE, positive)
    assert any(finding.fatal for finding in lint_sides(positive, NEGATIVE))


@pytest.mark.parametrize(
    ("kind", "example"),
    [
        ("equal answers", NEGATIVE[0]),
        ("copied example", POSITIVE[0]),
        ("control token", Example("Say <|im_start|>", "No.")),
        ("control token", Example("Hi", "Fine.<|eot_id|>")),
        ("control token", Example("Hi", "Fine.</s>")),
        ("control token", Example("[INST] Hi [/INST]", "Fine.")),
        ("control token", Example("Hi", "<start_of_turn>model")),
        ("control token", Example("Hi", "<|endoftext|>")),
        ("control token", Example("Hi", "<｜User｜>")),
        ("control token", Example((Message("system", "<<SYS>>"), Message("user", "Hi")), "Fine.")),
        ("unclosed thinking", Example("Hi", "<think>\nThe user asks")),
    ],
)
def test_what_is_doubtful_is_warned_of(kind: str, example: Example) -> None:
    assert kinds([*POSITIVE, example], NEGATIVE) == {kind}
    refuse_unfit([*POSITIVE, example], NEGATIVE)
    with pytest.warns(UserWarning, match=kind):
        warn_unfit([*POSITIVE, example], NEGATIVE, tiny_lm().tokenizer)


def test_the_models_own_special_tokens_are_looked_for() -> None:
    lm = tiny_lm()
    lm.tokenizer.add_special_tokens({"additional_special_tokens": ["<extra7>"]})
    assert "<extra7>" in special_tokens(lm.tokenizer)
    touched = [*POSITIVE, Example("Use <extra7> now", "Fine.")]
    assert kinds(touched, NEGATIVE) == set()
    assert kinds(touched, NEGATIVE, tuple(special_tokens(lm.tokenizer))) == {"control token"}


def test_every_way_to_train_refuses_equal_sides(
    tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str], quick: TrainSettings
) -> None:
    same = tmp_path / "same.jsonl"
    rows = [{"prompt": e.prompt, "chosen": e.answer, "rejected": e.answer} for e in POSITIVE]
    same.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for kind in ("lora", "dpo"):
        code, _, err = run(capsys, "train", "--pairs", same, "--kind", kind, "-m", checkpoint, "-o", tmp_path / "t")
        assert (code, err.count("\n")) == (1, 1)
        assert "equal sides" in err
    code, out, _ = run(capsys, "lint", "--pairs", same, "-m", checkpoint)
    assert code == 0
    assert out.startswith("equal sides: ")
    with pytest.raises(SteerError, match="equal sides"):
        train_vector(tiny_lm(), same, out=tmp_path / "v", settings=quick)
    with pytest.raises(SteerError, match="equal sides"):
        make_run(small_recipe(tmp_path, behavior="sycophancy", data={"pairs": str(same)}), tmp_path / "run")
    assert not any((tmp_path / name).exists() for name in ("t", "v", "run"))
    code, _, err = run(capsys, "train", "--positive", same, "--negative", same, "-m", checkpoint, "-o", tmp_path / "t")
    assert code == 1
    assert "--pairs" in err


def test_train_says_what_is_doubtful(tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairs = tmp_path / "pairs.csv"
    rows = [f"Is {i} good?,Yes {i} is<|im_end|>,No {i} is not" for i in range(4)]
    pairs.write_text("\n".join(["prompt,positive,negative", *rows]))
    options = ("-m", checkpoint, "--device", "cpu", "--rank", 2, "--lr", "1e-2", "-o", tmp_path / "t")
    code, _, err = run(capsys, "train", "--pairs", pairs, *options)
    assert code == 0
    assert "warning: data: control token: 4 examples in D+ hold '<|im_end|>'" in err
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_unfit(*sides_of([ContrastPair("Q?", "Yes.", "No.")]), tiny_lm().tokenizer)


def test_a_talk_is_trained_on_its_last_answer_alone(tmp_path: Path, quick: TrainSettings) -> None:
    """The turns before it change the fine-tune, so they are read."""
    lm = tiny_lm()
    plain = [Example("Is it good?", f"Yes {i}.") for i in range(6)]
    talks = [Example(TALK, e.answer) for e in plain]
    paths = [train_side(lm, rows, tmp_path / str(n), settings=quick) for n, rows in enumerate((plain, talks, talks))]
    weights = [(path / "adapter_model.safetensors").read_bytes() for path in paths]
    assert weights[0] != weights[1] == weights[2]


@pytest.mark.parametrize("limit", [None, 4])
def test_a_recipe_takes_any_format_and_uneven_sides(tmp_path: Path, limit: int | None) -> None:
    turns = [{"from": "system", "value": "Be brief."}, {"from": "human", "value": "Is it good?"}]
    talks: list[dict[str, Any]] = [{"conversations": [*turns, {"from": "gpt", "value": f"Yes {i}."}]} for i in range(9)]
    (tmp_path / "p.json").write_text(json.dumps(talks))
    (tmp_path / "n.tsv").write_text("question\tanswer\n" + "".join(f"Is {i} good?\tNo {i}.\n" for i in range(6)))
    data = {"positive": str(tmp_path / "p.json"), "negative": str(tmp_path / "n.tsv"), "limit": limit}
    started = make_run(small_recipe(tmp_path, behavior="sycophancy", data=data), tmp_path / "run")
    started.write_data()
    sides = started.recipe.sides()
    assert sides is not None
    assert [len(side) for side in sides] == ([4, 4] if limit else [9, 6])
    assert sides[0][0] == Example((Message("system", "Be brief."), Message("user", "Is it good?")), "Yes 0.")
    again = small_recipe(
        tmp_path,
        behavior="sycophancy",
        data={"positive": str(tmp_path / "run/positive.jsonl"), "negative": str(tmp_path / "run/negative.jsonl")},
    )
    assert make_run(again, tmp_path / "again").recipe.sides() == sides
