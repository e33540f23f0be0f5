"""The state of a disk after a power cut, from a record of what a process did to it.

The disk keeps what was synced. Names are kept in the order in which they changed, up to the last change of a folder
that was synced, and to any point after that. A file's content that was not synced is lost, or cut, or zeros, or there.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from interposer import Happened


@dataclass
class _File:
    content: bytearray = field(default_factory=bytearray)
    synced: bytes = b""
    changed: bool = False  # since it was synced

    def after_cut(self, chance: random.Random) -> bytes:
        """One of the contents that the disk may have."""
        if not self.changed:
            return self.synced
        kept = self.synced if self.content.startswith(self.synced) else b""
        fresh = bytes(self.content[len(kept) :])
        return chance.choice(
            [self.synced, bytes(self.content), kept + fresh[: len(fresh) // 2], kept + bytes(len(fresh))]
        )


class Disk:
    """What a record leaves, step by step."""

    def __init__(self, root: Path) -> None:
        self.root = str(root.resolve())
        self.files: dict[int, _File] = {}  # those that have an inode now
        self.names: list[tuple[str, tuple[str, ...], _File | None]] = []  # changes of names, in order
        self.safe = 0  # so many of them are on the disk

    def take(self, happened: Happened) -> None:
        """One operation of the record."""
        what, *rest = happened
        if what in ("write", "truncate"):
            self._change(what, *rest)
        elif what == "fsync":
            self._sync(*rest)
        elif what == "create":
            path, inode = rest
            self.files[inode] = _File()
            self.names.append((what, (path,), self.files[inode]))
        else:
            self.names.append((what, tuple(rest), None))

    def _change(self, what: str, inode: int, at: int, content: bytes = b"") -> None:
        file = self.files[inode]
        file.changed = True
        if what == "truncate":
            del file.content[at:]
            file.content.extend(bytes(at - len(file.content)))
        else:
            file.content.extend(bytes(max(0, at - len(file.content))))
            file.content[at : at + len(content)] = content

    def _sync(self, inode: int, path: str) -> None:
        if inode in self.files:
            self.files[inode].synced, self.files[inode].changed = bytes(self.files[inode].content), False
        for number, (_, paths, _) in enumerate(self.names, start=1):
            if any(changed.rpartition("/")[0] == path for changed in paths):
                self.safe = max(self.safe, number)

    def rebuild(self, place: Path, chance: random.Random) -> None:
        """Write into `place` a state that the disk may have if the power is cut now."""
        kept = chance.choice([self.safe, chance.randint(self.safe, len(self.names)), len(self.names)])
        found: dict[str, _File | None] = {}  # None: a folder
        for what, paths, file in self.names[:kept]:
            if what in ("rename", "replace"):
                old, new = paths
                moved = {path: found.pop(path) for path in list(found) if path == old or path.startswith(f"{old}/")}
                found |= {new + path[len(old) :]: entry for path, entry in moved.items()}
            elif what in ("create", "mkdir"):
                found[paths[0]] = file
            else:
                found.pop(paths[0], None)
        for path in sorted(found):
            target = place / path[len(self.root) :].lstrip("/")
            entry = found[path]
            if entry is None:
                target.mkdir(parents=True, exist_ok=True)
            else:
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(entry.after_cut(chance))


def state_after(record: Sequence[Happened], root: Path, place: Path, chance: random.Random) -> None:
    """Write into `place` what a power cut after the record may leave of `root`."""
    disk = Disk(root)
    for happened in record:
        disk.take(happened)
    disk.rebuild(place, chance)
