"""The head of a GGUF file, walked through before any library reads it: every length lies inside the file.

gguf's reader believes the counts that a file states. A count of 2^60 makes it loop without end, past the last byte.
The layout is that of ggml's docs/gguf.md.
"""

from __future__ import annotations

import math
import os
import struct
from pathlib import Path
from typing import BinaryIO

from ..errors import SteerError
from ..schema import shown

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}
TEXT, ARRAY = 8, 9
MOST_DIMENSIONS, MOST_NESTED = 4, 4
LARGEST_SIZE = 1 << 26
SIZES = ("_length", ".head_count", ".head_count_kv", ".expert_count", ".vocab_size", ".dimension_count", ".block_count")
LEAST_BITS = 1  # of a weight, in the smallest of ggml's types: no file holds more weights than it has bits


def check_gguf_header(path: Path) -> None:
    """Walk through the fields and the tensors' descriptions; no tensor is read.

    Raises:
        SteerError: a count, length or size that the file cannot hold, or more blocks than there are tensors.
    """
    with path.open("rb") as file:
        _Walk(path, file).check()


class _Walk:
    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path, self.file = path, file
        self.size = os.fstat(file.fileno()).st_size
        self.order = "<"
        self.sizes: dict[str, int] = {}  # whole numbers among the fields

    def check(self) -> None:
        self.file.seek(4)
        version = self._number("I")
        if version & 0xFFFF == 0:  # written on a machine of the other byte order
            self.order = ">"
        tensors, fields = self._number("Q"), self._number("Q")
        self._require(24 * tensors + 12 * fields, "the tensors and fields that it counts")
        for _ in range(fields):
            name = self._text()
            self._value(name, self._number("I"))
        for _ in range(tensors):
            self._tensor()
        for name, value in self.sizes.items():
            most = tensors if name.endswith(".block_count") else LARGEST_SIZE
            if name.endswith(SIZES) and not 0 <= value <= most:
                raise self._wrong(f"{name} is {value}, expected at most {most}")

    def _value(self, name: str, kind: int, depth: int = 0) -> None:
        if kind == TEXT:
            self._text()
        elif kind == ARRAY:
            inner, count = self._number("I"), self._number("Q")
            width = struct.calcsize(SCALARS[inner]) if inner in SCALARS else 8
            self._require(width * count, f"the list {name}")
            if inner in SCALARS:
                self.file.seek(width * count, os.SEEK_CUR)
            elif depth == MOST_NESTED:
                raise self._wrong(f"{name} is a list in a list in a list")
            else:
                for _ in range(count):
                    self._value(name, inner, depth + 1)
        elif kind in SCALARS:
            value = self._number(SCALARS[kind])
            if kind not in (6, 7, 12) and not depth:
                self.sizes[name] = value
        else:
            raise self._wrong(f"{name} is of type {kind}, which GGUF does not have")

    def _tensor(self) -> None:
        name, count = self._text(), self._number("I")
        if not 0 < count <= MOST_DIMENSIONS:
            raise self._wrong(f"tensor {shown(name)} has {count} dimensions")
        shape = [self._number("Q") for _ in range(count)]
        self._number("I")  # its type, which gguf checks
        start = self._number("Q")
        if start > self.size or math.prod(shape) * LEAST_BITS > 8 * self.size:
            raise self._wrong(f"tensor {shown(name)} of shape {shape} does not fit into {self.size} bytes")

    def _number(self, form: str) -> int:
        width = struct.calcsize(form)
        self._require(width, "what it states")
        value: int = struct.unpack(self.order + form, self.file.read(width))[0]
        return value

    def _text(self) -> str:
        length = self._number("Q")
        self._require(length, "a text")
        try:
            return self.file.read(length).decode("utf-8")
        except UnicodeDecodeError:
            raise self._wrong("a text in it is not UTF-8") from None

    def _require(self, length: int, what: str) -> None:
        if length > self.size - self.file.tell():
            raise self._wrong(f"it ends before {what}")

    def _wrong(self, reason: str) -> SteerError:
        return SteerError(f"{self.path}: is damaged or cut short ({reason}); download it again")
