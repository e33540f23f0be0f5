from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from test_runs import make_run, mute, small_recipe
from weightsteer.errors import SteerError
from weightsteer.lm import LM
from weightsteer.runs.pipeline import Run
from weightsteer.runs.recipe import Recipe
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


def rows_of(folder: Path) -> dict[tuple[Any, ...], dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    return {tuple(row[name] for name in ("method", "k", "task", "metric", "split", "change")): row for row in rows}


def test_a_recipe_with_an_engine_gives_the_rows_of_one_without(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    port, vectors = free_port(), tmp_path / "vectors"
    methods = {"contrastive": [-0.5, 0.5], "tau+": [0.5], "activation": [0.5], "system prompt": [1.0]}
    tasks = [{"task": t, "limit": 2} for t in ("preference", "false_beliefs", "facts", "prose")]
    tasks.append({"task": "refusal", "limit": 2, "max_new_tokens": 6})
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
