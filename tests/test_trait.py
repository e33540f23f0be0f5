from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from weightsteer.behavior import SHIPPED, Behavior
from weightsteer.data_building.sampling import asked_questions
from weightsteer.errors import SteerError
from weightsteer.evaluation.tasks.task import Choice, TaskSpec
from weightsteer.evaluation.tasks.trait import COHERENCE, STATEMENT, Question, TraitScorer, load_statements, load_trait
from weightsteer.judges.judge import rubric_of
from weightsteer.lm import LM
from weightsteer.progress import Progress, silent
from weightsteer.scoring import score_choices

SHARED = Path(__file__).parents[2] / "shared" / "data"


class TwoMinds:
    """Gives the verdicts that the reply under judgement names, as in `trait 70 coherence 30`; else 50."""

    name = "two minds"

    def __init__(self) -> None:
        self.seen: list[str] = []

    def generate(self, prompts: Sequence[str], *, max_new_tokens: int = 16, progress: Progress = silent) -> list[str]:
        self.seen += prompts
        return [self._verdict(prompt) for prompt in prompts]

    def _verdict(self, prompt: str) -> str:
        kind = "coherence" if prompt.startswith(COHERENCE.text[:40]) else "trait"
        match = re.search(rf"\b{kind} (\d+|REFUSAL)\b", prompt)
        return match[1] if match else "50"


@pytest.fixture
def trait_file(tmp_path: Path) -> Path:
    """A behaviour with three questions and a rubric of its own."""
    path = tmp_path / "calm.json"
    rubric = "How calm is it?\nQ: {question}\nA: {answer}\nA number from 0 to 100."
    Behavior("calm", ("Be calm.",), ("Be loud.",), ("Q one?", "Q two?", "Q three?"), rubric).save(path)
    return path


def test_replies_get_both_verdicts(lm: LM, trait_file: Path) -> None:
    chat_model = TwoMinds()
    task = load_trait(TaskSpec("trait", behavior=str(trait_file), judge=chat_model, max_new_tokens=4))
    assert [item.prompt for item in task.items] == ["Q one?", "Q two?", "Q three?"]
    assert task.splits == ("validation", "test", "validation")
    values = task.measure(lm)
    assert values == {"trait": [50.0] * 3, "coherence": [50.0] * 3, "judged": [1.0] * 3}
    assert len(chat_model.seen) == 6
    assert sum("How calm is it?" in prompt for prompt in chat_model.seen) == 3
    assert all("{question}" not in prompt and "Q " in prompt for prompt in chat_model.seen)


def test_a_verdict_that_is_missing_does_not_count(trait_file: Path) -> None:
    scorer = TraitScorer(TwoMinds(), rubric_of(Behavior.load(trait_file)))
    replies = ["trait 80 coherence 100", "trait REFUSAL coherence 90", "trait 10 coherence 999", "trait 0 coherence 0"]
    assert scorer([Question("Q?")] * 4, replies) == {
        "trait": [80.0, None, 10.0, 0.0],
        "coherence": [100.0, 90.0, None, 0.0],
        "judged": [1.0, 0.0, 0.0, 1.0],
    }


def test_data_wins_over_behavior_and_shipped_names_load(trait_file: Path) -> None:
    task = load_trait(TaskSpec("trait", str(trait_file), behavior="sycophancy", judge=TwoMinds()))
    assert len(task.items) == 3
    shipped = load_trait(TaskSpec("trait", behavior="sycophancy", judge=TwoMinds()))
    assert [item.prompt for item in shipped.items] == list(Behavior.load("sycophancy").questions)[20:]
    assert shipped.max_new_tokens == 128


@pytest.mark.parametrize("name", SHIPPED)
def test_of_a_shipped_behaviour_no_question_is_both_sampled_and_asked(name: str) -> None:
    behavior = Behavior.load(name)
    task = load_trait(TaskSpec("trait", behavior=name, judge=TwoMinds()))
    sampled = asked_questions(behavior, None)
    assert (*sampled, *(item.prompt for item in task.items)) == behavior.questions
    assert len(sampled) == len(task.items) == len(behavior.questions) // 2


def test_the_record_names_the_judge_and_the_rubric(trait_file: Path) -> None:
    rubric = rubric_of(Behavior.load(trait_file))
    other = rubric_of(Behavior("calm", ("a",), ("b",), ("c",), "Calm? {question} {answer}"))
    name = TraitScorer(TwoMinds(), rubric).name
    assert "two minds" in name
    assert name == TraitScorer(TwoMinds(), rubric).name
    assert name != TraitScorer(TwoMinds(), other).name


