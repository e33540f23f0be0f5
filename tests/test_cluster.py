from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

import killable
from test_runs import make_run, mute, small_recipe
from weightsteer.cluster import pool as pool_module
from weightsteer.cluster.drive import drive
from weightsteer.cluster.pool import open_pool
from weightsteer.cluster.queue import TRIES, Queue, Work
from weightsteer.cluster.worker import Failed, Worker
from weightsteer.errors import SteerError
from weightsteer.evaluation.cells import measure_cell
from weightsteer.locks import hold
from weightsteer.runs.bench import LoadModel, MeasureCell, RunRef, ScanLayer
from weightsteer.runs.pipeline import Run, batch_size_of
from weightsteer.runs.stages import Stage, ref_of, stages

SAME = ("rows.jsonl", "strengths.json", "layer.json", "samples.jsonl", "vector/adapter_model.safetensors")


def assert_same_run(one: Path, other: Path) -> None:
    for name in SAME:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    for name in ("measurements.jsonl", "costs.jsonl"):
        mine, theirs = ([json.loads(line) for line in (run / name).read_text().splitlines()] for run in (one, other))
        keys = [[(row["method"], row["k"], row["task"], row.get("metric")) for row in rows] for rows in (mine, theirs)]
        assert sorted(keys[0]) == sorted(keys[1]), name  # nothing lost, nothing double


@pytest.fixture
def alone(tmp_path: Path) -> tuple[Path, Path]:
    """A small recipe, and its run without workers."""
    source = small_recipe(tmp_path)
    make_run(source, tmp_path / "alone").run()
    return source, tmp_path / "alone"


def work_of(run: Run) -> Work:
    return Work(run.recipe.name, ref_of(run), stages(run))


@pytest.mark.slow
def test_jobs_done_one_by_one_give_the_run_that_there_is_without_them(alone: tuple[Path, Path], tmp_path: Path) -> None:
    """Without Ray: what a worker does, in this process, in another order than the run's own."""
    source, whole = alone
    run, worker = make_run(source, tmp_path / "jobs"), Worker()
    queue = Queue([work := work_of(run)])
    names = []
    while not queue.is_over:
        tickets = []
        while ticket := queue.take(None):
            tickets.append(ticket)
        names.append(type(tickets[0].job).__name__)
        for ticket in reversed(tickets):
            done = worker.do(ticket.work.ref, ticket.job)
            assert not isinstance(done, Failed), done
            queue.keep(ticket, done.result)
    assert work.failure == ""
    assert names == ["LoadModel", "TryTask", "Make", "ScanLayer", "FindStrengths", "WriteSamples"]
    assert_same_run(whole, tmp_path / "jobs")
    assert queue.done == queue.total
    again = Queue([work_of(make_run(source, tmp_path / "jobs"))])
    assert again.is_over  # nothing is left to be done
    assert again.total == 0


@pytest.mark.slow
def test_two_workers_measure_the_base_as_this_process_does_also_when_one_is_killed(tmp_path: Path) -> None:
    run, found, killed, pids = make_run(small_recipe(tmp_path), tmp_path / "run"), [], [], set()
    cells = [MeasureCell("base", 0.0, task.name, task.sha256) for task in run.tasks]

    def go() -> Generator[Stage, None, None]:
        yield Stage("cells", cells, lambda job, result: found.append(result))

    with open_pool("local", 0) as pool:

        def kill_one(done: float, total: float, note: str = "") -> None:
            there = [member.hello.pid for member in [*pool.members.values(), *pool.idle] if member.hello]
            pids.update(there)
            if done >= 1 and not killed:
                os.kill(there[0], signal.SIGKILL)
                killed.append(there[0])

        pool.work([work := Work("base", ref_of(run), go())], kill_one)
    assert work.failure == ""
    assert killed
    assert len(pids) >= 2  # another went on
    lm = run.artifacts.lm()
    here = [measure_cell(lm, None, 0.0, task, batch_size_of(run.recipe, lm)) for task in run.tasks]
    assert sorted(found, key=lambda one: one[0].task) == sorted(here, key=lambda one: one[0].task)


@pytest.mark.slow
def test_two_workers_give_the_rows_of_none_and_a_killed_one_loses_nothing(
    alone: tuple[Path, Path], tmp_path: Path
) -> None:
    source, whole = alone
    run, killed = make_run(source, tmp_path / "ray"), []
    with open_pool("local") as pool:
        assert pool.capacity() >= 2

        def kill_one(done: float, total: float, note: str = "") -> None:
            """A worker that has a job, once the fine-tunes are there."""
            busy = [m for m in pool.members.values() if m.ticket and m.hello]
            if busy and not killed and (tmp_path / "ray" / "positive").is_dir():
                assert busy[0].hello is not None
                killed.append(busy[0].hello.pid)
                os.kill(killed[-1], signal.SIGKILL)

        pool.work([work := work_of(run)], kill_one)
    assert work.failure == ""
    assert killed
    assert_same_run(whole, tmp_path / "ray")


@pytest.mark.slow
def test_a_killed_driver_goes_on_where_it_stopped(alone: tuple[Path, Path], tmp_path: Path) -> None:
    source, whole = alone
    folder, log = tmp_path / "killed", tmp_path / "log"
    arguments = ("run", str(source), "--out", str(folder), "--ray", "local")
    process = killable.start(log, killable.command, *arguments)
    while process.is_alive() and not (folder / "measurements.jsonl").exists():
        time.sleep(0.01)
    process.kill()
    process.join()
    assert not (folder / "rows.jsonl").exists(), log.read_text()
    before = (folder / "measurements.jsonl").read_text().splitlines()
    with pytest.raises(SteerError, match="is writing it"), open_second(folder):
        make_run(source, folder)  # two drivers
    drive(make_run(source, folder), "local", show=mute)
    after = (folder / "measurements.jsonl").read_text().splitlines()
    assert after[: len(before) - 1] == before[:-1]
    assert_same_run(whole, folder)


