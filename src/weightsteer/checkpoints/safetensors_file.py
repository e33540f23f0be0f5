"""One safetensors file: any part of any tensor read when it is asked for; written whole or as a stream."""

from __future__ import annotations

import json
import math
import os
import struct
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..errors import SteerError
from ..files import current_umask, refuse_lfs_pointer

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
FLOATS = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


class SafeFile:
    """An open safetensors file: its header, and its bytes on demand.

    The file stays the one that was opened even if another takes its path; reads may come from any thread and
    leave nothing mapped, so that memory does not grow with the file.
    """

    def __init__(self, path: Path) -> None:
        try:
            with safe_open(path, framework="pt"):
                pass  # checks the header and that every tensor is there
        except OSError as error:
            raise SteerError(
                f"{path}: cannot be opened ({error.strerror or error}); expected safetensors, to which other forms "
                "must be converted"
            ) from None
        except SafetensorError as error:
            refuse_lfs_pointer(path)
            raise SteerError(f"{path}: cannot be read as safetensors ({error}); the file is damaged") from None
        self.path = path
        self._fd = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._fd)
        self.data_start = 8 + struct.unpack("<Q", self.read(0, 8))[0]
        header = json.loads(self.read(8, self.data_start - 8))
        self.metadata: dict[str, str] = header.pop("__metadata__", {})
        self._entries = header

    def __reduce__(self) -> tuple[Callable[..., SafeFile], tuple[str, int, int]]:
        """Another process opens the file by its path: a descriptor's number means another file there, or none."""
        stat = os.fstat(self._fd)
        return reopened, (str(self.path.absolute()), stat.st_size, stat.st_mtime_ns)

    @property
    def tensors(self) -> dict[str, Stored]:
        """Handles of the tensors; they keep the file open, which closes when the last of them is gone."""
        return {
            name: Stored(self, name, entry["dtype"], tuple(entry["shape"]), *entry["data_offsets"])
            for name, entry in self._entries.items()
        }

    def read(self, start: int, length: int) -> bytearray:
        """`length` bytes from `start`."""
        buffer = bytearray(length)
        self.read_into(memoryview(buffer), start)
        return buffer

    def read_into(self, buffer: memoryview, start: int) -> None:
        """Fill `buffer` with the bytes from `start`."""
        done = 0
        while done < len(buffer):
            count = os.preadv(self._fd, [buffer[done:]], start + done)
            if count <= 0:
                raise SteerError(f"{self.path}: ends too early; it was changed while it was read")
            done += count


def reopened(path: str, size: int, changed: int) -> SafeFile:
    """A pickled file, opened again.

    Args:
        size: in bytes, when it was pickled.
        changed: its time of change then, in nanoseconds.

    Raises:
        SteerError: it is not there, or has changed since.
    """
    file = SafeFile(Path(path))
    stat = os.fstat(file._fd)
    if (stat.st_size, stat.st_mtime_ns) != (size, changed):
        raise SteerError(f"{path}: has changed since what was pickled read it; load the vector again, and pickle that")
    return file


@dataclass(frozen=True, eq=False)
class Stored:
    """A tensor that lies in a file. As a matrix it has the last dimension as columns (a vector is one column)."""

    file: SafeFile
    name: str
    dtype: str  # as safetensors writes it: "BF16"
    shape: tuple[int, ...]
    start: int  # bytes from the start of the file's data
    end: int

    @property
    def key(self) -> tuple[int, str]:
        """Equal for two handles of one tensor."""
        return id(self.file), self.name

    @property
    def nbytes(self) -> int:
        return self.end - self.start

    def read(self) -> Tensor:
        """The whole tensor, in its own dtype."""
        return self.rows(0, matrix_shape(self.shape)[0]).reshape(self.shape)

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows of the matrix form, in the stored dtype: (stop - start, columns)."""
        if self.dtype not in DTYPES:
            raise SteerError(f"{self.name}: has dtype {self.dtype}, which is not supported")
        return self.rows_into(torch.empty((stop - start, matrix_shape(self.shape)[1]), dtype=DTYPES[self.dtype]), start)

    def rows_into(self, buffer: Tensor, start: int) -> Tensor:
        """Fill `buffer` (rows, columns), of the stored dtype, with the rows from `start`."""
        if buffer.numel():
            width = buffer.shape[1] * buffer.itemsize
            self.file.read_into(bytes_of(buffer), self.file.data_start + self.start + start * width)
        return buffer


def matrix_shape(shape: tuple[int, ...] | torch.Size) -> tuple[int, int]:
    """The (rows, columns) form in which tensors of any shape are worked through in blocks."""
    if len(shape) < 2:
        return (math.prod(shape), 1)
    return (math.prod(shape[:-1]), shape[-1])


def same_bytes(first: Stored, second: Stored, block: int = 1 << 20) -> bool:
    """Whether two stored tensors are equal bit for bit; stops at the first difference."""
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    for at in range(0, first.nbytes, block):
        length = min(block, first.nbytes - at)
        ours, theirs = (t.file.read(t.file.data_start + t.start + at, length) for t in (first, second))
        if ours != theirs:
            return False
    return True


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write a safetensors file with the permissions that the umask gives (its writer makes 0600)."""
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata={"format": "pt"})
    path.chmod(0o666 & ~current_umask())


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file whole; a damaged one is an error that names it."""
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise SteerError(f"{path}: cannot be read as safetensors ({error}); the file is damaged") from None


@dataclass(frozen=True)
class Planned:
    """A tensor that is to be written: its place in the file is known before its content."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


def header_of(plan: Mapping[str, Planned], metadata: Mapping[str, str]) -> bytes:
    """The start of a safetensors file whose tensors lie one after another in the plan's order."""
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    at = 0
    for name, tensor in plan.items():
        header[name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [at, at := at + tensor.nbytes],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def write_stream(path: Path, plan: Mapping[str, Planned], blocks: Iterable[Tensor], **metadata: str) -> None:
    """Write a safetensors file from blocks of float32 that come in the plan's order; memory holds one block."""
    size = sum(tensor.nbytes for tensor in plan.values())
    with path.open("wb") as file:
        file.write(header_of(plan, {"format": "pt", **metadata}))
        start = file.tell()
        for block in blocks:
            file.write(bytes_of(block.float().contiguous()))
        assert file.tell() - start == size, "the blocks do not fill the plan"


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor, without a copy."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data
