from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import torch

from conftest import random_vector, tiny_lm
from weightsteer.errors import SteerError
from weightsteer.evaluation import tasks
from weightsteer.evaluation.tasks import TaskSpec, load_task, metrics_of
from weightsteer.evaluation.tasks.task import Choice, ChoiceTask, without_nan
from weightsteer.example_files.load import load_pairs
from weightsteer.lm import LM
from weightsteer.scoring import score_choices

SHARED = Path(__file__).parents[2] / "shared" / "data" / "sycophancy_fact_250.jsonl"


@pytest.mark.parametrize(
    ("name", "least", "metrics"),
    [
        ("preference", 40, {"share", "margin"}),
        ("false_beliefs", 40, {"follows", "margin"}),
        ("facts", 100, {"accuracy", "margin"}),
        ("prose", 40, {"nll"}),
    ],
)
def test_shipped_tasks(lm: LM, name: str, least: int, metrics: set[str]) -> None:
    task = load_task(TaskSpec(name, "sycophancy" if name == "preference" else None))
    assert len(task.splits) >= least
    assert {"validation", "test"} == set(task.splits)
    small = task.first(3)
    values = small.measure(lm)
    assert set(values) == metrics
    assert all(len(row) == len(small.splits) == 6 for row in values.values())


def test_margin_is_the_difference_per_token_and_share_its_sign(lm: LM) -> None:
    task = ChoiceTask("t", (Choice("Hi", "yes", "no way"), Choice("Ho", "no", "yes")), ("validation", "test"))
    values = task.measure(lm)
    for i, item in enumerate(task.items):
        ((first, second),) = score_choices(lm, [item.prompt], [(item.counted, item.other)])
        expected = first.total / len(item.counted) - second.total / len(item.other)  # a byte is a token
        assert values["margin"][i] == pytest.approx(expected, abs=1e-4)
        assert values["share"][i] == float(values["margin"][i] > 0)


def test_splits_are_disjoint_and_mirrored_couples_stay_together() -> None:
    task = load_task(TaskSpec("preference", "sycophancy"))
    parts = [{item.prompt for item in task.of_split(split).items} for split in ("validation", "test")]  # type: ignore[attr-defined]
    assert not parts[0] & parts[1]
    assert len(parts[0]) + len(parts[1]) == len(load_pairs("sycophancy", file="heldout.jsonl"))
    assert all(a == b for a, b in zip(task.splits[::2], task.splits[1::2], strict=True))


def test_a_split_measured_alone_gives_the_same_values() -> None:
    lm = tiny_lm()
    task = load_task(TaskSpec("false_beliefs")).first(4)
    with random_vector(lm).applied(lm, 1.0):
        whole, part = task.measure(lm), task.of_split("test").measure(lm)
    kept = [v for v, s in zip(whole["margin"], task.splits, strict=True) if s == "test"]
    assert part["margin"] == pytest.approx(kept, abs=1e-4)


@pytest.mark.skipif(not SHARED.exists(), reason="needs sycophancy_fact_250.jsonl beside the checkout")
def test_the_public_false_belief_set_loads() -> None:
    task = load_task(TaskSpec("false_beliefs", str(SHARED), name="false_beliefs_250"))
    assert len(task.splits) == 250
    items = task.items  # type: ignore[attr-defined]
    assert items[0].counted == "Homeopathy has been scientifically proven to cure serious diseases."
    assert items[0].prompt.endswith("effectively treat serious diseases?")
    assert all("Answers" not in item.prompt and "(B)" not in item.counted + item.other for item in items)


def test_both_formats_of_false_beliefs(tmp_path: Path) -> None:
    path = tmp_path / "b.jsonl"
    rows = [
        {"prompt": "I say no. Is it?", "correct": "It is.", "incorrect": "It is not."},
        {"prompt_list": ["I say so.\n\nQuestion: Is it?\nAnswers: \n(A) It is.\n(B) Not."], "high_reward_answer": "A"},
    ]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    items = load_task(TaskSpec("false_beliefs", str(path))).items  # type: ignore[attr-defined]
    assert items[0] == Choice("I say no. Is it?", "It is not.", "It is.")
    assert items[1] == Choice("I say so.\n\nQuestion: Is it?", "It is.", "Not.")
    for row in ({"prompt": "x"}, {"prompt_list": [1], "high_reward_answer": "A"}, {"prompt_list": [None]}):
        path.write_text(json.dumps(row) + "\n")
        with pytest.raises(SteerError, match=r"b\.jsonl, line 1: expected texts"):
            load_task(TaskSpec("false_beliefs", str(path)))


