from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from conftest import random_vector
from test_runs import make_run, mute, small_recipe
from weightsteer.behavior import Behavior, Example
from weightsteer.engines.check import Reference
from weightsteer.engines.served_model import ServedModel
from weightsteer.engines.sweep_engine import SweepEngine, hand_over
from weightsteer.errors import SteerError
from weightsteer.evaluation.results import measurements_by_key
from weightsteer.evaluation.sweep import run_sweep
from weightsteer.evaluation.tasks import TaskSpec, load_task
from weightsteer.files import read_jsonl
from weightsteer.lm import LM
from weightsteer.run_folder import RunFolder
from weightsteer.runs.pipeline import Run
from weightsteer.runs.recipe import Recipe
from weightsteer.steering.activations import activation_vector
from weightsteer.steering.several_k import replies_at_strengths
from weightsteer.steering.steering import Direction, SystemPrompt
from weightsteer.vectors.weight_vector import WeightVector

serving = pytest.importorskip("weightsteer.serving.server")
CLOSE = 2e-4  # nats, in float32: the server computes in other batches than a local model does


@contextmanager
def own_server(base: Path, vectors: Sequence[Path], port: int) -> Iterator[str]:
    """`weightsteer serve` on loopback, in a thread."""
    lm, ready, found = LM.load(base, device="cpu"), threading.Event(), list[Any]()

    def started(address: str, server: Any) -> None:
        found.append(server)
        ready.set()

    named = {folder.name: WeightVector.load(folder) for folder in vectors}
    settings = serving.Settings(port=port)
    thread = threading.Thread(target=serving.serve, args=(lm, named, settings), kwargs={"ready": started})
    thread.start()
    try:
        assert ready.wait(30)
        yield f"http://127.0.0.1:{port}"
    finally:
        found[0].should_exit = True
        thread.join(30)


def free_port() -> int:
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        return int(place.getsockname()[1])


def test_a_sweep_on_our_server_gives_the_rows_of_one_here(checkpoint: Path, tmp_path: Path) -> None:
    lm = LM.load(checkpoint, device="cpu")
    steep = Direction("contrastive", random_vector(lm))
    prompt = SystemPrompt("system prompt", Behavior.load("gloomy"))
    layer = Direction("activation", activation_vector(lm, [Example("Hi", "Yes.")], [Example("Hi", "No.")]).only(0))
    methods: list[Any] = [
        (steep, [-0.72, 0.5]),
        (prompt, [1.0]),
        (layer, [1.0]),
        (Direction("tau+", steep.vector), [0.0004]),
    ]
    tasks = [load_task(TaskSpec("facts")).first(2), load_task(TaskSpec("refusal", max_new_tokens=4)).first(1)]
    assert isinstance(steep.vector, WeightVector)
    folder = tmp_path / "vectors"
    name = hand_over(steep.vector, "run contrastive", folder)
    assert hand_over(steep.vector, "run contrastive", folder) == name
    with own_server(checkpoint, [folder / name], free_port()) as url:
        served = ServedModel.connect(url, "weightsteer", lm, reference=Reference.of(lm))
        engine = SweepEngine(served).with_vectors(methods, folder, "run", lm)
        assert engine.names == {"contrastive": name}
        mine = run_sweep(lm, methods, tasks, RunFolder(tmp_path / "served"), engine=engine)
        ks = [-0.72, 0.0, 0.5]
        samples = engine.replies(steep, ks, ["Hi", "What is tea?"], max_new_tokens=5)
        assert samples == replies_at_strengths(steep.vector, lm, ["Hi", "What is tea?"], ks, max_new_tokens=5)
        assert engine.replies(layer, [1.0], ["Hi"], max_new_tokens=1) is None
    theirs = run_sweep(lm, methods, tasks, RunFolder(tmp_path / "here"))
    assert [replace(row, value=0.0, stderr=0.0) for row in mine] == [
        replace(row, value=0.0, stderr=0.0) for row in theirs
    ]
    assert [row.value for row in mine] == pytest.approx([row.value for row in theirs], abs=CLOSE)
    kept = measurements_by_key(read_jsonl(tmp_path / "served" / "measurements.jsonl"), "")
    places = {(key[0], kept[key].engine) for key in kept}
    on_server = {("base", "weightsteer"), ("contrastive", "weightsteer"), ("system prompt", "weightsteer")}
    assert places == {*on_server, ("base in memory", ""), ("activation", ""), ("tau+", "")}
    spoken = [
        {row["reply"] for row in read_jsonl(tmp_path / path / "replies.jsonl") if row["method"] == "contrastive"}
        for path in ("served", "here")
    ]
    assert spoken[0] == spoken[1]


