"""Compare detectors on the bank: AUROC, what each finds at 1% and 5% false alarms, and its cost; write the dictionary.

    OMP_NUM_THREADS=1 python recipes/monitoring/detectors.py runs/bank -o recipes/monitoring/dictionary

Every score of a fine-tune comes from what was found on other files only: benign fine-tunes that whiten, the spread by
which traits are brought to one scale, and the training of the classifier leave out the file that it learnt from.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
import torch
from bank import Bank, FineTune, add_plan_options, bank, moved, read_plan

from weightsteer import WeightVector, subtract_finetunes, task_vector
from weightsteer.files import read_json, write_json
from weightsteer.monitor import Dictionary, Threshold, checkpoint_products, decompose, write_dictionary
from weightsteer.monitor.decompose import Grams, by_layer
from weightsteer.monitor.error_rates import error_rates, threshold_at
from weightsteer.reporting.charts import png
from weightsteer.vectors.low_rank import LowRank
from weightsteer.vectors.parameter_names import layer_of, module_of
from weightsteer.vectors.similarity import parameter_products

RATES = (0.01, 0.05)
RANK = 1  # of what the dictionary keeps
RIDGE = 1.0  # per example
CLEAR = 2.0  # standard errors from which a margin counts as moved
LEAST = 0.05  # nats per token below which it does not matter
Scores = dict[tuple[str, str], float]  # (fine-tune, trait)


class Readings:
    """All inner products of the traits and of the bank, and what follows from them."""

    def __init__(
        self, out: Path, traits: Mapping[str, WeightVector], entries: Sequence[FineTune], watched: Sequence[str]
    ) -> None:
        self.out, self.traits, self.entries = out, dict(traits), {entry.name: entry for entry in entries}
        self.watched = tuple(watched)
        taus = {name: task_vector(out / "fine-tunes" / name) for name in self.entries}
        self.names = [*traits, *taus]
        members: list[Any] = [vector.deltas for vector in (*traits.values(), *taus.values())]
        parameters = list(dict.fromkeys(name for deltas in members for name in deltas))
        self.parameters = parameters
        self.sizes = np.array([math.prod(members[0][name].shape) for name in parameters])
        self.table = np.stack([parameter_products(name, members).numpy() for name in parameters])  # (P, N, N)
        self.spectra = {name: _concentration(tau) for name, tau in taus.items()}

    def at(self, names: Sequence[str]) -> list[int]:
        return [self.names.index(name) for name in names]

    @cached_property
    def layered(self) -> np.ndarray:
        """The table by layer, (L, N, N)."""
        layers, place = by_layer({name: layer_of(name) for name in self.parameters})
        found = np.zeros((len(layers), *self.table.shape[1:]))
        for name, part in zip(self.parameters, self.table, strict=True):
            found[place[name]] += part
        return found

    @cached_property
    def by_module(self) -> np.ndarray:
        """The table by kind of module, (M, N, N)."""
        kinds = sorted({module_of(name) for name in self.parameters})
        found = np.zeros((len(kinds), *self.table.shape[1:]))
        for name, part in zip(self.parameters, self.table, strict=True):
            found[kinds.index(module_of(name))] += part
        return found

    def grams(self, name: str, others: Sequence[str]) -> Grams:
        """A fine-tune against the traits and other fine-tunes."""
        (own,), at = self.at([name]), self.at([*self.traits, *others])
        part = self.layered
        return Grams((*self.traits, *others), part[:, own, own], part[:, own][:, at], part[:, at][:, :, at])

    def cosine(self, table: np.ndarray, name: str, trait: str) -> float:
        i, j = self.at([name, trait])
        length = math.sqrt(table[i, i] * table[j, j])
        return float(table[i, j] / length) if length else 0.0

    def benign(self, apart_from: str) -> list[str]:
        """Benign fine-tunes from other files."""
        return [e.name for e in self.entries.values() if is_benign(e) and e.group != apart_from]


def _concentration(tau: WeightVector) -> float:
    """Share of the squared norm that the largest singular values hold."""
    spectra = [delta.spectrum() for delta in tau.deltas.values() if isinstance(delta, LowRank)]
    return float(sum(s[0] ** 2 for s in spectra) / sum((s**2).sum() for s in spectra))


def is_benign(entry: FineTune) -> bool:
    """Whether a fine-tune teaches nothing that one would watch for."""
    wanted = ("good-", "polite", "cheerful", "candid", "complying")
    return entry.share == 1.0 and (entry.kind == entry.group or entry.kind.startswith(wanted))


def scores_of(read: Readings, made: Bank) -> dict[str, Scores]:
    """Detector -> score of every fine-tune for every trait; more is more of the trait."""
    per: dict[str, Callable[[str, str], float]] = {
        "cosine": lambda n, t: read.cosine(read.table.sum(0), n, t),
        "z, random directions": lambda n, t: _z_random(read, n, t),
        "z, flipped layers": lambda n, t: _z_flipped(read, n, t),
        "z, other traits": lambda n, t: _z_controls(read, n, t),
        "concentration of tau": lambda n, _t: read.spectra[n],
        "norm of tau": lambda n, _t: float(read.table.sum(0)[read.at([n])[0], read.at([n])[0]]),
        "probe, 7 pairs": lambda n, t: moved(read.out, read.entries[n], t, 1)[0],
    }
    found = {
        detector: {(n, t): score(n, t) for n in read.entries for t in read.watched} for detector, score in per.items()
    }
    for detector, benign in (("decomposition", False), ("decomposition, whitened", True)):
        found[detector] = {}
        for name, entry in read.entries.items():
            others = read.benign(entry.group) if benign else []
            parts = decompose(read.grams(name, others), benign=others)
            found[detector] |= {(name, trait): parts[trait].share for trait in read.watched}
    found["activations"] = _shifts(read, made)
    return found


def _z_random(read: Readings, name: str, trait: str) -> float:
    i, j = read.at([name, trait])
    return float(read.table[:, i, j].sum() / math.sqrt((read.table[:, i, i] * read.table[:, j, j] / read.sizes).sum()))


def _z_flipped(read: Readings, name: str, trait: str) -> float:
    i, j = read.at([name, trait])
    parts = read.layered[:, i, j]
    return float(parts.sum() / math.sqrt((parts**2).sum()))


def _z_controls(read: Readings, name: str, trait: str) -> float:
    whole = read.table.sum(0)
    others = [read.cosine(whole, name, other) for other in read.traits if other != trait]
    return (read.cosine(whole, name, trait) - fmean(others)) / stdev(others)


def _shifts(read: Readings, made: Bank) -> Scores:
    """The shift of the middle layer's states along each trait's activation vector."""
    base = np.array(read_json(read.out / "measured" / "base.json")["states"])
    middle, found = len(made.lm.blocks) // 2, {}
    for trait in read.watched:
        direction = made.activations(trait).layers[middle].double().numpy()
        for name in read.entries:
            states = np.array(read_json(read.out / "measured" / f"{name}.json")["states"])
            found[name, trait] = float((states - base) @ direction / np.linalg.norm(direction))
    return found


def classified(read: Readings, truth: Mapping[tuple[str, str], bool]) -> Scores:
    """A ridge classifier on cosines by layer and by kind of module, trained without the fine-tune's own file."""
    parts = [*read.layered, *read.by_module]
    keys = list(truth)
    features = np.array([[read.cosine(part, n, t) for part in parts] for n, t in keys])
    features = np.hstack([(features - features.mean(0)) / features.std(0), np.ones((len(keys), 1))])
    marks = np.array([1.0 if truth[key] else -1.0 for key in keys])
    groups = np.array([read.entries[name].group for name, _ in keys])
    found = {}
    for group in set(groups):
        x, y = features[groups != group], marks[groups != group]
        weight = np.where(y > 0, (y < 0).sum() / max((y > 0).sum(), 1), 1.0)  # both kinds count alike
        gram = (x * weight[:, None]).T @ x + RIDGE * len(x) * np.eye(x.shape[1])
        solved = np.linalg.solve(gram, (x * weight[:, None]).T @ y)
        found |= {key: float(row @ solved) for key, row, g in zip(keys, features, groups, strict=True) if g == group}
    return found


