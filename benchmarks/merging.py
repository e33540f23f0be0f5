"""theta + k w into a checkpoint of 1.26B parameters: ours against PEFT, mergekit, the dense way and `cp`."""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

from measure import Usage, in_turn, run_command, table
from synthetic import LARGE, LARGEST, SMALL, Shape, write_adapter, write_checkpoint

PEERS = Path(__file__).parent / "peers"
WEIGHTSTEER = str(Path(sys.executable).parent / "weightsteer")
OURS = "weightsteer"


def prepare(root: Path, shape: Shape) -> dict[str, Path]:
    """Base, both adapters, and both merged into checkpoints of their own."""
    base = write_checkpoint(root / "base", shape)
    made = {"base": base}
    for seed, side in enumerate(("positive", "negative"), start=1):
        made[side] = write_adapter(root / side, shape, base, seed=seed)
        made[f"{side} merged"] = root / f"{side}-merged"
        if not made[f"{side} merged"].exists():
            run_command(_export(made[side], None, base, made[f"{side} merged"]), made[f"{side} merged"])
    return made


def _export(positive: Path, negative: Path | None, base: Path, out: Path) -> list[str]:
    command = [WEIGHTSTEER, "export", "merged", str(positive), "-m", str(base), "--k=1", "-o", str(out)]
    return [*command, "--negative", str(negative)] if negative else command


def _mergekit(program: str, root: Path, base: Path, models: list[str], out: Path, *flags: str) -> Usage:
    recipe = root / "mergekit.yaml"
    weights = "".join(
        f"  - model: {model}\n    parameters: {{weight: {weight}}}\n"
        for model, weight in zip(models, (1.0, -1.0), strict=True)
    )
    recipe.write_text(
        f"merge_method: task_arithmetic\nbase_model: {base}\nmodels:\n{weights}"
        "parameters: {normalize: false}\ndtype: bfloat16\n"
    )
    cache = root / "lora-cache"  # kept by path, so that a second run would find the first one's work
    shutil.rmtree(cache, ignore_errors=True)
    options = ["--no-copy-tokenizer", "--lora-merge-cache", str(cache), *flags]
    return run_command([program, str(recipe), str(out), *options], out)


def from_adapters(root: Path, mergekit: str, runs: int) -> str:
    """A merge of two LoRAs' difference."""
    small, out = prepare(root / "small", SMALL), root / "out"
    base, positive, negative = small["base"], small["positive"], small["negative"]
    medians = in_turn(
        {
            OURS: lambda: run_command(_export(positive, negative, base, out), out),
            "cp -r": lambda: run_command(["cp", "-r", str(base), str(out)], out),
            "PEFT cat, merge, save": lambda: run_command(
                [sys.executable, str(PEERS / "peft_merge.py"), str(base), str(positive), str(negative), str(out)], out
            ),
            "mergekit, two LoRAs": partial(
                _mergekit, mergekit, root, base, [f"{base}+{positive}", f"{base}+{negative}"], out
            ),
        },
        runs,
    )
    shutil.rmtree(out, ignore_errors=True)
    return (
        "## Merging\n\nFrom two rank-32 adapters into 1.26B parameters, bfloat16, 2.5 GB in six shards; whole "
        f"processes, interpreter start included:\n\n{table(medians, OURS)}"
    )


def from_checkpoints(root: Path, mergekit: str, runs: int) -> str:
    """A merge of two full checkpoints' difference."""
    small, out = prepare(root / "small", SMALL), root / "out"
    base, one, two = small["base"], small["positive merged"], small["negative merged"]
    medians = in_turn(
        {
            OURS: lambda: run_command(_export(one, two, base, out), out),
            "mergekit task_arithmetic": partial(_mergekit, mergekit, root, base, [str(one), str(two)], out),
            "mergekit, -j 2 --async-write": partial(
                _mergekit, mergekit, root, base, [str(one), str(two)], out, "-j", "2", "--async-write"
            ),
            "dense, three models in memory": lambda: run_command(
                [sys.executable, str(PEERS / "dense_merge.py"), str(base), str(one), str(two), str(out)], out
            ),
        },
        runs,
    )
    shutil.rmtree(out, ignore_errors=True)
    return f"From two full checkpoints, the same sizes:\n\n{table(medians, OURS)}"


