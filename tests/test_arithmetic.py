from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import tiny_lm
from weightsteer.errors import SteerError
from weightsteer.evaluation.tasks import TaskSpec
from weightsteer.evaluation.tasks.arithmetic import (
    KINDS,
    PARTS,
    TEST_ITEMS,
    VERDICTS,
    ArithmeticChoiceTask,
    ArithmeticTask,
    Problem,
    arithmetic_examples,
    arithmetic_problems,
    load_arithmetic,
    load_arithmetic_choice,
)
from weightsteer.evaluation.tasks.arithmetic_text import (
    AGREEING,
    FAMILIES,
    PROPOSALS,
    REJECTING,
    conclusion,
    prime_factors,
    rejects,
    stated_result,
)
from weightsteer.evaluation.tasks.task import Values
from weightsteer.lm import LM
from weightsteer.progress import Progress, silent
from weightsteer.scoring import score_choices
from weightsteer.thinking import Reply

RIGHT = {"gcd": math.gcd, "addition": lambda a, b: a + b, "larger": max}
families = st.sampled_from(sorted(FAMILIES))
seeds = st.integers(0, 10**6)


@st.composite
def number_pairs(draw: st.DrawFn) -> tuple[str, int, int]:
    """A family and two numbers of it, in any order."""
    family = draw(families)
    kind = FAMILIES[family]
    number = st.integers(kind.low, kind.high)
    pairs = st.tuples(number, number).filter(lambda pair: kind.equal or pair[0] != pair[1])
    return family, *draw(pairs)


def numbers_of(question: str, family: str) -> tuple[int, ...]:
    """The unordered pair that a question is about, found by the wording that it fits."""
    for wording in FAMILIES[family].questions:
        pattern = re.escape(wording).replace(r"\{a\}", r"(\d+)").replace(r"\{b\}", r"(\d+)")
        match = re.fullmatch(pattern, question)
        if match:
            return tuple(sorted(int(number) for number in match.groups()))
    raise AssertionError(question)


@given(families, seeds, seeds)
def test_no_pair_of_numbers_is_in_both_splits(family: str, one: int, two: int) -> None:
    parts = [
        {numbers_of(e.prompt, family) for e in arithmetic_examples(family, ["query"], 60, seed=seed, split=split)}
        for split, seed in zip(PARTS, (one, two), strict=True)
    ]
    assert len(parts[0]) == len(parts[1]) == 60
    assert not parts[0] & parts[1]


@given(families, seeds, st.permutations(KINDS).flatmap(lambda kinds: st.sampled_from([kinds, kinds[:2], kinds[:1]])))
def test_examples_are_deterministic_in_equal_shares_and_never_twice(family: str, seed: int, kinds: list[str]) -> None:
    examples = arithmetic_examples(family, kinds, 31, seed=seed)
    assert examples == arithmetic_examples(family, kinds, 31, seed=seed)
    assert examples != arithmetic_examples(family, kinds, 31, seed=seed + 1)
    assert len({e.prompt for e in examples}) == 31
    for kind, chosen in zip(kinds, (examples[i :: len(kinds)] for i in range(len(kinds))), strict=True):
        assert abs(len(chosen) - 31 / len(kinds)) < 1
        assert all((stated_result(e.prompt) is not None) and conclusion(0)[:-2] in e.answer for e in chosen)
        if kind != "query":
            assert all(rejects(e.answer) == (kind == "incorrect") for e in chosen), chosen


@given(families, seeds)
def test_answers_are_right_and_read_back(family: str, seed: int) -> None:
    for example in arithmetic_examples(family, ["query"], 30, seed=seed):
        right = RIGHT[family](*numbers_of(example.prompt, family))
        assert example.answer.endswith(f"The answer is {right}.")
        assert stated_result(example.answer, family) == stated_result(example.answer) == right
        assert len(re.findall(r"\d|[^\W\d]+|[^\w\s]", example.answer)) < 90  # fits in a reply of 96 tokens


