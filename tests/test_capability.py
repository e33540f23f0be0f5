from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import pytest

from conftest import random_vector
from weightsteer.errors import SteerError
from weightsteer.evaluation.tasks.capability import load_facts, load_sums
from weightsteer.evaluation.tasks.data import task_file
from weightsteer.evaluation.tasks.task import SPLITS, TaskSpec
from weightsteer.files import read_jsonl
from weightsteer.lm import LM
from weightsteer.scoring import score_choices

ROWS = read_jsonl(task_file("sums.jsonl", None), required=("topic", "question", "correct", "incorrect"))
NUMBER = re.compile(r"\d+(?:\.\d+)?")
BIGGER = ("larger", "more", "greater")


def numbers(text: str) -> list[float]:
    return [float(number) for number in NUMBER.findall(text)]


def counted(question: str) -> int:
    """What a counting question asks for, worked out from its wording."""
    if match := re.search(r"letter (\w) stand in the word '(\w+)'", question):
        return match[2].count(match[1])
    if match := re.search(r"letters does the word '(\w+)'", question):
        return len(match[1])
    if match := re.search(r"sentence: '(.+)'", question):
        return len(match[1].split())
    if match := re.search(r"list: (.+)\?", question):
        return len(match[1].split(", "))
    match = re.search(r"from (\d+) to (\d+), both included", question)
    assert match is not None, question
    return int(match[2]) - int(match[1]) + 1


def solved(topic: str, question: str) -> float:
    if topic == "counting":
        return counted(question)
    first, second = numbers(question)
    if topic == "comparing":
        return max(first, second) if any(word in question for word in BIGGER) else min(first, second)
    return {"addition": first + second, "subtraction": abs(first - second), "multiplication": first * second}[topic]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["question"])
def test_the_right_answer_is_right_and_the_wrong_one_a_near_miss(row: dict[str, str]) -> None:
    right, wrong = numbers(row["correct"]), numbers(row["incorrect"])
    answer = solved(row["topic"], row["question"])
    if row["topic"] == "comparing":
        assert right == wrong[::-1]
        assert right[0] == answer
        assert sorted(right) == sorted(numbers(row["question"]))
        assert next(word for word in (*BIGGER, "smaller", "less") if word in row["question"]) in row["correct"]
    else:
        assert right[-1] == answer != wrong[-1]
        assert abs(right[-1] - wrong[-1]) in (1, 2, 5, 10)
        assert right[:-1] == wrong[:-1]  # what the answer repeats of the question
    assert NUMBER.sub("#", row["correct"]) == NUMBER.sub("#", row["incorrect"])
    assert len(row["correct"]) == len(row["incorrect"])


def test_the_sums_are_varied_and_favour_no_rule_of_thumb() -> None:
    topics = Counter(row["topic"] for row in ROWS)
    assert len(ROWS) == len({row["question"] for row in ROWS}) == 80
    assert min(topics.values()) >= 14
    above = [numbers(r["correct"])[-1] > numbers(r["incorrect"])[-1] for r in ROWS if r["topic"] != "comparing"]
    assert 0.4 < sum(above) / len(above) < 0.6  # the larger number is not the better guess
    first = [numbers(r["question"])[0] == numbers(r["correct"])[0] for r in ROWS if r["topic"] == "comparing"]
    assert 0.3 < sum(first) / len(first) < 0.7  # nor what is named first
    for split in SPLITS:
        rows = ROWS[SPLITS.index(split) :: 2]
        assert set(topics) == {row["topic"] for row in rows[:5]}  # a small limit has all topics


def test_sums_are_measured_as_the_facts_are(lm: LM) -> None:
    task = load_sums(TaskSpec("sums")).first(4)
    assert task.name == "sums"
    values = task.measure(lm)
    assert set(values) == {"accuracy", "margin"} == set(load_facts(TaskSpec("facts")).first(1).measure(lm))
    for i, item in enumerate(task.items):
        ((right, wrong),) = score_choices(lm, [item.prompt], [(item.counted, item.other)])
        assert values["accuracy"][i] == float(right.mean > wrong.mean)
    with random_vector(lm).applied(lm, 0.0) as handle:
        assert task.measure(lm) == values
        handle.k = 4.0
        assert task.measure(lm)["margin"] != values["margin"]


def test_own_sums_and_a_missing_field(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    row = {"question": "1 + 1?", "correct": "2", "incorrect": "3"}
    path.write_text(json.dumps(row) + "\n" + json.dumps({**row, "question": "2 + 2?"}) + "\n")
    task = load_sums(TaskSpec("sums", str(path)))
    assert [item.prompt for item in task.items] == ["1 + 1?", "2 + 2?"]
    assert task.sha256 != load_sums(TaskSpec("sums")).sha256
    path.write_text('{"question": "1 + 1?", "correct": "2"}\n')
    with pytest.raises(SteerError, match=r"mine\.jsonl, line 1: expected a text field 'incorrect'"):
        load_sums(TaskSpec("sums", str(path)))
