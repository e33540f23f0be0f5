"""What is read is checked where it is read: JSON that means one thing, and values of the types that are expected."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from .errors import SteerError, first_line

if TYPE_CHECKING:
    from pydantic import TypeAdapter, ValidationError

MOST_BYTES = 1 << 28  # of one JSON file: the largest index of a checkpoint has some ten megabytes
MOST_ROWS_BYTES = 2_000_000_000  # of a file of examples: they are held in memory
LARGEST_FLOAT = 3.4028234e38  # of float32, in which every k and every scale ends
LONGEST_SHOWN = 80  # characters of what was found, in a message

T = TypeVar("T")


class TwiceError(ValueError):
    """A name stands twice in one JSON object, so that one of its values would be lost."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise TwiceError(f"field {next(name for name in names if names.count(name) > 1)!r} stands twice in one object")
    return found


STRICT_JSON = json.JSONDecoder(object_pairs_hook=_object)


def read_bounded(path: Path, most: int = MOST_ROWS_BYTES) -> bytes:
    """A file's bytes; it may be a pipe, but no device, which would never end.

    Raises:
        SteerError: it is a device, or larger than `most` bytes.
        OSError: it cannot be read.
    """
    if path.is_char_device() or path.is_block_device():
        raise SteerError(f"{path}: is a device; expected a file")
    with path.open("rb") as file:
        content = file.read(most + 1)
    return require_bounded(path, content, most)


def require_bounded(path: Path, content: bytes, most: int = MOST_ROWS_BYTES) -> bytes:
    """Bytes that were read up to `most` and one more.

    Raises:
        SteerError: they are more than `most`.
    """
    if len(content) > most:
        raise SteerError(f"{path}: is larger than {most / 1e6:.4g} MB, more than such a file can need; name another")
    return content


def read_limited(path: Path, most: int = MOST_BYTES) -> str:
    """A file's text; a byte order mark is passed over, and line ends are of any system.

    Raises:
        SteerError: it is larger than `most` bytes, or no UTF-8 text.
        OSError: it cannot be read.
    """
    content = read_bounded(path, most)
    try:
        return content.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise SteerError(
            f"{path}, line {line}: byte 0x{content[error.start]:02x} is not UTF-8 text; save the file in UTF-8"
        ) from None


def parse_json(text: str, where: str) -> Any:
    """One JSON value.

    Raises:
        SteerError: no JSON, a name that stands twice in one object, half of a surrogate pair, or lists in lists in
            lists without end.
    """
    try:
        value = STRICT_JSON.decode(text)
        if "\\ud" in text or "\\uD" in text:
            json.dumps(value, ensure_ascii=False).encode()  # a half pair is no text: it could not be written again
    except RecursionError:
        raise SteerError(f"{where}: nested too deeply to be read") from None
    except UnicodeEncodeError:
        raise SteerError(f"{where}: not JSON (half of a surrogate pair, which is no character)") from None
    except ValueError as error:
        raise SteerError(f"{where}: not JSON ({first_line(error)})") from None
    return value


def checked(kind: type[T], value: object, where: str) -> T:
    """A value that JSON gave, as an instance of a dataclass: no field missing, unknown or of another type.

    Raises:
        SteerError: the first field that is wrong, what was expected and what was found.
    """
    from pydantic import ValidationError

    adapter: TypeAdapter[T] = _adapter(cast("Any", kind))
    try:
        # by way of JSON: only there does pydantic take lists as tuples while it takes no text as a number
        return adapter.validate_json(json.dumps(value), strict=True)
    except ValidationError as error:
        raise SteerError(f"{where}: {describe_mistake(error, _names_in(adapter))}") from None


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    from pydantic import TypeAdapter

    return TypeAdapter(kind)


def _names_in(adapter: TypeAdapter[Any]) -> set[str]:
    """Every field's name in a type and the types inside it."""
    try:
        schema = adapter.json_schema()
    except Exception:  # a type without a JSON schema: then there is no suggestion
        return set()
    parts = [schema, *schema.get("$defs", {}).values()]
    return {name for part in parts for name in part.get("properties", {})}


def describe_mistake(error: ValidationError, names: Iterable[str] = ()) -> str:
    """pydantic's first mistake in one line: where, what was expected, what was found.

    Args:
        names: fields that there are; one that an unknown field is like is suggested.
    """
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        return f"field {where!r}: is not known{suggestion(str(first['loc'][-1]), names)}"
    if first["type"] == "missing":
        return f"field {where!r}: is missing"
    found = shown(first.get("input"))
    return f"field {where!r}: {first['msg']}; found {found}" if where else f"{first['msg']}; found {found}"


def suggestion(name: str, names: Iterable[str]) -> str:
    """ "; is 'rank' meant?" where a name is like one of `names`, else ""."""
    near = difflib.get_close_matches(
        name.strip().lower(), [known for known in names if known != name], n=1, cutoff=0.75
    )
    return f"; is {near[0]!r} meant?" if near else ""


def shown(value: object) -> str:
    """A value in a message, cut to a length that can be read."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a whole number of more than 4300 digits; lists in lists
        return f"a {type(value).__name__}"
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}..."


def parse_number(text: str, what: str) -> float:
    """A number that a user has typed.

    Raises:
        SteerError: it is none, or none that a float32 holds.
    """
    try:
        number = float(text)
    except ValueError:
        raise SteerError(f"{what}: expected a number, found {text!r}") from None
    if not abs(number) <= LARGEST_FLOAT:
        raise SteerError(f"{what}: expected a finite number up to {LARGEST_FLOAT:.3g}, found {text!r}")
    return number


def refuse_unusual(value: object, where: str) -> None:
    """Raise for what no file of ours keeps: a number that is not finite, a text that cannot be written or named.

    Dates, sets and bytes, which YAML has, are refused too.
    """
    for place, found in _leaves(value, ""):
        named = f"{where}: field {place!r}" if place else where
        if isinstance(found, str):
            if "\0" in found or not _can_be_written(found):
                raise SteerError(f"{named}: expected a text, found {shown(found)}, which has no such characters")
        elif isinstance(found, int | float) and not isinstance(found, bool):
            if not is_finite(found):
                raise SteerError(f"{named}: expected a finite number, found {shown(found)}")
        elif found is not None and not isinstance(found, bool):
            kind = type(found).__name__
            raise SteerError(f"{named}: expected a text, number, list or mapping, found {shown(found)} ({kind})")


def is_finite(number: float) -> bool:
    """Whether a number is neither NaN nor infinite, nor a whole number that no float holds."""
    try:
        return math.isfinite(number)
    except OverflowError:
        return False


def require_finite_k(k: float) -> None:
    """Raise for a strength that is no finite number."""
    if not is_finite(k):
        raise SteerError(f"k: expected a finite number, found {shown(k)}")


def _can_be_written(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _leaves(value: object, place: str) -> Iterator[tuple[str, object]]:
    if isinstance(value, Mapping):
        for name, inner in value.items():
            if not isinstance(name, str):
                yield place, name if not isinstance(name, int | float) else (name,)  # no name of a field
            else:
                yield place, name
                yield from _leaves(inner, f"{place}.{name}" if place else name)
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from _leaves(inner, f"{place}.{number}" if place else str(number))
    else:
        yield place, value
