"""What a behaviour is made from: a shipped one, a file of pairs, a trait file, or a folder that `init` wrote."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ..behavior import SHIPPED, Behavior
from ..errors import SteerError
from ..example_files.load import load_pairs
from ..schema import parse_json, read_limited, suggestion
from .starter import PAIRS, TRAIT


@dataclass(frozen=True)
class Source:
    """What a behaviour is made from: pairs, or a trait file under whose system prompts the model writes them."""

    name: str
    pairs: str | None = None  # a shipped behaviour's name, or a file
    trait: Path | None = None

    @classmethod
    def find(cls, text: str) -> Source:
        """A folder that `init` wrote, a shipped behaviour, a file of pairs, or a trait file; its data are read once.

        Raises:
            SteerError: none of these, or data that cannot be read or are not written yet.
        """
        found = cls._named(text)
        if found.pairs:
            load_pairs(found.pairs)
        found.described()
        return found

    @classmethod
    def _named(cls, text: str) -> Source:
        path = Path(text)
        if text in SHIPPED and not _is_begun(path):  # a folder that `init` wrote is meant before the shipped one
            return cls(text.replace("/", "-"), pairs=text)
        if path.is_dir():
            return cls._in_folder(path)
        if not path.is_file():
            meant = suggestion(text, SHIPPED)
            raise SteerError(
                f"{text}: no such behaviour, file or folder; expected one of {', '.join(SHIPPED)}, a file of pairs, a "
                f"trait file, or a folder made by `weightsteer init`{meant}"
            )
        own = path.stem if path.name not in (PAIRS, TRAIT, "pairs.jsonl") else path.resolve().parent.name
        return cls(own, trait=path) if _is_trait(path) else cls(own, pairs=text)

    @classmethod
    def _in_folder(cls, folder: Path) -> Source:
        name = folder.resolve().name
        for file in (PAIRS, "pairs.jsonl"):
            if (folder / file).is_file():
                return cls(name, pairs=str(folder / file))
        if (folder / TRAIT).is_file():
            return cls(name, trait=folder / TRAIT)
        raise SteerError(f"{folder}: holds neither {PAIRS} nor {TRAIT}; make such a folder with `weightsteer init`")

    def described(self) -> str:
        """One sentence about the behaviour, of the trait file or of one beside the pairs; "" where none is written."""
        if self.trait or self.pairs in SHIPPED:
            return Behavior.load(self.trait or str(self.pairs)).description
        beside = Path(str(self.pairs)).with_name(TRAIT)
        with suppress(SteerError):  # it is not needed, and may not be filled in
            return Behavior.load(beside).description if beside.is_file() and _is_trait(beside) else ""
        return ""


def _is_begun(folder: Path) -> bool:
    """Whether there is a folder with what somebody's own behaviour is made from."""
    return any((folder / name).is_file() for name in (PAIRS, "pairs.jsonl", TRAIT))


def _is_trait(path: Path) -> bool:
    """Whether a file is a trait file: a JSON object with system prompts."""
    try:
        fields = parse_json(read_limited(path), str(path))
    except SteerError:
        return False
    return isinstance(fields, dict) and "instruction" in fields
