"""The change of one parameter: factored, dense in memory, or dense in files and read block by block."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import Protocol

import torch
from torch import Tensor

from ..checkpoints.parameters import Assembled
from ..checkpoints.safetensors_file import DTYPES, Stored, bytes_of, matrix_shape
from ..errors import SteerError
from ..files import digest
from .low_rank import ACCUMULATE, ALONE, Layout, LowRank

CLEAR = 1e5  # a squared norm this many times the size of its rounding is taken as it is
BLOCK = 1 << 19  # entries: 2 MiB of float32, so that a block and its scratch stay in cache


class Part(Protocol):
    """Something that gives rows of a parameter's matrix form in float32."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    def rows(self, start: int, stop: int) -> Tensor: ...


Term = tuple[float, "Stored | LowRank | Tensor | Part"]


@dataclass(frozen=True, eq=False)
class Streamed:
    """A dense delta as a sum of scaled parts, added a block of rows at a time.

    So theta+ - theta- of two checkpoints costs no memory, and adding a factored delta to it none either.
    """

    terms: tuple[Term, ...]
    shape: tuple[int, ...]
    layout: Layout = "linear"  # how its factors would be stored in an adapter, were it cut to a low rank

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows of the matrix form in float32: (stop - start, columns)."""
        rows = torch.empty(stop - start, matrix_shape(self.shape)[1])
        _stream_rows(rows, self, start, stop, Scratch())
        return rows

    def dense(self) -> Tensor:
        """The whole delta in float32, in the parameter's shape."""
        return self.rows(0, matrix_shape(self.shape)[0]).reshape(self.shape)


Delta = LowRank | Tensor | Streamed


class LazyDeltas(Mapping[str, Delta]):
    """Name -> delta, made when it is asked for: a vector of any size costs no memory until it is used."""

    def __init__(self, makers: Mapping[str, Callable[[], Delta]]) -> None:
        self._makers = dict(makers)

    def __getitem__(self, name: str) -> Delta:
        return self._makers[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._makers)

    def __len__(self) -> int:
        return len(self._makers)

    def __contains__(self, name: object) -> bool:
        return name in self._makers


def rows_of(part: Delta | Stored | Part, start: int, stop: int) -> Tensor:
    """Rows of the matrix form of any delta or part, in float32."""
    if isinstance(part, LowRank):
        return part.B[start:stop].float() @ part.A.float()
    if isinstance(part, Tensor):
        return part.reshape(matrix_shape(part.shape))[start:stop].float()
    return part.rows(start, stop).float()


class Scratch:
    """Memory that one thread uses again for every block; asking the system for it anew costs more than the sums."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def take(self, use: str, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        """A matrix with old content, valid until the next call for the same use."""
        size = rows * columns
        held = self._buffers.get(use)
        if held is None or held.numel() < size or held.dtype != dtype:
            held = self._buffers[use] = torch.empty(size, dtype=dtype)
        return held[:size].view(rows, columns)


def add_rows(total: Tensor, delta: Delta, k: float, start: int, stop: int, scratch: Scratch) -> Tensor:
    """total += k * (rows start to stop of delta) in float32: first the delta, then times k, then the sum.

    Factors are multiplied and added in one go, which is the fastest; its last bit is not that of the three steps.
    """
    if isinstance(delta, LowRank):
        return total.addmm_(delta.B[start:stop], delta.A, alpha=k)
    rows, columns = total.shape
    change = scratch.take("change", rows, columns, torch.float32)
    if isinstance(delta, Tensor):
        change.copy_(rows_of(delta, start, stop))
    else:
        _stream_rows(change, delta, start, stop, scratch)
    return total.add_(change if k == 1.0 else change.mul_(k))


def _stream_rows(change: Tensor, delta: Streamed, start: int, stop: int, scratch: Scratch) -> None:
    """Fill `change` with rows of a streamed delta: its first term, then the others added."""
    rows, columns = change.shape
    if not delta.terms:
        change.zero_()
    for number, (scale, source) in enumerate(delta.terms):
        part = change if number == 0 else scratch.take("part", rows, columns, torch.float32)
        if isinstance(source, Stored):
            raw = scratch.take(f"raw {source.dtype}", rows, columns, DTYPES[source.dtype])
            part.copy_(source.rows_into(raw, start))
        else:
            part.copy_(rows_of(source, start, stop))
        if number > 0:
            change.add_(part, alpha=scale)
        elif scale != 1.0:
            change.mul_(scale)


def blocks(shape: tuple[int, ...] | torch.Size, entries: int = BLOCK) -> Iterator[tuple[int, int]]:
    """(start, stop) of row blocks of about so many entries that cover a matrix form."""
    rows, columns = matrix_shape(shape)
    if rows and columns:
        step = max(1, entries // columns)
        for start in range(0, rows, step):
            yield start, min(start + step, rows)


def read_delta(name: str, delta: Delta) -> LowRank | Tensor:
    """The delta with nothing left in files, and no NaN in it."""
    held = delta.dense() if isinstance(delta, Streamed) else delta
    require_finite(name, held)
    return held


def to_dense(delta: Delta) -> Tensor:
    """The whole delta as one tensor."""
    return delta if isinstance(delta, Tensor) else delta.dense()


def layout_of(delta: Delta) -> Layout:
    """How the delta's factors are stored in an adapter."""
    return "linear" if isinstance(delta, Tensor) else delta.layout


def scale_delta(delta: Delta, scale: float) -> Delta:
    """The delta times a number."""
    if isinstance(delta, Streamed):
        return replace(delta, terms=tuple((scale * factor, part) for factor, part in delta.terms))
    return delta * scale


