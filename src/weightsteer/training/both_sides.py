"""Pairs of answers -> the weight vector between two fine-tunes: the whole of the method in one call."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

from ..behavior import SHIPPED, SIDES, ContrastPair, sides_of
from ..checkpoints.whole import is_whole
from ..example_files.checks import refuse_unfit, warn_unfit
from ..example_files.load import load_pairs
from ..files import refuse_inputs
from ..fitting import kept_in
from ..lm import LM
from ..locks import hold
from ..progress import Progress, part_of, silent
from ..run_folder import RunFolder
from ..vectors.difference import subtract_finetunes
from ..vectors.visibility import why_unseen
from ..vectors.weight_vector import WeightVector
from .settings import TrainSettings
from .sft import train_side


def train_vector(
    lm: LM,
    pairs: str | Path | Sequence[ContrastPair],
    *,
    out: str | Path,
    settings: TrainSettings | None = None,
    progress: Progress = silent,
) -> WeightVector:
    """Fine-tune on each side of the pairs and subtract: w = theta+ - theta- (paper, section 2). `lm` stays as it was.

    In `out` come to lie `positive` and `negative`, the two fine-tunes, and `vector`. A killed call goes on where it
    stopped; a finished one with the same pairs and settings only loads the vector.

    Args:
        pairs: a shipped behaviour's name, a file that `load_pairs` reads, or a list of pairs.
        progress: called with steps done, steps in all, and the loss.

    Raises:
        SteerError: pairs that cannot be read, too few of them, or whose sides are equal, or `out` holds something else.
    """
    run = RunFolder(Path(out))
    if isinstance(pairs, str | Path) and str(pairs) not in SHIPPED:
        refuse_inputs(run.path, pairs)
    sides = sides_of(load_pairs(pairs) if isinstance(pairs, str | Path) else pairs)
    refuse_unfit(*sides)
    warn_unfit(*sides, lm.tokenizer)
    with hold(run.path), kept_in(run.batches):
        finetunes = []
        for number, (side, examples) in enumerate(zip(SIDES, sides, strict=True)):
            report = part_of(progress, number, len(SIDES), side)
            finetunes.append(train_side(lm, examples, run.finetune(side), settings=settings, progress=report))
        vector = subtract_finetunes(*finetunes)
        if not is_whole(run.vector) or WeightVector.load(run.vector).card.data_sha256 != vector.card.data_sha256:
            vector.save(run.vector)
        if unseen := why_unseen(vector, (-1.0, 1.0)):
            warnings.warn(unseen, stacklevel=2)
        return WeightVector.load(run.vector)
