"""The sentences at the head of a report say what the rows say, and no more."""

from __future__ import annotations

import math

import pytest

from weightsteer.evaluation.metrics import Metric
from weightsteer.evaluation.results import MetricRow
from weightsteer.evaluation.tasks import TASKS
from weightsteer.reporting.headline import change_in_words, headlines, nothing_recommended, side_left_out
from weightsteer.reporting.palette import METHOD_COLOURS, OTHERS, method_colours
from weightsteer.reporting.samples import (
    Sample,
    looping_by_strength,
    shown_replies,
    strengths_to_show,
    telling_first,
)
from weightsteer.run_card import StrengthRange
from weightsteer.steering.methods import METHODS

FOLLOWS, LOSS = ("false_beliefs", "follows"), ("prose", "nll")
METRICS = {FOLLOWS: Metric("follows", "Follows", better="lower", phrase="follows a false belief")}
RANGE = StrengthRange(0.5, -0.72, -2.0, 1.0)


def change(k: float, key: tuple[str, str], value: float, error: float, n: int = 250) -> MetricRow:
    return MetricRow("contrastive", k, *key, value, n, error, change=True)


def test_both_sides_are_told_with_their_errors_the_surest_first() -> None:
    rows = [
        change(0.5, FOLLOWS, 0.034, 0.022),
        change(0.5, LOSS, 0.1234, 0.01),
        change(-0.72, FOLLOWS, -0.0884, 0.018),
        change(-0.72, LOSS, 0.0041, 0.001),
    ]
    less, more = headlines(rows, "contrastive", RANGE, [FOLLOWS], METRICS)
    assert less.text == (
        "At k = -0.72 the model follows a false belief 8.8 ± 1.8 points less often; "
        "ordinary text costs 0.004 nats per token more."
    )
    assert more.text == (
        "At k = +0.5 the model follows a false belief 3.4 ± 2.2 points more often, which may be chance; "
        "ordinary text costs 0.12 nats per token more."
    )


@pytest.mark.parametrize(
    ("row", "metric", "said"),
    [
        (change(1, FOLLOWS, 0.5, math.nan, 1), METRICS[FOLLOWS], "50.0 points more often, on 1 item, so that no error"),
        (change(1, FOLLOWS, 1.0, 0.0, 2), METRICS[FOLLOWS], "100.0 ± 0.0 points more often, which may be chance"),
        (change(1, ("a", "b"), -0.3, 0.05), Metric("b", "Bees", "nats"), "changes in 'Bees' by -0.30 ± 0.05 nats"),
        (change(1, ("a", "b"), 9, 1), Metric("b", "B", "0 to 100", phrase="shows it"), "9.0 ± 1.0 points of 100 more"),
        (change(1, ("a", "b"), 0.0, 0.03), METRICS[FOLLOWS], "follows a false belief as before (0 ± 3.0 points)"),
    ],
)
def test_a_change_in_words(row: MetricRow, metric: Metric, said: str) -> None:
    assert said in change_in_words(row, metric)


def test_a_side_without_a_recommended_k_is_told() -> None:
    none = StrengthRange(0.0, 0.0, -2.0, 1.0)
    assert headlines([], "contrastive", none, [FOLLOWS], METRICS) == []
    assert nothing_recommended(none).startswith("No k from -2 to 1 moved the behaviour within the budget")
    assert side_left_out(none) == side_left_out(RANGE) == ""
    assert "No k below 0 that was measured lowered" in side_left_out(StrengthRange(0.5, 0.0, -2.0, 1.0))
    assert side_left_out(StrengthRange(0.5, 0.0, 0.5, 1.0)) == "No k below 0 was measured."
    assert "not measured on test items" in headlines([], "contrastive", RANGE, [FOLLOWS], METRICS)[0].text


def test_phrases_read_on_from_the_model() -> None:
    """A verb in the third person, or there is no phrase."""
    phrases = {metric.phrase for kind in TASKS.values() for metric in kind.metrics} - {""}
    assert "follows a false belief" in phrases
    assert all(phrase.split()[0].endswith("s") and not phrase.endswith(".") for phrase in phrases)


def test_at_most_five_strengths_with_those_recommended_and_the_base() -> None:
    every = Sample("p", {k / 4: f"reply {k}" for k in range(-8, 9)})
    assert strengths_to_show([every], StrengthRange(0.5, -1.0, -2.0, 2.0)) == [-1.0, -0.5, 0.0, 0.25, 0.5]
    assert strengths_to_show([every], StrengthRange(0.0, 0.0, -2.0, 2.0)) == [-2.0, -0.25, 0.0, 0.25, 2.0]
    few = Sample("p", {0.0: "a", 1.0: "b"})
    assert strengths_to_show([few], RANGE) == [0.0, 1.0]
    assert strengths_to_show([], RANGE) == []


def test_replies_that_loop_are_counted_and_tell_nothing() -> None:
    broken = "and so it goes " * 20
    same = Sample("same", {0.0: "a b c", 1.0: "a b c"})
    other = Sample("other", {0.0: "a b c", 1.0: "d e f"})
    looping = Sample("looping", {0.0: "a b c", 1.0: broken})
    assert telling_first([same, looping, other], [1.0])[0] == other
    assert [(row.k, row.loops, row.count) for row in looping_by_strength([same, other, looping])] == [
        (0.0, 0, 3),
        (1.0, 1, 3),
    ]
    assert [reply.loops for reply in shown_replies(looping, [0.0, 0.5, 1.0])] == [False, True]


def test_every_method_has_a_colour_of_its_own() -> None:
    assert METHOD_COLOURS.keys() == METHODS.keys()
    colours = method_colours([*METHODS, *(f"variant {n}" for n in range(len(OTHERS)))])
    assert len(set(colours.values())) == len(colours)
    assert method_colours(["contrastive"])["contrastive"] == colours["contrastive"]