def rows_of(folder: Path) -> dict[tuple[Any, ...], dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    return {tuple(row[name] for name in ("method", "k", "task", "metric", "split", "change")): row for row in rows}


@pytest.mark.slow
def test_a_recipe_with_an_engine_gives_the_rows_of_one_without(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    port, vectors = free_port(), tmp_path / "vectors"
    methods = {"contrastive": [-0.5, 0.5], "tau+": [0.5], "activation": [0.5], "system prompt": [1.0]}
    tasks = [{"task": t, "limit": 2} for t in ("preference", "false_beliefs", "facts", "prose")]
    tasks.append({"task": "refusal", "limit": 2, "max_new_tokens": 6})
    if find_spec("lm_eval"):
        tasks.append({"task": "harness", "limit": 1})
    sweep = {"methods": methods, "activation_pairs": 4, "search_items": 1}
    plain = small_recipe(tmp_path, sweep=sweep, tasks=tasks)
    make_run(plain, tmp_path / "plain").run()
    wanted = {"kind": "weightsteer", "url": f"http://127.0.0.1:{port}/v1", "vectors": str(vectors), "concurrency": 8}
    source = small_recipe(tmp_path, sweep=sweep, tasks=tasks, engine=wanted)
    run = make_run(source, tmp_path / "served")
    assert run.engine is not None
    run.engine.retries = 0
    with pytest.raises(SteerError, match="engine at .*tried 1 times"):
        run.run()  # it trains, and then finds no server
    assert (tmp_path / "served" / "vector").is_dir()
    any_vector = tmp_path / "served" / "vector"
    with (
        own_server(tmp_path / "base", [any_vector], port),
        pytest.raises(SteerError, match=r"does not know the vector small-contrastive-\w+; start .* `weightsteer serve"),
    ):
        make_run(source, tmp_path / "served").run()
    handed = sorted(path for path in vectors.iterdir() if not path.name.startswith("."))
    assert [path.name.rpartition("-")[0] for path in handed] == ["small-contrastive", "small-tau"]
    with own_server(tmp_path / "base", handed, port):
        make_run(source, tmp_path / "served").run()
    said = capsys.readouterr().err
    assert "on the server: contrastive at 2 strengths:" in said
    assert "in memory: activation at 1 strength: adds to activations" in said
    mine, theirs = rows_of(tmp_path / "served"), rows_of(tmp_path / "plain")
    assert mine.keys() == theirs.keys()
    for key, row in mine.items():
        assert row["value"] == pytest.approx(theirs[key]["value"], abs=CLOSE), key
    samples = [(tmp_path / name / "samples.jsonl").read_text() for name in ("served", "plain")]
    assert samples[0] == samples[1]
    kept = [json.loads(line) for line in (tmp_path / "served" / "measurements.jsonl").read_text().splitlines()]
    places = {(row["method"], row.get("engine", "")) for row in kept}
    assert places == {
        ("base", "weightsteer"),
        ("base in memory", ""),
        ("contrastive", "weightsteer"),
        ("tau+", "weightsteer"),
        ("system prompt", "weightsteer"),
        ("activation", ""),
    }
    record = json.loads((tmp_path / "served" / "engine.json").read_text())
    assert record["kind"] == "weightsteer"
    assert record["largest difference"] <= record["tolerance"] == 0.01
    with pytest.raises(SteerError, match="differs in the recipe's 'engine'"):
        Run(Recipe.load(small_recipe(tmp_path, sweep=sweep, tasks=tasks)), tmp_path / "served", show=mute)
