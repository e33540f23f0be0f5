"""Run a notebook from its first cell to its last, and write it with what it printed: `make notebook`."""

from __future__ import annotations

import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

SECONDS = 1800  # at most, for one cell


def main() -> None:
    source, result = (Path(argument) for argument in sys.argv[1:])
    notebook = nbformat.read(source, as_version=4)
    NotebookClient(notebook, timeout=SECONDS, kernel_name="python3", resources={"metadata": {"path": "."}}).execute()
    result.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, result)


if __name__ == "__main__":
    main()
