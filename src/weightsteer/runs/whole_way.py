"""The whole way in one call: a behaviour's pairs -> fine-tunes -> vector -> calibration -> a page."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..behavior import SHIPPED, Behavior, ContrastPair, pairs_of
from ..data_building.sampling import sample_sides
from ..data_building.sampling_settings import SamplingSettings
from ..data_building.starter import PAIRS, TRAIT
from ..errors import SteerError
from ..evaluation.calibration import BUDGET, Calibration
from ..evaluation.dial import calibrate
from ..example_files.load import load_examples, load_pairs
from ..files import refuse_inputs
from ..judges.judge import LikelihoodJudge
from ..lm import LM
from ..locks import hold
from ..places import public_name, shareable
from ..reporting.calibration_page import write_calibration_page
from ..run_card import CARD_FILE, RunCard, StrengthRange
from ..run_folder import RunFolder
from ..schema import parse_json, read_limited, suggestion
from ..training.both_sides import train_vector
from ..training.settings import TrainSettings
from ..vectors.vector_folder import save_card
from .artifacts import ShowProgress

SAMPLED = SamplingSettings(samples=1, max_new_tokens=96)  # of a trait file: one answer to each question and prompt
FEWEST = 8  # pairs that a sampling has to give


@dataclass(frozen=True)
class Source:
    """What a behaviour is made from: pairs, or a trait file under whose system prompts the model writes them."""

    name: str
    pairs: str | None = None  # a shipped behaviour's name, or a file
    trait: Path | None = None

    @classmethod
    def find(cls, text: str) -> Source:
        """A shipped behaviour, a folder that `init` wrote, a file of pairs, or a trait file; its data are read once.

        Raises:
            SteerError: none of these, or data that cannot be read or are not written yet.
        """
        found = cls._named(text)
        if found.pairs:
            load_pairs(found.pairs)
        found.described()
        return found

    @classmethod
    def _named(cls, text: str) -> Source:
        path = Path(text)
        if text in SHIPPED:
            return cls(text, pairs=text)
        if path.is_dir():
            return cls._in_folder(path)
        if not path.is_file():
            meant = suggestion(text, SHIPPED)
            raise SteerError(
                f"{text}: no such behaviour, file or folder; expected one of {', '.join(SHIPPED)}, a file of pairs, a "
                f"trait file, or a folder made by `weightsteer init`{meant}"
            )
        own = path.stem if path.name not in (PAIRS, TRAIT, "pairs.jsonl") else path.resolve().parent.name
        return cls(own, trait=path) if _is_trait(path) else cls(own, pairs=text)

    @classmethod
    def _in_folder(cls, folder: Path) -> Source:
        name = folder.resolve().name
        for file in (PAIRS, "pairs.jsonl"):
            if (folder / file).is_file():
                return cls(name, pairs=str(folder / file))
        if (folder / TRAIT).is_file():
            return cls(name, trait=folder / TRAIT)
        raise SteerError(f"{folder}: holds neither {PAIRS} nor {TRAIT}; make such a folder with `weightsteer init`")

    def described(self) -> str:
        """One sentence about the behaviour."""
        if self.trait or self.pairs in SHIPPED:
            return Behavior.load(self.trait or str(self.pairs)).description
        return f"The behaviour that the pairs in {Path(str(self.pairs)).name} show."


def _is_trait(path: Path) -> bool:
    """Whether a file is a trait file: a JSON object with system prompts."""
    try:
        fields = parse_json(read_limited(path), str(path))
    except SteerError:
        return False
    return isinstance(fields, dict) and "instruction" in fields


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
        save_card(found.written_into(RunCard.load(run.vector)), run.vector)
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
    place, prompt = shlex.quote(str(vector)), shlex.quote(prompt.splitlines()[0])
    ks = ",".join(f"{k:g}" for k in _ks_to_try(strength))
    k = strength.recommended or strength.negative or strength.high / 4
    return (f"weightsteer steer {place} {prompt} --k={ks}", f"weightsteer chat {place} --k={k:g}")


def _ks_to_try(strength: StrengthRange) -> Sequence[float]:
    """The recommended k around 0; where there is none on either side, a quarter of the range."""
    chosen = sorted({strength.negative, 0.0, strength.recommended})
    return chosen if len(chosen) > 1 else (strength.low / 4, 0.0, strength.high / 4)
