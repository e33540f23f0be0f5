from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import tiny_lm
from weightsteer import load_pairs
from weightsteer.behavior import ContrastPair
from weightsteer.errors import SteerError
from weightsteer.evaluation.tasks import TaskSpec, load_task
from weightsteer.evaluation.tasks.task import ChoiceTask

QUESTION = "I like tea. Is it healthy?\nChoices:\n (A) Agree\n (B) Disagree\nAnswer:"


def rows(letters: str) -> list[dict[str, Any]]:
    other = {"A": "B", "B": "A"}
    return [
        {
            "question": f"{number}. {QUESTION}",
            "answer_matching_behavior": f" ({letter})",
            "answer_not_matching_behavior": f" ({other[letter]})",
        }
        for number, letter in enumerate(letters)
    ]


def write(path: Path, entries: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return str(path)


def test_the_likelier_letter_is_that_of_a_direct_forward(tmp_path: Path) -> None:
    task = load_task(TaskSpec("model_written", data=write(tmp_path / "d.jsonl", rows("AABB"))))
    assert isinstance(task, ChoiceTask)
    assert [(item.counted, item.other) for item in task.items] == [("(A)", "(B)"), ("(B)", "(A)")] * 2
    assert task.splits == ("validation", "validation", "test", "test")
    lm = tiny_lm()
    values = task.measure(lm)
    for item, margin, matches in zip(task.items, values["margin"], values["matches"], strict=True):
        means = []
        for answer in (item.counted, item.other):
            head, tail = lm.chat_ids(item.prompt), lm.answer_ids(answer)
            with torch.no_grad():
                logits = lm.model(torch.tensor([head + tail])).logits[0].double().log_softmax(-1)
            means.append(logits[range(len(head) - 1, len(head + tail) - 1), tail].mean().item())
        assert margin == pytest.approx(means[0] - means[1], abs=1e-4)
        assert matches == float(means[0] > means[1])


def test_shipped_items_and_other_containers(tmp_path: Path) -> None:
    shipped = load_task(TaskSpec("model_written"))
    assert len(shipped.ids) == 12
    (tmp_path / "d.json").write_text(json.dumps(rows("AB")))
    assert len(load_task(TaskSpec("model_written", data=str(tmp_path / "d.json"))).ids) == 2
    yes_no = {"question": "Is it?", "answer_matching_behavior": " Yes", "answer_not_matching_behavior": " No"}
    assert len(load_task(TaskSpec("model_written", data=write(tmp_path / "d", [yes_no]))).ids) == 1


def test_the_same_file_is_data_for_pairs(tmp_path: Path) -> None:
    assert load_pairs(write(tmp_path / "d.jsonl", rows("B"))) == [ContrastPair(f"0. {QUESTION}", "(B)", "(A)")]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"question": None}, "field 'question' is null"),
        ({"answer_matching_behavior": " (C)"}, r"'answer_matching_behavior' is '\(C\)', an option that the question"),
        ({"answer_matching_behavior": " (A)", "answer_not_matching_behavior": "(A)"}, "are the same"),
        ({"answer_not_matching_behavior": [" (B)", " (C)"]}, "answer_not_matching_behavior"),
        ({"answer_not_matching_behavior": 2}, "'answer_not_matching_behavior' is a number"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = write(tmp_path / "d.jsonl", [*rows("A"), {**rows("A")[0], **change}])
    with pytest.raises(SteerError, match=rf"d\.jsonl, line 2: .*{message}"):
        load_task(TaskSpec("model_written", data=path))
    other = write(tmp_path / "o.jsonl", [{"prompt": "Q?", "positive": "Yes.", "negative": "No."}])
    with pytest.raises(SteerError, match="line 1: expected fields 'question', 'answer_matching_behavior'"):
        load_task(TaskSpec("model_written", data=other))
