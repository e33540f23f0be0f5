"""What was made and from what: the card beside every artifact, and output folders that appear only when whole."""

from __future__ import annotations

import importlib.metadata
import json
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar

from .adapter_files import ADAPTER_FILE, DENSE_FILE
from .disk import make_folder, sync_folder, sync_tree, telling_of_disk
from .errors import SteerError
from .files import current_umask, digest, is_empty, read_json, write_text
from .leftovers import REPLACED, sweep_beside
from .locks import hold
from .outputs import refuse_special
from .places import expanded, public_name, remember, without_paths
from .schema import checked, is_finite, refuse_unusual, shown

CARD_FILE = "weightsteer.json"
TENSOR_FILES = (ADAPTER_FILE, DENSE_FILE)
FILES = "files"  # in a vector's card on the disk alone: which of these it has
ABOUT = "description"  # the setting that says what the behaviour is, in a sentence
RECORDED_PACKAGES = ("weightsteer", "torch", "transformers", "peft", "safetensors")


@dataclass(frozen=True)
class StrengthRange:
    """The measured range of `k` (multiples of w; 0 is the base model), as found by a sweep.

    `recommended` and `negative` move the behaviour furthest on each side within the capability budget;
    `low` and `high` are the smallest and largest k that were measured.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "allow_inf_nan": False}

    recommended: float
    negative: float
    low: float
    high: float
    budget: Mapping[str, float] = field(default_factory=dict)

    @property
    def shown(self) -> list[float]:
        """The strengths to show side by side: both recommended k, their halves, and 0; a side with none is left out."""
        return sorted({self.negative, self.negative / 2, 0.0, self.recommended / 2, self.recommended})

    @property
    def described(self) -> str:
        """The range in words."""
        more = (
            f"k = {self.recommended:g} is recommended for more" if self.recommended else "none is recommended for more"
        )
        less = f"k = {self.negative:g} for less" if self.negative else "none for less"
        return f"{more} of the behaviour and {less}; {self.low:g} to {self.high:g} was tested"

    def warning(self, ks: Iterable[float]) -> str:
        """What to say of strengths that lie outside the tested range; "" if none does."""
        far = [k for k in ks if not self.low <= k <= self.high]
        if not far:
            return ""
        listed = ", ".join(f"{k:g}" for k in far)
        return f"k = {listed} lies outside the range that was tested, {self.low:g} to {self.high:g}; replies may break"


@dataclass(frozen=True)
class RunCard:
    """From what an artifact was made: enough to make it again, and to refuse a wrong base."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    kind: str
    base_model: str = ""
    base_revision: str = ""  # hub commit, or a local checkpoint's `fingerprint`
    data_sha256: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    seed: int | None = None
    measured: Mapping[str, Any] = field(default_factory=dict)
    strength: StrengthRange | None = None
    strengths: Mapping[str, StrengthRange] = field(default_factory=dict)  # on other models than the base, by revision
    held_out: tuple[Mapping[str, Any], ...] = ()  # rows of data that were not trained on: of a vector, pairs
    versions: Mapping[str, str] = field(default_factory=dict)
    created: str = ""  # to the microsecond, since artifacts are told apart by it

    @property
    def base_commit(self) -> str | None:
        """The hub commit of the base, if it came from the hub: forty hexadecimal digits."""
        return self.base_revision if re.fullmatch(r"[0-9a-f]{40}", self.base_revision) else None

    @property
    def made(self) -> str:
        """When the artifact was made, to the second."""
        return re.sub(r"\.\d+", "", self.created)

    @property
    def place_keys(self) -> tuple[str, ...]:
        """Under what the base's folder is remembered: this artifact's own key, then that of all with the same weights.

        Copies of a model may have one fingerprint and one name, and differ in their tokenizer or template; the time
        tells apart what was made on them.
        """
        own = [self.base_revision, public_name(self.base_model), self.created]
        return (digest(own), self.base_revision) if self.base_revision else ()

    @classmethod
    def now(cls, kind: str, **fields: Any) -> RunCard:
        """A card stamped with the current time and the installed versions."""
        stamp = datetime.now(UTC).isoformat(timespec="microseconds")
        return cls(kind=kind, versions=installed_versions(), created=stamp, **fields)

    def save(self, folder: str | Path) -> None:
        """Write the card as `weightsteer.json` into `folder`, atomically.

        A card may be shared, so it names no path of this machine: a local base goes by its folder's name, and where
        its weights lie is remembered apart. A vector's card names the files that hold it, which lie there already.

        Raises:
            SteerError: a file is missing that the card in `folder` names.
        """
        base = expanded(self.base_model)
        if self.base_model and base.exists():
            for key in self.place_keys:
                remember(key, str(base.absolute()))
        require_files(Path(folder))
        held = [name for name in TENSOR_FILES if self.kind == "vector" and (Path(folder) / name).is_file()]
        fields = {**asdict(self.shared()), **({FILES: held} if held else {})}
        write_text(Path(folder) / CARD_FILE, json.dumps(fields, indent=2, sort_keys=True) + "\n")

    def shared(self) -> RunCard:
        """The card without paths of this machine; one that an older version wrote may hold some."""
        settings, measured = without_paths(self.settings), without_paths(self.measured)
        return replace(self, base_model=public_name(self.base_model), settings=settings, measured=measured)

    @classmethod
    def load(cls, folder: str | Path) -> RunCard:
        """Read the card of an artifact folder.

        Raises:
            SteerError: there is no card, or it is not one of ours: the message names the field that is wrong.
        """
        path = Path(folder) / CARD_FILE
        fields = read_json(path)
        if isinstance(fields, dict):
            fields.pop(FILES, None)
        try:
            card = checked(cls, fields, str(path))
            refuse_unusual(card.settings, f"{path}: field 'settings'")
            refuse_unusual(list(card.held_out), f"{path}: field 'held_out'")
        except SteerError as error:
            raise SteerError(f"{error}; this is not a weightsteer card, remake the artifact") from None
        return card

    def measured_number(self, name: str) -> float:
        """A number that was measured; 0 where it was not.

        Raises:
            SteerError: it is none.
        """
        value = self.measured.get(name, 0.0)
        if isinstance(value, bool) or not isinstance(value, int | float) or not is_finite(value):
            raise SteerError(f"card of a {self.kind}: measured {name!r}: expected a number, found {shown(value)}")
        return float(value)

    @property
    def about(self) -> str:
        """One sentence about the behaviour; "" where none is known."""
        text = self.settings.get(ABOUT, "")
        return text if isinstance(text, str) else ""

    def with_about(self, text: str) -> RunCard:
        """The card with a sentence about the behaviour; as it is where there is none."""
        return replace(self, settings={**self.settings, ABOUT: text}) if text else self

    def with_strength(self, strength: StrengthRange, model: str = "") -> RunCard:
        """The same card with its range of k as it was measured on the base, or on the model of another revision."""
        if self.is_base(model):
            return replace(self, strength=strength)
        return replace(self, strengths={**self.strengths, model: strength})

    def is_base(self, model: str) -> bool:
        """Whether a model of this revision is the base; one without a revision counts as it."""
        return not model or not self.base_revision or model == self.base_revision

    def as_on(self, model: str) -> RunCard:
        """The card as it stands for the model of this revision: with its own range of k, if one was measured there."""
        return replace(self, strength=self.strengths.get(model, self.strength))


