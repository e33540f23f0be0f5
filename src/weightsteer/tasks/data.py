"""Where the shipped task files lie."""

from __future__ import annotations

from importlib import resources
from pathlib import Path


def task_file(shipped: str, data: str | Path | None) -> Path:
    """The user's file if one is given, else the shipped one."""
    return Path(data) if data else Path(str(resources.files("weightsteer") / "data" / "tasks" / shipped))
