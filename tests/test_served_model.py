from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

import xllama_server
from conftest import random_vector, tiny_lm
from tiny_gguf import write_llama
from weightsteer.continuations import score_plainly
from weightsteer.engines.check import STEERED, Reference, require_strengths
from weightsteer.engines.served_model import ServedModel
from weightsteer.engines.tokens import tokens_of
from weightsteer.errors import SteerError
from weightsteer.export.gguf_lora import export_gguf_lora
from weightsteer.lm import LM
from weightsteer.vectors.weight_vector import WeightVector
from xllama_server import Serving

PROMPTS = ["How was your day?", [{"role": "user", "content": "Do you like my poem? é"}], "Tell me about bread."]
CHOICES = [["Splendid, thank you.", "Dreary."], ["Yes.", "No, I do not."], ["It rises. ☀"]]
Answer = Callable[["Scripted", dict[str, Any]], tuple[int, Any]]


class Scripted(ThreadingHTTPServer):
    """A vLLM by its looks: log-probabilities are those of a model here, and faults are as told."""

    daemon_threads = True
    request_queue_size = 128  # clients that connect at once; of more than 5, the default, some are reset

    def __init__(self, lm: LM, answer: Answer) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.lm, self.answer, self.name = lm, answer, "base"
        self.posts = 0
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def right(self, body: dict[str, Any]) -> tuple[int, Any]:
        """What a vLLM without a fault answers; its one reply is the letter a."""
        ids = body["prompt"]
        with self.lock, torch.no_grad():
            logits = self.lm.model(torch.tensor([ids])).logits[0].log_softmax(dim=-1)
        chances = [None, *({str(t): {"logprob": float(logits[i, t])}} for i, t in enumerate(ids[1:]))]
        return 200, {"choices": [{"text": "a", "finish_reason": "stop", "prompt_logprobs": chances}]}

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that went away is no news."""


class Handler(BaseHTTPRequestHandler):
    server: Scripted

    def do_GET(self) -> None:
        models = [{"id": "base@1", "parent": "base"}, {"id": self.server.name, "created": time.time()}]
        self.give(200, {"data": models})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.posts += 1
        self.give(*self.server.answer(self.server, body))

    def give(self, status: int, body: Any) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Retry-After-Ms", "1")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Keep quiet."""


Start = Callable[..., Scripted]