def require_files(folder: Path) -> bool:
    """Whether the card in a folder names the files that hold its numbers, all of which are there.

    Raises:
        SteerError: one is missing, which would be read as zero.
    """
    card = read_json(folder / CARD_FILE) if (folder / CARD_FILE).is_file() else None
    named = card.get(FILES) if isinstance(card, dict) else None
    for name in named if isinstance(named, list) else ():
        if not (folder / str(name)).is_file():
            raise lost_file(folder / str(name))
    return bool(named)


def lost_file(path: Path) -> SteerError:
    """What to say of a vector's folder that lost a file."""
    return SteerError(
        f"{path}: is missing, and holds the vector or a part of it; get the folder again where it comes from, or "
        "delete it and make the vector again"
    )


def installed_versions() -> dict[str, str]:
    """Versions of the packages that decide a result; a package that is not installed is left out."""
    versions = {}
    for name in RECORDED_PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


@contextmanager
def new_folder(target: Path, kind: str) -> Iterator[Path]:
    """Yield a temporary folder beside `target` that becomes `target` when the block succeeds.

    Until then nothing is to be seen under `target`'s name; after an error nothing is left. An older `target` is
    replaced only if it is empty or holds our artifact of the same `kind`. All is on the disk before it takes its name,
    so that a power cut leaves it whole, too.

    Raises:
        SteerError: another process writes `target`, it holds something else, it is the working folder or holds that,
            or the disk refuses.
    """
    target = target.absolute()
    refuse_here(target)
    with hold(target), telling_of_disk(target):
        sweep_beside(target)
        refuse_foreign(target, kind)
        make_folder(target.parent)
        part = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent))
        try:
            yield part
            part.chmod(0o777 & ~current_umask())
            for file in filter(Path.is_file, part.rglob("*")):  # safetensors keeps what it writes from other users
                if file.stat().st_nlink == 1:  # else it is somebody's under another name, too
                    file.chmod(file.stat().st_mode | 0o666 & ~current_umask())
            sync_tree(part)
            _put_in_place(part, target)
        finally:
            shutil.rmtree(part, ignore_errors=True)


def _put_in_place(part: Path, target: Path) -> None:
    """Give a finished folder its name; an older one is there until then."""
    try:
        if target.exists():
            target.rename(part / REPLACED)
        part.rename(target)
    except BaseException:
        if not target.exists() and (part / REPLACED).exists():
            (part / REPLACED).rename(target)
        raise
    sync_folder(target.parent)
    shutil.rmtree(target / REPLACED, ignore_errors=True)


def refuse_here(target: Path) -> None:
    """Raise if a folder that is to be replaced is the one in which the command runs, or holds it."""
    here, there = Path.cwd(), target.resolve()
    if there == here or there in here.parents:
        raise SteerError(f"{target}: is the folder in which the command runs, or holds it; name a folder below it")


def refuse_foreign(target: Path, kind: str) -> None:
    """Raise unless `target` is free to be written: absent, an empty folder, or our artifact of that kind."""
    refuse_special(target)
    if not target.exists():
        return
    if not target.is_dir():
        raise SteerError(f"{target}: a file of this name exists; choose another output")
    if is_empty(target):
        return
    if not (target / CARD_FILE).exists():
        raise SteerError(f"{target}: exists and was not made by weightsteer; choose another output")
    if is_emptied(target / CARD_FILE):
        return
    found = RunCard.load(target).kind
    if found != kind:
        raise SteerError(f"{target}: holds a {found}, which a {kind} would replace; choose another output")


def is_emptied(path: Path) -> bool:
    """Whether a file holds nothing, or zeros alone, as a power cut may leave what was not brought to the disk."""
    with path.open("rb") as file:
        return not file.read(1 << 16).strip(b"\0")