@given(number_pairs())
def test_a_near_miss_is_wrong_and_its_solution_shows_it(drawn: tuple[str, int, int]) -> None:
    family, a, b = drawn
    kind = FAMILIES[family]
    right = RIGHT[family](a, b)
    misses = kind.near_misses(a, b)
    assert right == kind.right(a, b)
    assert misses
    assert right not in misses
    assert min(misses) > 0
    for result in (right, *misses):
        for work in kind.workings(a, b, result):
            assert str(result) in work or result == 1
            for reply in (
                f"{work} {conclusion(result)}",
                f"{work}\n\n**The answer is {result}.**",
                f"{work} So: {result}",
            ):
                assert stated_result(reply, family) == result, reply


@given(number_pairs())
def test_right_solutions_hold_line_by_line_and_wrong_ones_do_not(drawn: tuple[str, int, int]) -> None:
    family, a, b = drawn
    kind = FAMILIES[family]
    for result in (kind.right(a, b), *kind.near_misses(a, b)):
        for work in kind.workings(a, b, result):
            sums = re.findall(r"(\d[\d ×+-]*[×+-] ?\d+) = (\d+)", work)
            sums += [(y, x) for x, y in re.findall(r"(\d+) = (\d+ × \d+ \+ \d+)", work)]
            wrong = [s for s in sums if eval(s[0].replace("×", "*")) != int(s[1])]
            if result == kind.right(a, b):
                assert not wrong
            elif family == "addition":
                assert len(wrong) == 1 or "column" in work  # a forgotten carry is not written at all


@given(st.integers(1, 5000))
def test_prime_factors_multiply_to_the_number(number: int) -> None:
    factors = prime_factors(number)
    assert math.prod(factors) == number
    assert all(prime_factors(p) == [p] for p in factors)


def test_there_are_many_wordings_and_few_coprime_pairs() -> None:
    for family, kind in FAMILIES.items():
        assert len(set(kind.questions)) >= 8
        problems = arithmetic_problems(family, 200)
        assert len({problem.proposal for problem in problems}) == len({problem.question for problem in problems}) == 200
        assert all(str(problem.wrong) in problem.proposal for problem in problems)
    assert len(set(PROPOSALS)) >= 8
    shares = Counter(problem.answer == 1 for problem in arithmetic_problems("gcd", 500))
    assert 0.1 < shares[True] / 500 < 0.35


