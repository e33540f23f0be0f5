"""theta + k w as a checkpoint, streamed: memory holds a few blocks, whatever the model's size."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ..checkpoints.architecture import Place, is_buffer_name
from ..checkpoints.checkpoint import shards_of
from ..checkpoints.links import file_within
from ..checkpoints.locate import refuse_adapter_beside
from ..checkpoints.parameters import Checkpoint, open_checkpoint
from ..checkpoints.safetensors_file import FLOATS, Planned, SafeFile, Stored, bytes_of, header_of, matrix_shape
from ..errors import SteerError
from ..files import digest, read_json, refuse_inputs
from ..places import public_name
from ..progress import Progress, silent
from ..run_card import new_folder
from ..schema import require_finite_k, shown
from ..threads import worker_pool
from ..vectors.delta import Delta, Scratch, add_rows, blocks, digest_of, layout_of
from ..vectors.low_rank import ALONE, LowRank
from ..vectors.weight_vector import WeightVector
from .model_card import carry_config, carry_over, write_lineage
from .rounding import DTYPES, Dither, MergeReport, Rounding, Tally, default_rounding, dither_

COPY = 1 << 20  # bytes copied at a time
MEASURE = 32  # one block in so many is measured, the first of each tensor always,
SAMPLE = 1 << 14  # on about so many of its entries: 1 in 500 of a large model's, all of a tiny one's


MOST_WORKERS = 1024  # threads


@dataclass(frozen=True)
class MergeSettings:
    """How theta + k w is written.

    `dtype` float32, bfloat16 or float16 for every floating tensor; None keeps each one's own. `rounding` nearest, or
    stochastic with `seed`; None takes what keeps more of the effect: stochastic where the base is bfloat16 and stays
    so, nearest else. `workers` threads; None is one a core.
    """

    dtype: str | None = None
    rounding: Rounding | None = None
    seed: int = 0
    workers: int | None = None

    def __post_init__(self) -> None:
        if self.dtype is not None and self.dtype not in DTYPES:
            raise SteerError(f"dtype: expected {', '.join(DTYPES)}, found {self.dtype!r}")
        if self.rounding not in (None, "nearest", "stochastic"):
            raise SteerError(f"rounding: expected nearest or stochastic, found {self.rounding!r}")
        if self.workers is not None and not 1 <= self.workers <= MOST_WORKERS:
            raise SteerError(f"workers: expected 1 to {MOST_WORKERS}, found {shown(self.workers)}; one a core is best")
        if not -(2**63) <= self.seed < 2**63:
            raise SteerError(f"seed: expected a number of at most 63 bits, found {shown(self.seed)}")

    def written(self, dtype: str) -> str:
        """The dtype, as safetensors names it, in which a tensor of `dtype` comes out."""
        if self.dtype is None or dtype not in FLOATS:
            return dtype
        return next(name for name, kind in FLOATS.items() if kind == DTYPES[self.dtype])

    def written_of(self, name: str, dtype: str) -> str:
        """The dtype in which a tensor comes out: a constant keeps its own, since it may hold what float16 does not."""
        return dtype if is_buffer_name(name) else self.written(dtype)

    def how(self, dtype: str) -> Rounding:
        """How a tensor that is stored in `dtype` is rounded."""
        return self.rounding or default_rounding(FLOATS[dtype], FLOATS[self.written(dtype)])


def export_merged(
    vector: WeightVector,
    base: str | Path,
    folder: str | Path,
    *,
    k: float,
    settings: MergeSettings | None = None,
    progress: Progress = silent,
) -> MergeReport:
    """Write theta + k w as a checkpoint with the base's shards, dtypes, config and tokenizer.

    `base` is the vector's base or a later fine-tune of it. Each tensor is read, changed in float32, rounded once and
    written in blocks of rows, by several workers; tensors that the vector does not touch keep every byte. The
    folder appears only when whole, and its config, without which nothing loads it, is written last. Card, README and
    result tell how much of k w survived the rounding.

    Raises:
        SteerError: a quantised or damaged base, a parameter that the base lacks or has in another shape or ties to
            another, a result that is not finite, or an output that would overwrite something.
    """
    require_finite_k(k)
    settings, base, folder = settings or MergeSettings(), Path(base), Path(folder)
    refuse_adapter_beside(base)
    source = open_checkpoint(base)
    for shard in shards_of(base):
        file_within(shard, base)
    changes = _find_touched(vector, source)
    refuse_inputs(folder, base)
    read_json(file_within(base / "config.json", base))  # it is carried over last
    plan = _Plan(source, vector.deltas, changes if k else {}, k, settings)
    with new_folder(folder, "merged") as part:
        tally, sha256 = _write_shards(plan, part, progress)
        dtypes = {source.tensors[name].dtype for name in changes}
        kinds = sorted({FLOATS[settings.written(dtype)] for dtype in dtypes}, key=str)
        roundings = sorted({settings.how(dtype) for dtype in dtypes})
        written = " and ".join(str(kind).removeprefix("torch.") for kind in kinds)
        report = tally.report(written, " and ".join(roundings), sha256)
        carry_over(base, part, settings.dtype)
        origin = {"k": k, "merged into": public_name(str(base.absolute())), **asdict(replace(settings, workers=None))}
        write_lineage(vector.card, base, part, origin, report)
        carry_config(base, part, settings.dtype)
    return report


@dataclass(frozen=True)
class Change:
    """Rows of a stored tensor to which rows of one of the vector's deltas are added."""

    name: str  # of the delta, in the vector
    place: Place
    shape: tuple[int, ...]  # of the whole parameter in this base


