"""Processes that the package starts by itself: killed, refused, and on two sides of a command."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

import killable
from ranks_of_two import until
from test_processes import UNEVEN, assert_same, counts, examples
from weightsteer.checkpoints.load_options import LoadOptions
from weightsteer.errors import SteerError
from weightsteer.lm import LM
from weightsteer.training import TrainSettings, launch, train_side
from weightsteer.training.order import Order, load_to_train, order_of, refuse_idle
from weightsteer.training.settings import PAPER

TWO = replace(UNEVEN, processes=2)


def train(base: Path, out: Path, settings: TrainSettings) -> None:
    lm = load_to_train(settings, {"name": str(base), "device": "cpu"})
    train_side(lm, examples(), out, settings=settings)


def started_for(out: Path) -> list[int]:
    """The processes that were started for an output, and the one of torch that watches them."""
    found = subprocess.run(["pgrep", "-f", f"worker {out.with_name('.' + out.name)}"], capture_output=True, text=True)
    return [int(number) for number in found.stdout.split()]


def ranks_of(out: Path) -> list[int]:
    """Those that train."""
    return [number for number in started_for(out) if "torch.distributed.run" not in _command(number)]


def _command(number: int) -> str:
    try:
        return Path(f"/proc/{number}/cmdline").read_text()
    except OSError:
        return "torch.distributed.run"


@pytest.mark.parametrize(
    ("settings", "count", "reason"),
    [
        (replace(PAPER, processes=9), 100, "expected at most 8, the rows of a batch, found 9"),
        (replace(PAPER, processes=4), 3, "expected at most 3, the examples to train on, found 4"),
    ],
)
def test_no_process_may_be_idle(settings: TrainSettings, count: int, reason: str) -> None:
    with pytest.raises(SteerError, match=reason):
        refuse_idle(count, settings)


def test_what_cannot_be_spread_is_refused_before_anything_starts(lm: LM, tmp_path: Path) -> None:
    with pytest.raises(SteerError, match="this one was made in memory"):
        train_side(lm, examples(), tmp_path / "out", settings=TWO)
    with pytest.raises(SteerError, match="shard fsdp: spreads a model over several processes, found one"):
        train_side(lm, examples(), tmp_path / "out", settings=replace(UNEVEN, shard="fsdp"))
    with pytest.raises(SteerError, match="shard: expected one of ddp, fsdp, found 'zero'"):
        TrainSettings(shard="zero")
    assert not any(tmp_path.iterdir())


def test_an_order_is_read_as_it_was_written(checkpoint: Path, tmp_path: Path) -> None:
    """And the model without its weights is known by the same revision."""
    asked = {"name": str(checkpoint), "device": "cpu"}
    light, whole = load_to_train(TWO, asked), LM.load(checkpoint, device="cpu")
    assert light.device.type == "meta"
    assert (light.revision, light.stops) == (whole.revision, whole.stops)
    order = order_of(light, tmp_path / "out", TWO)
    order.save(tmp_path / "order.json")
    assert Order.load(tmp_path / "order.json") == order
    assert order.settings == TWO
    spread = LoadOptions(attention="eager", max_memory={0: "20GiB"})
    replace(order, loading=spread).save(tmp_path / "order.json")
    assert Order.load(tmp_path / "order.json").asked() == {**order.model, "options": spread}


@pytest.mark.parametrize(
    ("options", "settings", "reason"),
    [
        (LoadOptions(device_map="auto"), TWO, "device_map and max_memory: spread the model of one process"),
        (LoadOptions(quantize="nf4"), replace(TWO, shard="fsdp"), "quantize nf4: shard fsdp does not split weights"),
        (None, replace(TWO, kl_weight=0.1), "a training with kl_weight runs in one process, found 2"),
    ],
)
def test_what_does_not_go_together_is_refused(
    options: LoadOptions | None, settings: TrainSettings, reason: str, lm: LM, tmp_path: Path
) -> None:
    with pytest.raises(SteerError, match=reason):
        train_side(replace(lm, origin={"name": "tiny", "options": options}), examples(), tmp_path, settings=settings)


def test_a_dead_process_is_told_with_its_last_lines(tmp_path: Path) -> None:
    folder = tmp_path / ".out.processes"
    (folder / "logs/x/attempt_0/1").mkdir(parents=True)
    (folder / "logs/x/attempt_0/1/stderr.log").write_text("Traceback\n\n  line 3\nRuntimeError: \x1b[31mno room\n")
    (folder / "torchrun.log").write_text(
        "Root Cause (first observed failure):\n[0]:\n  rank      : 1 (local_rank: 1)\n  exitcode  : -9 (pid: 7)\n"
    )
    told = str(launch._failure(folder, 2, 1))
    assert told.startswith("process 1 of 2 was killed by signal 9; its last lines: Traceback | line 3 | RuntimeError: ")
    assert "\\x1b[31mno room; the same command goes on from the last checkpoint" in told
    (folder / "torchrun.log").write_text(  # the other lost its connection, was seen first, and a third was ended then
        "Failures:\n[1]:\n  rank      : 2 (local_rank: 2)\n  exitcode  : -15 (pid: 9)\n"
        "[2]:\n  rank      : 1 (local_rank: 1)\n  exitcode  : -9 (pid: 7)\n"
        "Root Cause (first observed failure):\n[0]:\n  rank      : 0 (local_rank: 0)\n  exitcode  : 1 (pid: 6)\n"
    )
    assert str(launch._failure(folder, 3, 1)).startswith("process 1 of 3 was killed by signal 9; ")


@pytest.mark.slow
def test_started_processes_train_as_one_after_kills(checkpoint: Path, tmp_path: Path) -> None:
    """SIGKILL of one process, then of the one that has started them, which leaves none behind; then one goes on."""
    settings = replace(TWO, epochs=12, evaluations=12, snapshots=0, patience=12)
    alone = train_side(
        LM.load(checkpoint, device="cpu"), examples(), tmp_path / "one", settings=replace(settings, processes=1)
    )
    out, log = tmp_path / "two", tmp_path / "log"

    def has_checkpoint() -> bool:
        return any(out.with_name("two.work").glob("lr-*/checkpoint-*/whole.json"))

    first = killable.start(log, train, checkpoint, out, settings)
    until(has_checkpoint, 240)
    os.kill(ranks_of(out)[-1], signal.SIGKILL)
    first.join()
    said = killable.printed(log)[-1]
    assert "was killed by signal 9" in said
    assert "the same command goes on from the last checkpoint" in said
    assert not list(tmp_path.glob(".two.processes"))

    before = len(list(out.with_name("two.work").glob("lr-*/result.json")))
    second = killable.start(log, train, checkpoint, out, settings)
    until(lambda: len(ranks_of(out)) == 2 and (tmp_path / ".two.processes/progress.json").exists(), 240)
    second.kill()
    second.join()
    until(lambda: not started_for(out), 60)  # the watcher holds the output as long as it lives
    assert not out.exists()
    assert len(list(out.with_name("two.work").glob("lr-*/result.json"))) >= before

    train(checkpoint, out, replace(settings, processes=1))  # any number of processes goes on
    assert_same(out, alone)
    assert counts(out) == counts(alone)


@pytest.mark.slow
@pytest.mark.parametrize("program", ["torch.distributed.run", "accelerate.commands.launch"])
def test_by_hand_on_the_command_line(
    program: str, checkpoint: Path, tmp_path: Path, run: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    """The commands of docs/many-gpus.md, on one machine."""
    verb = ["-m", "weightsteer", "train", "--pairs", "formal", "-m", str(checkpoint), "--device", "cpu", "--lr", "0.01"]
    verb += ["--max-steps", "4", "--rank", "2", "-o", str(tmp_path / "out")]
    options = {
        "torch.distributed.run": ["--standalone", "--nproc-per-node=2"],
        "accelerate.commands.launch": ["--cpu", "--num_processes=2", "--num_machines=1", "--mixed_precision=no"],
    }[program]
    done = run([sys.executable, "-m", program, *options, *verb])
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("positive: ") == 1
    assert (tmp_path / "out/negative/adapter_model.safetensors").exists()


@pytest.fixture
def run() -> Callable[..., subprocess.CompletedProcess[str]]:
    return lambda command: subprocess.run(command, capture_output=True, text=True, check=False)
