from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from weightsteer.behavior import Example
from weightsteer.errors import SteerError
from weightsteer.judges.endpoint import THINKING_ROOM, Endpoint
from weightsteer.judges.judge import Rubric, RubricJudge, verdict
from weightsteer.judges.request_errors import pause_asked_for, pause_before
from xllama_server import MODEL, served

PROMPTS = ["Say the word tea.", "What colour is the sky?", "Name a fruit.", "What is two positive two?", "Say hello."]


def completion(content: object, **more: object) -> bytes:
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": content}, **more}]}).encode()


class Server(ThreadingHTTPServer):
    """Answers each request by `answer(prompt, number of the request)`: a status and a body."""

    daemon_threads = True
    request_queue_size = 128  # clients that connect at once

    def __init__(self, answer: Callable[[str, int], tuple[int, bytes]], content_type: str) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answer, self.content_type = answer, content_type
        self.asked: list[str] = []
        self.requests: list[dict[str, Any]] = []
        self.keys: set[str | None] = set()
        self.under_way = self.peak = 0
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that went away is no news."""


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt = request["messages"][0]["content"]
        with self.server.lock:
            self.server.requests.append(request)
            self.server.asked.append(prompt)
            self.server.keys.add(self.headers["Authorization"])
            number = len(self.server.asked)
            self.server.under_way += 1
            self.server.peak = max(self.server.peak, self.server.under_way)
        status, body = self.server.answer(prompt, number)
        with self.server.lock:
            self.server.under_way -= 1
        self.send_response(status)
        self.send_header("Content-Type", self.server.content_type)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Retry-After-Ms", "1")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Keep quiet."""


