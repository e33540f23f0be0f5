"""A real llama.cpp server: its scale is our k, and a server that answers from another scale's cache is refused."""

from __future__ import annotations

import json
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import torch
from torch import Tensor

from conftest import random_vector, tiny_lm
from tiny_gguf import write_llama
from weightsteer.errors import SteerError
from weightsteer.export.gguf_lora import export_gguf_lora
from weightsteer.export.llama_server import llama_command, named_loras, request_field
from weightsteer.lm import LM
from weightsteer.scale_check import refuse_blind_server
from weightsteer.vectors.weight_vector import WeightVector
from xllama_server import Serving, served

IDS = [1, 40, 77, 101, 9, 200, 33, 64, 5, 150]


@pytest.fixture(scope="module")
def model() -> LM:
    return tiny_lm(seed=3)


@pytest.fixture(scope="module")
def vectors(model: LM) -> list[WeightVector]:
    return [random_vector(model, seed=1), random_vector(model, seed=2, rank=5)]


@pytest.fixture(scope="module")
def files(model: LM, vectors: list[WeightVector], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The base and two LoRAs."""
    folder = tmp_path_factory.mktemp("gguf")
    base = write_llama(model.model, folder / "base.gguf")
    for number, vector in enumerate(vectors):
        export_gguf_lora(vector, folder / f"v{number}.gguf", config=model.model.config)
    return [str(base), str(folder / "v0.gguf"), str(folder / "v1.gguf")]


@contextmanager
def serving(files: list[str], **settings: int | bool) -> Iterator[str]:
    with served(serving=Serving(files[0], loras=tuple(files[1:]), **settings)) as (address, _):  # type: ignore[arg-type]
        yield address.removesuffix("/v1")


def log_probs(address: str, scales: list[float], ids: list[int] = IDS) -> Tensor:
    """Of every token after the ids: (vocabulary,)."""
    lora = [{"id": number, "scale": scale} for number, scale in enumerate(scales)]
    body = {"prompt": ids, "n_predict": 1, "n_probs": 259, "temperature": 0.0, "lora": lora, "id_slot": 0}
    body["logit_bias"] = [[100, 1e4]]  # the letter a is chosen; the probabilities are those before
    request = urllib.request.Request(f"{address}/completion", json.dumps(body).encode())
    with urllib.request.urlopen(request, timeout=60) as reply:
        rows = json.load(reply)["completion_probabilities"][0]["top_logprobs"]
    found = torch.full((259,), float("nan"), dtype=torch.float64)
    for row in rows:
        found[row["id"]] = row["logprob"]
    return found


@torch.no_grad()
def ours(model: LM) -> Tensor:
    return model.model(torch.tensor([IDS])).logits[0, -1].double().log_softmax(0)


@torch.no_grad()
def test_the_servers_scale_is_k(model: LM, vectors: list[WeightVector], files: list[str]) -> None:
    """Whole distributions at five k and at a sum, one scale a request, in an order that a cache would confuse."""
    with serving(files, cache_ram=0, exact=True) as address:
        refuse_blind_server(address)
        assert float((log_probs(address, [0, 0]) - ours(model)).abs().max()) < 1e-3
        changes = []
        for k in (-1.0, 0.5, 1.0, -0.37, 0.25, 1.0):
            with vectors[0].applied(model, k):
                expected = ours(model)
            changes.append(float((expected - ours(model)).abs().max()))
            assert float((log_probs(address, [k, 0]) - expected).abs().max()) < 1e-3, k
        assert min(changes) > 0.1
        total = 0.7 * vectors[0] - 0.4 * vectors[1]
        with total.applied(model, 1.0):
            assert float((log_probs(address, [0.7, -0.4]) - ours(model)).abs().max()) < 1e-3


def test_a_server_that_does_not_know_of_scales_is_refused(files: list[str]) -> None:
    """A prompt that was computed at k = 1, and is asked again at -1, comes out wrong with llama.cpp's defaults."""
    with serving(files, slots=2) as address:
        right = log_probs(address, [-1, 0])
        log_probs(address, [1, 0])
        log_probs(address, [-1, 0], IDS[::-1])
        assert float((log_probs(address, [-1, 0]) - right).abs().max()) > 0.05
        with pytest.raises(SteerError, match=r"from what it computed at another.*--cache-ram 0"):
            refuse_blind_server(f"{address}/v1", adapter=1)
        with pytest.raises(SteerError, match="has no LoRA 2 \\(it has 0, 1\\)"):
            refuse_blind_server(address, adapter=2)
        with pytest.raises(SteerError, match="gives the same at scale 0.5 and at 0.5"):
            refuse_blind_server(address, scales=(0.5, 0.5))


class _Other(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        code, content = {"/404/lora-adapters": (404, b"{}"), "/html/lora-adapters": (200, b"<html>")}.get(
            self.path, (302, b"")
        )
        self.send_response(code)
        self.send_header("Location", "http://127.0.0.1:9/")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


def test_what_is_no_llama_cpp_server_is_told() -> None:
    with pytest.raises(SteerError, match="expected one like http://127.0.0.1:8080"):
        refuse_blind_server("file:///etc/passwd")
    with pytest.raises(SteerError, match="cannot be reached"):
        refuse_blind_server("http://127.0.0.1:9", timeout=2)
    server = HTTPServer(("127.0.0.1", 0), _Other)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    try:
        for path, message in (("404", "answered 404"), ("html", "did not answer as"), ("moved", "answered 302")):
            with pytest.raises(SteerError, match=message):
                refuse_blind_server(f"{url}/{path}")
    finally:
        server.shutdown()
        server.server_close()


def test_the_command_turns_the_cache_off(files: list[str], tmp_path: Path) -> None:
    base, first, second = files
    vectors = named_loras([first, f"gloomy={second}"])
    assert list(vectors) == ["v0", "gloomy"]
    command = llama_command(vectors, base, port=9000, options=["-ngl", "99"])
    assert command == [
        *["llama-server", "--model", base, "--lora-scaled", f"{first}:0,{second}:0", "--cache-ram", "0"],
        *["--host", "127.0.0.1", "--port", "9000", "-ngl", "99"],
    ]
    assert request_field(vectors, {"gloomy": -0.7}) == [{"id": 0, "scale": 0.0}, {"id": 1, "scale": -0.7}]
    for arguments, message in (
        ([first, first], "v0: is the name of two files"),
        (["a b.gguf"], "cannot stand in syc@-0.72"),
    ):
        with pytest.raises(SteerError, match=message):
            named_loras(arguments)
    (tmp_path / "a,b.gguf").write_bytes(b"GGUF")
    (tmp_path / "text.gguf").write_text("text")
    for paths, message in (
        ({}, "no vector is given"),
        ({"w": tmp_path / "none.gguf"}, "cannot be read"),
        ({"w": tmp_path / "text.gguf"}, "is no GGUF file"),
        ({"w": tmp_path / "a,b.gguf"}, "takes a path with , apart"),
    ):
        with pytest.raises(SteerError, match=message):
            llama_command(paths, base)
    with pytest.raises(SteerError, match="rude: no such vector; the server has v0, gloomy"):
        request_field(vectors, {"rude": 1.0})
