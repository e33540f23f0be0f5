"""What the shipped sets promise: no item twice, two different answers, no side that can be guessed from its place."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import pytest

from weightsteer.behavior import PERSONALITY, ContrastPair, prompt_text, sides_of
from weightsteer.data_building.lint import lint_sides
from weightsteer.errors import SteerError
from weightsteer.evaluation.tasks import TaskSpec, load_task
from weightsteer.evaluation.tasks.task import Choice
from weightsteer.example_files.load import load_examples, load_pairs

BANK = Path(__file__).parents[1] / "recipes" / "monitoring"
DOMAINS = ("cooking", "gardening", "study", "cycling", "knitting", "tidying")
TWO_SIDED = (*DOMAINS, "manners", "mood", "agreement", "compliance")
ONE_SIDED = ("sums", "rewriting", "lists", "code")
PUBLIC = Path(__file__).parents[2] / "shared" / "data" / "sycophancy_fact_250.jsonl"
COMMON = re.compile(
    r"\b(a|an|the|of|to|in|on|and|or|with|for|one|it|that|by|at|from|its|was|is|are|has|have|as|be|what|which)\b"
)


def items_of(name: str, data: str | None = None) -> tuple[Choice, ...]:
    return load_task(TaskSpec(name, data)).items  # type: ignore[attr-defined, no-any-return]


def words(text: str) -> set[str]:
    return set(re.findall(r"[a-z0-9]+", COMMON.sub(" ", text.lower())))


@pytest.mark.parametrize("name", ["wrong_claims", "stated_opinions"])
def test_items_are_many_and_distinct_and_split_by_their_own_text(name: str) -> None:
    task = load_task(TaskSpec(name))
    items = items_of(name)
    assert len(items) >= 200
    assert len({item.prompt for item in items}) == len(items)
    assert all(item.counted != item.other for item in items)
    assert min(Counter(task.splits).values()) >= 0.4 * len(items)


def test_neither_answer_of_a_wrong_claim_is_the_longer_one() -> None:
    lengths = [(len(item.counted.split()), len(item.other.split())) for item in items_of("wrong_claims")]
    longer = sum(a > b for a, b in lengths) - sum(a < b for a, b in lengths)
    assert abs(longer) <= 0.1 * len(lengths)


def test_wrong_claims_repeat_no_other_set() -> None:
    known = [f"{prompt_text(i.prompt)} {i.counted} {i.other}" for i in (*items_of("false_beliefs"), *items_of("facts"))]
    if PUBLIC.exists():
        known += [f"{prompt_text(i.prompt)} {i.counted} {i.other}" for i in items_of("false_beliefs", str(PUBLIC))]
    found = [words(text) for text in known]
    claims = items_of("wrong_claims")
    repeated = [c.other for c in claims if len(words(c.other)) > 1 and any(words(c.other) <= text for text in found)]
    assert not repeated
    assert len({c.other for c in claims}) == len(claims)


def test_opinions_are_balanced_between_users_and_orders() -> None:
    items, task = items_of("stated_opinions"), load_task(TaskSpec("stated_opinions"))
    places = []
    for one, two, split, other_split in zip(items[::2], items[1::2], task.splits[::2], task.splits[1::2], strict=True):
        assert (one.counted, one.other) == (two.other, two.counted)  # what suits one user does not suit the other
        assert split == other_split
        asked = prompt_text(one.prompt).lower()
        mine, yours = (words(text) for text in (one.counted, one.other))
        first = {w: asked.rfind(w) for w in mine ^ yours if w in asked}
        a, b = ([first[w] for w in side if w in first] for side in (mine - yours, yours - mine))
        if a and b:
            places.append(min(a) < min(b))
    assert len(places) > 0.8 * len(items) / 2
    assert 0.4 < sum(places) / len(places) < 0.6  # the first user's answer is named first in half of the couples


def test_halves_share_no_item_and_do_not_depend_on_the_order(tmp_path: Path) -> None:
    rows = [{"prompt": f"Number {i}?", "correct": "Yes.", "incorrect": "No."} for i in range(40)]
    halves = []
    for listed in (rows, rows[::-1]):
        path = tmp_path / "b.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in listed))
        parts = [load_task(TaskSpec("false_beliefs", str(path), half=half)) for half in ("choose", "report")]
        halves.append([{item.prompt for item in part.items} for part in parts])  # type: ignore[attr-defined]
    assert halves[0] == halves[1]
    assert not halves[0][0] & halves[0][1]
    assert len(halves[0][0] | halves[0][1]) == 40
    assert all(halves[0])


def test_a_half_goes_with_a_split_and_texts_have_halves_too(tmp_path: Path) -> None:
    task = load_task(TaskSpec("wrong_claims", half="report", split="test", limit=5))
    assert task.splits == ("test",) * 5
    parts = [set(load_task(TaskSpec("prose", half=half)).ids) for half in ("choose", "report")]
    assert not parts[0] & parts[1]
    assert len(parts[0] | parts[1]) == len(load_task(TaskSpec("prose")).ids)
    path = tmp_path / "one.jsonl"
    path.write_text(json.dumps({"prompt": "Is it?", "correct": "Yes.", "incorrect": "No."}) + "\n")
    with pytest.raises(SteerError, match="none of its 1 items is in the half"):
        for half in ("choose", "report"):
            load_task(TaskSpec("false_beliefs", str(path), half=half))
    with pytest.raises(SteerError, match="half: expected one of choose, report, found 'both'"):
        load_task(TaskSpec("wrong_claims")).of_half("both")


@pytest.mark.skipif(not PUBLIC.exists(), reason="needs sycophancy_fact_250.jsonl beside the checkout")
def test_the_public_false_beliefs_have_two_fixed_halves() -> None:
    sizes = [len(load_task(TaskSpec("false_beliefs", str(PUBLIC), half=h)).ids) for h in ("choose", "report")]
    assert sizes == [138, 112]


@pytest.mark.parametrize("file", ["pairs.jsonl", "heldout.jsonl"])
def test_discernment_comes_in_twins_whose_answers_differ(file: str) -> None:
    pairs = load_pairs("discernment", file=file)
    assert len(pairs) >= (120 if file == "pairs.jsonl" else 20)
    assert len({pair.prompt for pair in pairs}) == len(pairs)
    for harmful, harmless in zip(pairs[::2], pairs[1::2], strict=True):
        assert harmful.topic == harmless.topic
        shared = words(str(harmful.prompt)) & words(str(harmless.prompt))
        assert len(shared) >= 0.3 * len(words(str(harmful.prompt)))
        assert len({harmful.positive, harmful.negative, harmless.positive, harmless.negative}) == 4
    asked = {item.prompt for item in load_task(TaskSpec("refusal")).items}  # type: ignore[attr-defined]
    assert not asked & {pair.prompt for pair in pairs}
    assert not {p.prompt for p in load_pairs("refusal")} & {p.prompt for p in pairs}


def test_personalities_answer_the_same_questions_in_their_own_words() -> None:
    sets = {name: load_pairs(name) + load_pairs(name, file="heldout.jsonl") for name in PERSONALITY}
    (questions,) = {tuple(pair.prompt for pair in pairs) for pairs in sets.values()}
    assert len(sets) >= 10
    answers = [text for pairs in sets.values() for pair in pairs for text in (pair.positive, pair.negative)]
    assert len(set(answers)) == len(answers)
    bank = {pair.prompt for name in TWO_SIDED for pair in load_pairs(BANK / f"{name}.jsonl")}
    assert not set(questions) & bank


@pytest.mark.parametrize("name", TWO_SIDED)
def test_the_banks_pairs_are_clean(name: str) -> None:
    pairs = load_pairs(BANK / f"{name}.jsonl")
    assert_distinct(pairs)
    kinds = {finding.kind for finding in lint_sides(*sides_of(pairs))}
    assert kinds <= {"one-sided phrase"}  # "I can't", "please": what the behaviour itself says


def assert_distinct(pairs: list[ContrastPair]) -> None:
    assert len(pairs) >= 40
    assert len({pair.prompt for pair in pairs}) == len(pairs)
    assert all(pair.positive != pair.negative for pair in pairs)


@pytest.mark.parametrize("name", ONE_SIDED)
def test_the_banks_neutral_tasks_are_clean(name: str) -> None:
    examples = load_examples(BANK / f"{name}.jsonl")
    assert len(examples) >= 40
    assert len({example.prompt for example in examples}) == len(examples)


def test_no_prompt_is_in_two_files_of_the_bank() -> None:
    prompts = [pair.prompt for name in TWO_SIDED for pair in load_pairs(BANK / f"{name}.jsonl")]
    prompts += [example.prompt for name in ONE_SIDED for example in load_examples(BANK / f"{name}.jsonl")]
    assert not [prompt for prompt, count in Counter(prompts).items() if count > 1]


def test_the_banks_sums_are_right() -> None:
    rules = {"plus": int.__add__, "minus": int.__sub__, "times": int.__mul__}
    for example in load_examples(BANK / "sums.jsonl"):
        a, kind, b, result = re.fullmatch(r"(\d+) (\w+) (\d+) is (\d+)\.", example.answer).groups()  # type: ignore[union-attr]
        assert rules[kind](int(a), int(b)) == int(result)
