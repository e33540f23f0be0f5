"""A model's name, `syc@-0.72` or a sum, as an adapter folder in a cache: torch is needed for sums alone."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..adapter_files import ADAPTER_CONFIG, ADAPTER_FILE
from ..errors import SteerError
from ..files import digest, link_or_copy, read_json, sha256_of
from ..locks import hold
from ..named_folders import is_vector
from ..run_card import CARD_FILE, RunCard, new_folder
from ..schema import shown
from ..strength_names import on_grid, parse_strengths, strength_name
from .limits import require_servable

KIND = "served adapter"  # on the cards of the folders that are made here
HASH_DIGITS = 12
PINNED = re.compile(rf"(?P<text>[^@]+@.*[\d.])-(?P<hash>[0-9a-f]{{{HASH_DIGITS}}})", re.ASCII)
LONGEST_NAME = 100  # characters of a folder's name before its hash
TRIES = 5  # to read a vector while another process replaces it


@dataclass(frozen=True)
class Source:
    """A vector as it lies in its folder at this moment."""

    name: str
    folder: Path
    config: Mapping[str, Any]  # PEFT's adapter_config.json
    tensors_sha256: str

    @property
    def content(self) -> str:
        """A hash of everything that decides what the vector does."""
        return digest([self.tensors_sha256, self.config])


@dataclass(frozen=True)
class Plan:
    """An adapter that may have to be made: vectors with their strengths, and the folder that it belongs in."""

    called: str  # the one name of these strengths
    parts: tuple[tuple[Source, float], ...]
    target: Path

    @property
    def is_linked(self) -> bool:
        """Whether it has the tensors of one vector, and only its config tells k; else they are written anew."""
        return _is_linked([source for source, _ in self.parts])


@dataclass
class AdapterCache:
    """Folders of adapters at their strengths, each made once. Several processes may share a cache."""

    folder: Path
    _hashes: dict[tuple[int, ...], str] = field(default_factory=dict)  # a file's identity -> SHA-256
    _packed: dict[Path, tuple[tuple[int, ...], ...]] = field(default_factory=dict)  # a folder -> what was found whole

    def plan(self, text: str, vectors: Mapping[str, Path]) -> Plan:
        """What a model's name means now; nothing is written.

        Args:
            text: `syc@-0.72`, `syc` for the recommended k of its card, or a sum; k = 0 is an adapter that adds zeros.
                A hash at its end, as in `syc@-0.72-0123456789ab`, refuses a vector that was replaced since.
            vectors: the name and folder of every vector that can be meant.

        Raises:
            SteerError: the name means nothing here, or a vector is damaged or none that an engine can take.
        """
        plain, pin = split_pin(text)
        strengths = with_recommended(parse_strengths(plain, vectors), vectors)
        used = {name: k for name, k in strengths.items() if k} or {next(iter(strengths)): 0.0}
        parts = tuple((self._read(name, vectors[name]), used[name]) for name in sorted(used))
        called = strength_name(used) or f"{parts[0][0].name}@0"
        sources = [source for source, _ in parts]
        folded = ["folded"] if len(sources) == 1 and not _is_linked(sources) else []
        key = digest([called, [source.content for source in sources], *folded])[:HASH_DIGITS]
        if pin not in ("", key):
            raise SteerError(f"model {shown(text)}: was replaced, and is {key} now; ask for {plain}")
        return Plan(called, parts, self.folder / "adapters" / f"{called[:LONGEST_NAME]}-{key}")

    def adapter(self, text: str, vectors: Mapping[str, Path]) -> Path:
        """The folder of the adapter that a model's name means (see `plan`); its own name ends in a hash of the content.

        Raises:
            SteerError: as `plan`, or the disk refuses.
        """
        plan = self.plan(text, vectors)
        if not self._is_whole(plan):
            with hold(plan.target, wait=True):
                if not self._is_whole(plan):  # another process may have made it meanwhile
                    self._make(plan)
        return plan.target

    def _read(self, name: str, folder: Path) -> Source:
        """The vector as it is now; its tensors are hashed once for each file.

        Raises:
            SteerError: it is damaged, or none that an engine can take.
        """
        for _ in range(TRIES):
            before = _identity(folder)
            source = Source(name, folder, read_json(folder / ADAPTER_CONFIG), self._sha256(folder / ADAPTER_FILE))
            if before == _identity(folder):
                require_servable(folder)
                self._require_as_packed(folder, before)
                return source
        raise SteerError(f"{folder}: changes while it is read; wait until its writer has ended")

    def _sha256(self, path: Path) -> str:
        key = _file_identity(path)
        if key not in self._hashes:
            self._hashes[key] = sha256_of(path)
        return self._hashes[key]

    def _require_as_packed(self, folder: Path, identity: tuple[tuple[int, ...], ...]) -> None:
        """Raise if a pack was changed after it was packed; each state of it is looked at once."""
        if self._packed.get(folder) != identity:
            from ..vectors.manifest import require_as_packed  # with torch

            require_as_packed(folder)
            self._packed[folder] = identity

    def _is_whole(self, plan: Plan) -> bool:
        """Whether the adapter is there, and what it is linked to has not been written over."""
        config, tensors = plan.target / ADAPTER_CONFIG, plan.target / ADAPTER_FILE
        if not config.is_file() or not tensors.is_file():
            return False
        return not plan.is_linked or self._sha256(tensors) == plan.parts[0][0].tensors_sha256

    def _make(self, plan: Plan) -> None:
        with new_folder(plan.target, KIND) as part:
            if plan.is_linked:
                source, k = plan.parts[0]
                config = scaled_config(source.config, k)
                self._link(source, part / ADAPTER_FILE)
            else:
                from .sums import write_sum

                config = write_sum([(source.folder, k) for source, k in plan.parts], part / ADAPTER_FILE)
                if any(self._read(s.name, s.folder).content != s.content for s, _ in plan.parts):
                    raise SteerError(f"{plan.called}: a vector was replaced while it was read; ask again")
            (part / ADAPTER_CONFIG).write_text(json.dumps(config) + "\n")
            settings = {"name": plan.called, "vectors": {source.name: source.content for source, _ in plan.parts}}
            RunCard.now(KIND, settings=settings).save(part)

    def _link(self, source: Source, target: Path) -> None:
        """The source's tensors under another name: a hard link, or a copy where the file system has none.

        No symbolic link: it would lead to other tensors once the vector is replaced, while the engine may read the
        folder again whenever it has put the adapter out of its memory.
        """
        kept = self.folder / "tensors" / f"{source.tensors_sha256}.safetensors"
        with hold(kept, wait=True):
            if not kept.is_file() or self._sha256(kept) != source.tensors_sha256:
                self._keep(source, kept)
        link_or_copy(kept, target)

    def _keep(self, source: Source, kept: Path) -> None:
        kept.parent.mkdir(parents=True, exist_ok=True)
        part = kept.with_suffix(".part")
        part.unlink(missing_ok=True)
        link_or_copy(source.folder / ADAPTER_FILE, part)
        try:
            if self._sha256(part) != source.tensors_sha256:
                raise SteerError(f"{source.folder}: was replaced while it was read; ask again")
            part.replace(kept)
        finally:
            part.unlink(missing_ok=True)


def _is_linked(sources: Sequence[Source]) -> bool:
    """vLLM reads one alpha and one rank for all modules: those of single modules are folded into the factors."""
    return len(sources) == 1 and not any(sources[0].config.get(name) for name in ("rank_pattern", "alpha_pattern"))


def split_pin(text: str) -> tuple[str, str]:
    """A model's name without the hash at its end, and that hash; "" where it has none, as after a bare vector."""
    match = PINNED.fullmatch(text)
    return (match["text"], match["hash"]) if match else (text, "")


