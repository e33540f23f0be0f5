from __future__ import annotations

import json
import math
import shutil
import socket
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainerCallback, TrainingArguments

import killable
import two_processes
from conftest import random_vector, tiny_lm, tiny_model
from test_weight_vector import flat
from weightsteer import LM, SteerError, WeightVector, combine, task_vector
from weightsteer.monitor import (
    WHOLE,
    Alert,
    Products,
    Reading,
    SteeringMonitor,
    checkpoint_products,
    list_checkpoints,
    random_variance,
    read_checkpoints,
    read_off,
)
from weightsteer.monitor.alerts import describe
from weightsteer.run_card import RunCard
from weightsteer.vectors import row_products
from weightsteer.vectors.delta import to_dense
from weightsteer.vectors.low_rank import LowRank

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def rows(count: int = 8) -> list[dict[str, list[int]]]:
    return [
        {"input_ids": [3 + i, 9, 40, 7], "labels": [3 + i, 9, 40, 7], "attention_mask": [1] * 4} for i in range(count)
    ]


def trained(
    folder: Path,
    *callbacks: TrainerCallback,
    whole: bool = False,
    monitor: SteeringMonitor | None = None,
    steps: int = 4,
) -> Trainer:
    """A short run on the tiny model, saving every second step."""
    model: Any = tiny_model()
    if not whole:
        torch.manual_seed(0)
        model = get_peft_model(model, LoraConfig(r=3, lora_alpha=6, target_modules=LINEAR))
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=4, learning_rate=1e-2, save_steps=2,
        logging_steps=1, report_to="none", use_cpu=True, disable_tqdm=True, save_only_model=True,
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=rows(), callbacks=list(callbacks))
    if monitor:
        monitor.watch(trainer)
    trainer.train()
    return trainer


def at(readings: list[Reading], step: int, vector: str = "a", part: str = WHOLE) -> Reading:
    (found,) = [r for r in readings if (r.step, r.vector, r.part) == (step, vector, part)]
    return found


@pytest.fixture
def vectors() -> dict[str, WeightVector]:
    lm = tiny_lm()
    return {name: random_vector(lm, seed) for seed, name in enumerate("abcde", start=1)}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    lm = tiny_lm()
    lm.model.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def test_readings_are_those_of_the_vectors_themselves(vectors: dict[str, WeightVector], tmp_path: Path) -> None:
    trained(tmp_path / "run")
    checkpoints = list_checkpoints(tmp_path / "run")
    assert list(checkpoints) == [2, 4]
    readings = read_checkpoints(checkpoints, vectors)
    for step, path in checkpoints.items():
        tau = task_vector(path)
        for name, vector in vectors.items():
            whole = at(readings, step, name)
            bare = WeightVector(tau.deltas, RunCard("vector"))
            other = WeightVector(vector.deltas, RunCard("vector"))
            assert whole.cosine == pytest.approx(bare.cosine(other), abs=1e-6)
            assert whole.norm == pytest.approx(tau.norm(), rel=1e-6)
            assert whole.projection == pytest.approx(bare.dot(other) / other.dot(other), rel=1e-5)
            for part in ("layer 1", "mlp.up_proj"):
                chosen = {"layers": "1"} if part == "layer 1" else {"modules": "up_proj"}
                expected = bare.filter(**chosen).cosine(other.filter(**chosen))  # type: ignore[arg-type]
                assert at(readings, step, name, part).cosine == pytest.approx(expected, abs=1e-5)


def products_from_the_whole_table(tau: WeightVector, vectors: dict[str, WeightVector]) -> list[Products]:
    """Every pair's product, as a table of all of them has it; the monitor computes a row and the diagonal."""
    found = []
    for parameter in dict.fromkeys([*tau.deltas, *(name for vector in vectors.values() for name in vector.deltas)]):
        parts = [flat(member).get(parameter) for member in (tau, *vectors.values())]
        there = next(part for part in parts if part is not None)
        rows = torch.stack([(torch.zeros_like(there) if part is None else part).flatten() for part in parts])
        table = rows @ rows.T
        crossed = {name: float(table[0, i]) for i, name in enumerate(vectors, start=1)}
        squares = {name: float(table[i, i]) for i, name in enumerate(vectors, start=1)}
        found.append(Products(parameter, float(there.numel()), float(table[0, 0]), crossed, squares))
    return found


