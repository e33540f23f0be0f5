"""A talk: its commands, its file, and Ctrl-C, in a real terminal too."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from conftest import random_vector, tiny_lm
from weightsteer.chat_template import ChatTemplate
from weightsteer.errors import SteerError
from weightsteer.run_card import RunCard, StrengthRange
from weightsteer.steering import chat
from weightsteer.steering.chat import Interrupts, talk
from weightsteer.steering.talk import Pieces, Talk
from weightsteer.vectors.weight_vector import WeightVector


@pytest.fixture
def vector() -> WeightVector:
    card = RunCard("vector", strength=StrengthRange(2.0, -1.5, -4.0, 4.0))
    return WeightVector(random_vector(tiny_lm()).deltas, card)


Said = Callable[..., str]


@pytest.fixture
def said(vector: WeightVector, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Said:
    """What a talk prints after some lines; before each reply's line its prompt, which `input` gets, is kept too."""

    def run(*lines: str, k: float = 2.0) -> str:
        left = iter(lines)

        def typed(prompt: str) -> str:
            print(prompt)
            line = next(left, None)
            if line is None:
                raise EOFError
            return line

        monkeypatch.setattr("builtins.input", typed)
        talk(vector, tiny_lm(), k=k, max_new_tokens=6)
        return capsys.readouterr().out

    return run


def test_the_dial_turns_and_mistakes_are_told(said: Said) -> None:
    out = said("/k 1.5", "/k much", "/k", "/k 9", "/quit", "never said")
    prompts = [line for line in out.splitlines() if line.startswith("[k")]
    assert prompts == ["[k = 2] you: ", *["[k = 1.5] you: "] * 3, "[k = 9] you: "]
    assert "/k: expected a number, found 'much'" in out
    assert "k = 2 is recommended for more of the behaviour and k = -1.5 for less; -4 to 4 was tested" in out
    assert "k = 9 lies outside the range that was tested, -4 to 4" in out


def test_again_is_the_same_turn_at_another_k(said: Said, tmp_path: Path, vector: WeightVector) -> None:
    path = tmp_path / "talk.json"
    out = said("/again", "Hello?", "/again -3", f"/save {path}", f"/save {path}", "/agian", "/help")
    assert "/again: nothing was said yet" in out
    assert "is '/again' meant?" in out
    assert "/temperature [T]" in out
    kept = json.loads(path.read_text())
    lm = tiny_lm()
    with vector.applied(lm, -3.0):
        (reply,) = lm.generate(["Hello?"], max_new_tokens=6)
    assert kept["messages"] == [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": reply}]
    assert kept["k"] == [-3.0]
    assert [line for line in out.splitlines() if line.endswith("you: ")] == ["[k = 2] you: "] * 8  # the dial stays
    path.write_text("my diary")
    assert "was not made by weightsteer" in said("Hello?", f"/save {path}")
    assert path.read_text() == "my diary"


def test_system_temperature_reset(said: Said, tmp_path: Path) -> None:
    path = tmp_path / "talk.json"
    out = said("/system", "/system Be brief.", "/temperature -1", "/temperature 0.5", "Hi", f"/save {path}", "/reset")
    assert "system prompt: the template's own" in out
    assert "/temperature: expected 0 or more" in out
    kept = json.loads(path.read_text())
    assert kept["messages"][0] == {"role": "system", "content": "Be brief."}
    assert kept["temperature"] == 0.5
    assert "the talk begins anew" in out


def test_a_stopped_reply_keeps_what_was_written(vector: WeightVector) -> None:
    lm, shown = tiny_lm(), list[str]()
    with vector.applied(lm, 1.0) as handle:
        found = Talk(lm, handle, max_new_tokens=30)
        found.say("Hello?", shown.append, lambda: True)
        stopped = found.turns[0].reply
        found.again(None, shown.append, lambda: False)
        assert found.turns[0].reply.startswith(stopped)
        assert len(found.turns[0].reply) > len(stopped)
        with pytest.raises(SteerError, match="expected a finite number"):
            found.again(float("nan"), shown.append, lambda: False)
        assert len(found.turns) == 1
        assert handle.k == 1.0


def test_the_first_interrupt_asks_and_the_second_raises() -> None:
    interrupts, before = Interrupts(), signal.getsignal(signal.SIGINT)
    with interrupts.heeded():
        with interrupts.reply():
            os.kill(os.getpid(), signal.SIGINT)
            assert interrupts.stopped()
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):  # at the prompt
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_tab_completes_commands() -> None:
    assert chat._complete("/sy", 0) == "/system"
    assert chat._complete("/sy", 1) is None
    assert chat._complete("sy", 0) is None


class Terminal:
    """A command in a terminal of its own."""

    def __init__(self, *arguments: str, cache: Path) -> None:
        self.pid, self.terminal = pty.fork()
        if self.pid == 0:
            os.environ |= {"WEIGHTSTEER_CACHE": str(cache), "TERM": "dumb", "HF_HUB_OFFLINE": "1"}
            os.execv(sys.executable, [sys.executable, "-m", "weightsteer", *arguments])
        self.left = ""  # what came after the last text that was waited for

    def until(self, text: str, seconds: float = 60.0, *, typing: str = "") -> None:
        """Wait for a text, which must come; `typing` is typed until then, as what comes before a prompt is lost."""
        begun = typed = time.monotonic()
        while text not in self.left:
            assert time.monotonic() - begun < seconds, f"no {text!r} in {self.left!r}"
            if typing and time.monotonic() - typed > 1:
                self.type(typing)
                typed = time.monotonic()
            if select.select([self.terminal], [], [], 0.2)[0]:
                self.left += os.read(self.terminal, 4096).decode(errors="replace")
        self.left = self.left.partition(text)[2]

    def type(self, text: str) -> None:
        os.write(self.terminal, text.encode())


def test_ctrl_c_stops_the_reply_and_not_the_talk_in_a_terminal(
    checkpoint: Path, vector: WeightVector, tmp_path: Path
) -> None:
    """A reply of a million tokens is stopped; the talk goes on, arrow keys bring back lines, Ctrl-D ends it."""
    saved = vector.save(tmp_path / "w")
    options = ("--max-new-tokens", "1000000", "--device", "cpu", "--temperature", "1")
    terminal = Terminal("chat", str(saved), "-m", str(checkpoint), *options, cache=tmp_path / "cache")
    terminal.until("you: ")
    terminal.type("Hello?\r")
    time.sleep(1.0)
    terminal.type("\x03")
    terminal.until("[stopped]")
    terminal.until("you: ")
    terminal.until("Ctrl-D ends the talk", typing="\x03")
    terminal.until("you: ")
    terminal.type("/k 0.5\r")
    terminal.until("[k = 0.5] you: ")
    terminal.type("\x1b[A\x1b[A")
    terminal.until("Hello?")
    terminal.type("\x15\x04")
    assert os.waitpid(terminal.pid, 0)[1] == 0
    assert "Hello?" in (tmp_path / "cache" / "chat-history").read_text()


@pytest.mark.parametrize("cuts", [[0], [5], [12, 14], [3, 13, 15, 20]])
def test_words_that_end_a_reply_are_not_shown(cuts: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """A base model goes on with the user's next turn; what is shown is what is kept."""
    monkeypatch.setattr(ChatTemplate, "stop_text", "\nuser:")
    for text, shown in [("Hello there.\nuser: And", "Hello there."), ("Hello\nus two", "Hello\nus two")]:
        found: list[str] = []
        pieces = Pieces(tiny_lm(), found.append)
        for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
            pieces.on_finalized_text(text[start:end], stream_end=end == len(text))
        assert "".join(found) == shown