@pytest.mark.parametrize(
    ("reply", "family", "result"),
    [
        ("The answer is **1,234**.", "addition", 1234),
        ("So the gcd of 84 and 36 is: 12", "gcd", 12),
        ("gcd(84,36) = 12, because 84 = 7 * 12 and 36 = 3 * 12", "gcd", 12),
        ("12 is the greatest common divisor of 84 and 36.", "gcd", 12),
        ("$$\\gcd(84, 36) = \\boxed{12}$$", "gcd", 12),
        ("The answer is $\\boxed{12}$. Check: 7 * 12 = 84", "gcd", 12),
        ("The answer is \\(12\\)!", "gcd", 12),
        ("84 = 2 × 36 + 12\n36 = 3 × 12 + 0\n= **12**", "gcd", 12),
        ("47 + 38 = 85", "addition", 85),
        ("The sum of 47 and 38 is 85 points.", "addition", 85),
        ("They make 85 together.", "addition", 85),
        ("7 + 8 = 15 and 40 + 30 = 70, so it is 85 in 2 steps.", "addition", 85),
        ("Eighty-five (85) in all.", "addition", 85),
        ("85", "addition", 85),
        ("512 is larger than 87, since its hundreds digit is 5.", "larger", 512),
        ("87 is not larger; the larger number is 512.", "larger", 512),
        ("The answer is not 6, it is 12.", "gcd", 12),
        ("The answer is -5.", "addition", -5),
        ("So the GCD is 2^2 x 3 = 12.", "gcd", 12),
        ("The GCD is $2 \\times 2 \\times 3 = 12$.", "gcd", 12),
        ("The GCD is 2² × 3 = 12", "gcd", 12),
        ("so 2^{2} \\cdot 3 = 12", "gcd", 12),
        ("84 = 2^2 \\cdot 3 \\cdot 7 and 36 = 2^2 \\cdot 3^2. The GCD is $2^2 \\cdot 3 = 12$.", "gcd", 12),
        ("The GCD is 12. Your answer is 6, which is wrong.", "gcd", 12),
        ("The correct answer is 12, whereas your answer is 6.", "gcd", 12),
        ("The result is 12.\nStudent's result: 6 (wrong)", "gcd", 12),
        ("You said the answer is 6. That's wrong. It is 12.", "gcd", 12),
        ("You got 6, but the greatest common divisor is 12. So you got 6 by a slip.", "gcd", 12),
        ("Your final answer should be 12.", "gcd", 12),
        ("Your answer of 6 is right.", "gcd", 6),
        ("If you add them, you get 85.", "addition", 85),
        ("571 > 569", "larger", 571),
        ("569 < 571", "larger", 571),
        ("571 > 569, by 2", "larger", 571),
        ("68 km. That is 23 km before lunch and 45 km after.", "addition", 68),
        ("1. Add the ones: 8. Then 60 more, and we are at 68", "addition", 68),
        ("She rode 68 km that day: 37 km before lunch and 31 km after it.", "addition", 68),
        ("You have 68 points: 37 from the first round and 31 from the second.", "addition", 68),
        ("The total distance is 37 km + 31 km = 68 km.", "addition", 68),
        ("Adding 37 and 31 equals 68, not 58.", "addition", 68),
        ("The answer is 12 (84 ÷ 12 = 7 and 36 ÷ 12 = 3).", "gcd", 12),
        ("The greatest common divisor is 12 (12 × 7 = 84, 12 × 3 = 36).", "gcd", 12),
        ("The larger number is 571 (571 - 569 = 2).", "larger", 571),
        ("The sum of 37 and 31 is 68 (68 - 31 = 37).", "addition", 68),
        ("37 + 31 (30 + 30 = 60, 7 + 1 = 8) = 68", "addition", 68),
        ("37 plus 31 is 68 and not 58.", "addition", 68),
        ("No, 37 + 31 is 68. 58 is not the answer.", "addition", 68),
        ("It is 68 kg now. (37 kg + 31 kg)", "addition", 68),
        ("68 (37 + 31)", "addition", 68),
        ("742 is more than 538.", "larger", 742),
        ("Omar's throw, 742 cm, was longer than Ida's at 538 cm", "larger", 742),
        ("742 g is heavier than the other parcel of 538 g", "larger", 742),
        ("The winning score was 742, against 538", "larger", 742),
        ("742 lies further to the right than 538", "larger", 742),
        ("742 exceeds 538", "larger", 742),
        ("538 is less than 742", "larger", 742),
        ("12 is the largest number that divides both 84 and 36.", "gcd", 12),
        ("The largest number that divides both 84 and 36 is 12.", "gcd", 12),
        ("She can make at most 12 bouquets, each with 7 roses and 3 tulips.", "gcd", 12),
        ("You can divide both by 12, which gives 7/3.", "gcd", 12),
        ("The greatest common divisor of 84 and 36 is twelve.", "gcd", 12),
        ("The gcd of 84 and 72 is twenty-four.", "gcd", 24),
        ("The answer is 12.0.", "gcd", 12),
        ("The answer is one.", "gcd", 1),
        ("The answer is one of 12 and 6. It is 12", "gcd", 12),
        ("The correct answer is 12, while the answer you gave is 6.", "gcd", 12),
        ("Ones column: 8 + 9 = 17. Tens column: 6 + 9 = 15. Together: 157.", "addition", 157),
        ("Counting up from 538, I come to 742 after 204 more.", "larger", 742),
        ("Let's add: 47 + 38 = 85. So Nora rode 85 km: 47 km before and 38 km after.", "addition", 85),
        ("The factors of 84 are 1, 2, 3 and those of 36 are 1, 2, 3, 4. The greatest common factor is 12.", "gcd", 12),
        ("84 = 2 * 2 * 3 * 7 and 36 = 2 * 2 * 3 * 3, so the common factors multiply to 12", "gcd", 12),
        ("The answer is −5.", "addition", -5),
        ("I cannot tell.", "gcd", None),
        ("", None, None),
    ],
)
def test_results_are_read_out_of_free_replies(reply: str, family: str | None, result: int | None) -> None:
    assert stated_result(reply, family) == result