Start = Callable[..., Server]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts servers that answer as told, and stops them."""
    servers: list[Server] = []

    def starting(
        answer: Callable[[str, int], tuple[int, bytes]] = lambda prompt, _: (200, completion(f"re: {prompt}")),
        content_type: str = "application/json",
    ) -> Server:
        servers.append(Server(answer, content_type))
        threading.Thread(target=servers[-1].serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return servers[-1]

    yield starting
    for server in servers:
        server.shutdown()
        server.server_close()


def test_replies_keep_their_order_and_requests_their_limit(start: Start) -> None:
    def slow_first(prompt: str, _: int) -> tuple[int, bytes]:
        time.sleep(0.15 if prompt.endswith("0") else 0.03)
        return 200, completion(f" re: {prompt}\n")

    server = start(slow_first)
    prompts = [f"p{i}" for i in range(12)]
    seen: list[tuple[float, float]] = []
    replies = Endpoint(server.url, "m", concurrency=3).generate(
        prompts, progress=lambda d, t, n="": seen.append((d, t))
    )
    assert replies == [f"re: {prompt}" for prompt in prompts]
    assert 1 < server.peak <= 3
    assert seen == [(done, 12) for done in range(13)]
    assert Endpoint(server.url, "m").generate([]) == []


def test_a_prompt_that_comes_twice_is_asked_once(start: Start) -> None:
    server = start()
    assert Endpoint(server.url, "m").generate(["a", "b", "a", "a"]) == ["re: a", "re: b", "re: a", "re: a"]
    assert sorted(server.asked) == ["a", "b"]
    assert {(request["temperature"], request["max_tokens"]) for request in server.requests} == {(0, 16)}


def test_the_key_comes_from_its_variable(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    server = start()
    monkeypatch.setenv("MY_KEY", "secret")
    endpoint = Endpoint(server.url, "m", key_env="MY_KEY")
    endpoint.generate(["a"])
    assert server.keys == {"Bearer secret"}
    assert "secret" not in repr(endpoint) + endpoint.name
    monkeypatch.delenv("MY_KEY")
    assert Endpoint(server.url, "m", key_env="MY_KEY").generate(["b"]) == ["re: b"]


@pytest.mark.parametrize("status", [408, 429, 500, 503])
def test_passing_failures_are_asked_again(start: Start, status: int) -> None:
    server = start(lambda prompt, number: (status, b"{}") if number < 3 else (200, completion("at last")))
    assert Endpoint(server.url, "m", retries=2).generate(["a"]) == ["at last"]
    assert len(server.asked) == 3


@pytest.mark.parametrize(
    ("status", "says"),
    [(401, "a valid key.*OPENAI_API_KEY"), (403, "may not use"), (404, "ends in /v1"), (400, "$"), (422, "$")],
)
def test_refusals_are_not_asked_again(start: Start, status: int, says: str) -> None:
    server = start(lambda *_: (status, b'{"error": {"message": "no such\\nthing"}}'))
    with pytest.raises(SteerError, match=rf"{server.url}, model m: .*no such.*thing.*{says}"):
        Endpoint(server.url, "m").generate(["a"])
    assert len(server.asked) == 1


@pytest.mark.parametrize(
    "body",
    [
        completion("", finish_reason="error", error={"message": "overloaded"}),
        completion("5", finish_reason="error"),
        b'{"error": {"message": "overloaded"}, "choices": null}',
    ],
)
def test_a_reply_that_is_an_error_is_asked_again(start: Start, tmp_path: Path, body: bytes) -> None:
    server = start(lambda _, number: (200, body if number == 1 else completion("at last")))
    assert Endpoint(server.url, "m", retries=1, cache=tmp_path / "c.jsonl").generate(["a"]) == ["at last"]
    with pytest.raises(SteerError, match="the reply is an error: .*tried 1 times"):
        Endpoint(start(lambda *_: (200, body)).url, "m", retries=0).generate(["a"])


def test_attempts_are_told(start: Start) -> None:
    server = start(lambda _, number: (503, b"{}") if number < 3 else (200, completion("at last")))
    notes: list[str] = []
    Endpoint(server.url, "m", retries=2).generate(["a"], progress=lambda done, total, note="": notes.append(note))
    assert notes[0] == notes[-1] == "replies"
    assert [note[-10:] for note in notes[1:-1]] == ["try 2 of 3", "try 3 of 3"]


def test_pauses_are_those_that_the_server_asks_for_or_grow() -> None:
    def asked(**headers: str) -> float | None:
        error = Exception()
        error.response = SimpleNamespace(headers={k.replace("_", "-"): v for k, v in headers.items()})  # type: ignore[attr-defined]
        return pause_asked_for(error)

    assert asked(retry_after="20") == 20.0
    assert asked(retry_after_ms="1500", retry_after="20") == 1.5
    assert asked(retry_after="Wed, 21 Oct 2015 07:28:00 GMT") is asked() is pause_asked_for(Exception()) is None
    assert asked(retry_after="-1") == asked(retry_after="nan") == 0.0
    assert [0.75 * s <= pause_before(n) <= s for n, s in enumerate((0.5, 1, 2, 4, 8, 8))] == [True] * 6


@pytest.mark.parametrize(
    ("body", "content_type"),
    [
        (b"<html>Welcome</html>", "text/html"),
        (b'{"choices": [', "application/json"),
        (b'{"object": "list"}', "application/json"),
        (b"[]", "application/json"),
        (b"\xff\xfe", "application/json"),
    ],
)
def test_what_is_no_chat_server_is_named(start: Start, body: bytes, content_type: str) -> None:
    server = start(lambda *_: (200, body), content_type)
    with pytest.raises(SteerError, match=rf"{server.url}: did not answer as an OpenAI-compatible chat server does"):
        Endpoint(server.url, "m").generate(["a"])


@pytest.mark.parametrize(
    "body",
    [
        completion(None),
        completion("  "),
        completion("", finish_reason="content_filter"),
        b'{"choices": []}',
        b'{"choices": [{"message": null}]}',
    ],
)
def test_no_content_is_an_empty_reply_that_is_asked_for_again(start: Start, tmp_path: Path, body: bytes) -> None:
    server = start(lambda *_: (200, body))
    endpoint = Endpoint(server.url, "m", cache=tmp_path / "c.jsonl")
    assert endpoint.generate(["a"]) == endpoint.generate(["a"]) == [""]
    assert len(server.asked) == 2
    assert not (tmp_path / "c.jsonl").exists()


def test_a_text_in_parts_is_joined(start: Start) -> None:
    parts = [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "8"}, {"type": "text", "text": "5 "}, 7]
    assert Endpoint(start(lambda *_: (200, completion(parts))).url, "m").generate(["a"]) == ["85"]


@pytest.mark.parametrize(
    ("short", "long"),
    [
        (completion(None, finish_reason="length"), completion("85")),
        (completion("<think>Well, th", finish_reason="length"), completion("<think>Well, 40?</think>\n\n85")),
    ],
)
def test_a_judge_that_thinks_gets_room_for_it(start: Start, short: bytes, long: bytes) -> None:
    server = start(lambda *_: (200, long if server.requests[-1]["max_tokens"] > 16 else short))
    endpoint = Endpoint(server.url, "m", concurrency=1)
    replies = endpoint.generate(["a", "b"])
    assert [verdict(reply) for reply in replies] == [85, 85]
    assert [request["max_tokens"] for request in server.requests] == [16, 16 + THINKING_ROOM, 16 + THINKING_ROOM]
    cut = start(lambda *_: (200, completion("85 because", finish_reason="length")))
    assert Endpoint(cut.url, "m").generate(["a"]) == ["85 because"]
    assert len(cut.requests) == 1
    endless = start(lambda *_: (200, completion("<think>Well", finish_reason="length")))
    with pytest.raises(SteerError, match="4112 tokens were spent before a reply began; turn the judge's thinking off"):
        Endpoint(endless.url, "m").generate(["a"])


def test_a_thought_that_the_chat_template_begins_gets_room_too(start: Start) -> None:
    """As DeepSeek-R1's template does: no reply starts with the mark, and the short one is no verdict."""
    long = completion("Okay, so they ask me to rate it. Maybe 40?\n</think>\n\n85")
    short = completion("Okay, so they ask me to rate it", finish_reason="length")
    server = start(lambda *_: (200, long if server.requests[-1]["max_tokens"] > 16 else short))
    endpoint = Endpoint(server.url, "m", concurrency=1).keeping(lambda reply: verdict(reply) is not None)
    assert [verdict(reply) for reply in endpoint.generate(["a", "b"])] == [85, 85]
    assert [request["max_tokens"] for request in server.requests] == [16, 16 + THINKING_ROOM, 16 + THINKING_ROOM]