@pytest.fixture
def start() -> Iterator[Start]:
    servers: list[Scripted] = []

    def starting(lm: LM, answer: Answer = lambda server, body: server.right(body)) -> Scripted:
        servers.append(Scripted(lm, answer))
        threading.Thread(target=servers[-1].serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return servers[-1]

    yield starting
    for server in servers:
        server.shutdown()
        server.server_close()


def connected(server: Scripted, lm: LM, **options: Any) -> ServedModel:
    reference = options.pop("reference") if "reference" in options else Reference.of(lm)
    return ServedModel.connect(server.url, "vllm", lm, **{"reference": reference, "retries": 2, **options})


def agree(served: ServedModel, lm: LM, within: float) -> None:
    """Scores and greedy replies of both."""
    theirs = [score for row in served.score_choices(PROMPTS, CHOICES) for score in row]
    mine = [score for row in lm.score_choices(PROMPTS, CHOICES) for score in row]
    assert [score.tokens for score in theirs] == [score.tokens for score in mine]
    assert [score.total for score in theirs] == pytest.approx([score.total for score in mine], abs=within)
    assert served.replies(PROMPTS, max_new_tokens=6) == lm.replies(PROMPTS, max_new_tokens=6)


def test_a_served_model_is_the_one_here(start: Start, lm: LM, checkpoint: Path) -> None:
    server = start(lm)
    for local in (lm, tokens_of(checkpoint)):  # with its weights, and without
        served = connected(server, local, reference=Reference.of(lm)).with_system_prompt("Be kind.")
        mine = lm.with_system_prompt("Be kind.")
        assert served.chat_ids("Hi") == mine.chat_ids("Hi")
        scores, expected = (each.score_choices(PROMPTS, CHOICES) for each in (served, mine))
        for row, wanted in zip(scores, expected, strict=True):
            assert [s.total for s in row] == pytest.approx([s.total for s in wanted], abs=1e-4)
        (text,), (wanted_text,) = (each.score_texts(["Bread is old."]) for each in (served, mine))
        assert (text.total, text.tokens) == pytest.approx((wanted_text.total, wanted_text.tokens), abs=1e-4)
        assert served.generate(["Hi"]) == ["a"]


def test_what_a_request_says(start: Start, lm: LM) -> None:
    bodies: list[dict[str, Any]] = []

    def noting(server: Scripted, body: dict[str, Any]) -> tuple[int, Any]:
        bodies.append(body)
        return server.right(body)

    served = connected(start(lm, noting), lm, reference=None, concurrency=1).steered({"syc": -0.72, "calm": 0.0})
    served.replies(["Hi", "Ho"], max_new_tokens=5, temperature=0.7, seed=3)
    assert [body["model"] for body in bodies] == ["syc@-0.72"] * 2
    assert [body["prompt"] for body in bodies] == [lm.chat_ids("Hi"), lm.chat_ids("Ho")]
    wanted = {"max_tokens": 5, "temperature": 0.7, "top_p": 1.0, "top_k": -1, "stop_token_ids": lm.stops}
    assert {name: bodies[0][name] for name in wanted} == wanted
    assert [body["seed"] for body in bodies] == [3, 4]
    served.steered({}).score_texts(["Hi there"])
    assert bodies[-1]["model"] == "base"
    beside = replace(served, dialect=served.dialect.beside("calm"), strengths={})  # where other strengths run at once
    beside.score_texts(["Hi there"])
    assert bodies[-1]["model"] == "calm@0"


@pytest.mark.parametrize(
    "fault",
    [
        (429, {"error": {"message": "busy"}}),
        (503, b"loading"),
        (200, b"{"),
        (200, {"choices": []}),
        (200, {"choices": [{"prompt_logprobs": [None]}]}),
    ],
)
def test_what_may_pass_is_tried_again(start: Start, lm: LM, fault: tuple[int, Any]) -> None:
    seen: set[str] = set()

    def at_first(server: Scripted, body: dict[str, Any]) -> tuple[int, Any]:
        with server.lock:
            first = str(body["prompt"]) not in seen
            seen.add(str(body["prompt"]))
        return fault if first else server.right(body)

    served = connected(start(lm, at_first), lm, concurrency=4)
    (score,) = served.score_texts(["Bread is old."])
    assert score.total == pytest.approx(lm.score_texts(["Bread is old."])[0].total, abs=1e-4)


def test_what_does_not_pass_is_one_line_that_says_what_to_do(start: Start, lm: LM) -> None:
    with pytest.raises(SteerError, match=r"HTTP 500|broken, tried 3 times .*is the server running.*is kept"):
        connected(start(lm, lambda server, body: (500, {"error": {"message": "broken"}})), lm)
    with pytest.raises(SteerError, match="malformed .*the kind of server"):
        connected(start(lm, lambda server, body: (200, b"<html>")), lm)
    with pytest.raises(SteerError, match="not found"):  # at once
        connected(start(lm, lambda server, body: (404, {"error": {"message": "not found"}})), lm)
    with pytest.raises(SteerError, match="timed out"):
        connected(start(lm, lambda server, body: time.sleep(2) or server.right(body)), lm, timeout=0.2, retries=0)
    gone = start(lm)
    served = connected(gone, lm, retries=0)
    gone.shutdown()
    gone.server_close()
    with pytest.raises(SteerError, match="tried 1 times"):
        served.score_texts(["Hi there"])


def test_another_model_is_refused_before_and_after(start: Start, lm: LM) -> None:
    other = tiny_lm(seed=1)
    with pytest.raises(SteerError, match=r"does not serve tiny: at k = 0 .* differs by .* are allowed"):
        connected(start(other), lm)
    server = start(lm)
    served = connected(server, lm)
    served.score_texts(["Hi there"])
    server.lm = other  # restarted under the same name
    with pytest.raises(SteerError, match="does not serve tiny"):
        served.score_texts(["Hi there"])
    server.lm, server.name = lm, "base-2"  # the same weights under another name
    served.score_texts(["Hi there"])
    unchecked = connected(server, lm, reference=None)
    server.name = "base-3"
    with pytest.raises(SteerError, match="serves base-3 now and served base-2 before"):
        unchecked.score_texts(["Hi there"])


def test_a_lost_connection_is_followed_by_the_whole_comparison(start: Start, lm: LM) -> None:
    server = start(lm)
    served = connected(server, lm)
    before = server.posts
    served.score_texts(["Hi there"])
    usual, before = server.posts - before, server.posts
    served.connection.lost.append("as if it had been lost")
    served.score_texts(["Hi there"])
    assert (usual, server.posts - before) == (2, 9)


@contextmanager
def llama_cpp(model: Path, lora: Path, cache_ram: int | None = 0) -> Iterator[str]:
    """The address of a real llama.cpp server; None for `cache_ram` is its own default, to keep prompts."""
    serving = Serving(str(model), slots=4, loras=(str(lora),), cache_ram=cache_ram)
    with xllama_server.served(serving=serving) as (url, _):
        yield url


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[LM, WeightVector, Path, Path]:
    """The tiny model, a vector, and both as GGUF files."""
    folder, lm = tmp_path_factory.mktemp("gguf"), tiny_lm()
    vector = random_vector(lm)
    return (
        lm,
        vector,
        write_llama(lm.model, folder / "m.gguf"),
        export_gguf_lora(vector, folder / "syc.gguf", config=lm.model.config).path,
    )


def test_llama_cpp_steers_by_scale(files: tuple[LM, WeightVector, Path, Path]) -> None:
    lm, vector, model, lora = files
    with llama_cpp(model, lora) as url:
        served = ServedModel.connect(url, "llama.cpp", lm, concurrency=4)
        assert served.vectors() == ["syc"]
        for k in (-1.0, 0.5):
            with vector.applied(lm, k):
                agree(served.steered({"syc": k}), lm, within=0.02)  # its cache of keys and values is in 16 bits
        with pytest.raises(SteerError, match=r"no LoRA file calm.gguf; those that it has: syc"):
            served.steered({"calm": 1.0}).score_texts(["Hi there"])


@pytest.mark.slow
def test_its_strengths_are_compared(files: tuple[LM, WeightVector, Path, Path]) -> None:
    lm, vector, model, lora = files
    with llama_cpp(model, lora) as url:
        served = ServedModel.connect(url, "llama.cpp", lm, reference=Reference.of(lm))
        assert require_strengths(served, "syc", lm, vector, [-1.0, 1.0], 0.01) < STEERED * 0.01


@pytest.mark.slow
def test_a_prompt_cache_that_ignores_the_scale_is_found(files: tuple[LM, WeightVector, Path, Path]) -> None:
    lm, vector, model, lora = files
    with llama_cpp(model, lora) as url, llama_cpp(model, lora, cache_ram=None) as blind:
        with pytest.raises(SteerError, match="prompt cache does not know of scales: .*--cache-ram 0"):
            ServedModel.connect(blind, "llama.cpp", lm)
        served = ServedModel.connect(url, "llama.cpp", lm, reference=Reference.of(lm))
        served = replace(served, connection=replace(served.connection, url=blind))  # as if it had been started anew
        with pytest.raises(SteerError, match="steers wrongly by syc: .*--cache-ram 0"):
            require_strengths(served, "syc", lm, vector, [-1.0, 1.0], 0.01)


def test_plain_scores_are_what_the_check_compares(lm: LM) -> None:
    ids = lm.chat_ids("Hi")
    with torch.no_grad():
        ((total,),) = score_plainly(lm, [ids[:-2]], [[ids[-2:]]], [0], 1, 1)
        chances = lm.model(torch.tensor([ids])).logits[0].log_softmax(dim=-1)
    assert total == pytest.approx(float(chances[-3, ids[-2]] + chances[-2, ids[-1]]), abs=1e-5)


@pytest.mark.parametrize("url", ["ftp://x", "localhost:8000", "http://me:secret@host", "http://host/?key=secret"])
def test_an_address_that_is_none(lm: LM, url: str) -> None:
    with pytest.raises(SteerError, match="expected a server's address") as error:
        ServedModel.connect(url, "vllm", lm)
    assert "secret" not in str(error.value)
