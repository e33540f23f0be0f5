from __future__ import annotations

import json
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from weightsteer.errors import SteerError
from weightsteer.judges.endpoint import Endpoint
from weightsteer.judges.keys import Key, require_own_key

KEY = "sk-SECRET/secret+SECRET=="


def ok(text: str) -> bytes:
    return json.dumps({"choices": [{"finish_reason": "stop", "message": {"content": text}}]}).encode()


class Echo(BaseHTTPRequestHandler):
    """Repeats the key that it was sent, in the way that the address says."""

    seen: list[str | None]

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        sent = self.headers["authorization"]
        self.seen.append(sent)
        way = self.path.split("/")[1]
        status, _, where = way.partition("-")
        self.send_response(int(status))
        if where:
            self.send_header("location", f"http://127.0.0.1:{where}/200/v1/chat/completions")
        body = ok(f"You sent {sent}") if status == "200" else json.dumps({"error": {"message": f"bad {sent}"}}).encode()
        if status == "201":
            body = f"<html>{sent}".encode()
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


@contextmanager
def echoing() -> Iterator[tuple[int, list[str | None]]]:
    seen: list[str | None] = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("H", (Echo,), {"seen": seen}))
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server.server_port, seen
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("status", [200, 201, 400, 401, 403, 404, 422, 429, 500])
@pytest.mark.parametrize("ending", ["", "\n", "\r\n", " "])
def test_a_key_that_a_server_repeats_is_nowhere(
    status: int, ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY + ending)
    notes: list[str] = []
    with echoing() as (port, seen), warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        endpoint = Endpoint(f"http://127.0.0.1:{port}/{status}/v1", "m", retries=1, timeout=5.0, cache=tmp_path / "c")
        try:
            texts = "".join(endpoint.generate(["p"], progress=lambda done, total, note="": notes.append(note)))
        except SteerError as error:
            texts = "".join(traceback.format_exception(error))
    assert seen[0] == f"Bearer {KEY}"
    everything = [texts, *notes, *(str(one.message) for one in told), caplog.text, repr(endpoint), endpoint.name]
    everything += [path.read_text() for path in tmp_path.rglob("*") if path.is_file()]
    assert not any(KEY in text or KEY[:12] in text for text in everything)


@pytest.mark.parametrize("value", ["sk\nx", "sk\rx", "sk-é", "sk\x00", "sk\x1b[2J", "a\tb"])
def test_a_key_that_no_header_can_hold_is_refused_and_not_shown(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.environ", {"OPENAI_API_KEY": value})
    with pytest.raises(SteerError, match="OPENAI_API_KEY: expected a key") as found:
        Key.read("OPENAI_API_KEY")
    assert value not in str(found.value)


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_a_redirection_is_not_followed(status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with echoing() as (other, theirs), echoing() as (port, _):
        with pytest.raises(SteerError, match="not followed"):
            Endpoint(f"http://127.0.0.1:{port}/{status}-{other}/v1", "m", retries=0).generate(["p"])
        assert not theirs


@pytest.mark.parametrize("url", ["http://h/v1?api_key=SECRET", "http://h/v1#SECRET", "http://h/v1\r\nX: y"])
def test_an_address_holds_no_key(url: str) -> None:
    with pytest.raises(SteerError, match="address") as found:
        Endpoint(url, "m")
    assert "api_key=SECRET" not in str(found.value)


@pytest.mark.parametrize(
    ("variable", "url", "allowed"),
    [
        ("OPENAI_API_KEY", "https://api.openai.com/v1", True),
        ("OPENAI_API_KEY", "http://api.openai.com/v1", False),
        ("OPENAI_API_KEY", "https://api.openai.com.evil.org/v1", False),
        ("OPENAI_API_KEY", "https://evilopenai.com/v1", False),
        ("OPENAI_API_KEY", "https://evil.org/v1", False),
        ("OPENAI_API_KEY", "http://localhost:8000/v1", True),
        ("OPENAI_API_KEY", "http://127.0.0.1:8000/v1", True),
        ("OPENAI_API_KEY", "http://[::1]:8000/v1", True),
        ("OPENAI_API_KEY", "http://127.0.0.1.evil.org/v1", False),
        ("OPENROUTER_API_KEY", "https://openrouter.ai/api/v1", True),
        ("AWS_SECRET_ACCESS_KEY", "https://api.openai.com/v1", False),
        ("AWS_SECRET_ACCESS_KEY", "http://localhost:1/v1", False),
        ("HOME", "https://evil.org/v1", False),
    ],
)
def test_a_recipe_sends_a_key_only_where_it_belongs(
    variable: str, url: str, allowed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, KEY)
    if allowed:
        require_own_key(variable, url)
    else:
        with pytest.raises(SteerError, match=f"--key-env {variable}") as found:
            require_own_key(variable, url)
        assert KEY not in str(found.value)
    require_own_key(variable, url, [variable])
    monkeypatch.delenv(variable)
    require_own_key(variable, url)