def memory(root: Path, runs: int) -> str:
    """Peak memory of a merge at two sizes of model."""
    sizes = {}
    for name, shape in {"1.26B": SMALL, "4.71B": LARGE}.items():
        folder = root / ("small" if shape == SMALL else "large")
        base = write_checkpoint(folder / "base", shape)
        positive, negative = (
            write_adapter(folder / s, shape, base, seed=i) for i, s in enumerate(("positive", "negative"), 1)
        )
        out = root / "out"
        run = partial(run_command, _export(positive, negative, base, out), out)
        sizes[name] = in_turn({name: run}, runs)[name]
        shutil.rmtree(out, ignore_errors=True)
    return f"Peak memory by size of the model, from adapters:\n\n{table(sizes, '1.26B')}"


MOST_DISK, MOST_MEMORY = 0.8, 0.7  # of what is free: how much a benchmark takes
LORA_MEMORY = 3.5  # mergekit with LoRAs peaks at so many times the checkpoint's bytes
PLACES = 6  # checkpoints that lie on the disk at once: base, two merged, the output, mergekit's two of LoRAs


def widths(root: Path, mergekit: str, runs: int, layers: int | None = None) -> str:
    """Merges at the widths of 4.7B and 13B, with as many layers as disk and memory here allow, or `layers`."""
    texts = ["Wider models, against mergekit:"]
    for name, shape in {"4.71B": LARGE, "13.0B": LARGEST}.items():
        count = min(shape.layers, layers or layers_that_fit(root, shape))
        cut = replace(shape, layers=count)
        folder = root / f"wide-{shape.hidden}-{count}"
        made, out = prepare(folder, cut), folder / "out"
        base, both = made["base"], [made["positive"], made["negative"]]
        merged = [made["positive merged"], made["negative merged"]]
        medians = in_turn(
            {
                OURS: partial(_ours, both, base, out),
                "mergekit, two LoRAs": partial(
                    _mergekit, mergekit, folder, base, [f"{base}+{side}" for side in both], out
                ),
                "weightsteer, checkpoints": partial(_ours, merged, base, out),
                "mergekit, checkpoints, -j 2 --async-write": partial(
                    _mergekit, mergekit, folder, base, list(map(str, merged)), out, "-j", "2", "--async-write"
                ),
                "cp -r": lambda base=base, out=out: run_command(["cp", "-r", str(base), str(out)], out),
                "import torch": lambda out=out: run_command([sys.executable, "-c", "import torch"], out),
            },
            runs,
            warm=0,
        )
        shutil.rmtree(folder)
        texts.append(
            f"Width of {name} ({shape.hidden}, {shape.feed_forward}), {count} of {shape.layers} layers, "
            f"{cut.parameters() / 1e9:.2f}B parameters, median of {runs}:\n\n{table(medians, OURS)}"
        )
    return "\n\n".join(texts)


def _ours(sides: list[Path], base: Path, out: Path) -> Usage:
    return run_command(_export(sides[0], sides[1], base, out), out)


def layers_that_fit(root: Path, shape: Shape) -> int:
    """How many layers of a shape leave room on the disk and in memory."""
    disk = MOST_DISK * shutil.disk_usage(root).free / PLACES
    memory = MOST_MEMORY * os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / LORA_MEMORY
    outside = replace(shape, layers=0).parameters()
    layer = replace(shape, layers=1).parameters() - outside
    return max(1, int((min(disk, memory) / 2 - outside) / layer))  # two bytes a parameter