def test_a_judge_of_many_words_is_asked_once_with_room(start: Start) -> None:
    words = "This reply deserves praise, since it "
    long, short = completion(words + "is kind."), completion(words, finish_reason="length")
    server = start(lambda *_: (200, long if server.requests[-1]["max_tokens"] > 16 else short))
    endpoint = Endpoint(server.url, "m", concurrency=1).keeping(lambda reply: verdict(reply) is not None)
    assert [verdict(reply) for reply in endpoint.generate(["a", "b", "c"])] == [None] * 3
    assert [request["max_tokens"] for request in server.requests] == [16, 16 + THINKING_ROOM, 16, 16]


@pytest.mark.parametrize(
    "said",
    ["max_tokens is too large: 4112. This model's maximum context length is 4096", "max_completion_tokens: 4112"],
)
def test_a_server_without_room_for_a_thought_is_asked_without_it(start: Start, said: str) -> None:
    """One reply of many words is no verdict, and ends no judging."""
    refusal = json.dumps({"error": {"message": said}}).encode()
    replies = {"a": completion("80"), "b": completion("This reply shows", finish_reason="length")}

    def answer(prompt: str, number: int) -> tuple[int, bytes]:
        asked = max(server.requests[-1].get(name, 0) for name in ("max_tokens", "max_completion_tokens"))
        return (400, refusal) if asked > 4000 else (200, replies[prompt])

    server = start(answer)
    endpoint = Endpoint(server.url, "m", concurrency=1).keeping(lambda reply: verdict(reply) is not None)
    assert [verdict(reply) for reply in endpoint.generate(["b", "a"])] == [None, 80]


NEWER = {  # as newer models, and strict servers, refuse parameters
    "max_tokens": (
        400,
        "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead.",
    ),
    "temperature": (
        400,
        "Unsupported value: 'temperature' does not support 0.0 with this model. Only the default (1) is supported.",
    ),
}
STRICT = {"max_tokens": (422, "body.max_tokens: unexpected field"), "temperature": (422, "temperature is deprecated")}