def add_deltas(name: str, first: Delta, second: Delta, scale: float = 1.0) -> Delta:
    """first + scale * second, exact; equal deltas subtract to exactly nothing.

    Raises:
        SteerError: the shapes differ.
    """
    require_same_shape(name, first, second)
    if isinstance(first, LowRank) and isinstance(second, LowRank):
        if scale == -1.0 and torch.equal(first.B, second.B) and torch.equal(first.A, second.A):
            return LowRank(first.B[:, :0], first.A[:0], first.layout)
        return first + (second if scale == 1.0 else second * scale)
    if isinstance(first, Streamed) or isinstance(second, Streamed):
        terms = _like_terms([*_terms(first), *((scale * factor, part) for factor, part in _terms(second))])
        layouts = [layout_of(delta) for delta in (first, second)]
        if "shared" in layouts and any(layout in ALONE for layout in layouts):
            raise SteerError(
                f"{name}: one vector changes the input embedding alone, the other the head that is tied to it too; "
                "steer with both at once, or subtract the fine-tunes themselves"
            )
        return Streamed(terms, tuple(first.shape), next((layout for layout in layouts if layout != "linear"), "linear"))
    return torch.add(to_dense(first), to_dense(second), alpha=scale)


def require_same_shape(name: str, first: Delta, second: Delta) -> None:
    """Raise, naming the parameter, unless the two deltas are of one shape."""
    if tuple(first.shape) != tuple(second.shape):
        raise SteerError(
            f"{name}: shapes differ, {tuple(first.shape)} and {tuple(second.shape)}; "
            "the vectors were made on different models"
        )


def _terms(delta: Delta) -> tuple[Term, ...]:
    return delta.terms if isinstance(delta, Streamed) else ((1.0, delta),)


def _like_terms(terms: list[Term]) -> tuple[Term, ...]:
    """One term for each stored tensor: what is added and taken away again leaves no rounding behind."""
    sums: dict[object, float] = {}
    parts: dict[object, Stored | LowRank | Tensor | Part] = {}
    for scale, part in terms:
        key = part.key if isinstance(part, Stored | Assembled) else id(part)
        sums[key] = sums.get(key, 0.0) + scale
        parts[key] = part
    return tuple((scale, parts[key]) for key, scale in sums.items() if scale != 0.0)


def dot(first: Delta, second: Delta) -> float:
    """<first, second> in float64, for any mix of kinds: B @ A is never formed, files are read block by block."""
    if isinstance(first, LowRank) and isinstance(second, LowRank):
        return first.dot(second)
    if isinstance(second, LowRank):
        first, second = second, first
    if isinstance(first, LowRank):
        B, A = first.B.to(ACCUMULATE), first.A.to(ACCUMULATE)
        return math.fsum(
            float((B[start:stop].T @ rows_of(second, start, stop).to(ACCUMULATE) * A).sum())
            for start, stop in blocks(second.shape)
        )
    return math.fsum(_block_dot(first, second, *block) for block in blocks(first.shape))


def quick_dot(first: Delta, second: Delta) -> tuple[float, float]:
    """<first, second> and the size of its rounding: float32 products of factors, summed in float64; else as `dot`."""
    if not (isinstance(first, LowRank) and isinstance(second, LowRank)) or first.B.dtype != second.B.dtype:
        return dot(first, second), 0.0
    gram = torch.mm(first.B.T, second.B)
    gram *= torch.mm(first.A, second.A.T)
    return float(gram.sum(dtype=ACCUMULATE)), float(gram.abs().sum()) * torch.finfo(gram.dtype).eps


def _block_dot(first: Delta, second: Delta, start: int, stop: int) -> float:
    ours = rows_of(first, start, stop).to(ACCUMULATE)
    theirs = ours if first is second else rows_of(second, start, stop).to(ACCUMULATE)
    return float((ours * theirs).sum())


def require_finite(name: str, delta: LowRank | Tensor) -> None:
    """Raise, naming the tensor, if an entry is NaN or infinite."""
    parts = {"lora_A": delta.A, "lora_B": delta.B} if isinstance(delta, LowRank) else {"delta": delta}
    for part, tensor in parts.items():
        if not bool(torch.isfinite(tensor).all()):
            raise not_finite(f"{name} ({part})")


def not_finite(what: str) -> SteerError:
    """The error for an entry that is no number."""
    return SteerError(f"{what}: holds NaN or infinite entries; the training diverged, or a factor is too large")


def digest_of(delta: Delta) -> str:
    """SHA-256 of a delta's content; of tensors that lie in files, of their names, forms and first KiB."""
    if isinstance(delta, Streamed):
        return digest([[scale, _digest_of_part(part)] for scale, part in delta.terms])
    return _digest_of_part(delta)


def _digest_of_part(part: Stored | LowRank | Tensor | Part) -> str:
    if isinstance(part, Stored):
        head = part.file.read(part.file.data_start + part.start, min(1024, part.nbytes))
        return digest([part.name, part.dtype, list(part.shape), sha256(head).hexdigest()])
    if isinstance(part, Assembled):
        return digest([_digest_of_part(stored) for stored in part.stored])
    if isinstance(part, LowRank | Tensor):
        tensors = (part.B, part.A) if isinstance(part, LowRank) else (part,)
        content = sha256()
        for tensor in tensors:
            content.update(bytes_of(tensor.contiguous()))
        return digest([list(part.shape), content.hexdigest()])
    return digest([list(part.shape), sha256(bytes_of(part.rows(0, 1))).hexdigest()])
