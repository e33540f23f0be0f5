from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from weightsteer.behavior import PERSONALITY, SHIPPED, Behavior, sample_pairs, sides_of
from weightsteer.data_building.lint import lint_sides
from weightsteer.errors import SteerError
from weightsteer.example_files.load import load_pairs

TRAITS = Path(__file__).parents[2] / "shared" / "data" / "traits"
SMALL = {"formal", "concise", "candid", "plain", "cheerful"}  # 20 pairs: what a user would write in an afternoon
FEW = SMALL | set(PERSONALITY)  # of the personalities 24
STRUCTURAL = {"length skew", "duplicate prompt", "missing counterpart", "near-empty answer", "repeated opening"}


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_behaviours_are_whole_and_clean(name: str) -> None:
    behavior = Behavior.load(name)
    assert len(behavior.questions) == (20 if name in FEW else 40)
    assert len(behavior.positive_prompts) == len(behavior.negative_prompts) == 5
    assert "{question}" in behavior.judge_prompt
    assert "{answer}" in behavior.judge_prompt
    pairs, held = load_pairs(name), load_pairs(name, file="heldout.jsonl")
    assert len(pairs) >= (20 if name in FEW else 100)
    assert len({pair.topic for pair in pairs}) >= 20
    assert not {pair.topic for pair in pairs} & {pair.topic for pair in held}
    assert not {pair.prompt for pair in pairs} & {pair.prompt for pair in held}
    found = {finding.kind for finding in lint_sides(*sides_of(pairs))}
    assert found & STRUCTURAL == ({"length skew"} if name == "concise" else set())  # there, length is the behaviour


def test_false_beliefs_do_not_occur_in_the_training_pairs() -> None:
    """Out of distribution means it: no training prompt shares a run of five words with an evaluation item."""
    from weightsteer.evaluation.tasks import TaskSpec, load_task

    def runs(text: str) -> set[tuple[str, ...]]:
        words = re.findall(r"[a-z']+", text.lower())
        return {tuple(words[i : i + 5]) for i in range(len(words) - 4)}

    items = load_task(TaskSpec("false_beliefs")).items  # type: ignore[attr-defined]
    asked = {run for item in items for run in runs(item.prompt.split("Question:")[1])}
    trained = {run for pair in load_pairs("sycophancy") for run in runs(pair.prompt)}
    assert not asked & trained


def test_behaviour_round_trip(tmp_path: Path) -> None:
    behavior = Behavior.load("gloomy")
    behavior.save(tmp_path / "b.json")
    assert Behavior.load(tmp_path / "b.json") == behavior


@pytest.mark.skipif(not TRAITS.exists(), reason="needs the persona-vectors trait files beside the checkout")
def test_persona_vectors_trait_files_load_as_they_are() -> None:
    files = sorted(TRAITS.glob("*/*.json"))
    assert files
    for file in files:
        trait = Behavior.load(file)
        assert trait.name == file.stem
        assert len(trait.questions) == 20
        assert len(trait.positive_prompts) == 5


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ([1], "expected a JSON object"),
        ({"questions": ["q"]}, "'instruction'"),
        ({"instruction": [{"pos": "a"}], "questions": ["q"]}, "instruction.0.neg"),
        ({"instruction": [{"pos": "a", "neg": "b"}], "questions": []}, "'questions'"),
    ],
)
def test_malformed_trait_files(tmp_path: Path, fields: object, message: str) -> None:
    path = tmp_path / "t.json"
    path.write_text(json.dumps(fields))
    with pytest.raises(SteerError, match=message):
        Behavior.load(path)


def test_unknown_behaviour_lists_the_known() -> None:
    with pytest.raises(SteerError, match="sycophancy, refusal, evil, gloomy"):
        Behavior.load("angry")


def test_sampling_keeps_mirrored_couples_together() -> None:
    pairs = load_pairs("sycophancy")
    some = sample_pairs(pairs, 40, seed=1)
    assert some == sample_pairs(pairs, 40, seed=1)
    assert len(some) == 40
    places = [pairs.index(pair) for pair in some]
    assert all(b == a + 1 and a % 2 == 0 for a, b in zip(places[::2], places[1::2], strict=True))
    assert sample_pairs(pairs, None, 0) == pairs