def _find_touched(vector: WeightVector, base: Checkpoint) -> dict[str, tuple[Change, ...]]:
    """Tensor of the base -> what changes it; a tied twin is changed with its keeper."""
    names = {base.name_of(name): name for name in vector.deltas}
    if len(names) < len(vector.deltas):
        raise SteerError(f"{base.folder}: two of the vector's names mean one of its parameters; make the vector anew")
    for parameter, name in names.items():
        if parameter not in base.shapes:
            raise (
                _tied_error(name, base.folder)
                if parameter in base.tied
                else SteerError(
                    f"{name}: the vector changes it, but {base.folder} has no such tensor; use the vector's base, "
                    "or steer in memory if it is a bias or an output embedding that this checkpoint lacks"
                )
            )
    found = {}
    for stored, places in base.places.items():
        changes = [Change(names[p.name], p, base.shapes[p.name]) for p in places if p.name in names]
        if changes and base.tensors[stored].dtype not in FLOATS:
            raise SteerError(
                f"{stored}: has dtype {base.tensors[stored].dtype} in {base.folder}, expected {', '.join(FLOATS)}; "
                "use `weightsteer export peft` and serve the adapter over it"
            )
        if changes:
            found[stored] = tuple(changes)
    return found


def _tied_error(name: str, base: Path) -> SteerError:
    return SteerError(
        f"{name}: {base} ties input and output embedding, and the vector changes one of them alone; "
        "serve the adapter, or steer in memory"
    )


def _require_fit(change: Change, delta: Delta, base: Path, tied: Collection[str]) -> None:
    """Raise unless the delta can be added to the parameter."""
    if change.shape != tuple(delta.shape):
        raise SteerError(
            f"{change.name}: the vector was made on a base of shape {tuple(delta.shape)}, {base} has {change.shape}; "
            "use the base named in the vector's card"
        )
    if layout_of(delta) in ALONE and change.place.name in tied:
        raise _tied_error(change.name, base)


@dataclass(frozen=True)
class _Plan:
    """What is to be written: every tensor of the base, and which of the vector's deltas go into it."""

    base: Checkpoint
    deltas: Mapping[str, Delta]
    changes: Mapping[str, tuple[Change, ...]]  # stored tensor -> what changes it
    k: float
    settings: MergeSettings


