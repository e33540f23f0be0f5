"""A real OpenAI-compatible server for tests: the embedded model's GGUF served by llama.cpp, in a process of its own.

Run as a script with the path of a GGUF, it prints its address and serves until its input is closed.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from weightsteer.checkpoints.embedded_model import PACKAGE

MODEL = "smollm2"  # llama.cpp serves its one model under any name


def packaged_gguf() -> Path:
    """The embedded model's file, in the package that carries it."""
    spec = importlib.util.find_spec(PACKAGE)  # which does not import it: that needs llama.cpp
    assert spec is not None
    assert spec.submodule_search_locations is not None
    (path,) = (file for folder in spec.submodule_search_locations for file in Path(folder).glob("*.gguf"))
    return path


@contextmanager
def served(*, slots: int = 2) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """The server's address, which ends in /v1, and its process; it is stopped when the block is left."""
    if importlib.util.find_spec("xllamacpp") is None:
        pytest.skip("needs the package xllamacpp")
    command = [sys.executable, __file__, str(packaged_gguf()), str(slots)]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        address = process.stdout.readline().strip()
        assert address, f"{command}: ended before it served"
        yield f"{address}/v1", process
    finally:
        process.stdin.close()
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()


def _serve(gguf: str, slots: int) -> None:
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = gguf
    params.hostnames, params.port = ["127.0.0.1"], 0  # any free port
    params.n_parallel, params.n_ctx = slots, 1024 * slots
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.n_gpu_layers = 0
    params.warmup = False
    server = xllamacpp.Server(params)
    print(server.listening_address, flush=True)
    sys.stdin.read()
    del server


if __name__ == "__main__":
    _serve(sys.argv[1], int(sys.argv[2]))