@pytest.mark.parametrize("refusals", [NEWER, STRICT])
@pytest.mark.filterwarnings("ignore:m at .*no temperature")
def test_refused_parameters_are_replaced_and_remembered(
    start: Start, refusals: dict[str, tuple[int, str]], tmp_path: Path
) -> None:
    def strict(prompt: str, number: int) -> tuple[int, bytes]:
        for name, (status, message) in refusals.items():
            if name in server.requests[-1]:
                return status, json.dumps({"error": {"message": message, "param": name}}).encode()
        return 200, completion("85")

    server = start(strict)
    endpoint = Endpoint(server.url, "m", concurrency=1, cache=tmp_path / "c.jsonl")
    assert endpoint.generate(["a", "b"]) == ["85", "85"]
    assert endpoint.generate(["c"], max_new_tokens=5) == ["85"]
    sent = [{key: value for key, value in r.items() if key not in ("messages", "model")} for r in server.requests]
    assert sent == [
        {"max_tokens": 16, "temperature": 0},
        {"max_completion_tokens": 16, "temperature": 0},
        *({"max_completion_tokens": tokens} for tokens in (16, 16, 5)),
    ]


def test_a_judge_without_temperature_is_warned_of_once(start: Start) -> None:
    status, message = NEWER["temperature"]
    body = json.dumps({"error": {"message": message}}).encode()
    server = start(lambda *_: (status, body) if "temperature" in server.requests[-1] else (200, completion("85")))
    endpoint = Endpoint(server.url, "m")
    with pytest.warns(UserWarning, match="takes no temperature 0, so that its replies may differ") as warned:
        assert endpoint.generate(["a", "b", "c"]) == ["85"] * 3
    assert len(warned) == 1


def test_a_parameter_that_is_refused_in_both_forms_ends_it(start: Start) -> None:
    body = b'{"error": {"message": "max_completion_tokens: not supported"}}'
    server = start(lambda *_: (400, body))
    with pytest.raises(SteerError, match="max_completion_tokens: not supported"):
        Endpoint(server.url, "m").generate(["a"])
    assert len(server.asked) == 2
    too_long = start(lambda *_: (400, b'{"error": {"message": "max_tokens is above the context of 8 tokens"}}'))
    with pytest.raises(SteerError, match="above the context"):
        Endpoint(too_long.url, "m").generate(["a"])
    assert len(too_long.asked) == 1


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (completion("", finish_reason="content_filter"), "held back by a content filter"),
        (json.dumps({"choices": [{"message": {"content": None, "refusal": "No."}}]}).encode(), "the model refused"),
        (completion(None), "no text in it"),
    ],
)
def test_why_replies_are_empty_is_told(start: Start, body: bytes, reason: str) -> None:
    server = start(lambda prompt, _: (200, body if prompt != "b" else completion("85")))
    with pytest.warns(UserWarning, match=rf"m at .*: 2 of 3 replies are empty \({reason}: 2\)"):
        assert Endpoint(server.url, "m").generate(["a", "b", "c"]) == ["", "85", ""]


def test_replies_of_no_use_are_asked_for_again(start: Start, tmp_path: Path) -> None:
    says = ["I cannot rate this."]
    server = start(lambda *_: (200, completion(says[0])))
    cache = tmp_path / "c.jsonl"
    rubric, examples = Rubric("r", "Rate {question} {answer}"), [Example("q", "a")]
    Endpoint(server.url, "m", cache=cache).generate([rubric.filled(examples[0])])  # kept, as it is a reply
    judge = RubricJudge(Endpoint(server.url, "m", cache=cache), rubric)
    assert judge.scores(examples) == [None]
    says[0] = "85"
    assert judge.scores(examples) == judge.scores(examples) == [85]
    assert len(server.asked) == 3


def test_limits_and_used_up_quotas_are_told_apart(start: Start) -> None:
    limited = start(lambda *_: (429, b'{"error": {"message": "slow down"}}'))
    with pytest.raises(SteerError, match="slow down.*tried 2 times.*lower the judge's concurrency, or wait"):
        Endpoint(limited.url, "m", retries=1).generate(["a"])
    spent = start(lambda *_: (429, b'{"error": {"message": "You exceeded it", "code": "insufficient_quota"}}'))
    with pytest.raises(SteerError, match="You exceeded it.*the quota of the key in OPENAI_API_KEY is used up"):
        Endpoint(spent.url, "m").generate(["a"])
    assert len(spent.asked) == 1