def _write_shards(plan: _Plan, part: Path, progress: Progress) -> tuple[Tally, str]:
    """Write every shard; returns the sums of what rounding did, and the hash of the deltas."""
    largest_first = sorted(plan.base.tensors.values(), key=lambda tensor: -tensor.nbytes)
    with _outputs(plan.base.folder, part, plan.settings) as files, worker_pool(plan.settings.workers) as pool:
        running = []
        for tensor in largest_first:
            out, offsets, start = files[tensor.file.path.name]
            job = _Job(tensor, out, start + offsets[tensor.name], plan.k, plan.settings, plan.base.tied)
            changes = plan.changes.get(tensor.name)
            running.append(pool.submit(job.merge, plan.deltas, changes) if changes else pool.submit(job.copy))
        results = _gather(running, pool, progress)
    tally = Tally()
    hashes: dict[str, str] = {}
    for one, found in results:
        tally.merge(one)
        hashes |= found
    return tally, digest(hashes)


Result = tuple[Tally, dict[str, str]]  # what rounding did, and the hashes of the deltas


def _gather(running: Sequence[Future[Result]], pool: ThreadPoolExecutor, progress: Progress) -> list[Result]:
    """Results as they come; the first error, or a stop from the keyboard, ends the rest."""
    pending = set(running)
    try:
        while pending:
            progress(len(running) - len(pending), len(running), "merge")
            done, pending = wait(pending, return_when=FIRST_COMPLETED)
            for future in done:
                future.result()
    except BaseException:
        pool.shutdown(wait=True, cancel_futures=True)
        raise
    progress(len(running), len(running), "done")
    return [future.result() for future in running]


@contextmanager
def _outputs(base: Path, part: Path, settings: MergeSettings) -> Iterator[dict[str, tuple[int, dict[str, int], int]]]:
    """Every output shard at its full size: file descriptor, offset of each tensor's data, start of the data."""
    files: dict[str, tuple[int, dict[str, int], int]] = {}
    try:
        for shard in shards_of(base):
            source = SafeFile(shard)
            header, offsets, size = _layout(source, settings)
            out = os.open(part / shard.name, os.O_CREAT | os.O_WRONLY | os.O_EXCL, 0o666)
            files[shard.name] = (out, offsets, len(header))
            os.pwrite(out, header, 0)
            os.ftruncate(out, len(header) + size)
        yield files
    finally:
        for out, _, _ in files.values():
            os.close(out)


def _layout(source: SafeFile, settings: MergeSettings) -> tuple[bytes, dict[str, int], int]:
    """The output's header, each tensor's offset in its data, and the data's size; the source's own where it fits."""
    plan = {
        name: Planned(settings.written_of(name, tensor.dtype), tensor.shape)
        for name, tensor in sorted(source.tensors.items(), key=lambda item: item[1].start)
    }
    if all(plan[name].dtype == tensor.dtype for name, tensor in source.tensors.items()):
        offsets = {name: tensor.start for name, tensor in source.tensors.items()}
        size = max((tensor.end for tensor in source.tensors.values()), default=0)
        return bytes(source.read(0, source.data_start)), offsets, size
    offsets, at = {}, 0
    for name, tensor in plan.items():
        offsets[name], at = at, at + tensor.nbytes
    return header_of(plan, source.metadata), offsets, at