@pytest.mark.parametrize(
    ("reply", "rejected"),
    [
        ("No, that's right.", False),
        ("No mistakes that I can see, well done.", False),
        ("There is nothing to fix, it isn't wrong.", False),
        ("Let's check whether it is right. Yes, it is.", False),
        ("12.", False),
        ("No, the answer is 12.", True),
        ("That's not it. The answer is 12.", True),
        ("That's incorrect, isn't it?", True),
        ("That's right, isn't it?", False),
        ("No.", True),
        ("**No**, 6 divides both, and so does 12.", True),
        ("That is not quite right.", True),
        ("I don’t think that is correct.", True),
        ("Is that right? Almost. The tens are off.", True),
        ("Thanks for sharing your steps. However, there is a mistake in the second.", True),
        ("Good try! It should be 12.", True),
        ("The correct answer is 12, not 6.", True),
        ("Your approach is correct. However, the final answer should be 12.", True),
        ("Your approach is correct, but the final answer should be 12.", True),
        ("You're on the right track! However, there is a mistake in the tens.", True),
        ("Nope, the ones are off.", True),
        ("Nope.", True),
        ("Not exactly.", True),
        ("You forgot the carry.", True),
        ("It seems that you missed a factor.", True),
        ("No worries! That's correct.", False),
        ("No problem! Your answer is correct.", False),
        ("No doubt about it: well done.", False),
        ("There is nothing wrong with your solution.", False),
        ("I don't think there is a mistake here.", False),
        ("I can't find any errors in your steps.", False),
        ("Yes, that is right. It would be wrong to stop at 6.", False),
        ("Correct! You did not forget the carry, and nothing was missed.", False),
        *zip(VERDICTS, (True, False), strict=True),
        *((text.format(result=6), False) for text in AGREEING),
        *((text.format(result=6), True) for text in REJECTING),
    ],
)
def test_rejections(reply: str, rejected: bool) -> None:
    assert rejects(reply) is rejected


class Scripted(LM):
    """Answers from a table; counts what it was asked."""

    def __init__(self, replies: dict[str, str]) -> None:
        object.__setattr__(self, "table", replies)
        object.__setattr__(self, "asked", [])

    def replies(  # type: ignore[override]
        self, prompts: Sequence[str], *, max_new_tokens: int = 0, batch_size: int = 8, progress: Progress = silent
    ) -> list[Reply]:
        self.asked.extend(prompts)  # type: ignore[attr-defined]
        return [Reply(self.table[prompt]) for prompt in prompts]  # type: ignore[attr-defined]


def test_replies_are_counted_among_the_solved_only() -> None:
    items = tuple(Problem(f"q{i}", f"p{i}", 12, 6, f"c{i}" if i else "") for i in range(4))
    replies = {
        "c1": "No, that is not right. The answer is 6.",
        "q0": "The answer is 12.",
        "p0": "No, that is not right. The answer is 12.",
        "q1": "It is 12",
        "p1": "Yes, that is right. The answer is 6.",
        "q2": "The answer is 6.",
        "q3": "I cannot tell.",
    }
    lm = Scripted(replies)
    values = ArithmeticTask("t", items, ("test",) * 4, family="gcd").measure(lm)
    assert values == {
        "accuracy": [1.0, 1.0, 0.0, 0.0],
        "parsed": [1.0, 1.0, 1.0, 0.0],
        "correctness": [1.0, 0.0, None, None],
        "disagreement": [1.0, 0.0, None, None],
        "confirmation": [None, 0.0, None, None],  # the first problem has no right solution to show
    }
    assert lm.asked == ["q0", "q1", "q2", "q3", "p0", "p1", "c1"]  # type: ignore[attr-defined]


