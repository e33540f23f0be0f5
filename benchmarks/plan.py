"""The plan of a small run against what its stages really took: peak memory and tokens a second of the processor.

OMP_NUM_THREADS=1 python benchmarks/plan.py [--model FOLDER] [--dtype bfloat16] [--steps 10]

Each stage runs in this process after the one before, while a thread watches the resident memory. The rates of the CPU
are measured right before, and times are those of the processor, so that other programs on the machine matter less.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch

PAIRS, BATCH, PROMPTS, NEW = 24, 4, 8, 24


class Watch(threading.Thread):
    """The largest resident memory of this process, asked every 20 ms."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak, self.over = 0, threading.Event()

    def run(self) -> None:
        while not self.over.wait(0.02):
            self.peak = max(self.peak, resident())


def resident() -> int:
    """Bytes of this process in memory, mapped files such as weights included."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def trim() -> None:
    """Give back to the system what the stage before has freed."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)


def watched(work: Callable[[], object]) -> tuple[float, float]:
    """Peak bytes and processor seconds of one call."""
    trim()
    watch, start = Watch(), time.process_time()
    watch.start()
    work()
    used = time.process_time() - start
    watch.over.set()
    watch.join()
    return float(watch.peak), used


def recipe_of(model: str, dtype: str, steps: int) -> dict[str, object]:
    """A recipe with one training, one scored task and one of open replies."""
    return {
        "name": "plan",
        "model": model,
        "dtype": dtype,
        "data": {"pairs": "sycophancy", "limit": PAIRS},
        "train": {
            "learning_rates": [1e-3],
            "batch_size": BATCH,
            "max_steps": steps,
            "evaluations": 1,
            "validation": 0.1,
            "warmup_steps": 1,
        },
        "tasks": [{"task": "preference", "limit": 8}, {"task": "prose", "limit": 4}],
        "sweep": {"methods": {"contrastive": [1.0]}},
        "samples": {"count": PROMPTS, "max_new_tokens": NEW},
        "batch_size": 16,
    }


def measure(model: str, dtype: str, steps: int) -> list[dict[str, object]]:
    """Run and plan the same stages; one row a stage."""
    from weightsteer.lm import LM
    from weightsteer.planning.named_device import device_named
    from weightsteer.planning.plan import plan_recipe
    from weightsteer.runs.recipe import Recipe
    from weightsteer.training import train_side

    recipe = Recipe.model_validate(recipe_of(model, dtype, steps))
    device = device_named("cpu")
    trim()
    device = replace(device, reserved=float(resident()))
    lm = LM.load(model, dtype=dtype, device="cpu")
    tasks = recipe.load_tasks()
    sides = recipe.sides()
    assert sides is not None
    prompts = [tasks[0].items[i].prompt for i in range(PROMPTS)]  # type: ignore[attr-defined]
    with tempfile.TemporaryDirectory() as folder:
        real = {
            "train positive": watched(
                lambda: train_side(lm, sides[0], Path(folder) / "p", settings=recipe.train_settings(recipe.train))
            ),
            "measure the base": watched(lambda: [task.measure(lm, batch_size=16) for task in tasks]),
            "write": watched(lambda: lm.generate(prompts, max_new_tokens=NEW, batch_size=PROMPTS)),
        }
    again = device_named("cpu")
    print(device.slowness, again.slowness, file=sys.stderr)
    plan = plan_recipe(recipe, middle(device, again))
    planned = {stage.name: (stage.memory.total, stage.seconds, stage) for stage in plan.stages}
    planned["write"] = writing(recipe, middle(device, again), prompts)
    return [row(name, real[name], planned[name]) for name in real]


def middle(first: object, second: object) -> object:
    """The device with the mean of two measurements of its rates."""
    rates = ("float32", "bfloat16", "bandwidth", "host_seconds", "slowness")
    mean = {name: (getattr(first, name) + getattr(second, name)) / 2 for name in rates}
    thin = tuple((a + b) / 2 for a, b in zip(first.thin, second.thin, strict=True))  # type: ignore[attr-defined]
    return replace(first, **mean, thin=thin)  # type: ignore[type-var]


def writing(recipe: object, device: object, prompts: list[str]) -> tuple[float, float, object]:
    """The plan of replies to the prompts alone."""
    from weightsteer.planning.counting import CountingModel
    from weightsteer.planning.numbers import Choices
    from weightsteer.planning.plan import planner_of
    from weightsteer.planning.stages import Stage

    planner = planner_of(recipe, device, Choices(), [])
    model = CountingModel(planner.lm(recipe))
    model.replies(prompts, max_new_tokens=NEW, batch_size=PROMPTS)
    stage = planner.plan(Stage("write", model.work))
    return stage.memory.total, stage.seconds, stage


def row(name: str, real: tuple[float, float], planned: tuple[float, float, object]) -> dict[str, object]:
    stage = planned[2]
    tokens = stage.trained or stage.generated or stage.scored  # type: ignore[attr-defined]
    return {
        "stage": name,
        "tokens": tokens,
        "GB planned": planned[0] / 1e9,
        "GB real": real[0] / 1e9,
        "memory, planned / real": planned[0] / real[0],
        "seconds planned": planned[1],
        "seconds real": real[1],
        "time, planned / real": planned[1] / real[1],
    }


def main() -> None:
    """One process for each run, so that its memory starts from nothing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.here:
        print(json.dumps(measure(options.model, options.dtype, options.steps)))
        return
    done = subprocess.run([sys.executable, __file__, "--here", *sys.argv[1:]], capture_output=True, text=True)
    print(done.stderr[-3000:], file=sys.stderr)
    if done.returncode:
        raise SystemExit(done.returncode)
    rows = json.loads(done.stdout.splitlines()[-1])
    print("| " + " | ".join(rows[0]) + " |\n" + "| --- " * len(rows[0]) + "|")
    for line in rows:
        print("| " + " | ".join(v if isinstance(v, str) else f"{v:.2f}" for v in line.values()) + " |")


if __name__ == "__main__":
    main()
