"""Judges that are asked beside the model's work: the same results, in the same order, and an end when one gives up."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from conftest import random_vector, tiny_lm
from test_endpoint import Server, completion
from test_sampling import BEHAVIOR, SETTINGS
from weightsteer.beside import beside
from weightsteer.data_building.sampling import sample_sides
from weightsteer.errors import SteerError
from weightsteer.evaluation.sweep import run_sweep
from weightsteer.evaluation.task_spec import TaskSpec
from weightsteer.evaluation.tasks import load_task
from weightsteer.judges.asking import stop_asking
from weightsteer.judges.endpoint import Endpoint
from weightsteer.judges.judge import RubricJudge, rubric_of
from weightsteer.run_folder import RunFolder
from weightsteer.steering.steering import Direction

SLOW = 0.1  # seconds that the judge's server takes for a reply


@contextmanager
def slow_judge(seconds: float = SLOW) -> Iterator[Endpoint]:
    """A server that takes its time, and whose verdict follows from the prompt."""

    def answer(prompt: str, number: int) -> tuple[int, bytes]:
        time.sleep(seconds)
        return 200, completion(str(60 + len(prompt) % 30))

    with Server(answer, "application/json") as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield Endpoint(server.url, "judge", retries=0)
        server.shutdown()


def test_results_come_in_order_from_one_other_thread_and_few_wait() -> None:
    seen, prepared, done = set(), [0], []

    def work(number: int) -> int:
        time.sleep(0.01 * (number % 3))
        seen.add(threading.get_ident())
        return number

    def works() -> Iterator[Callable[[], int]]:
        for number in range(12):
            prepared[0] += 1
            assert prepared[0] - len(done) <= 4  # two that wait, the one that is prepared, and one on its way out
            yield partial(work, number)

    for found in beside(works(), waiting=2, stop=lambda: None):
        done.append(found)
    assert done == list(range(12))
    assert len(seen) == 1
    assert threading.get_ident() not in seen
    assert list(beside((partial(work, n) for n in range(3)), waiting=0, stop=lambda: None)) == [0, 1, 2]
    assert threading.get_ident() in seen


def test_a_works_error_comes_in_its_turn() -> None:
    def fail() -> int:
        raise SteerError("the judge is down")

    found = beside([lambda: 1, fail, lambda: 3], waiting=2, stop=lambda: None)
    assert next(found) == 1
    with pytest.raises(SteerError, match="the judge is down"):
        next(found)


def test_who_gives_up_does_not_wait_for_the_judge() -> None:
    with slow_judge(30) as endpoint:

        def interrupted() -> Iterator[Callable[[], list[str]]]:
            yield lambda: endpoint.generate(["a"])
            time.sleep(0.3)  # the request is under way
            raise KeyboardInterrupt

        found = beside(interrupted(), waiting=1, stop=stop_asking)
        began = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            next(found)
        assert time.monotonic() - began < 10


def test_a_sweep_with_a_served_judge_has_the_rows_of_one_that_waits(tmp_path: Path) -> None:
    BEHAVIOR.save(tmp_path / "loud.json")
    vector, rows = random_vector(tiny_lm()), {}
    with slow_judge() as endpoint:
        for beside_it in (False, True):
            spec = TaskSpec("trait", str(tmp_path / "loud.json"), judge=endpoint, max_new_tokens=8)
            folder = RunFolder(tmp_path / str(beside_it))
            folder.path.mkdir()
            methods = [(Direction("contrastive", vector), [-1.0, 1.0])]
            tasks = [load_task(spec), load_task(TaskSpec("prose")).first(1)]
            rows[beside_it] = run_sweep(tiny_lm(), methods, tasks, folder, judge_is_served=beside_it)
    assert rows[True] == rows[False]
    for name in ("measurements.jsonl", "replies.jsonl", "rows.jsonl"):
        assert (tmp_path / "True" / name).read_bytes() == (tmp_path / "False" / name).read_bytes()


def test_a_sampling_with_a_served_judge_has_the_answers_of_one_that_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with slow_judge() as endpoint:
        judge = RubricJudge(endpoint, rubric_of(BEHAVIOR))
        for name in ("beside", "waiting"):
            if name == "waiting":
                monkeypatch.setattr("weightsteer.data_building.sampling.WAITING", 0)
            sample_sides(tiny_lm(), BEHAVIOR, judge, tmp_path / name, settings=SETTINGS)
    for file in ("answers.jsonl", "positive.jsonl", "negative.jsonl"):
        assert (tmp_path / "beside" / file).read_bytes() == (tmp_path / "waiting" / file).read_bytes()