@contextmanager
def open_second(folder: Path) -> Iterator[None]:
    """Hold a folder in a thread of its own, as another driver would."""
    with ThreadPoolExecutor(1) as thread:
        lock = hold(folder)
        thread.submit(lock.__enter__).result()
        try:
            yield
        finally:
            thread.submit(lock.__exit__, None, None, None).result()


@pytest.mark.slow
def test_a_machine_that_joins_late_gets_work(alone: tuple[Path, Path], tmp_path: Path) -> None:
    from ray.cluster_utils import Cluster

    source, whole = alone
    seen: set[int] = set()
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        run = make_run(source, tmp_path / "late")
        with open_pool(cluster.address) as pool:
            assert pool.capacity() == 1

            def join_late(done: float, total: float, note: str = "") -> None:
                seen.update(m.hello.pid for m in pool.members.values() if m.ticket and m.hello)
                if done >= 1 and len(cluster.list_all_nodes()) == 1:
                    cluster.add_node(num_cpus=1)

            pool.work([work := work_of(run)], join_late)
        assert work.failure == ""
        assert len(seen) == 2
        assert_same_run(whole, tmp_path / "late")
    finally:
        cluster.shutdown()


REF = RunRef({}, "/nowhere", "/nowhere")


def a_work(name: str, *sizes: int, kept: list[object] | None = None) -> Work:
    """Stages of so many jobs."""

    def go() -> Generator[Stage, None, None]:
        for number, size in enumerate(sizes):
            jobs = [ScanLayer(100 * number + i) for i in range(size)]
            yield Stage(f"stage {number}", jobs, lambda job, result: kept.append(job) if kept is not None else None)

    return Work(name, REF, go())


def test_a_stage_waits_for_the_one_before_and_a_worker_stays_with_its_run() -> None:
    kept: list[object] = []
    queue = Queue([one := a_work("one", 2, 0, 1, kept=kept), two := a_work("two", 3)])
    first, second = queue.take(two), queue.take(None)
    assert first is not None
    assert second is not None
    assert (first.work, second.work) == (two, one)  # its own run, then the one with most left for each worker
    third = queue.take(one)
    assert third is not None
    assert third.work is one
    assert queue.take(one).work is two  # type: ignore[union-attr]  # one waits for its first stage
    queue.keep(second, 0)
    queue.keep(third, 0)
    assert one.stage is not None
    assert one.stage.name == "stage 2"
    assert kept == [ScanLayer(0), ScanLayer(1)]


def test_a_job_that_costs_worker_after_worker_fails_its_run_alone() -> None:
    queue = Queue([one := a_work("one", 1), two := a_work("two", 1)])
    for _ in range(TRIES):
        ticket = queue.take(one)
        assert ticket is not None
        assert ticket.work is one
        queue.lose(ticket, "out of memory")
    assert "its worker died 3 times (out of memory)" in one.failure
    assert not queue.is_over
    ticket = queue.take(one)
    assert ticket is not None
    assert ticket.work is two
    queue.keep(ticket, 0)
    assert queue.is_over


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"folder": "/nowhere"}, "/nowhere: is not on .*every machine has to see the run's folder"),
        ({"model": "/nowhere"}, "nowhere"),
        ({"sha256": "0"}, "this worker reads other items than the driver"),
    ],
)
def test_a_worker_says_what_it_lacks(tmp_path: Path, change: dict[str, str], message: str) -> None:
    run = make_run(small_recipe(tmp_path), tmp_path / "run")
    ref = ref_of(run)
    if "folder" in change:
        ref = replace(ref, folder=change["folder"])
    if "model" in change:
        ref = replace(ref, recipe={**ref.recipe, "model": change["model"]})
    job = MeasureCell("base", 0.0, "prose", change["sha256"]) if "sha256" in change else LoadModel()
    found = Worker().do(ref, job)
    assert isinstance(found, Failed)
    assert re.search(message, found.message)


def test_without_ray_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "find_spec", lambda name: None)
    with pytest.raises(SteerError, match=r"--ray: needs Ray; pip install 'weightsteer\[ray\]'"), open_pool("local"):
        pass


@pytest.mark.parametrize("gpus", [-1.0, 1.5, float("nan")])
def test_odd_numbers_of_gpus_are_refused(gpus: float) -> None:
    with pytest.raises(SteerError, match="--gpus-per-model: expected"), open_pool("local", gpus):
        pass


@pytest.mark.slow
def test_no_cluster_no_gpu_and_another_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SteerError, match="no Ray cluster can be reached there"), open_pool("127.0.0.1:1"):
        pass
    with pytest.raises(SteerError, match="no machine of the Ray cluster has so many GPUs"), open_pool("local", 64):
        pass
    handler = signal.getsignal(signal.SIGTERM)
    run = make_run(small_recipe(tmp_path), tmp_path / "run")
    mine = pool_module.installed_versions()
    monkeypatch.setattr(pool_module, "installed_versions", lambda: {**mine, "weightsteer": "9.9"})
    with pytest.raises(SteerError, match=r"has weightsteer \S+ and the driver 9.9; install the same"):
        drive(run, "local", show=mute)
    assert signal.getsignal(signal.SIGTERM) is handler
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"