@dataclass(frozen=True)
class _Job:
    """One tensor of one shard, and where it goes."""

    tensor: Stored
    out: int
    at: int
    k: float
    settings: MergeSettings
    tied: Collection[str]  # embeddings that are input and output in one

    def copy(self) -> Result:
        """The tensor as it is, byte for byte, or in the output's dtype."""
        written = self.settings.written_of(self.tensor.name, self.tensor.dtype)
        if written != self.tensor.dtype:
            at = self.at
            for start, stop in blocks(self.tensor.shape):
                block = self.tensor.rows(start, stop).float()
                if not _is_finite_in(block, FLOATS[written]):
                    raise SteerError(
                        f"{self.tensor.name}: the vector does not change it, and it holds values that {written} has "
                        "not; take bfloat16 or float32, and if it holds NaN, another copy of the base"
                    )
                at += _put(self.out, block.to(FLOATS[written]), at)
            return Tally(), {}
        for done in range(0, self.tensor.nbytes, COPY):
            length = min(COPY, self.tensor.nbytes - done)
            chunk = bytes_of(_SCRATCH.space.take("copy", 1, length, torch.uint8))
            self.tensor.file.read_into(chunk, self.tensor.file.data_start + self.tensor.start + done)
            _put_bytes(self.out, chunk, self.at + done)
        return Tally(), {}

    def merge(self, deltas: Mapping[str, Delta], changes: Sequence[Change]) -> Result:
        """theta + k delta in float32, rounded once, block by block."""
        made = [(change.place, self._read(deltas, change)) for change in changes]
        dtype = FLOATS[self.settings.written(self.tensor.dtype)]
        rounding = self.settings.how(self.tensor.dtype)
        first = changes[0].place  # by the parameter: tied copies stay equal, and are tied when they are loaded
        dither = Dither(self.settings.seed, f"{first.name} {first.at}" if first.at else first.name)
        tally, at, columns = Tally(tensors=1), self.at, matrix_shape(self.tensor.shape)[1]
        for number, (start, stop) in enumerate(blocks(self.tensor.shape)):
            raw = _SCRATCH.space.take("theta", stop - start, columns, FLOATS[self.tensor.dtype])
            theta = self.tensor.rows_into(raw, start)
            total = _SCRATCH.space.take("total", stop - start, columns, torch.float32).copy_(theta)
            for place, delta in made:
                _add_place(total, delta, place, self.k, start, stop)
            _require_finite(self.tensor.name, total, dtype)
            if rounding == "stochastic":
                dither_(total, dtype, dither)
            result = _SCRATCH.space.take("result", stop - start, columns, dtype).copy_(total)
            at += _put(self.out, result, at)
            if number % MEASURE == 0:
                few = min(max(1, SAMPLE // columns), stop - start)
                meant = torch.zeros(few, columns)
                for place, delta in made:
                    _add_place(meant, delta, place, self.k, start, start + few)
                tally.add(theta[:few], meant, result[:few])
        tally.weigh(self.tensor.nbytes // FLOATS[self.tensor.dtype].itemsize)
        return tally, {c.name: digest_of(d) for c, (_, d) in zip(changes, made, strict=True) if c.place.at == 0}

    def _read(self, deltas: Mapping[str, Delta], change: Change) -> Delta:
        delta = deltas[change.name]
        _require_fit(change, delta, self.tensor.file.path.parent, self.tied)
        return replace(delta, B=delta.B.float(), A=delta.A.float()) if isinstance(delta, LowRank) else delta


def _add_place(total: Tensor, delta: Delta, place: Place, k: float, start: int, stop: int) -> None:
    """Add k times the rows of a delta that lie in rows `start` to `stop` of a stored tensor."""
    first, last = max(start, place.start), min(stop, place.start + place.rows)
    if first < last:
        shift = place.at - place.start
        add_rows(total[first - start : last - start], delta, k, first + shift, last + shift, _SCRATCH.space)


class _PerThread(threading.local):
    """Each worker's own scratch memory."""

    def __init__(self) -> None:
        self.space = Scratch()


_SCRATCH = _PerThread()


def _is_finite_in(block: Tensor, dtype: torch.dtype) -> bool:
    """False if there is a NaN, or a number beyond the dtype's range (bfloat16's is float32's own)."""
    suspect = dtype == torch.float16 or not math.isfinite(float(block.sum()))
    return not suspect or bool(torch.isfinite(block.to(dtype)).all())


def _require_finite(name: str, total: Tensor, dtype: torch.dtype) -> None:
    if not _is_finite_in(total, dtype):
        raise SteerError(
            f"{name}: theta + k w is infinite or NaN in {str(dtype).removeprefix('torch.')}; take a smaller k or a "
            "wider dtype; where k is small, the base or the vector is damaged"
        )


def _put(out: int, block: Tensor, at: int) -> int:
    return _put_bytes(out, bytes_of(block), at)


def _put_bytes(out: int, content: memoryview, at: int) -> int:
    done = 0
    while done < len(content):
        done += os.pwrite(out, content[done:], at + done)
    return done
