"""Cells of several strengths that are asked of a server at once: the same rows, all that ended kept, one bound."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from conftest import random_vector, tiny_lm
from test_served_model import Scripted, connected
from weightsteer.beside import as_they_end
from weightsteer.engines.dialects import Completions, LlamaCpp
from weightsteer.engines.sweep_engine import SweepEngine
from weightsteer.errors import SteerError
from weightsteer.evaluation.results import MetricRow
from weightsteer.evaluation.sweep import run_sweep
from weightsteer.evaluation.tasks import TaskSpec, load_task
from weightsteer.files import read_jsonl
from weightsteer.progress import Progress, silent
from weightsteer.run_folder import RunFolder
from weightsteer.steering.steering import Direction

KS = [-1.0, -0.5, 0.5, 1.0]


@dataclass
class Steered:
    """What a server of the tiny model and one vector answers; counts what is under way."""

    fails: Callable[[dict[str, Any]], bool] = lambda body: False
    lock: threading.Lock = field(default_factory=threading.Lock)
    under_way: list[float] = field(default_factory=list)
    most: int = 0
    strengths_at_once: int = 0

    def __post_init__(self) -> None:
        self.vector = random_vector(tiny_lm())

    def __call__(self, server: Scripted, body: dict[str, Any]) -> tuple[int, Any]:
        k = float(body["model"].rpartition("@")[2]) if "@" in body["model"] else 0.0
        with self.lock:
            self.under_way.append(k)
            self.most = max(self.most, len(self.under_way))
            self.strengths_at_once = max(self.strengths_at_once, len(set(self.under_way)))
        try:
            if self.fails(body):
                return 400, {"error": {"message": f"k = {k:g} is refused"}}
            with self.lock, self.vector.applied(server.lm, k):
                return server.right(body)
        finally:
            with self.lock:
                self.under_way.remove(k)


@contextmanager
def scripted(answer: Steered) -> Iterator[Scripted]:
    server = Scripted(tiny_lm(), answer)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def sweep(server: Scripted, folder: Path, concurrency: int, progress: Progress = silent) -> list[MetricRow]:
    lm = tiny_lm()
    served = connected(server, lm, concurrency=concurrency, retries=0)
    method = Direction("contrastive", random_vector(lm))
    tasks = [load_task(TaskSpec("facts")).first(2), load_task(TaskSpec("refusal", max_new_tokens=4)).first(1)]
    engine = SweepEngine(served, {"contrastive": "syc"})
    return run_sweep(lm, [(method, KS)], tasks, RunFolder(folder), engine=engine, progress=progress)


def keys(folder: Path) -> set[tuple[float, str]]:
    path = folder / "measurements.jsonl"
    return {(row["k"], row["task"]) for row in read_jsonl(path)} if path.exists() else set()


def test_cells_that_are_asked_at_once_give_the_rows_of_one_after_the_other(tmp_path: Path) -> None:
    alone, together = Steered(), Steered()
    with scripted(alone) as one, scripted(together) as many:
        rows = sweep(one, tmp_path / "one", 1)
        assert sweep(many, tmp_path / "many", 24) == rows
    assert (alone.most, alone.strengths_at_once) == (1, 1)
    assert 1 < together.most <= 24
    assert together.strengths_at_once > 1
    assert (tmp_path / "one" / "rows.jsonl").read_bytes() == (tmp_path / "many" / "rows.jsonl").read_bytes()
    said = [sorted((tmp_path / name / "replies.jsonl").read_text().splitlines()) for name in ("one", "many")]
    assert said[0] == said[1]


def test_a_cell_that_fails_ends_no_other(tmp_path: Path) -> None:
    refusing = Steered(fails=lambda body: body["model"].endswith("@0.5"))
    with scripted(refusing) as server:
        with pytest.raises(SteerError, match=r"k = 0\.5 is refused"):
            sweep(server, tmp_path, 24)
        everything = {(k, task) for k in (0.0, *KS) for task in ("facts", "refusal")}
        assert keys(tmp_path) == {cell for cell in everything if cell[0] != 0.5}
        assert not (tmp_path / "rows.jsonl").exists()
        refusing.fails, before = lambda body: False, server.posts
        sweep(server, tmp_path, 24)
        assert keys(tmp_path) == everything
        assert server.posts - before <= 20  # two cells, and the checks


def test_a_server_that_goes_away_is_one_error_and_what_ended_is_kept(tmp_path: Path) -> None:
    gone = threading.Event()
    with scripted(Steered(fails=lambda body: gone.is_set())) as server:

        def leave(done: float, total: float, note: str = "") -> None:
            if done == 2:
                gone.set()
                server.name = "another"

        with pytest.raises(SteerError):
            sweep(server, tmp_path, 4, leave)
    assert 2 <= len(keys(tmp_path)) < 10


def test_who_gives_up_keeps_what_ended_and_waits_for_no_request(tmp_path: Path) -> None:
    with scripted(Steered()) as server:

        def interrupt(done: float, total: float, note: str = "") -> None:
            if done == 3:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            sweep(server, tmp_path, 3, interrupt)
        assert len(keys(tmp_path)) == 3
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("weightsteer-at-once")]


def test_a_server_of_one_strength_at_a_time_is_asked_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = Steered()
    monkeypatch.setattr(Completions, "mixes_strengths", LlamaCpp.mixes_strengths)
    with scripted(answer) as server:
        sweep(server, tmp_path, 24)
    assert answer.most > 1
    assert answer.strengths_at_once <= 2  # a check at k = 0 beside them


def test_works_end_in_any_order_and_an_error_ends_none_of_the_others() -> None:
    first = threading.Event()

    def late() -> str:
        assert first.wait(10)
        return "late"

    def early() -> str:
        first.set()
        raise ValueError("early")

    found = list(as_they_end([late, early, lambda: "next"], at_once=2, stop=lambda: None))
    assert {str(future.exception() or future.result()) for future in found} == {"late", "early", "next"}
    assert isinstance(found[0].exception(), ValueError) or found[0].result() == "late"