def hash_of(adapter: Path) -> str:
    """The hash at the end of an adapter's folder's name."""
    return adapter.name[-HASH_DIGITS:]


def with_recommended(strengths: Mapping[str, float | None], vectors: Mapping[str, Path]) -> dict[str, float]:
    """Strengths with the card's recommended k where the name says none.

    Raises:
        SteerError: the card recommends none.
    """
    return {name: _recommended(name, vectors[name]) if k is None else k for name, k in strengths.items()}


def _recommended(name: str, folder: Path) -> float:
    strength = RunCard.load(folder).strength if (folder / CARD_FILE).is_file() else None
    if strength is None or not strength.recommended:
        raise SteerError(f"{name}: its card recommends no k; say which, as in {name}@0.5")
    return on_grid(strength.recommended, name)


def scaled_config(config: Mapping[str, Any], k: float) -> dict[str, Any]:
    """The config at k times the change of an adapter that has one alpha and one rank: alpha times k."""
    return {**config, "lora_alpha": k * config["lora_alpha"]}


def stamp(folder: Path) -> tuple[object, ...]:
    """What changes when a vector is replaced, or its card: the card may recommend another k.

    Raises:
        SteerError: no vector is there.
    """
    card = folder / CARD_FILE
    return (*_identity(folder), card.stat().st_mtime_ns if card.is_file() else None)


def _identity(folder: Path) -> tuple[tuple[int, ...], ...]:
    return tuple(_file_identity(folder / name) for name in (ADAPTER_CONFIG, ADAPTER_FILE))


def _file_identity(path: Path) -> tuple[int, ...]:
    """What changes when a file is replaced or written.

    Raises:
        SteerError: it is not there.
    """
    try:
        found = path.stat()
    except OSError:
        known = "dense parts alone" if is_vector(path.parent) else "no vector"
        raise SteerError(f"{path.parent}: has no {path.name}, so that it holds {known}; expected an adapter") from None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
