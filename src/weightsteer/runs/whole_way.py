"""The whole way in one call: a behaviour's pairs -> fine-tunes -> vector -> calibration -> a page."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..behavior import SHIPPED, Behavior, ContrastPair, pairs_of
from ..data_building.sampling import sample_sides
from ..data_building.sampling_settings import SamplingSettings
from ..data_building.source import Source
from ..errors import SteerError
from ..evaluation.calibration import BUDGET, Calibration
from ..evaluation.dial import calibrate, refuse_budget
from ..example_files.load import load_examples, load_pairs
from ..files import refuse_inputs
from ..judges.judge import LikelihoodJudge
from ..lm import LM
from ..locks import hold
from ..places import public_name, shareable
from ..reporting.calibration_page import write_calibration_page
from ..run_card import CARD_FILE, RunCard, StrengthRange
from ..run_folder import RunFolder
from ..training.both_sides import train_vector
from ..training.settings import TrainSettings
from ..vectors.vector_folder import save_card
from .models import ShowProgress
from .own_data import shown_by

SAMPLED = SamplingSettings(samples=1, max_new_tokens=96)  # of a trait file: one answer to each question and prompt
FEWEST = 8  # pairs that a sampling has to give


@dataclass(frozen=True)
class Made:
    """What came of it."""

    vector: Path
    page: Path
    calibration: Calibration
    commands: tuple[str, ...]  # to try next


def make_dial(
    source: Source,
    lm: LM,
    out: Path,
    *,
    settings: TrainSettings | None = None,
    budget: float = BUDGET,
    show: ShowProgress,
) -> Made:
    """Go from the pairs to a calibrated vector and its page. What is trained already is kept; k is measured anew.

    Raises:
        SteerError: data that cannot be trained on, or `out` holds something else.
    """
    refuse_budget(budget)
    refuse_inputs(out, source.trait, None if source.pairs in SHIPPED else source.pairs)
    run = RunFolder(out)
    if (out / CARD_FILE).exists():
        raise SteerError(f"{out}: holds a {RunCard.load(out).kind}; choose another output with -o")
    with hold(out):
        pairs = load_pairs(source.pairs) if source.pairs else _sampled(source, lm, run, show)
        with show("train") as progress:
            vector = train_vector(lm, pairs, out=out, settings=settings, progress=progress)
        with show("calibrate") as progress:
            found = calibrate(vector, lm, budget=budget, progress=progress)
        card = found.written_into(RunCard.load(run.vector)).with_about(source.described() or shown_by(source.pairs))
        save_card(card, run.vector)
        commands = next_commands(run.vector, found)
        page = write_calibration_page(
            run.page,
            source.name,
            found,
            model=public_name(lm.name),
            description=source.described(),
            commands=next_commands(Path(shareable(run.vector)), found),
        )
    return Made(run.vector, page, found, commands)


def _sampled(source: Source, lm: LM, run: RunFolder, show: ShowProgress) -> list[ContrastPair]:
    """Pairs that the model writes under the trait file's system prompts."""
    assert source.trait is not None
    behavior, sampled = Behavior.load(source.trait), RunFolder(run.sampled)
    with show("the model writes pairs") as progress:
        judge = LikelihoodJudge(lm, behavior)
        sample_sides(lm, behavior, judge, sampled.path, settings=SAMPLED, progress=progress)
    pairs = pairs_of(load_examples(sampled.examples("positive")), load_examples(sampled.examples("negative")))
    if len(pairs) < FEWEST:
        raise SteerError(
            f"{source.trait}: the model wrote {len(pairs)} usable pairs, of {FEWEST} at least; ask more questions, "
            f"take a larger model (-m), or write pairs yourself; its answers are in {sampled.path}"
        )
    return pairs


def next_commands(vector: Path, found: Calibration) -> tuple[str, ...]:
    """The two commands to try next: one prompt at the recommended strengths, and a talk."""
    return commands_for(vector, found.strength, found.prompts[0])


def commands_for(vector: Path, strength: StrengthRange, prompt: str) -> tuple[str, str]:
    """One prompt at the recommended strengths, and a talk at one of them."""
    first = next((line for line in prompt.splitlines() if line.strip()), "Hello, who are you?")
    first = f" {first}" if first.startswith("-") else first  # else it would be read as an option
    place, prompt = shlex.quote(str(vector)), shlex.quote(first)
    ks = ",".join(f"{k:g}" for k in _ks_to_try(strength))
    k = strength.recommended or strength.negative or strength.high / 4
    return (f"weightsteer steer {place} {prompt} --k={ks}", f"weightsteer chat {place} --k={k:g}")


def _ks_to_try(strength: StrengthRange) -> Sequence[float]:
    """The recommended k around 0; where there is none on either side, a quarter of the range."""
    chosen = sorted({strength.negative, 0.0, strength.recommended})
    return chosen if len(chosen) > 1 else (strength.low / 4, 0.0, strength.high / 4)