def test_an_address_without_its_end_is_told_the_end(start: Start) -> None:
    server = start(lambda *_: (404, b"{}"))
    with pytest.raises(SteerError, match=rf"the address may lack its end: try {server.url}$"):
        Endpoint(server.url.removesuffix("/v1") + "/", "m").generate(["a"])
    with pytest.raises(SteerError, match="leave out /chat/completions"):
        Endpoint(server.url + "/chat/completions", "m")


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl to make a certificate")
def test_tls_is_named(start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key, certificate = tmp_path / "k.pem", tmp_path / "c.pem"
    made = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    subprocess.run([*made, "-addext", "subjectAltName=DNS:localhost", "-keyout", key, "-out", certificate], check=True)
    plain, secure = start(lambda *_: (200, completion("85"))), start(lambda *_: (200, completion("85")))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    secure.socket = context.wrap_socket(secure.socket, server_side=True)
    address = f"https://localhost:{secure.server_port}/v1"
    with pytest.raises(SteerError, match=r"certificate is not trusted \(.*self-signed.*set .* SSL_CERT_FILE"):
        Endpoint(address, "m").generate(["a"])
    with pytest.raises(SteerError, match=r"does not speak https at this address .*write http://"):
        Endpoint(plain.url.replace("http:", "https:"), "m").generate(["a"])
    with pytest.raises(SteerError, match=r"tried 1 times.*if the server speaks https, write https://"):
        Endpoint(address.replace("https:", "http:"), "m", retries=0).generate(["a"])
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    assert Endpoint(address, "m").generate(["a"]) == ["85"]


def test_half_a_character_can_be_kept(start: Start, tmp_path: Path) -> None:
    endpoint = Endpoint(start(lambda *_: (200, completion("x\ud83d"))).url, "m", cache=tmp_path / "c.jsonl")
    assert endpoint.generate(["a"]) == endpoint.generate(["a"]) == ["x?"]


def test_the_cache_tells_models_and_lengths_apart(start: Start, tmp_path: Path) -> None:
    server, cache = start(), tmp_path / "deep" / "c.jsonl"
    first = Endpoint(server.url, "m", cache=cache)
    for endpoint, tokens in ((first, 16), (first, 16), (first, 5), (Endpoint(server.url, "n", cache=cache), 16)):
        assert endpoint.generate(["a"], max_new_tokens=tokens) == ["re: a"]
    assert server.asked == ["a"] * 3
    assert len(cache.read_text().splitlines()) == 3


def test_a_failure_keeps_the_replies_before_it(start: Start, tmp_path: Path) -> None:
    broken = True
    server = start(lambda prompt, _: (500, b"{}") if broken and prompt == "p3" else (200, completion(prompt)))
    endpoint = Endpoint(server.url, "m", concurrency=1, retries=1, cache=tmp_path / "c.jsonl")
    prompts = [f"p{i}" for i in range(6)]
    with pytest.raises(SteerError, match=r"tried 2 times.*is the server running.*kept in .*c\.jsonl; the same command"):
        endpoint.generate(prompts)
    assert server.asked == ["p0", "p1", "p2", "p3", "p3"]
    with (tmp_path / "c.jsonl").open("a") as file:
        file.write('{"key": "cut by a ki')
    broken = False
    seen: list[float] = []
    assert endpoint.generate(prompts, progress=lambda done, total, note="": seen.append(done)) == prompts
    assert server.asked[5:] == ["p3", "p4", "p5"]
    assert seen == [3, 4, 5, 6]


def test_a_foreign_file_is_no_cache(start: Start, tmp_path: Path) -> None:
    (tmp_path / "c.jsonl").write_text('{"prompt": "a"}\n')
    with pytest.raises(SteerError, match=r"c\.jsonl: expected lines with texts 'key' and 'reply'"):
        Endpoint(start().url, "m", cache=tmp_path / "c.jsonl").generate(["a"])
    assert (tmp_path / "c.jsonl").read_text() == '{"prompt": "a"}\n'


def test_a_server_that_is_down_is_named() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    begun = time.monotonic()
    with pytest.raises(SteerError, match=rf"{url}, model m: Connection error.*tried 2 times.*is the server running"):
        Endpoint(url, "m", retries=1).generate(["a", "b"])
    assert time.monotonic() - begun < 5


def test_a_slow_server_times_out(start: Start) -> None:
    server = start(lambda *_: (time.sleep(1.0), (200, completion("late")))[1])
    with pytest.raises(SteerError, match=r"timed out.*tried 1 times at up to 0\.2 s.*quick enough for 8"):
        Endpoint(server.url, "m", retries=0, timeout=0.2).generate(["a"])


def test_a_reply_that_trickles_in_times_out_as_a_whole() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def trickle() -> None:
            connection, _ = listening.accept()
            with connection, suppress(OSError):
                connection.recv(9999)
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n")
                for _ in range(99):
                    connection.sendall(b" ")
                    time.sleep(0.1)

        threading.Thread(target=trickle, daemon=True).start()
        begun = time.monotonic()
        with pytest.raises(SteerError, match=r"timed out, tried 1 times at up to 0\.5 s"):
            Endpoint(f"http://127.0.0.1:{listening.getsockname()[1]}/v1", "m", retries=0, timeout=0.5).generate(["a"])
        assert time.monotonic() - begun < 5


def test_ctrl_c_does_not_wait_for_replies(start: Start, tmp_path: Path) -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job may have it ignored
    release = threading.Event()

    def hanging(prompt: str, _: int) -> tuple[int, bytes]:
        if prompt == "quick":
            return 200, completion("done")
        release.wait(20)
        return 200, b"{}"

    def interrupt() -> None:
        while "slow" not in server.asked or not endpoint.cache.exists():
            time.sleep(0.02)
        pressed.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGINT)

    server, pressed = start(hanging), []
    endpoint = Endpoint(server.url, "m", cache=tmp_path / "c.jsonl")
    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        endpoint.generate(["slow", "quick"])
    assert time.monotonic() - pressed[0] < 5
    signal.signal(signal.SIGINT, before)
    release.set()
    assert endpoint.generate(["quick"]) == ["done"]
    assert len((tmp_path / "c.jsonl").read_text().splitlines()) == 1


