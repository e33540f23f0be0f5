"""The scripts of the monitoring bank, from data to a dictionary, on a tiny model."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from weightsteer.files import read_json
from weightsteer.monitor import Dictionary

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_a_small_bank_gives_detectors_and_a_dictionary(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "recipes" / "monitoring"))
    import bank
    import detectors
    import holding
    import screening

    plan: dict[str, Any] = bank.read_plan() | {
        "model": str(checkpoint),
        "train": {"rank": 2, "max_steps": 2, "batch_size": 2, "evaluations": 1, "learning_rates": [1e-2]},
        "seeds": [0],
        "trait_seed": 1,
        "pairs": {"manners": ["rude", "polite"], "mood": ["gloomy", "cheerful"]},
        "neutral": ["sums", "rewriting"],
        "mixtures": {"into": "rewriting", "of": ["rude"], "shares": [0.3]},
        "traits": ["gloomy", "rude", "formal", "evil"],
        "watched": ["gloomy", "rude"],
        "by_design": {"rude": ["rude"], "gloomy": ["gloomy"]},
    }
    for module in (bank, detectors, holding, screening):
        monkeypatch.setattr(module, "read_plan", lambda *_: plan)
    monkeypatch.setattr(holding, "TRAITS", ("rude",))
    monkeypatch.setattr(screening, "COUNT", 4)
    monkeypatch.setattr(screening, "PLANTED", (2,))
    dictionary = str(tmp_path / "dictionary")
    programs = ((bank, []), (detectors, ["-o", dictionary]), (screening, ["--dictionary", dictionary]), (holding, []))
    for program, more in programs:
        monkeypatch.setattr(sys, "argv", ["program", str(tmp_path / "bank"), *more])
        program.main()
    found = read_json(tmp_path / "bank" / "detectors.json")
    assert found["fine_tunes"] == 7
    assert {row["detector"] for row in found["detectors"]} >= {"cosine", "decomposition, whitened", "activations"}
    assert all(0 <= row["low"] <= row["auroc"] <= row["high"] <= 1 for row in found["detectors"])
    made = Dictionary.load(tmp_path / "dictionary")
    assert made.traits == ("gloomy", "rude", "formal", "evil")
    assert set(made.controls) == {"polite-0", "cheerful-0", "sums-0", "rewriting-0"}
    assert made.threshold("rude", 0.05) is not None
    planted = read_json(tmp_path / "bank" / "screening.json")["rows"]
    assert {row["score"] for row in planted} == set(screening.SCORES)
    assert all(0 <= row["precision"] <= 1 for row in planted)
    ways = {row["way"]: row["seeds"] for row in read_json(tmp_path / "bank" / "holding.json")["rows"]}
    assert len(ways) == 6
    assert all(len(seeds) == len(holding.SEEDS) for seeds in ways.values())
