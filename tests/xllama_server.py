"""A real OpenAI-compatible server for tests: a GGUF, the embedded model's or another, served by llama.cpp.

Run as a script with its settings as JSON, it prints its address and serves until its input is closed.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
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


@dataclass(frozen=True)
class Serving:
    """What is served and how; as llama.cpp's own defaults have it, but for what is set here."""

    gguf: str
    slots: int = 2
    loras: tuple[str, ...] = ()  # each at scale 0 until a request says otherwise
    cache_ram: int | None = None  # MiB for the states of earlier prompts; None: the default, which is to have it
    exact: bool = False  # keys and values in float32, plain attention


@contextmanager
def served(*, slots: int = 2, serving: Serving | None = None) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """The server's address, which ends in /v1, and its process; it is stopped when the block is left."""
    if importlib.util.find_spec("xllamacpp") is None:
        pytest.skip("needs the package xllamacpp")
    settings = serving or Serving(str(packaged_gguf()), slots)
    command = [sys.executable, __file__, json.dumps(asdict(settings))]
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


def _serve(serving: Serving) -> None:
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = serving.gguf
    params.hostnames, params.port = ["127.0.0.1"], 0  # any free port
    params.n_parallel, params.n_ctx = serving.slots, 1024 * serving.slots
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.n_gpu_layers = 0
    params.warmup = False
    if serving.loras:
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(path, 0.0) for path in serving.loras]
    if serving.cache_ram is not None:
        params.cache_ram_mib = serving.cache_ram
    if serving.exact:
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = xllamacpp.Server(params)
    print(server.listening_address, flush=True)
    sys.stdin.read()
    del server


if __name__ == "__main__":
    _serve(Serving(**json.loads(sys.argv[1])))
