"""An engine as the place where a sweep's measurements run: which of them it takes, and by which vector's name."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from ..beside import as_they_end
from ..chat_template import PromptLike
from ..checkpoints.checkpoint import ADAPTER_FILE
from ..errors import SteerError
from ..files import sha256_of
from ..judges.asking import stop_asking
from ..lm import LM
from ..progress import Progress, silent
from ..steering.steering import Direction, Steering, SystemPrompt, TrainedCheckpoints
from ..strength_names import on_grid
from ..vectors.low_rank import LowRank
from ..vectors.weight_vector import WeightVector
from .check import require_strengths
from .served_model import ServedModel

HASH_DIGITS = 10


@dataclass(frozen=True)
class Cell:
    """A vector and its strength, or a system prompt: what a server does in place of a method at k."""

    vector: WeightVector | None = None
    k: float = 0.0
    system_prompt: str | None = None
    key: str = ""  # what the vector is kept under: the method, and of trained checkpoints their k


def served_cell(method: Steering | None, k: float) -> Cell | str:
    """What a server does for a method at k, or why it cannot."""
    if method is None or not k:
        return Cell()
    if isinstance(method, SystemPrompt):
        return Cell(system_prompt=method.prompt_at(k))
    if isinstance(method, TrainedCheckpoints) and k in method.changes:
        return _of_vector(method.changes[k], 1.0, f"{method.name} {k:g}")
    if isinstance(method, Direction) and isinstance(method.vector, WeightVector):
        return _of_vector(method.vector, k, method.name)
    return "reads or changes activations"


def _of_vector(vector: WeightVector, k: float, key: str) -> Cell | str:
    if not all(isinstance(vector.deltas[name], LowRank) for name in vector.deltas):
        return "is no low-rank change of weights alone"
    if on_grid(k) != k:
        return "has a k between two that a model's name can say"
    return Cell(vector, k, key=key)


@dataclass(frozen=True)
class SweepEngine:
    """A served model and the names of the vectors that were handed to its server.

    Args:
        names: what a vector is kept under (see `Cell`) -> its name at the server.
    """

    served: ServedModel
    names: Mapping[str, str] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """What kind of server it is; measurements keep it."""
        return self.served.kind

    def model_at(self, method: Steering | None, k: float) -> ServedModel | None:
        """The served model under a method at k; None where that has to run here."""
        cell = served_cell(method, k)
        if isinstance(cell, str):
            return None
        if cell.system_prompt is not None:
            return self.served.with_system_prompt(cell.system_prompt)
        if cell.vector is None:
            return self.served
        return self.served.steered({self.names[cell.key]: cell.k})

    def replies(
        self,
        method: Steering,
        ks: Sequence[float],
        prompts: Sequence[PromptLike],
        *,
        max_new_tokens: int,
        progress: Progress = silent,
    ) -> list[list[str]] | None:
        """For each k the greedy replies to all prompts, several k at once; None where one of them has to run here.

        Raises:
            SteerError: as `ServedModel.replies`.
        """
        models = [self.model_at(method, k) for k in ks]
        if None in models:
            return None
        found: dict[int, list[str]] = {}

        def work(place: int, served: ServedModel) -> tuple[int, list[str]]:
            return place, served.generate(prompts, max_new_tokens=max_new_tokens)

        works = [partial(work, place, served) for place, served in enumerate(models) if served is not None]
        with self.served.connection.shared() as most:
            at_once = most if self.served.dialect.mixes_strengths else 1
            with closing(as_they_end(works, at_once=at_once, stop=stop_asking)) as all_ended:
                for place, replies in (ended.result() for ended in all_ended):
                    found[place] = replies
                    progress(len(found), len(ks), f"k = {ks[place]:g}")
        return [found[place] for place in range(len(ks))]

    def with_vectors(
        self, methods: Sequence[tuple[Steering, Sequence[float]]], folder: Path, run: str, lm: LM
    ) -> SweepEngine:
        """The engine with the methods' vectors: written into the folder, known to the server, and compared.

        Raises:
            SteerError: the server does not know a vector, or steers otherwise than the model here.
        """
        cells = [cell for method, ks in methods for k in ks if not isinstance(cell := served_cell(method, k), str)]
        vectors = {cell.key: cell.vector for cell in cells if cell.vector is not None}
        names = {key: hand_over(vector, f"{run}-{key}", folder) for key, vector in vectors.items()}
        self._require_known(list(names.values()), folder)
        assert self.served.reference is not None
        for key, vector in vectors.items():
            ks = sorted({cell.k for cell in cells if cell.key == key})
            ends = ks if len(ks) < 2 else [ks[0], ks[-1]]
            require_strengths(self.served, names[key], lm, vector, ends, self.served.reference.tolerance)
        if not names:
            return SweepEngine(self.served)
        dialect = self.served.dialect.beside(next(iter(names.values())))
        return SweepEngine(replace(self.served, dialect=dialect), names)

    def _require_known(self, wanted: Sequence[str], folder: Path) -> None:
        known = self.served.vectors()
        missing = [] if known is None else [name for name in wanted if name not in known]
        if not missing:
            return
        if self.served.kind == "llama.cpp":
            files = shlex.quote(",".join(f"{folder / name}.gguf:0" for name in wanted))
            place = folder / missing[0]
            made = shlex.join(["weightsteer", "export", "gguf-lora", str(place), "-o", f"{place}.gguf"])
            way = f"make each vector's file, as by `{made}`, start the server with --cache-ram 0 --lora-scaled {files}"
        else:
            way = f"start the server with `{shlex.join(['weightsteer', 'serve', *(str(folder / n) for n in wanted)])}`"
        raise SteerError(
            f"engine at {self.served.address}: does not know the vector {missing[0]}; {way}, and give the command "
            "again: it goes on from here"
        )


def hand_over(vector: WeightVector, name: str, folder: Path) -> str:
    """Write a vector where the server looks for it; returns its name there, which ends in a hash of its content.

    So a vector that was trained anew has another name, and no cache of the server mixes the two.
    """
    plain = re.sub(r"[^A-Za-z0-9_.-]+", "-", name).strip("-.") or "vector"
    part = vector.save(folder / f".{plain}.handed")  # no name that a server reads
    called = f"{plain}-{sha256_of(part / ADAPTER_FILE)[:HASH_DIGITS]}"
    if (folder / called / ADAPTER_FILE).is_file():
        shutil.rmtree(part)
    else:
        part.replace(folder / called)
    return called