def test_trait_needs_a_behaviour_a_judge_and_a_rubric(tmp_path: Path) -> None:
    with pytest.raises(SteerError, match="task trait: expected 'behavior' or 'data', one of sycophancy"):
        load_trait(TaskSpec("trait", judge=TwoMinds()))
    with pytest.raises(SteerError, match="task trait: expected a judge .*; give 'judge'"):
        load_trait(TaskSpec("trait", behavior="sycophancy"))
    path = tmp_path / "bare.json"
    Behavior("bare", ("a",), ("b",), ("c",)).save(path)
    with pytest.raises(SteerError, match="bare"):
        load_trait(TaskSpec("trait", str(path), judge=TwoMinds()))


def test_statements_of_both_formats(tmp_path: Path) -> None:
    path = tmp_path / "statements.jsonl"
    rows = [
        {"statement": "I rarely worry.", "matches": "Yes"},
        {"question": "Do you?", "answer_matching_behavior": " No", "answer_not_matching_behavior": " Yes"},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = load_statements(TaskSpec("statements", str(path)))
    assert task.items == (Choice(STATEMENT.format("I rarely worry."), "Yes", "No"), Choice("Do you?", "No", "Yes"))


def test_statements_are_scored_by_yes_and_no(lm: LM, tmp_path: Path) -> None:
    path = write_statements(tmp_path, "YNN")
    task = load_statements(TaskSpec("statements", str(path)))
    values = task.measure(lm)
    for i, item in enumerate(task.items):
        ((yes, no),) = score_choices(lm, [item.prompt], [("Yes", "No")])
        margin = yes.mean - no.mean if item.counted == "Yes" else no.mean - yes.mean
        assert values["margin"][i] == pytest.approx(margin, abs=1e-4)
        assert values["matches"][i] == float(margin > 0)


@pytest.mark.parametrize("answers", ["YYYYNNNN", "YNYNYNYN", "NNYYNYNY"])
def test_a_lean_to_yes_cancels_in_any_first_items(tmp_path: Path, answers: str) -> None:
    """A model that says Yes to all statements matches half of them, and a stronger lean moves no mean margin."""
    task = load_statements(TaskSpec("statements", str(write_statements(tmp_path, answers))))
    for limit in (2, 4):
        for split in ("validation", "test"):
            part = task.of_split(split).first(limit)
            assert [item.counted for item in part.items] == ["Yes", "No"] * (limit // 2)


def test_statements_left_over_come_last_and_keep_their_numbers(tmp_path: Path) -> None:
    task = load_statements(TaskSpec("statements", str(write_statements(tmp_path, "NNNNNY"))))
    assert [item.counted for item in task.items] == ["Yes", "No", "No", "No", "No", "No"]
    assert task.ids == (5, 0, 1, 2, 3, 4)
    assert [f"number {i}." in item.prompt for i, item in zip(task.ids, task.items, strict=True)] == [True] * 6


def write_statements(folder: Path, answers: str) -> Path:
    """Statements whose matching answers start with the given letters."""
    path = folder / "letters.jsonl"
    rows = [
        {"statement": f"This is number {i}.", "matches": "Yes" if a == "Y" else "No"} for i, a in enumerate(answers)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("row", "found"),
    [
        ({"statement": "x"}, "answer 'None' and the fields statement"),
        ({"statement": "x", "matches": "Maybe"}, "answer 'Maybe'"),
        ({"matches": "Yes"}, "fields matches"),
        ({"question": "x", "answer_matching_behavior": " Yes"}, "answer 'Yes'"),
        ({"question": "x", "answer_matching_behavior": " Yes", "answer_not_matching_behavior": " Yes"}, "answer 'Yes'"),
        ({"question": 3, "answer_matching_behavior": " Yes", "answer_not_matching_behavior": " No"}, "'question'"),
    ],
)
def test_malformed_statements_name_file_line_and_fields(tmp_path: Path, row: dict[str, object], found: str) -> None:
    path = tmp_path / "s.jsonl"
    path.write_text('{"statement": "fine", "matches": "No"}\n' + json.dumps(row) + "\n")
    with pytest.raises(SteerError, match=rf"s\.jsonl, line 2: expected a text 'statement'.*{found}"):
        load_statements(TaskSpec("statements", str(path)))


def test_shipped_statements() -> None:
    task = load_statements(TaskSpec("statements"))
    assert {item.counted for item in task.items} == {"Yes", "No"}
    assert len({item.prompt for item in task.items}) == len(task.items)


@pytest.mark.skipif(not SHARED.exists(), reason="needs persona_statements and traits beside the checkout")
def test_the_public_statements_and_traits_load() -> None:
    task = load_statements(TaskSpec("statements", str(SHARED / "persona_statements" / "psychopathy.jsonl")))
    assert len(task.items) == 1000
    assert [item.counted for item in task.of_split("test").items] == ["Yes", "No"] * 250
    for path in sorted((SHARED / "traits" / "eval").glob("*.json")):
        assert len(load_trait(TaskSpec("trait", str(path), judge=TwoMinds())).items) == 20
