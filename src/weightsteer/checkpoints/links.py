"""Links in a model's folder: they may lead about in it and to the hub cache's own store, and nowhere else."""

from __future__ import annotations

from pathlib import Path

from ..errors import SteerError


def file_within(file: Path, folder: Path) -> Path:
    """The file that is meant, with links followed; a link may be a way to a file that is none of the model's.

    Raises:
        SteerError: a link that leads out of the folder.
    """
    real, home = file.resolve(), folder.resolve()
    blobs = home.parent.parent / "blobs"  # where a hub cache keeps what its snapshots link to
    if not real.is_relative_to(home) and not (home.parent.name == "snapshots" and real.is_relative_to(blobs)):
        raise SteerError(f"{file}: is a link out of the model's folder, to {real}; put the file itself in its place")
    return real