@pytest.mark.parametrize("whole", [False, True])
def test_a_row_and_a_diagonal_give_the_readings_of_the_whole_table(
    vectors: dict[str, WeightVector], tmp_path: Path, saved: Path, whole: bool
) -> None:
    """For LoRA and full checkpoints, of factored and dense vectors, some of which lack parameters."""
    if whole:
        model = tiny_model()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.01 * torch.randn_like(parameter)
        model.save_pretrained(tmp_path / "run")
    else:
        trained(tmp_path)
        (tmp_path / "checkpoint-2").rename(tmp_path / "run")
    tau = task_vector(tmp_path / "run", base=saved)
    dense = {name: to_dense(delta) for name, delta in vectors["b"].deltas.items()}
    watched = {**vectors, "b": WeightVector(dense, vectors["b"].card), "c": vectors["c"].filter(layers="1")}
    bare = {name: WeightVector(vector.deltas, RunCard("vector")) for name, vector in watched.items()}
    found, expected = (
        read_off(products, checkpoint="c", step=0, controls="cde")
        for products in (checkpoint_products(tau, bare), products_from_the_whole_table(tau, bare))
    )
    assert [(r.vector, r.part) for r in found] == [(r.vector, r.part) for r in expected]
    for one, other in zip(found, expected, strict=True):
        for number in ("cosine", "projection", "norm", "centre", "band", "z"):
            assert getattr(one, number) == pytest.approx(getattr(other, number), rel=1e-6, abs=1e-9)


