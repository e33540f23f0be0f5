"""What was made and from what: run cards, measured rows, JSONL, and writes that are whole or absent."""

from __future__ import annotations

import fcntl
import glob
import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from .errors import SteerError

CARD_FILE = "weightsteer.json"
REPLACED = ".replaced.part"  # an older artifact, for the moment in which the new one takes its place
SPLITS = ("validation", "test")  # what is chosen by, and what is reported
CHANGE = " change"  # ends the name of a metric that is measured as the difference to the base, item by item
RECORDED_PACKAGES = ("weightsteer", "torch", "transformers", "peft", "safetensors")


@dataclass(frozen=True)
class StrengthRange:
    """The measured range of `k` (multiples of w; 0 is the base model), as found by a sweep.

    `recommended` and `negative` move the behaviour furthest on each side within the capability budget;
    `low` and `high` are the smallest and largest k that were measured.
    """

    recommended: float
    negative: float
    low: float
    high: float
    budget: Mapping[str, float] = field(default_factory=dict)

    @property
    def shown(self) -> list[float]:
        """The strengths to show side by side: both recommended k, their halves, and 0; a side with none is left out."""
        return sorted({self.negative, self.negative / 2, 0.0, self.recommended / 2, self.recommended})


@dataclass(frozen=True)
class RunCard:
    """From what an artifact was made: enough to make it again, and to refuse a wrong base."""

    kind: str
    base_model: str = ""
    base_revision: str = ""  # hub commit, or a local checkpoint's `fingerprint`
    data_sha256: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    seed: int | None = None
    measured: Mapping[str, Any] = field(default_factory=dict)
    strength: StrengthRange | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    created: str = ""

    @property
    def base_commit(self) -> str | None:
        """The hub commit of the base, if it came from the hub: forty hexadecimal digits."""
        return self.base_revision if re.fullmatch(r"[0-9a-f]{40}", self.base_revision) else None

    @classmethod
    def now(cls, kind: str, **fields: Any) -> RunCard:
        """A card stamped with the current time and the installed versions."""
        stamp = datetime.now(UTC).isoformat(timespec="seconds")
        return cls(kind=kind, versions=installed_versions(), created=stamp, **fields)

    def save(self, folder: Path) -> None:
        """Write the card as `weightsteer.json` into `folder`, atomically."""
        write_text(folder / CARD_FILE, json.dumps(asdict(self), indent=2, sort_keys=True) + "\n")

    @classmethod
    def load(cls, folder: Path) -> RunCard:
        """Read the card of an artifact folder.

        Raises:
            SteerError: there is no card, or it is not one of ours.
        """
        path = folder / CARD_FILE
        fields = read_json(path)
        try:
            strength = fields.pop("strength", None)
            return cls(**fields, strength=StrengthRange(**strength) if strength else None)
        except (TypeError, AttributeError) as error:
            raise SteerError(f"{path}: not a weightsteer card ({error}); remake the artifact") from None

    def with_strength(self, strength: StrengthRange) -> RunCard:
        """The same card with its measured range of k."""
        return replace(self, strength=strength)


@dataclass(frozen=True)
class Row:
    """One measured number: the mean of `n` items with its standard error."""

    method: str
    k: float
    task: str
    metric: str
    value: float
    n: int
    stderr: float
    split: str = "test"


def installed_versions() -> dict[str, str]:
    """Versions of the packages that decide a result; a package that is not installed is left out."""
    versions = {}
    for name in RECORDED_PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(value: Any) -> str:
    """SHA-256 of a JSON-serialisable value: equal values give equal digests."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def read_json(path: Path) -> Any:
    """Parse one JSON file.

    Raises:
        SteerError: the file is missing or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SteerError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    except ValueError as error:
        raise SteerError(f"{path}: not JSON ({error})") from None


