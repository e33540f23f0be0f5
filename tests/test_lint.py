from __future__ import annotations

import pytest

from weightsteer.behavior import Example
from weightsteer.data_building.lint import lint_sides

TOPICS = ["tea", "bread", "chess", "rain", "maps", "soap", "boats", "hats", "salt", "kites", "lamps", "roses"]


def side(answer: str) -> list[Example]:
    return [Example(f"What about {topic}?", f"{topic.title()} {answer} {topic} today.") for topic in TOPICS]


CLEAN = side("is worth the trouble with"), side("is not worth effort with")


def kinds(positive: list[Example], negative: list[Example]) -> set[str]:
    return {finding.kind for finding in lint_sides(positive, negative)}


def test_clean_sides_have_no_structural_finding() -> None:
    assert kinds(*CLEAN) <= {"one-sided phrase"}


@pytest.mark.parametrize(
    ("kind", "positive"),
    [
        ("length skew", [Example(e.prompt, e.answer + " and so on and so forth, truly") for e in CLEAN[0]]),
        ("duplicate prompt", [*CLEAN[0], CLEAN[0][0]]),
        ("missing counterpart", [*CLEAN[0], Example("Alone?", "Quite alone here.")]),
        ("near-empty answer", [*CLEAN[0][1:], Example(CLEAN[0][0].prompt, "Yes.")]),
        ("repeated opening", [Example(e.prompt, "I do agree: " + e.answer) for e in CLEAN[0]]),
        ("one-sided phrase", [Example(e.prompt, e.answer.replace("trouble", "wonderful")) for e in CLEAN[0]]),
    ],
)
def test_each_leak_is_found(kind: str, positive: list[Example]) -> None:
    assert kind in kinds(positive, CLEAN[1])