def test_it_can_be_asked_where_an_event_loop_runs(start: Start) -> None:
    server = start()

    async def notebook() -> list[str]:
        return Endpoint(server.url, "m").generate(["a"])

    assert asyncio.run(notebook()) == ["re: a"]


@pytest.mark.parametrize("url", ["localhost:8000/v1", "ftp://host/v1", "", "http:///v1", "http://[1/v1"])
def test_addresses_are_checked(url: str) -> None:
    with pytest.raises(SteerError, match="expected a server's address"):
        Endpoint(url, "m")


def test_settings_and_package_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SteerError, match="'host/v1'") as caught:
        Endpoint("http://me:secret@host/v1", "m")
    assert "secret" not in str(caught.value)
    with pytest.raises(SteerError, match="found 0, 5 and 60"):
        Endpoint("http://host/v1", "m", concurrency=0)
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(SteerError, match=r"pip install 'weightsteer\[judge\]'"):
        Endpoint("http://host/v1", "m")


@pytest.mark.slow
@pytest.mark.embedded
def test_a_real_server(tmp_path: Path) -> None:
    cache = tmp_path / "c.jsonl"
    with served() as (url, process):
        replies = Endpoint(url, MODEL, cache=cache).generate(PROMPTS, max_new_tokens=8)
        assert all(replies)
        assert len(set(replies)) == len(PROMPTS)
        one_by_one = Endpoint(url, MODEL, concurrency=1)
        assert [one_by_one.generate([prompt], max_new_tokens=8)[0] for prompt in PROMPTS] == replies
        process.kill()
        process.wait()
        endpoint = Endpoint(url, MODEL, cache=cache, retries=1)
        assert endpoint.generate(PROMPTS, max_new_tokens=8) == replies
        begun = time.monotonic()
        with pytest.raises(SteerError, match=f"{url}, model {MODEL}"):
            endpoint.generate([*PROMPTS, "And now?"], max_new_tokens=8)
        assert time.monotonic() - begun < 10
        assert endpoint.generate(PROMPTS[::-1], max_new_tokens=8) == replies[::-1]