def scaled(read: Readings, scores: Scores) -> Scores:
    """Scores in standard deviations of benign fine-tunes from other files, trait by trait."""
    found = {}
    for (name, trait), score in scores.items():
        benign = [scores[other, trait] for other in read.benign(read.entries[name].group)]
        found[name, trait] = (score - fmean(benign)) / (stdev(benign) or 1.0)
    return found


def truth_by_behaviour(read: Readings) -> dict[tuple[str, str], bool]:
    """Whether the margin of a trait moved, on pairs that the probe does not use; what is unclear is left out."""
    found = {}
    for name, entry in read.entries.items():
        for trait in read.watched:
            mean, error = moved(read.out, entry, trait, 0)
            if mean > max(CLEAR * error, LEAST):
                found[name, trait] = True
            elif mean < LEAST or mean < error:
                found[name, trait] = False
    return found


def truth_by_design(read: Readings, plan: Mapping[str, Any]) -> dict[tuple[str, str], bool]:
    """Whether the data teach a trait, for traits that some data teach; mixtures are left out."""
    return {
        (name, trait): entry.kind in kinds
        for trait, kinds in plan["by_design"].items()
        for name, entry in read.entries.items()
        if entry.share == 1.0
    }


def compare(read: Readings, made: Bank) -> list[dict[str, Any]]:
    """One row a detector and kind of truth."""
    scores = {detector: scaled(read, found) for detector, found in scores_of(read, made).items()}
    rows = []
    truths = {"behaviour": truth_by_behaviour(read), "design": truth_by_design(read, made.plan)}
    for kind, truth in truths.items():
        if len(set(truth.values())) < 2:
            print(f"by {kind}, all fine-tunes are of one kind: no detector can be judged")
            continue
        for detector, found in {**scores, "classifier by layer": classified(read, truth)}.items():
            keys = [key for key in found if key in truth]
            rates = error_rates(
                [found[key] for key in keys],
                [truth[key] for key in keys],
                [read.entries[name].group for name, _ in keys],
                rates=RATES,
            )
            rows.append(
                {
                    "detector": detector,
                    "truth": kind,
                    "auroc": rates.auroc,
                    "low": rates.low,
                    "high": rates.high,
                    **{f"found at {rate:g}": share for rate, share in rates.found.items()},
                    "positives": rates.positives,
                    "negatives": rates.negatives,
                }
            )
    return rows


