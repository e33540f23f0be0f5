"""The manifest of a vector that was packed to be shared: which files it has, and the SHA-256 of each.

A folder with a manifest is loaded only if all is as it was packed. Hashes tell of damage and of changes; who made a
pack they do not tell, unless the pack's own digest came another way (`pull --sha256`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from ..checkpoints.checkpoint import ADAPTER_CONFIG, ADAPTER_FILE, DENSE_FILE
from ..errors import SteerError
from ..files import read_json, sha256_of, write_json
from ..run_card import CARD_FILE
from ..schema import checked, shown
from .readme import README

MANIFEST = "pack.json"
FORMAT = "weightsteer pack 1"
TENSORS = (ADAPTER_FILE, DENSE_FILE)
ALLOWED = (CARD_FILE, README, ADAPTER_CONFIG, *TENSORS)  # beside the manifest; no other file is written or read
AGAIN = "get it again where it comes from, or pack the vector anew with `weightsteer push`"


@dataclass(frozen=True)
class Packed:
    """One file of a pack."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    sha256: str
    bytes: int


@dataclass(frozen=True)
class Manifest:
    """What `pack.json` says."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    format: str
    name: str
    files: Mapping[str, Packed]


def write_manifest(folder: Path, name: str) -> None:
    """Write the manifest of the files that lie in a folder."""
    files = {
        file: {"sha256": sha256_of(folder / file), "bytes": (folder / file).stat().st_size}
        for file in ALLOWED
        if (folder / file).is_file()
    }
    write_json(folder / MANIFEST, {"format": FORMAT, "name": name, "files": files})


def read_manifest(path: Path) -> Manifest:
    """Read a manifest, and check all that can be checked without the files.

    Raises:
        SteerError: none, of another format, or one that names other files than a vector has.
    """
    if not path.is_file():
        raise SteerError(f"{path.parent}: is no pack (no {MANIFEST}); expected what `weightsteer push` made")
    content = read_json(path)
    found = content.get("format") if isinstance(content, dict) else None
    if found != FORMAT:
        raise SteerError(f"{path}: expected the format {FORMAT!r}, found {shown(found)}; this is no pack of ours")
    manifest = checked(Manifest, content, str(path))
    if foreign := next((name for name in manifest.files if name not in ALLOWED), ""):
        raise SteerError(f"{path}: names {shown(foreign)}; a pack holds {', '.join(ALLOWED)} and nothing else")
    if missing := next((name for name in (CARD_FILE, README) if name not in manifest.files), ""):
        raise SteerError(f"{path}: does not name {missing}, which every pack has; {AGAIN}")
    if not any(name in manifest.files for name in TENSORS):
        raise SteerError(f"{path}: names no tensors ({' or '.join(TENSORS)}); {AGAIN}")
    return manifest


def require_as_packed(folder: Path) -> None:
    """Raise unless a folder that has a manifest holds what it says, and of a vector's files no other.

    Raises:
        SteerError: a file is missing, was added, or has another content: the message names both hashes.
    """
    if not (folder / MANIFEST).exists():
        return
    manifest = read_manifest(folder / MANIFEST)
    for name in ALLOWED:
        path = folder / name
        if name not in manifest.files:
            if path.exists():
                raise SteerError(f"{path}: is not named in {MANIFEST}, so it was added after packing; {AGAIN}")
            continue
        if not path.is_file():
            raise SteerError(f"{path}: is named in {MANIFEST} and is missing; {AGAIN}")
        expected, found = manifest.files[name].sha256, sha256_of(path)
        if found != expected:
            raise SteerError(
                f"{path}: was changed after packing: expected SHA-256 {shown(expected)}, found {found!r}; {AGAIN}"
            )


def drop_manifest(folder: Path) -> None:
    """Make a pack an ordinary vector, before something of it is written anew."""
    (folder / MANIFEST).unlink(missing_ok=True)