def test_the_vectors_own_products_are_taken_once_for_all_checkpoints(
    vectors: dict[str, WeightVector], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """V squares in all, and V + 1 products a checkpoint, in each parameter."""
    counted: list[str] = []
    plain = row_products.dot
    monkeypatch.setattr(row_products, "dot", lambda first, second: counted.append("") or plain(first, second))
    trained(tmp_path / "run", steps=6)
    checkpoints = list_checkpoints(tmp_path / "run")
    read_checkpoints(checkpoints, vectors)
    parameters = len(vectors["a"].deltas)
    assert len(checkpoints) == 3
    assert len(counted) == parameters * (len(vectors) + len(checkpoints) * (len(vectors) + 1))


def test_a_vector_has_cosine_one_and_projection_one_with_itself(vectors: dict[str, WeightVector]) -> None:
    (reading,) = [
        r
        for r in read_off(checkpoint_products(vectors["a"], {"a": vectors["a"]}), checkpoint="c", step=0)
        if r.part == WHOLE
    ]
    assert reading.cosine == pytest.approx(1.0)
    assert reading.projection == pytest.approx(1.0)
    layers = len({name.split(".")[2] for name in vectors["a"].deltas})
    assert reading.z <= math.sqrt(layers) + 1e-6  # agreement everywhere: as far as flipped layers go


@given(seed=st.integers(0, 1000))
def test_parts_add_up_to_the_whole(seed: int) -> None:
    lm = tiny_lm()
    tau, v = random_vector(lm, seed), random_vector(lm, seed + 1)
    readings = read_off(checkpoint_products(tau, {"a": v}), checkpoint="c", step=0)
    whole = at(readings, 0)
    for parts in ([r for r in readings if r.part.startswith("layer")], [r for r in readings if "proj" in r.part]):
        assert math.fsum(r.norm**2 for r in parts) == pytest.approx(whole.norm**2, rel=1e-9)


def test_the_random_null_is_what_random_singular_directions_give() -> None:
    """The closed form against 4000 draws: same singular values, random orthonormal directions."""
    generator = torch.Generator().manual_seed(0)
    tau, v = torch.randn(12, 9, generator=generator), torch.randn(12, 9, generator=generator)
    values = torch.linalg.svdvals(v)[:4]
    draws = []
    for _ in range(4000):
        u = torch.linalg.qr(torch.randn(12, 4, generator=generator))[0]
        w = torch.linalg.qr(torch.randn(9, 4, generator=generator))[0]
        draws.append(float((tau * (u * values @ w.T)).sum()))
    product = Products("w", 108.0, float(tau.square().sum()), {"v": 0.0}, {"v": float(values.square().sum())})
    assert torch.tensor(draws).var().item() == pytest.approx(random_variance([product], "v"), rel=0.1)


def test_one_loud_layer_is_no_alert_and_agreement_everywhere_is() -> None:
    def products(crossed: list[float]) -> list[Products]:
        return [Products(f"m.{i}.w", 1e6, 1.0, {"v": c}, {"v": 1.0}) for i, c in enumerate(crossed)]

    loud, even = (at(read_off(products(c), checkpoint="", step=0), 0, "v") for c in ([0.5] + [0.0] * 24, [0.02] * 25))
    assert loud.cosine == pytest.approx(even.cosine)
    assert loud.z == pytest.approx(1.0)
    assert even.z == pytest.approx(5.0)
    assert Alert.parse("z=4").raised([loud, even]) == [even]


def test_named_controls_move_the_centre() -> None:
    crossed = {"v": 0.5, "x": 0.48, "y": 0.5, "z": 0.52}
    products = [Products(f"m.{i}.w", 1e9, 1.0, crossed, dict.fromkeys(crossed, 1.0)) for i in range(100)]
    plain, controlled = (
        at(read_off(products, checkpoint="", step=0, controls=names), 0, "v") for names in ((), ("x", "y", "z"))
    )
    assert plain.z == pytest.approx(10.0)
    assert controlled.centre == pytest.approx(0.5)
    assert controlled.z == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize("text", ["4", "z=", "z=x", "z=-1", "cos=3", "z=nan"])
def test_alerts_that_cannot_be_read(text: str) -> None:
    with pytest.raises(SteerError, match="z=NUMBER"):
        Alert.parse(text)


def test_full_checkpoints_against_their_base(vectors: dict[str, WeightVector], saved: Path, tmp_path: Path) -> None:
    trained(tmp_path / "run", whole=True)
    readings = read_checkpoints(list_checkpoints(tmp_path / "run"), vectors, base=saved)
    start = dict(tiny_model().named_parameters())
    from safetensors.torch import load_file

    now = load_file(tmp_path / "run" / "checkpoint-4" / "model.safetensors")
    square = sum(float((now[n] - start[n].detach()).double().square().sum()) for n in now)
    assert at(readings, 4).norm == pytest.approx(math.sqrt(square), rel=1e-5)


def test_broken_checkpoints_are_skipped_and_taken_up_when_they_are_whole(
    vectors: dict[str, WeightVector], tmp_path: Path
) -> None:
    trained(tmp_path / "run")
    whole, half, odd = (tmp_path / "run" / f"checkpoint-{n}" for n in (2, 4, 6))
    shutil.copytree(whole, odd)
    content = (half / "adapter_model.safetensors").read_bytes()
    (half / "adapter_model.safetensors").write_bytes(content[: len(content) // 2])
    wrong = get_peft_model(tiny_model(), LoraConfig(r=2, target_modules=LINEAR))
    for name, parameter in wrong.named_parameters():
        if "lora" in name:
            parameter.data.fill_(math.nan)
    wrong.save_pretrained(odd)
    with pytest.warns(UserWarning, match="is skipped") as seen:
        first = read_checkpoints(list_checkpoints(tmp_path / "run"), vectors, out=tmp_path / "out")
    texts = [str(w.message) for w in seen]
    assert any("checkpoint-4 is skipped" in text for text in texts)
    assert any("checkpoint-6 is skipped" in text and "NaN" in text for text in texts)
    assert {r.step for r in first} == {2}
    (half / "adapter_model.safetensors").write_bytes(content)
    shutil.rmtree(odd)
    shutil.rmtree(whole)  # what was read is kept
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = read_checkpoints({2: whole, **list_checkpoints(tmp_path / "run")}, vectors, out=tmp_path / "out")
    assert {r.step for r in again} == {2, 4}
    assert [r for r in again if r.step == 2] == first


def test_a_checkpoint_that_was_trained_again_is_read_again(vectors: dict[str, WeightVector], tmp_path: Path) -> None:
    trained(tmp_path / "run")
    place = tmp_path / "run" / "checkpoint-2"
    first = read_checkpoints({2: place}, vectors, out=tmp_path / "out")
    shutil.rmtree(place)
    shutil.copytree(tmp_path / "run" / "checkpoint-4", place)
    for _ in range(2):
        second = read_checkpoints({2: place}, vectors, out=tmp_path / "out")
        assert len(second) == len(first)
        assert at(second, 2).norm == pytest.approx(task_vector(place).norm())
    assert at(first, 2).norm != at(second, 2).norm


def test_readings_are_those_of_the_vectors_as_they_are_now(vectors: dict[str, WeightVector], tmp_path: Path) -> None:
    """The same names and data, but another weighing of them."""
    trained(tmp_path / "run")
    found = []
    for factor in (1.0, -1.0):
        made = {"a": combine(f"{factor} * a", {"a": vectors["a"]})}
        found.append(at(read_checkpoints(list_checkpoints(tmp_path / "run"), made, out=tmp_path / "out"), 2).cosine)
    assert found[1] == -found[0] != 0.0


def test_another_runs_readings_do_not_count(vectors: dict[str, WeightVector], tmp_path: Path) -> None:
    """Of a run of the same name in another folder; what is gone of the run itself stays."""
    for folder, steps in (("x", 4), ("y", 2)):
        trained(tmp_path / folder / "run", steps=steps)
        read_checkpoints(list_checkpoints(tmp_path / folder / "run"), vectors, out=tmp_path / "out")
    shutil.rmtree(tmp_path / "x" / "run" / "checkpoint-2")
    for folder, steps in (("y", {2}), ("x", {2, 4})):
        found = read_checkpoints(list_checkpoints(tmp_path / folder / "run"), vectors, out=tmp_path / "out")
        assert {reading.step for reading in found} == steps


def test_a_folders_checkpoints_are_all_named_or_told_of(vectors: dict[str, WeightVector], tmp_path: Path) -> None:
    for name in ("checkpoint-10", "lora-10-merged", "checkpoint-9-v2", "best", "epoch3"):
        vectors["a"].save(tmp_path / "run" / name)
    with pytest.warns(UserWarning, match="is left out") as seen:
        found = list_checkpoints(tmp_path / "run")
    assert {step: path.name for step, path in found.items()} == {3: "epoch3", 9: "checkpoint-9-v2", 10: "checkpoint-10"}
    assert sorted(str(one.message).split()[0] for one in seen) == ["best", "lora-10-merged"]


def test_the_model_that_a_training_ended_with_comes_last(vectors: dict[str, WeightVector], tmp_path: Path) -> None:
    vectors["a"].save(tmp_path / "run")
    assert list_checkpoints(tmp_path / "run") == {0: tmp_path / "run"}
    vectors["b"].save(tmp_path / "run" / "checkpoint-5")
    assert list(list_checkpoints(tmp_path / "run").values()) == [tmp_path / "run" / "checkpoint-5", tmp_path / "run"]


def test_another_base_is_named(vectors: dict[str, WeightVector], tmp_path: Path) -> None:
    other = LM.wrap(tiny_model(layers=1), tiny_lm().tokenizer, name="other", revision="other")
    random_vector(other).save(tmp_path / "c" / "vector-1")
    with pytest.warns(UserWarning, match=r"its base is tiny \(other\)"), pytest.raises(SteerError, match="none of the"):
        read_checkpoints({1: tmp_path / "c" / "vector-1"}, vectors)
    with pytest.raises(SteerError, match="no checkpoints"):
        list_checkpoints(tmp_path)
    with pytest.raises(SteerError, match="no such folder"):
        list_checkpoints(tmp_path / "nothing")


class Reporter(TrainerCallback):
    """What TensorBoard's and W&B's callbacks see."""

    def __init__(self) -> None:
        self.seen: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.seen.append(dict(logs))


@pytest.mark.parametrize("whole", [False, True])
def test_live_numbers_are_those_of_the_checkpoints(
    vectors: dict[str, WeightVector], saved: Path, tmp_path: Path, whole: bool
) -> None:
    reporter, monitor = Reporter(), SteeringMonitor(vectors, every=2, out=tmp_path / "live.jsonl")
    trainer = trained(tmp_path / "run", reporter, whole=whole, monitor=monitor)
    after = read_checkpoints(list_checkpoints(tmp_path / "run"), vectors, base=saved)
    for step in (2, 4):
        for part in (WHOLE, "layer 0", "self_attn.v_proj"):
            live, read = (at(readings, step, "b", part) for readings in (monitor.readings, after))
            assert live.cosine == pytest.approx(read.cosine, abs=1e-5)
            assert live.norm == pytest.approx(read.norm, rel=1e-4)
            assert live.z == pytest.approx(read.z, abs=1e-2)
    logged = [logs for logs in reporter.seen if "cos/b" in logs]
    assert [logs["cos/b"] for logs in logged] == [at(monitor.readings, step, "b").cosine for step in (2, 4)]
    assert [row["cos/b"] for row in trainer.state.log_history if "cos/b" in row] == [logs["cos/b"] for logs in logged]
    lines = [json.loads(line) for line in (tmp_path / "live.jsonl").read_text().splitlines()]
    assert [Reading(**line) for line in lines] == monitor.readings


def test_training_is_the_same_with_and_without_the_monitor(vectors: dict[str, WeightVector], tmp_path: Path) -> None:
    plain = trained(tmp_path / "plain")
    watched = trained(tmp_path / "watched", monitor=SteeringMonitor(vectors, every=1))
    pairs = zip(plain.model.parameters(), watched.model.parameters(), strict=True)  # type: ignore[union-attr]
    assert all(torch.equal(a, b) for a, b in pairs)


def test_an_alert_warns_and_stops_if_asked(tmp_path: Path) -> None:
    """Against the run's own end: the training moves toward it in every layer."""
    trained(tmp_path / "run", steps=8)
    goal = {"goal": task_vector(tmp_path / "run" / "checkpoint-8")}
    with pytest.warns(UserWarning, match="moves toward 'goal'"):
        trainer = trained(tmp_path / "a", monitor=SteeringMonitor(goal, every=1, alert="z=1"), steps=8)
    assert trainer.state.global_step == 8
    with pytest.warns(UserWarning, match="moves toward"):
        trainer = trained(tmp_path / "b", monitor=SteeringMonitor(goal, every=1, alert="z=1", stop=True), steps=8)
    assert trainer.state.global_step < 8


def test_mistakes_of_the_live_monitor(vectors: dict[str, WeightVector], tmp_path: Path) -> None:
    with pytest.raises(SteerError, match="expected vectors"):
        SteeringMonitor({})
    odd = {"o": WeightVector({"nothing.weight": LowRank(torch.ones(2, 1), torch.ones(1, 2))}, RunCard("vector"))}
    with pytest.raises(SteerError, match="no parameter in common"):
        trained(tmp_path / "a", monitor=SteeringMonitor(odd))
    name = next(iter(vectors["a"].deltas))
    short = {"s": WeightVector({name: LowRank(torch.ones(2, 1), torch.ones(1, 2))}, RunCard("vector"))}
    with pytest.raises(SteerError, match="shapes differ"):
        trained(tmp_path / "b", monitor=SteeringMonitor(short))


def test_two_processes_see_the_same_and_write_it_once(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    logs = [tmp_path / f"log{rank}" for rank in (0, 1)]
    processes = [killable.start(log, two_processes.train, rank, port, tmp_path) for rank, log in enumerate(logs)]
    for process in processes:
        process.join(timeout=300)
    assert [process.exitcode for process in processes] == [0, 0], "\n".join(log.read_text() for log in logs)
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    assert first["world"] == 2
    assert len((tmp_path / "readings.jsonl").read_text().splitlines()) == len(first["cosines"]) > 2


def test_a_vector_without_direction_is_refused(tmp_path: Path) -> None:
    trained(tmp_path)
    w = random_vector(tiny_lm(), 1)
    with pytest.raises(SteerError, match="the vector 'none' is zero"):
        read_checkpoints(list_checkpoints(tmp_path), {"a": w, "none": w - w})
    with pytest.raises(SteerError, match="the vector 'none' is zero"):
        trained(tmp_path / "live", monitor=SteeringMonitor({"none": w - w}))


def test_a_share_whose_error_is_not_known_is_shown_without_one() -> None:
    reading = Reading("c", 1, "a", WHOLE, cosine=0.3, projection=1.0, norm=1.0, centre=0.0, band=0.1, z=3.0, share=0.3)
    assert "+0.3000 of its norm" in describe(reading)
    assert "+0.3000 of its norm" in describe(replace(reading, error=math.nan))
    assert "+0.3000 ± 0.0100 of its norm" in describe(replace(reading, error=0.01))