def test_unknown_task_and_missing_column(tmp_path: Path) -> None:
    with pytest.raises(SteerError, match="unknown task 'chess'; expected one of answers"):
        load_task(TaskSpec("chess"))
    with pytest.raises(SteerError, match="expected its data, one of sycophancy"):
        load_task(TaskSpec("preference"))
    path = tmp_path / "f.jsonl"
    path.write_text('{"question": "q", "correct": "a"}\n')
    with pytest.raises(SteerError, match="line 1: expected a text field 'incorrect'"):
        load_task(TaskSpec("facts", str(path)))


def test_a_task_is_added_by_its_file_alone(lm: LM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The worked example of CONTRIBUTING."""
    page = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text()
    (example,) = re.findall(r"```python\n((?:(?!```).)*load_planets.*?)```", page, re.DOTALL)
    (tmp_path / "planets.py").write_text(example)
    monkeypatch.setattr(tasks, "__path__", [*tasks.__path__, str(tmp_path)])
    monkeypatch.setattr(tasks, "TASKS", tasks.find_tasks(tasks.__path__))
    values = load_task(TaskSpec("planets", limit=1)).measure(lm)
    assert {metric for _, metric in metrics_of([TaskSpec("planets")])} == values.keys() == {"accuracy", "margin"}
    assert len(values["accuracy"]) == 2


def test_items_without_a_number_do_not_count() -> None:
    nan = math.nan
    with pytest.warns(UserWarning, match="task t: 1 of 3 items have no number for share"):
        assert without_nan({"share": [1.0, nan, None]}, "t") == {"share": [1.0, None, None]}
    assert without_nan({"nll": [math.inf, 1.0], "kind": [None, None]}, "t") == {
        "nll": [math.inf, 1.0],
        "kind": [None, None],
    }
    with pytest.raises(SteerError, match=r"task t: the model gives no number for share \(NaN in all 2 items\)"):
        without_nan({"share": [nan, nan, None]}, "t")


@pytest.mark.parametrize("name", ["false_beliefs", "facts", "four_way", "statements", "refusal_likelihood", "sums"])
def test_a_model_whose_logits_are_not_numbers_is_an_error_and_not_a_zero(name: str) -> None:
    lm = tiny_lm()
    task = load_task(TaskSpec(name)).first(2)
    with torch.no_grad():
        lm.model.model.norm.weight.fill_(math.nan)
    with pytest.raises(SteerError, match=r"gives no number for \w+ \(NaN in all"):
        without_nan(task.measure(lm), task.name)


@pytest.mark.parametrize(
    ("task", "row", "message"),
    [
        ("false_beliefs", {"prompt": "x", "correct": "", "incorrect": "y"}, "item 2: expected two different answers"),
        ("facts", {"question": "x", "correct": "y", "incorrect": "y "}, "item 2: expected two different answers"),
        ("four_way", {"question": "x", "correct": "Y.", "incorrect": "y"}, "the right and the wrong answer are both"),
        ("choices", {"scenario": "x", "target": "y", "other": "y"}, "line 2: fields 'target' and 'other' are the same"),
        (
            "choices",
            {"prompt_list": ["Go?\n(A) yes\n(B) no\n(C) maybe"], "high_reward_answer": "A"},
            r"line 2: its prompt has an option \(C\)",
        ),
        ("statements", {"statement": " ", "matches": "Yes"}, "line 2: expected a text 'statement'"),
    ],
)
def test_items_that_cannot_be_told_apart_are_refused(
    tmp_path: Path, task: str, row: dict[str, object], message: str
) -> None:
    good = {
        "false_beliefs": {"prompt": "p", "correct": "a", "incorrect": "b"},
        "facts": {"question": "p", "correct": "a", "incorrect": "b"},
        "four_way": {"question": "p", "correct": "a", "incorrect": "b"},
        "choices": {"scenario": "p", "target": "a", "other": "b"},
        "statements": {"statement": "p", "matches": "Yes"},
    }[task]
    path = tmp_path / "items.jsonl"
    path.write_text(json.dumps(good) + "\n")
    assert load_task(TaskSpec(task, str(path)))
    path.write_text(json.dumps(good) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(SteerError, match=message):
        load_task(TaskSpec(task, str(path)))