def read_jsonl(path: Path, *, required: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Read one JSON object a line; blank lines are passed over.

    Raises:
        SteerError: the file is missing, a line is not a JSON object, a `required` field is absent,
            is not text or is blank, or the file holds no line at all. The message names file, line, field.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise SteerError(f"{path}: cannot be read ({reason}); check the path") from None
    rows = [
        _parse_line(path, number, line, required)
        for number, line in enumerate(text.split("\n"), start=1)  # not splitlines: JSON may hold U+0085
        if line.strip()
    ]
    if not rows:
        raise SteerError(f"{path}: the file is empty; expected one JSON object a line")
    return rows


def _parse_line(path: Path, number: int, line: str, required: Sequence[str]) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise SteerError(f"{path}, line {number}: not JSON ({error}); expected one object a line") from None
    if not isinstance(row, dict):
        raise SteerError(f"{path}, line {number}: expected a JSON object, found {type(row).__name__}")
    for name in required:
        if not isinstance(row.get(name), str):
            found = ", ".join(sorted(row)) or "none"
            raise SteerError(f"{path}, line {number}: expected a text field {name!r}; fields found: {found}")
        if not row[name].strip():
            raise SteerError(f"{path}, line {number}: field {name!r} is blank; expected a text")
    return row


def write_text(path: Path, text: str) -> None:
    """Replace a file in one step: readers see the old text or the new, never a part."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Replace a file in one step, with the permissions that the umask gives a new file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON object a line, in one step."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def append_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Append rows and flush them to disk, so that a kill loses at most the line being written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    with path.open("a", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def read_finished(path: Path) -> list[dict[str, Any]]:
    """Rows of a file that grows by `append_jsonl`; a last line cut short by a kill is dropped.

    The file is put right as it is read, so that the next append starts on a fresh line.
    """
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        write_text(path, whole)
    return [_parse_line(path, number, line, ()) for number, line in enumerate(whole.split("\n")[:-1], 1)]


@contextmanager
def new_folder(target: Path, kind: str) -> Iterator[Path]:
    """Yield a temporary folder beside `target` that becomes `target` when the block succeeds.

    Until then nothing is to be seen under `target`'s name; after an error nothing is left. An
    older `target` is replaced only if it is empty or holds our artifact of the same `kind`.
    """
    target = target.absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    _sweep_parts(target)
    refuse_foreign(target, kind)
    part = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent))
    lock = os.open(part, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(lock, fcntl.LOCK_EX)  # held while we live: what a kill leaves behind is unlocked
        yield part
        part.chmod(0o777 & ~current_umask())
        if target.exists():
            target.rename(part / REPLACED)
        part.rename(target)
        shutil.rmtree(target / REPLACED, ignore_errors=True)
    finally:
        os.close(lock)
        shutil.rmtree(part, ignore_errors=True)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder for this process alone.

    Raises:
        SteerError: another process holds it.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SteerError(
                f"{folder}: another process is running this; wait for it, or choose another --out"
            ) from None
        except OSError:
            pass  # a file system without locks
        yield
    finally:
        os.close(handle)


def _sweep_parts(target: Path) -> None:
    """Remove unfinished folders for `target` whose writer was killed."""
    for part in target.parent.glob(f".{glob.escape(target.name)}.*.part"):
        with suppress(OSError):  # another process is writing it, it is somebody else's, or there are no locks here
            lock = os.open(part, os.O_RDONLY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if not target.exists() and (part / REPLACED).exists():
                    (part / REPLACED).rename(target)  # killed between the two renames: the older artifact stands
                shutil.rmtree(part, ignore_errors=True)
            finally:
                os.close(lock)


def refuse_foreign(target: Path, kind: str) -> None:
    """Raise unless `target` is free to be written: absent, an empty folder, or our artifact of that kind."""
    if not target.exists():
        return
    if not target.is_dir():
        raise SteerError(f"{target}: a file of this name exists; choose another output")
    if is_empty(target):
        return
    if not (target / CARD_FILE).exists():
        raise SteerError(f"{target}: exists and was not made by weightsteer; choose another output")
    found = RunCard.load(target).kind
    if found != kind:
        raise SteerError(f"{target}: holds a {found}, which a {kind} would replace; choose another output")


def is_empty(folder: Path) -> bool:
    """True if a folder holds nothing but unfinished writes of ours, as a kill leaves them."""
    return all(path.name.startswith(".") and path.name.endswith(".part") for path in folder.iterdir())


def current_umask() -> int:
    """The process's umask (reading it means setting it for a moment)."""
    umask = os.umask(0)
    os.umask(umask)
    return umask
