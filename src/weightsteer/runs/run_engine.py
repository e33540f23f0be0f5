"""A run's engine: found, compared with the model here, given the run's vectors; what it will be asked."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..engines.check import Reference
from ..engines.connection import Connection
from ..engines.dialects import dialect_of
from ..engines.kinds import KEYS
from ..engines.served_model import ServedModel
from ..engines.sweep_engine import SweepEngine, served_cell
from ..evaluation.cells import Planned
from ..evaluation.engine_plan import Part, plan_lines
from ..evaluation.results import BASE, LOCAL_BASE
from ..evaluation.tasks.task import Task
from ..files import read_kept, write_json
from ..judges.keys import require_own_key
from ..lm import LM
from ..run_folder import RunFolder
from ..shown import note
from ..steering.methods import METHODS
from .recipe import Recipe
from .recipe_fields import EngineRecipe


class RunEngine:
    """The engine of a recipe, in one run's folder."""

    def __init__(self, recipe: Recipe, wanted: EngineRecipe, folder: RunFolder, keys: Sequence[str]) -> None:
        """Check its address, and that its key may go there.

        Raises:
            SteerError: an address that is none, or a key that is not for it.
        """
        self.recipe, self.wanted, self.folder = recipe, wanted, folder
        self.key_env = wanted.key_env or KEYS[wanted.kind]
        require_own_key(self.key_env, wanted.url, keys, what="engine")
        self.connection = Connection(wanted.url, wanted.concurrency, self.key_env)
        self.retries = self.connection.retries
        self.found: SweepEngine | None = None

    def is_there(self) -> bool:
        """Whether the server can be reached now; a note says so if not, since it is needed once the run has vectors."""
        there = self.connection.is_there
        if not there:
            note(
                f"engine at {self.connection.root}: nothing is there yet; it is needed once the vectors are trained, "
                "and the run stops there if it is still missing"
            )
        return there

    def meet(self, lm: LM) -> SweepEngine:
        """The server, compared with the model here at k = 0.

        Raises:
            SteerError: it cannot be reached, or serves another model.
        """
        if self.found is None:
            wanted = self.wanted
            served = ServedModel.connect(
                wanted.url,
                wanted.kind,
                lm,
                reference=self._reference(lm),
                concurrency=wanted.concurrency,
                key_env=self.key_env,
                retries=self.retries,
            )
            self.found = SweepEngine(served)
            self._keep(served)
        return self.found

    def _reference(self, lm: LM) -> Reference:
        """What the base here gives: measured once in a run."""
        kept = read_kept(self.folder.engine, dict[str, object]) or {}
        means = kept.get("base log-probabilities")
        fresh = Reference.of(lm, self.wanted.tolerance) if not isinstance(means, list) else None
        if fresh is not None:
            return fresh
        assert isinstance(means, list)
        return Reference([float(mean) for mean in means], Reference.tolerance_for(lm, self.wanted.tolerance))

    def _keep(self, served: ServedModel) -> None:
        assert served.reference is not None
        record = {
            "kind": served.kind,
            "serves": served.session.base,
            "base log-probabilities": list(served.reference.means),
            "tolerance": served.reference.tolerance,
            "largest difference": served.session.worst,
        }
        write_json(self.folder.engine, record)

    def ready(self, plan: Sequence[Planned], lm: LM) -> SweepEngine:
        """The server with the run's vectors, each compared with the model here; what it will be asked is told.

        Raises:
            SteerError: as `meet`; or it does not know a vector, or steers otherwise than the model here.
        """
        engine = self.meet(lm)
        methods = [(cell.method, [cell.k]) for cell in plan if cell.method is not None]
        self.found = engine.with_vectors(methods, Path(self.wanted.vectors), self.recipe.name, lm)
        _tell(self.wanted, plan_lines(_parts(plan), lm, engine.served.dialect))
        return self.found

    def tell_plan(self, tasks: Sequence[Task], lm: LM) -> None:
        """Say before the start which method will be measured where, and about what it will cost."""
        sweep = self.recipe.sweep
        parts = [Part(BASE, 1, tasks)]
        for name in (*sweep.variants, *sweep.methods):
            listed = sweep.methods.get(name)
            searched = len(sweep.sides) * len(sweep.fractions_of.get(name, sweep.fractions))
            count = searched if listed is None else len([k for k in listed if k])
            here = METHODS[name].in_memory if name in METHODS else ""
            own = list(tasks) if name == "contrastive" else [t.of_split("test") for t in tasks if "test" in t.splits]
            parts.append(
                Part(name, count, [t.first(sweep.items_of[name]) for t in own] if name in sweep.items_of else own, here)
            )
        _tell(self.wanted, plan_lines(parts, lm, dialect_of(self.wanted.kind, "", 0)))


def _tell(wanted: EngineRecipe, lines: Sequence[str]) -> None:
    note("\n".join([f"engine: {wanted.kind} at {wanted.url}, {wanted.concurrency} requests at once", *lines]))


def _parts(plan: Sequence[Planned]) -> list[Part]:
    """The plan by methods, and by why their cells do not run on the server."""
    groups: dict[tuple[str, str], list[Planned]] = {}
    for planned in plan:
        cell = served_cell(planned.method, planned.k)
        here = "is what those in memory are compared with" if planned.name == LOCAL_BASE else ""
        groups.setdefault((planned.name, cell if isinstance(cell, str) else here), []).append(planned)
    return [Part(name, len(cells), cells[0].tasks, here) for (name, here), cells in groups.items() if cells[0].tasks]
