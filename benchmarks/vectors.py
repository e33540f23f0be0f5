"""Cosines: 32 x 32 vectors of rank 64 against pair by pair, and one cosine against dense deltas."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from measure import in_turn, table, time_function
from synthetic import SMALL, write_adapter

from weightsteer.run_card import RunCard
from weightsteer.vectors.delta import Delta
from weightsteer.vectors.difference import subtract_finetunes
from weightsteer.vectors.low_rank import LowRank
from weightsteer.vectors.similarity import similarities
from weightsteer.vectors.weight_vector import WeightVector

COUNT = 32


def many(root: Path, runs: int) -> str:
    """The 32 x 32 table."""
    folders = []
    for number in range(COUNT):
        folder = root / "vectors" / str(number)
        if not (folder / "weightsteer.json").exists():
            sides = [
                write_adapter(root / "sides" / side, SMALL, root / "small" / "base", seed=2 * number + seed)
                for seed, side in enumerate((f"{number}-positive", f"{number}-negative"))
            ]
            subtract_finetunes(*sides).save(folder)
            for side in sides:
                shutil.rmtree(side)
        folders.append(folder)
    vectors = {str(number): WeightVector.load(folder) for number, folder in enumerate(folders)}
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    similarities(vectors)
    peak = resident("VmHWM")
    medians = in_turn(
        {
            "weightsteer, all at once": lambda: time_function(lambda: similarities(vectors)),
            "pair by pair, float32 products": lambda: time_function(lambda: pair_by_pair(vectors)),
        },
        runs,
        warm=0,
    )
    return (
        f"## Cosines\n\n{COUNT} x {COUNT} contrastive vectors of rank 64 on the 1.26B shape, from files, "
        f"{torch.get_num_threads()} threads; peak memory of ours {peak:.2f} GiB, torch included:\n\n"
        + table(medians, "weightsteer, all at once")
    )


WIDTH = (3584, 18944)  # the feed-forward matrices of Qwen2.5-7B, of which it has three in each of 28 layers


def by_count(runs: int) -> str:
    """Tables of 8, 32 and 128 vectors of one such matrix, with the memory that is free and with 512 MiB."""
    lines = ["| vectors | wall, s | cpu, s | cpu at 512 MiB, s |", "| --- | --- | --- | --- |"]
    generator = torch.Generator().manual_seed(0)
    for count in (8, 32, 128):
        vectors = {str(number): _of_one_matrix(generator) for number in range(count)}
        medians = in_turn(
            {
                "free memory": lambda vectors=vectors: time_function(lambda: similarities(vectors, device="cpu")),
                "512 MiB": lambda vectors=vectors: time_function(
                    lambda: similarities(vectors, device="cpu", budget=1 << 29)
                ),
            },
            runs,
            warm=0,
        )
        free, small = medians["free memory"], medians["512 MiB"]
        lines.append(f"| {count} | {free.wall:.2f} | {free.cpu:.2f} | {small.cpu:.2f} |")
    shape = " x ".join(map(str, WIDTH))
    return f"All cosines of vectors of rank 64 in one matrix of {shape}:\n\n" + "\n".join(lines)


def _of_one_matrix(generator: torch.Generator) -> WeightVector:
    factors = LowRank(torch.randn(WIDTH[0], 64, generator=generator), torch.randn(64, WIDTH[1], generator=generator))
    return WeightVector({"model.layers.0.mlp.down_proj.weight": factors}, RunCard("vector"))


def resident(field: str) -> float:
    """A field of this process's memory, in GiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 2**20


def pair_by_pair(vectors: Mapping[str, WeightVector]) -> list[list[float]]:
    """The factored product of each pair once: factors held in memory, float32 products, float64 sums."""
    held = [dict(vector.deltas) for vector in vectors.values()]
    return [[_dot(held[i], held[j]) for j in range(i + 1)] for i in range(len(held))]


def _dot(first: Mapping[str, Delta], second: Mapping[str, Delta]) -> float:
    total = 0.0
    for name, x in first.items():
        y = second[name]
        assert isinstance(x, LowRank)
        assert isinstance(y, LowRank)
        gram = (x.B.T @ y.B) * (x.A @ y.A.T)
        total += float(gram.sum(dtype=torch.float64))
    return total


def one(root: Path, runs: int) -> str:
    """One cosine of two vectors that are in memory."""
    x, y = (
        WeightVector(dict(v.deltas), v.card)
        for v in (WeightVector.load(root / "vectors" / str(number)) for number in range(2))
    )
    medians = in_turn(
        {
            "weightsteer": lambda: time_function(lambda: x.cosine(y)),
            "dense deltas and their dot": lambda: time_function(lambda: dense_cosine(x, y)),
        },
        runs,
    )
    return f"One cosine of two vectors of rank 64, in process:\n\n{table(medians, 'weightsteer')}"


def dense_cosine(x: WeightVector, y: WeightVector) -> float:
    """Building both deltas, then three dot products."""
    first = {name: delta.B @ delta.A for name, delta in x.deltas.items() if isinstance(delta, LowRank)}
    second = {name: delta.B @ delta.A for name, delta in y.deltas.items() if isinstance(delta, LowRank)}

    def dot(p: dict[str, torch.Tensor], q: dict[str, torch.Tensor]) -> float:
        return sum(float((p[name] * q[name]).sum(dtype=torch.float64)) for name in p)

    return dot(first, second) / (dot(first, first) * dot(second, second)) ** 0.5