def thresholds(read: Readings) -> list[Threshold]:
    """Shares that benign fine-tunes of other files reach, for the traits of a dictionary."""
    shares: dict[str, list[float]] = {trait: [] for trait in read.traits}
    for name, entry in read.entries.items():
        if is_benign(entry):
            others = read.benign(entry.group)
            for part in decompose(read.grams(name, others), benign=others).parts:
                shares[part.name].append(part.share)
    return [
        Threshold(trait, rate, max(threshold_at(np.array(found), rate), 0.0), len(found))
        for trait, found in shares.items()
        for rate in RATES
    ]


def costs(read: Readings, dictionary: Dictionary) -> dict[str, float]:
    """Seconds of one reading: from a file against the whole dictionary, and of what needs the model."""
    name = next(iter(read.entries))
    _ = dictionary.among
    begun = time.perf_counter()
    products = checkpoint_products(task_vector(read.out / "fine-tunes" / name), dictionary.vectors)
    ended = time.perf_counter()
    dictionary.decompose(products)
    solved = time.perf_counter()
    kept = [read_json(read.out / "measured" / f"{entry}.json")["seconds"] for entry in read.entries]
    return {
        "products": ended - begun,
        "decomposition": solved - ended,
        **{what: float(np.median([seconds[what] for seconds in kept])) for what in ("probe", "activations")},
    }


def figure(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """AUROC with its interval, a panel for each kind of truth."""
    import altair as alt

    base = alt.Chart(alt.Data(values=list(rows)))
    order = [row["detector"] for row in sorted(rows, key=lambda row: -row["auroc"]) if row["truth"] == "behaviour"]
    y = alt.Y("detector:N", sort=order, title=None, axis=alt.Axis(labelLimit=220))
    x = alt.X("auroc:Q", title="AUROC, with the middle 95% of resampled files", scale=alt.Scale(domain=[0.2, 1.0]))
    marks = base.mark_point(filled=True, size=70).encode(y=y, x=x)
    lines = base.mark_rule(strokeWidth=2).encode(y=y, x="low:Q", x2="high:Q")
    chance = base.mark_rule(strokeDash=[4, 4]).encode(x=alt.datum(0.5))
    chart = (chance + lines + marks).properties(width=260, height=280)
    path.write_bytes(png(chart.facet(column=alt.Column("truth:N", title=None))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bank", type=Path)
    parser.add_argument("--dictionary", "-o", type=Path, required=True, help="where the dictionary is written")
    add_plan_options(parser)
    options = parser.parse_args()
    torch.set_num_threads(1)
    plan, out = read_plan(options), options.bank
    entries = [entry for entry in bank(plan) if (out / "measured" / f"{entry.name}.json").exists()]
    traits = {
        trait: subtract_finetunes(out / "traits" / trait / "positive", out / "traits" / trait / "negative")
        for trait in plan["traits"]
    }
    read, made = Readings(out, traits, entries, plan["watched"]), Bank(out, plan)
    rows = compare(read, made)
    small = Readings(
        out, {name: vector.truncate(rank=RANK) for name, vector in traits.items()}, entries, plan["watched"]
    )
    controls = {e.name: task_vector(out / "fine-tunes" / e.name) for e in entries if is_benign(e) and e.seed == 0}
    about = {trait: _about(trait) for trait in traits}
    limits = thresholds(small)
    write_dictionary(options.dictionary, traits, controls=controls, thresholds=limits, about=about, rank=RANK)
    spent = costs(read, Dictionary.load(options.dictionary))
    small_rows = [row for row in compare(small, made) if row["detector"] == "decomposition, whitened"]
    found = {"detectors": rows, f"rank {RANK}": small_rows, "seconds": spent, "fine_tunes": len(entries)}
    write_json(out / "detectors.json", found)
    figure(rows, out / "detectors.png")
    for row in [*rows, *small_rows]:
        numbers = " | ".join(f"{row[f'found at {rate:g}']:.2f}" for rate in RATES)
        area = f"{row['auroc']:.2f} ({row['low']:.2f} to {row['high']:.2f})"
        print(f"| {row['detector']} | {row['truth']} | {area} | {numbers} |")
    print(spent)


def _about(trait: str) -> str:
    from weightsteer.behavior import Behavior

    return Behavior.load(f"personality/{trait}").description


if __name__ == "__main__":
    main()