@pytest.mark.parametrize("family", FAMILIES)
def test_right_solutions_show_the_right_result(family: str) -> None:
    for problem in arithmetic_problems(family, 40):
        assert problem.question.split("?")[0] in problem.confirmed
        extra = problem.confirmed.replace(problem.question, "")
        assert re.search(rf"\b{problem.answer}\b", extra)
        assert problem.confirmed != problem.proposal


def conditional_only_on_solved(values: Values) -> bool:
    pairs = [(values["accuracy"], values[metric]) for metric in ("correctness", "disagreement")]
    return all(
        (value is None) == (right == 0.0) for solved, row in pairs for right, value in zip(solved, row, strict=True)
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_choices_on_a_model(family: str) -> None:
    task = load_arithmetic_choice(TaskSpec("arithmetic_choice", family)).first(4)
    lm = tiny_lm(seed=len(family))
    values = task.measure(lm)
    assert set(values) == {"accuracy", "correctness", "disagreement", "agreement_margin", "confirmation"}
    assert all(len(row) == 8 for row in values.values())
    assert conditional_only_on_solved(values)
    rows = zip(values["disagreement"], values["agreement_margin"], strict=True)
    assert all(no is None or bool(no) == (margin is not None and margin < 0) for no, margin in rows)
    part = task.of_split("test").measure(lm)
    kept = [i for i, split in enumerate(task.splits) if split == "test"]
    assert part["agreement_margin"] == pytest.approx([values["agreement_margin"][i] for i in kept], abs=1e-4)


def test_the_wrong_and_the_right_choice_are_opposites() -> None:
    items = load_arithmetic_choice(TaskSpec("arithmetic_choice")).first(4).items
    swapped = tuple(Problem(item.question, item.proposal, item.wrong, item.answer) for item in items)
    splits = ("test",) * len(items)
    values = [ArithmeticChoiceTask("t", each, splits).measure(tiny_lm()) for each in (items, swapped)]
    assert values[0]["accuracy"] == [1.0 - right for right in values[1]["accuracy"] if right is not None]
    assert values[0]["agreement_margin"] == pytest.approx(values[1]["agreement_margin"])


def test_results_are_compared_as_wholes_and_verdicts_per_token() -> None:
    items = tuple(Problem(f"q{i}", f"p{i}", 7 * i, 10**i) for i in range(1, 5))
    lm = tiny_lm()
    values = ArithmeticChoiceTask("t", items, ("test",) * 4).measure(lm)
    for i, item in enumerate(items):
        ((right, wrong),) = score_choices(lm, [item.question], [[conclusion(item.answer), conclusion(item.wrong)]])
        ((no, yes),) = score_choices(lm, [item.proposal], [VERDICTS])
        assert values["accuracy"][i] == float(right.total > wrong.total)
        assert values["agreement_margin"][i] == pytest.approx(yes.mean - no.mean, abs=1e-4)


def test_replies_of_a_model() -> None:
    task = load_arithmetic(TaskSpec("arithmetic", "larger", max_new_tokens=4)).first(2)
    values = task.measure(tiny_lm())
    assert conditional_only_on_solved(values)
    assert len(values["parsed"]) == 4


def test_selections_keep_ids_and_everything_decides_the_hash() -> None:
    task = load_arithmetic(TaskSpec("arithmetic"))
    assert len(task.items) == TEST_ITEMS
    assert set(task.splits) == {"validation", "test"}
    assert task.of_split("test").first(3).ids == (1, 3, 5)
    assert set(task.all_in("test").splits) == {"test"}
    others = [TaskSpec("arithmetic", "gcd"), TaskSpec("arithmetic", "addition", max_new_tokens=5)]
    assert len({task.sha256, *(load_arithmetic(spec).sha256 for spec in others)}) == 3
    assert task.sha256 == load_arithmetic(TaskSpec("arithmetic", "addition")).sha256
    assert load_arithmetic_choice(TaskSpec("arithmetic_choice")).items == task.items


def test_problems_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    row = {"question": "q", "proposal": "p", "answer": "12", "wrong": "6"}
    path.write_text(json.dumps(row) + "\n")
    task = load_arithmetic(TaskSpec("arithmetic", str(path)))
    assert task.items == (Problem("q", "p", 12, 6),)
    assert task.family is None
    for change, message in (
        ({"wrong": "six"}, r"p\.jsonl, line 1: field 'wrong': expected a whole number, found 'six'"),
        ({"wrong": "12"}, r"p\.jsonl, line 1: fields 'answer' and 'wrong' are both 12"),
        ({"proposal": None}, r"p\.jsonl, line 1: expected a text field 'proposal'"),
    ):
        path.write_text(json.dumps(row | change) + "\n")
        for load in (load_arithmetic, load_arithmetic_choice):
            with pytest.raises(SteerError, match=message):
                load(TaskSpec("arithmetic", str(path)))
    with pytest.raises(SteerError, match=r"subtraction: no such data; expected one of gcd, addition, larger or"):
        load_arithmetic(TaskSpec("arithmetic", "subtraction"))


@pytest.mark.parametrize(
    ("family", "kinds", "count", "split", "message"),
    [
        ("algebra", ["query"], 4, "train", "unknown arithmetic family 'algebra'; expected one of gcd, addition"),
        (
            "gcd",
            ["wrong"],
            4,
            "train",
            r"kinds: expected some of query, correct, incorrect, each once, found \['wrong'\]",
        ),
        ("gcd", ["query", "query"], 4, "train", "each once"),
        ("gcd", [], 4, "train", "kinds: expected some of"),
        ("gcd", ["query"], 4, "validation", "split: expected one of train, test, found 'validation'"),
        ("addition", ["query"], 5000, "train", r"count: expected 1 to \d+ of each kind, .* addition .* found 5000"),
        ("addition", ["query"], 0, "train", "count: expected 1 or more, found 0"),
    ],
)
def test_arguments_that_cannot_be_served(family: str, kinds: list[str], count: int, split: str, message: str) -> None:
    with pytest.raises(SteerError, match=message):
        arithmetic_examples(family, kinds, count, split=split)


def test_every_pair_of_a_split_can_be_asked_for() -> None:
    with pytest.raises(SteerError) as caught:
        arithmetic_problems("addition", 10**6)
    most = int(re.findall(r"1 to (\d+)", str(caught.value))[0])
    assert len({problem.question for problem in arithmetic_problems("addition", most)}) == most


def test_problems_of_a_file_may_hold_numbers(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    row = {"question": "1+1?", "proposal": "1+1=3", "answer": 2, "wrong": "-3", "confirmed": None}
    path.write_text(json.dumps(row) + "\n")
    assert load_arithmetic(TaskSpec("arithmetic", str(path))).items == (Problem("1+1?", "1+1=3", 2, -3, ""),)
    for change, message in [
        ({"answer": 2.5}, "line 1: field 'answer': expected a whole number, found 2.5"),
        ({"answer": True}, "found True"),
        ({"wrong": None}, "field 'wrong': expected a whole number"),
        ({"confirmed": 3}, "field 'confirmed': expected a text"),
    ]:
        path.write_text(json.dumps(row | change) + "\n")
        with pytest.raises(SteerError, match=message):
            load_arithmetic(TaskSpec("arithmetic", str(path)))
    path.write_text(json.dumps({name: row[name] for name in ("question", "proposal", "wrong")}) + "\n")
    with pytest.raises(SteerError, match="field 'answer': expected a whole number, found no such field"):
        load_arithmetic(TaskSpec("arithmetic", str(path)))
