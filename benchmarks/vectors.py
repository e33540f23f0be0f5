"""Cosines: 32 x 32 vectors of rank 64 against pair by pair, and one cosine against dense deltas."""

from __future__ import annotations

import resource
from pathlib import Path

import torch
from measure import in_turn, table, time_function
from synthetic import SMALL, write_adapter

from weightsteer.extract import contrast_vector
from weightsteer.lowrank import LowRank
from weightsteer.similarity import similarity
from weightsteer.vector import WeightVector

COUNT = 32


def many(root: Path, runs: int) -> str:
    """The 32 x 32 table."""
    folders = []
    for number in range(COUNT):
        folder = root / "vectors" / str(number)
        if not (folder / "weightsteer.json").exists():
            sides = [
                write_adapter(root / "sides" / side, SMALL, root / "small" / "base", seed=2 * number + seed)
                for seed, side in enumerate((f"{number}-plus", f"{number}-minus"))
            ]
            contrast_vector(*sides).save(folder)
        folders.append(folder)
    vectors = {str(number): WeightVector.load(folder) for number, folder in enumerate(folders)}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    similarity(vectors)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20
    medians = in_turn(
        {
            "weightsteer, all at once": lambda: time_function(lambda: similarity(vectors)),
            "pair by pair, factored": lambda: time_function(lambda: pair_by_pair(list(vectors.values()))),
        },
        runs,
        warm=0,
    )
    return (
        f"## Cosines\n\n{COUNT} x {COUNT} contrastive vectors of rank 64 on the 1.26B shape, from files, "
        f"{torch.get_num_threads()} threads; ours took {grown:.2f} GiB more than the process had before:\n\n"
        + table(medians, "weightsteer, all at once")
    )


def pair_by_pair(vectors: list[WeightVector]) -> list[list[float]]:
    """What a careful user writes: factors held, float32 products, float64 sums, each pair once."""
    held = [dict(vector.deltas) for vector in vectors]
    return [[_dot(held[i], held[j]) for j in range(i + 1)] for i in range(len(held))]


def _dot(first: dict[str, LowRank], second: dict[str, LowRank]) -> float:  # type: ignore[type-arg]
    return sum(
        float(((x.B.T @ second[name].B) * (x.A @ second[name].A.T)).sum(dtype=torch.float64))
        for name, x in first.items()
    )


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
