"""What the server refuses, and how it says so; and clients that go away, are slow, or are too many."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import openai
import pytest

from conftest import random_vector, tiny_lm
from served import Address, served
from weightsteer.errors import SteerError
from weightsteer.run_card import StrengthRange
from weightsteer.serving.dial import Dial
from weightsteer.serving.guard import Guard
from weightsteer.vectors.weight_vector import WeightVector

TALK = [{"role": "user", "content": "Hello!"}]
KEY = "a key, of some length"


def _vectors() -> dict[str, WeightVector]:
    lm = tiny_lm()
    syc = random_vector(lm, 1)
    card = replace(syc.card, strength=StrengthRange(recommended=0.5, negative=-0.5, low=-1.0, high=1.0))
    return {"syc": replace(syc, card=card), "gloomy": random_vector(lm, 2)}


@pytest.fixture(scope="module")
def here() -> Iterator[Address]:
    with served(tiny_lm(), _vectors(), api_key=KEY) as address:
        yield address


@pytest.fixture(scope="module")
def small() -> Iterator[Address]:
    """A server with room for two rows and one request in the queue."""
    with served(tiny_lm(), _vectors(), most_rows=2, most_waiting=1) as address:
        yield address


def _refused(here: Address, path: str, body: object, **headers: str) -> tuple[int, dict[str, Any]]:
    status, _, found = here.ask(path, body, {"Authorization": f"Bearer {KEY}", **headers})
    assert set(found) == {"error"}, found
    assert set(found["error"]) == {"message", "type", "param", "code"}
    return status, found["error"]


CHAT = "/v1/chat/completions"


@pytest.mark.parametrize(
    ("fields", "status", "param", "said"),
    [
        ({"model": "sic@1"}, 404, "model", "no vector 'sic' among syc, gloomy"),
        ({"model": "syc@"}, 404, "model", "the names here are tiny, syc, gloomy"),
        ({"model": "syc@1+syc@2"}, 404, "model", "stands twice"),
        ({"model": "syc@1e99"}, 404, "model", "syc@-0.72"),
        ({"model": "<script>alert(1)</script>\x1b[31m"}, 404, "model", "syc@-0.72"),
        ({"model": "gloomy"}, 400, "model", "recommends no k"),
        ({"model": "syc@1", "k": 2}, 400, "k", "has a strength already"),
        ({"k": 1}, 400, "k", "there are 2 vectors (syc, gloomy)"),
        ({"k": {"sic": 1}}, 404, "k", "no vector 'sic'"),
        ({"k": {"syc": 1e39}}, 400, "k", "finite strength"),
        ({"k": "a lot"}, 400, "k", ""),
        ({"k": True}, 400, "k", "found true or false"),
        ({"k": {"syc": False}}, 400, "k", "found true or false"),
        ({"temperature": -1}, 400, "temperature", "greater than or equal to 0"),
        ({"temprature": 1}, 400, "temprature", "no such field"),
        ({"tools": [{"type": "function"}]}, 400, None, "tools: this server cannot do"),
        ({"max_tokens": 9000}, 400, "max_tokens", "longer than the model's context of 8192"),
        ({"messages": [{"role": "user", "content": "x" * 9000}]}, 400, "messages", "longer than the model's context"),
        ({"messages": []}, 400, "messages", "at least 1 item"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "messages", ""),
        ({"n": 0}, 400, "n", "greater than or equal to 1"),
    ],
)
def test_mistakes_are_told_as_openai_tells_them(
    here: Address, fields: dict[str, Any], status: int, param: str | None, said: str
) -> None:
    found, error = _refused(here, CHAT, {"messages": TALK, **fields})
    assert (found, error["param"]) == (status, param), error
    assert said in error["message"]


@pytest.mark.parametrize("body", [b"{", b'{"messages": NaN}', b"\xff", b'"text"', b"[]"])
def test_a_body_that_is_no_request(here: Address, body: bytes) -> None:
    assert _refused(here, CHAT, body)[0] == 400


@pytest.mark.parametrize("asked", [{"echo": True, "logprobs": 2}, {"prompt_logprobs": 1}])
def test_a_prompt_that_cannot_be_scored_says_why(here: Address, asked: dict[str, Any]) -> None:
    """At a k where the model gives no numbers."""
    body = {"prompt": "abc", "model": "syc", "k": 3e38, "max_tokens": 0, **asked}
    status, error = _refused(here, "/v1/completions", body)
    assert status == 400
    assert "no numbers" in error["message"]


@pytest.mark.parametrize(
    ("path", "asked"),
    [("/dial/fan", {"strengths": [{"syc": True}]}), ("/dial/kl", {"strengths": {"syc": True}, "reply": "Hi."})],
)
def test_a_switch_is_no_strength(here: Address, path: str, asked: dict[str, Any]) -> None:
    status, error = _refused(here, path, {"messages": TALK, **asked})
    assert status == 400
    assert "true or false" in error["message"]


def test_a_body_that_is_no_json(here: Address) -> None:
    status, error = _refused(here, CHAT, b"{bad")
    assert (status, error["param"]) == (400, None)
    assert "the body is no JSON" in error["message"]


@pytest.mark.parametrize("temperature", [1e-30, 1e-45, 1e-300])
def test_a_temperature_near_zero_takes_the_likeliest_token(here: Address, temperature: float) -> None:
    asked = {"model": "syc@0.5", "prompt": "Hi", "max_tokens": 5, "seed": 3}
    likeliest, found = (
        here.ask("/v1/completions", {**asked, "temperature": t}, {"Authorization": f"Bearer {KEY}"})[2]["choices"][0]
        for t in (0, temperature)
    )
    assert found["text"] == likeliest["text"]


def test_a_token_that_the_model_has_not(here: Address) -> None:
    status, error = _refused(here, "/v1/completions", {"prompt": [5, 259]})
    assert (status, error["param"]) == (400, "prompt")
    assert "0 to 258" in error["message"]


def test_a_path_that_is_not_there(here: Address) -> None:
    assert _refused(here, "/v1/embeddings", {"input": "a"})[0] == 404


def test_the_client_of_openai_raises_its_own_errors(here: Address) -> None:
    with pytest.raises(openai.NotFoundError, match="no vector 'sic'"):
        here.client(KEY).chat.completions.create(model="sic@1", messages=TALK)
    with pytest.raises(openai.AuthenticationError, match="Authorization: Bearer KEY"):
        here.client("another key").models.list()


def test_only_the_page_is_free_of_the_key(here: Address) -> None:
    for path in ("/dial", "/v1/models", "/health", "/openapi.json", "/nothing"):
        assert here.ask(path)[0] == 401
    status, headers, text = here.ask("/")
    assert status == 200
    assert "<html" in text
    assert "default-src 'none'" in headers["content-security-policy"]


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "evil.example"}, 403),
        ({"Host": "evil.example:8080"}, 403),
        ({"Host": "["}, 403),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://["}, 403),
        ({"Host": "localhost:1"}, 200),
        ({"Host": "localhost:1", "Origin": "http://localhost:1"}, 200),
    ],
)
def test_another_sites_page_is_kept_out(here: Address, headers: dict[str, str], status: int) -> None:
    assert here.ask("/dial", None, {"Authorization": f"Bearer {KEY}", **headers})[0] == status


def test_a_server_that_is_open_to_others_has_any_name() -> None:
    with served(tiny_lm(), {}, host="0.0.0.0") as address:
        url = Address(address.url.replace("0.0.0.0", "127.0.0.1"))
        assert url.ask("/dial", None, {"Host": "gpu-box"})[0] == 200


def test_strengths_out_of_the_tested_range() -> None:
    vectors = _vectors()
    warned = Dial("tiny", vectors).setting("syc@1.5")
    assert warned.strengths == {"syc": 1.5}
    assert "outside the range" in warned.warning
    clamped = Dial("tiny", vectors, "clamp").setting("syc@-1.5")
    assert clamped.strengths == {"syc": -1.0}
    assert "k = -1 was taken" in clamped.warning
    with pytest.raises(SteerError, match="this server refuses it"):
        Dial("tiny", vectors, "refuse").setting(None, {"syc": 1.5})
    assert Dial("tiny", vectors).setting("gloomy@99").warning == ""  # nothing was tested
    assert Dial("tiny", vectors).setting("syc@0+gloomy@0.0001").strengths == {}


def test_a_warning_is_in_the_header_and_in_the_body(small: Address) -> None:
    body = {"model": "syc@1.5", "messages": TALK, "max_tokens": 1}
    _, headers, found = small.ask(CHAT, body)
    assert headers["X-Weightsteer-Warning"] == found["warning"]
    assert "outside the range" in found["warning"]
    assert small.events(CHAT, {**body, "stream": True})[0]["warning"] == found["warning"]


def test_names_that_requests_cannot_carry() -> None:
    syc = _vectors()["syc"]
    with pytest.raises(SteerError, match="NAME=FOLDER"):
        Dial("tiny", {"a b": syc})
    with pytest.raises(SteerError, match="the base's name too"):
        Dial("tiny", {"tiny": syc})


def test_a_vector_of_another_base() -> None:
    other = tiny_lm(layers=3)
    with (
        pytest.raises(SteerError, match=r"layers\.2.*use the base model"),
        served(tiny_lm(), {"w": random_vector(other)}),
    ):
        pass


def test_a_port_in_use() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(SteerError, match=f"port {port} is in use"), served(tiny_lm(), {}, port=port):
            pass


def test_hostile_text_is_text(small: Address) -> None:
    hostile = "<script>alert(1)</script>\x1b[31m\u202e\x00"
    body = {"prompt": hostile, "echo": True, "max_tokens": 1, "temperature": 0}
    status, headers, found = small.ask("/v1/completions", body)
    assert (status, headers["content-type"]) == (200, "application/json")
    assert found["choices"][0]["text"].startswith(hostile)


def _send(address: Address, head: str, *parts: bytes) -> str:
    """A raw request, part by part; what comes back."""
    where = urlsplit(address.url)
    with socket.create_connection((where.hostname, where.port), timeout=30) as connection:
        connection.sendall(f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\n{head}\r\n\r\n".encode())
        try:
            for part in parts:
                connection.sendall(part)
        except OSError:  # refused before all was sent
            pass
        found = b""
        while received := connection.recv(1 << 16):
            found += received
        return found.decode()


def test_a_huge_body_is_refused_while_it_comes(small: Address) -> None:
    size = 100 << 20
    before = time.perf_counter()
    assert " 413 " in _send(small, f"Content-Type: application/json\r\nContent-Length: {size}")
    assert time.perf_counter() - before < 5
    part = b"100000\r\n" + b"x" * (1 << 20) + b"\r\n"
    found = _send(small, "Content-Type: application/json\r\nTransfer-Encoding: chunked", *[part] * 40)
    assert "413" in found.splitlines()[0]
    assert "larger than 16 MiB" in found


def test_the_client_of_openai_sees_why_a_huge_body_is_refused(small: Address) -> None:
    with pytest.raises(openai.APIStatusError, match="larger than 16 MiB"):
        small.client().completions.create(model="syc@1", prompt="x" * (100 << 20))


def test_a_body_that_does_not_come_is_not_waited_for() -> None:
    sent: list[dict[str, Any]] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        while (await receive()).get("more_body"):
            pass

    async def receive() -> dict[str, Any]:
        if sent:
            return {"type": "http.disconnect"}
        await asyncio.sleep(60)
        raise AssertionError

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "path": "/", "headers": []}
    asyncio.run(Guard(app, slowest_body=0.05)(scope, receive, send))
    assert sent[0]["status"] == 408
    assert "no further part" in json.loads(sent[1]["body"])["error"]["message"]


def _load(address: Address) -> tuple[int, int]:
    found = address.ask("/health")[2]
    return found["running"], found["waiting"]


def _wait_for(address: Address, load: tuple[int, int]) -> None:
    end = time.monotonic() + 20
    while _load(address) != load:
        assert time.monotonic() < end, _load(address)
        time.sleep(0.02)


def _leave_early(address: Address, *, stream: bool) -> None:
    """Ask for a long reply and go away while it is written."""
    where = urlsplit(address.url)
    body = json.dumps({"prompt": "a", "max_tokens": 8000, "ignore_eos": True, "stream": stream}).encode()
    with socket.create_connection((where.hostname, where.port), timeout=30) as connection:
        head = f"Host: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.sendall(f"POST /v1/completions HTTP/1.1\r\n{head}".encode() + body)
        _wait_for(address, (1, 0))
        if stream:
            connection.recv(100)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_frees_its_row(small: Address, stream: bool) -> None:
    _leave_early(small, stream=stream)
    _wait_for(small, (0, 0))


def test_a_full_queue_answers_429_and_goes_on(small: Address) -> None:
    client = small.client()
    streams = []
    for running, waiting in ((1, 0), (2, 0), (2, 1)):
        body = {"ignore_eos": True}
        streams.append(
            client.completions.create(model="syc@1", prompt="a", max_tokens=8000, stream=True, extra_body=body)
        )
        _wait_for(small, (running, waiting))
    for fields in ({}, {"stream": True}):
        status, headers, found = small.ask(CHAT, {"messages": TALK, **fields})
        assert (status, headers["Retry-After"], found["error"]["type"]) == (429, "1", "rate_limit_error")
    assert small.ask("/dial/fan", {"messages": TALK, "strengths": [{}]})[0] == 429
    for stream in streams:
        stream.close()
    _wait_for(small, (0, 0))
    assert small.ask(CHAT, {"messages": TALK, "max_tokens": 2})[0] == 200


def test_requests_that_come_at_once_are_told_of_a_full_queue_by_the_status(small: Address) -> None:
    body = {"prompt": "a", "max_tokens": 8000, "ignore_eos": True, "stream": True}
    statuses: list[int] = []
    gone = threading.Event()

    def ask() -> None:
        request = Request(
            f"{small.url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urlopen(request, timeout=60) as reply:
                statuses.append(reply.status)
                gone.wait()
        except HTTPError as error:
            statuses.append(error.code)

    threads = [threading.Thread(target=ask) for _ in range(12)]
    for thread in threads:
        thread.start()
    end = time.monotonic() + 30
    while sum(_load(small)) + statuses.count(429) < len(threads):  # each runs, waits, or was told
        assert time.monotonic() < end, (_load(small), statuses)
        time.sleep(0.02)
    gone.set()
    for thread in threads:
        thread.join()
    assert set(statuses) == {200, 429}
    _wait_for(small, (0, 0))


def test_a_fan_waits_until_all_its_rows_have_room(small: Address) -> None:
    body = {"messages": TALK, "strengths": [{}, {"syc": 1}], "max_tokens": 30}
    with small.client().completions.create(
        model="syc@1", prompt="a", max_tokens=60, stream=True, extra_body={"ignore_eos": True}
    ) as stream:
        events = small.events("/dial/fan", body)
        assert len(list(stream)) > 0
    first, second = ([at for at, event in enumerate(events) if event["index"] == index] for index in (0, 1))
    assert min(first) < max(second)
    assert min(second) < max(first)
    assert {event["index"] for event in events if "finish_reason" in event} == {0, 1}
