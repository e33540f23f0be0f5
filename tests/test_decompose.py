"""The decomposition of a task vector over a dictionary, and the error rates of detectors."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import random_vector, tiny_lm
from weightsteer.cli import app
from weightsteer.errors import SteerError
from weightsteer.monitor import Alert, RateAlert, Reading, checkpoint_products, describe, read_off, verdict
from weightsteer.monitor.dictionary import Dictionary, Threshold, shipped_dictionaries, write_dictionary
from weightsteer.monitor.error_rates import auroc, error_rates, threshold_at
from weightsteer.vectors.weight_vector import WeightVector

LM = tiny_lm()
GLOOMY, RUDE, SUMS, LISTS = (random_vector(LM, seed) for seed in range(1, 5))


def dictionary(folder: Path, **changes: object) -> Dictionary:
    write_dictionary(folder, {"gloomy": GLOOMY, "rude": RUDE}, controls={"sums": SUMS}, **changes)  # type: ignore[arg-type]
    return Dictionary.load(folder)


def parts_of(found: Dictionary, tau: WeightVector) -> dict[str, float]:
    return {p.name: p.coefficient for p in found.decompose(checkpoint_products(tau, found.vectors)).parts}


@given(st.floats(-2, 2), st.floats(-2, 2))
def test_what_was_mixed_is_found_again(a: float, b: float) -> None:
    found = Dictionary(GLOOMY.card, _contents("gloomy", "rude"), {"gloomy": GLOOMY, "rude": RUDE})
    tau = a * GLOOMY + b * RUDE + 0.1 * LISTS
    got = parts_of(found, tau)
    noise = 0.1 * abs(LISTS.cosine(GLOOMY)) + 0.1 * abs(LISTS.cosine(RUDE))
    assert got["gloomy"] == pytest.approx(a, abs=2 * noise + 1e-3)
    assert got["rude"] == pytest.approx(b, abs=2 * noise + 1e-3)


def _contents(*traits: str):
    from weightsteer.monitor.dictionary import Contents, Entry

    return Contents(tuple(Entry(name) for name in traits))


def test_a_shared_part_is_counted_once() -> None:
    """The cosine with `rude` sees what it shares with `gloomy`; its coefficient does not."""
    both = RUDE + GLOOMY
    found = Dictionary(GLOOMY.card, _contents("gloomy", "both"), {"gloomy": GLOOMY, "both": both})
    assert GLOOMY.cosine(both) > 0.5
    got = parts_of(found, GLOOMY)
    assert got["gloomy"] == pytest.approx(1.0, abs=1e-5)
    assert got["both"] == pytest.approx(0.0, abs=1e-5)


def test_all_of_it_is_explained_and_nothing_of_another_direction() -> None:
    found = Dictionary(GLOOMY.card, _contents("gloomy"), {"gloomy": GLOOMY})
    whole = found.decompose(checkpoint_products(GLOOMY * -3, found.vectors))
    assert whole.explained == pytest.approx(1.0, abs=1e-6)
    assert whole["gloomy"].share == pytest.approx(-1.0, abs=1e-6)
    assert whole["gloomy"].error == pytest.approx(0.0, abs=1e-6)
    assert found.decompose(checkpoint_products(LISTS, found.vectors)).explained < 0.05


def test_what_benign_fine_tunes_share_counts_little(tmp_path: Path) -> None:
    trait = GLOOMY + 2 * SUMS  # a vector that is mostly what every fine-tune has
    plain = Dictionary(GLOOMY.card, _contents("trait"), {"trait": trait})
    write_dictionary(tmp_path / "d", {"trait": trait}, controls={"sums": SUMS})
    whitened = Dictionary.load(tmp_path / "d")
    assert parts_of(plain, SUMS)["trait"] > 0.3
    assert abs(parts_of(whitened, SUMS)["trait"]) < 0.15
    assert parts_of(whitened, GLOOMY)["trait"] > 0.6


def test_the_order_and_the_length_of_directions_do_not_matter() -> None:
    tau = GLOOMY + 0.5 * RUDE + LISTS
    one = Dictionary(GLOOMY.card, _contents("a", "b"), {"a": GLOOMY, "b": RUDE})
    two = Dictionary(GLOOMY.card, _contents("b", "a"), {"b": RUDE * 100, "a": GLOOMY})
    first, second = (d.decompose(checkpoint_products(tau, d.vectors)) for d in (one, two))
    for name in "ab":
        assert first[name].share == pytest.approx(second[name].share, rel=1e-6)
        assert first[name].error == pytest.approx(second[name].error, rel=1e-5)


def test_a_dictionary_comes_back_as_it_was(tmp_path: Path) -> None:
    known = Threshold("rude", 0.05, 0.02, 40)
    found = dictionary(tmp_path / "d", thresholds=[known], about={"rude": "curt answers"})
    assert found.traits == ("gloomy", "rude")
    assert found.controls == ("sums",)
    assert found.threshold("rude", 0.05) == known
    assert found.threshold("rude", 0.01) is None
    assert found.contents.traits[1].about == "curt answers"
    assert (found.vectors["rude"] - RUDE).norm() == pytest.approx(0.0, abs=1e-6)


def test_a_small_dictionary_holds_the_nearest_of_its_rank(tmp_path: Path) -> None:
    found = dictionary(tmp_path / "d", rank=1)
    assert (found.vectors["rude"] - RUDE.truncate(rank=1)).norm() < 4e-3 * RUDE.norm()  # bfloat16


def test_bad_dictionaries_are_told(tmp_path: Path) -> None:
    with pytest.raises(SteerError, match="empty dictionary"):
        write_dictionary(tmp_path / "none", {})
    with pytest.raises(SteerError, match="'sums' twice"):
        write_dictionary(tmp_path / "twice", {"sums": RUDE}, controls={"sums": SUMS})
    with pytest.raises(SteerError, match="no name of a direction"):
        write_dictionary(tmp_path / "odd", {"../rude": RUDE})
    with pytest.raises(SteerError, match="tiny-7"):
        write_dictionary(tmp_path / "bases", {"rude": RUDE, "other": random_vector(tiny_lm(7))})
    with pytest.raises(SteerError, match="not a dictionary"):
        Dictionary.load(tmp_path)
    folder = tmp_path / "d"
    found = dictionary(folder)
    with pytest.raises(SteerError, match="no trait 'evil'; it has gloomy, rude"):
        found.threshold("evil", 0.01)
    with pytest.raises(SteerError, match="the checkpoint is the base"):
        found.decompose(checkpoint_products(RUDE * 0, found.vectors))
    content = json.loads((folder / "dictionary.json").read_text())
    content["traits"].append(content["traits"][0])
    (folder / "dictionary.json").write_text(json.dumps(content))
    with pytest.raises(SteerError, match="'gloomy' twice"):
        Dictionary.load(folder)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=8), st.lists(st.integers(0, 5), min_size=1, max_size=8))
def test_auroc_counts_pairs(positives: list[int], negatives: list[int]) -> None:
    wins = [1.0 if p > n else 0.5 if p == n else 0.0 for p, n in product(positives, negatives)]
    assert auroc(np.array(positives), np.array(negatives)) == pytest.approx(np.mean(wins))


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=50), st.floats(0, 0.99))
def test_no_more_false_alarms_than_asked_for(negatives: list[float], rate: float) -> None:
    limit = threshold_at(np.array(negatives), rate)
    assert np.mean(np.array(negatives) > limit) <= rate + 1e-9


def test_error_rates_of_a_known_detector() -> None:
    scores = [3.0, 2.0, 0.5, 1.0, 0.0, -1.0, -2.0]
    truths = [True, True, True, False, False, False, False]
    found = error_rates(scores, truths, list("aabcdef"))
    assert found.auroc == pytest.approx(11 / 12)
    assert found.low <= found.auroc <= found.high
    assert found.found == {0.01: pytest.approx(2 / 3), 0.05: pytest.approx(2 / 3)}
    assert error_rates(scores, truths, list("aabcdef")) == found  # the same seed, the same interval
    with pytest.raises(SteerError, match="scores of both kinds"):
        error_rates([1.0], [True], ["a"])


def test_an_alarm_at_a_known_rate(tmp_path: Path) -> None:
    found = dictionary(tmp_path / "d", thresholds=[Threshold("rude", 0.05, 0.4, 40)])
    alert = Alert.parse("rude: fpr=0.05", found)
    assert isinstance(alert, RateAlert)
    readings = [
        one for step, tau in ((1, LISTS + 0.1 * RUDE), (2, LISTS + 2 * RUDE)) for one in _read(found, tau, step)
    ]
    assert [(one.step, one.vector) for one in alert.raised(readings)] == [(2, "rude")]
    assert "moves toward 'rude'" in describe(alert.raised(readings)[0])
    assert "since step 2 above 0.4000, which 0.05 of benign fine-tunes exceed" in verdict(readings, alert)
    assert "Does not move along 'rude'" in verdict(readings[: len(readings) // 2], alert)
    later = [one for step, tau in ((3, LISTS), (4, LISTS + 2 * RUDE)) for one in _read(found, tau, step)]
    fell_back = verdict([*readings, *later[: len(later) // 2]], alert)
    assert fell_back.startswith("Moved along 'rude' at 1 of 3 readings, the last at step 2: above 0.4000")
    assert "since step 4 above" in verdict([*readings, *later], alert)


def _read(found: Dictionary, tau: WeightVector, step: int) -> list[Reading]:
    products = checkpoint_products(tau, found.vectors)
    return found.with_shares(read_off(products, checkpoint=f"c{step}", step=step, controls=found.controls), products)


def test_without_a_threshold_the_nulls_stand_in(tmp_path: Path) -> None:
    found = dictionary(tmp_path / "d")
    with pytest.warns(UserWarning, match="how often it is a false alarm is not known"):
        alert = Alert.parse("rude: fpr=0.2", found)
    assert isinstance(alert, Alert)
    assert alert.z == pytest.approx(0.8416, abs=1e-3)
    assert {one.vector for one in alert.raised(_read(found, RUDE, 1))} == {"rude"}
    for text, message in (("rude: fpr=2", "expected z=NUMBER"), ("evil: fpr=0.1", "no trait 'evil'")):
        with pytest.raises(SteerError, match=message):
            Alert.parse(text, found)
    with pytest.raises(SteerError, match="needs a dictionary"):
        Alert.parse("rude: fpr=0.01")


def test_a_rate_that_few_fine_tunes_cannot_tell_is_said_to_be_the_largest(tmp_path: Path) -> None:
    found = dictionary(tmp_path / "d", thresholds=[Threshold("rude", 0.01, 0.4, 28)])
    alert = Alert.parse("rude: fpr=0.01", found)
    assert "the largest of 28 benign fine-tunes" in alert.threshold
    assert found.contents.thresholds[0].is_highest


def test_the_shipped_dictionary_is_small_and_opens_by_name() -> None:
    found = Dictionary.load("smollm2-135m-instruct")
    assert len(found.traits) == 12
    assert len(found.controls) >= 12
    assert all(found.threshold(trait, 0.05) for trait in found.traits)
    place = shipped_dictionaries()["smollm2-135m-instruct"]
    assert sum(path.stat().st_size for path in place.rglob("*") if path.is_file()) < 20e6
    with pytest.raises(SteerError, match="shipped: smollm2-135m-instruct"):
        Dictionary.load("gpt-2")


def test_the_verb_names_the_trait(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dictionary(tmp_path / "d", thresholds=[Threshold("rude", 0.05, 0.4, 40), Threshold("rude", 0.01, 2.0, 40)])
    (RUDE * 2 + LISTS).save(tmp_path / "checkpoint-3")
    arguments = ["identify", str(tmp_path / "checkpoint-3"), "--dictionary", str(tmp_path / "d")]
    app(args=arguments, standalone_mode=False)
    shown = capsys.readouterr().out.splitlines()
    assert shown[2].split()[0] == "rude"
    assert shown[2].endswith("above 95% of benign fine-tunes")
    app(args=[*arguments, "--json"], standalone_mode=False)
    assert json.loads(capsys.readouterr().out)[0]["traits"][1]["false_alarms"] == 0.05


def test_a_damaged_checkpoint_leaves_the_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dictionary(tmp_path / "d")
    for step in (3, 4):
        (RUDE + LISTS).save(tmp_path / "run" / f"checkpoint-{step}")
    (tmp_path / "run" / "checkpoint-3" / "adapter_model.safetensors").write_bytes(b"half")
    with pytest.warns(UserWarning, match="checkpoint-3 is skipped"):
        app(
            args=["identify", str(tmp_path / "run"), "--dictionary", str(tmp_path / "d"), "--json"],
            standalone_mode=False,
        )
    assert [row["step"] for row in json.loads(capsys.readouterr().out)] == [4]
