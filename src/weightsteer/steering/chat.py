"""A talk in the terminal: lines that can be edited, commands, and Ctrl-C, which stops a reply and not the talk."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from ..errors import SteerError
from ..lm import LM
from ..places import cache_folder, expanded
from ..run_card import StrengthRange
from ..schema import parse_number, suggestion
from ..shown import ask, say
from ..vectors.weight_vector import WeightVector
from .talk import REPLY_TOKENS, Talk

HISTORY, HISTORY_LINES = "chat-history", 1000


class Interrupts:
    """Ctrl-C within a talk: the first one while a reply is written asks it to end, any other raises."""

    def __init__(self) -> None:
        self.answering = False
        self.asked = False

    def stopped(self) -> bool:
        """Whether the running reply is to end."""
        return self.asked

    @contextmanager
    def reply(self) -> Iterator[None]:
        """While a reply is written."""
        self.answering, self.asked = True, False
        try:
            yield
        finally:
            self.answering = False

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if not self.answering or self.asked:
            raise KeyboardInterrupt
        self.asked = True

    @contextmanager
    def heeded(self) -> Iterator[None]:
        """Take the signal until the block is left; Python gives signals to the main thread alone."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGINT, self._on_signal)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)


def talk(
    vector: WeightVector,
    lm: LM,
    *,
    k: float,
    max_new_tokens: int = REPLY_TOKENS,
    system: str | None = None,
    temperature: float = 0.0,
    seed: int = 0,
) -> None:
    """Read lines from stdin until /quit or end of file; replies are streamed."""
    say(f"k = {k:g}. /k NUMBER turns the dial, /help lists the commands, Ctrl-C stops a reply.")
    with vector.applied(lm, k) as handle, _line_editing():
        found = Talk(lm, handle, max_new_tokens, temperature, seed, system)
        chat = _Chat(found, vector.card.strength)
        with chat.interrupts.heeded():
            while chat.goes_on:
                chat.turn()


class _Chat:
    """The terminal's side of a talk."""

    def __init__(self, talk: Talk, strength: StrengthRange | None) -> None:
        self.talk, self.strength = talk, strength
        self.interrupts = Interrupts()
        self.goes_on = True

    def turn(self) -> None:
        """Read one line and do what it asks for; a mistake is told, and the talk goes on."""
        try:
            line = ask(f"[k = {self.talk.k:g}] you: ").strip()
        except EOFError:
            say()
            self.goes_on = False
            return
        except KeyboardInterrupt:
            say("\n/quit or Ctrl-D ends the talk")
            return
        try:
            if line.startswith("/"):
                self._command(line)
            elif line:
                self._reply(lambda show, stopped: self.talk.say(line, show, stopped))
        except SteerError as error:
            say(error)
        except OSError as error:
            say(f"{error.filename or 'system'}: {error.strerror or error}")

    def _command(self, line: str) -> None:
        name, _, rest = line.partition(" ")
        if name not in COMMANDS:
            say(f"{name}: no such command{suggestion(name, COMMANDS)} (/help lists them)")
            return
        COMMANDS[name][2](self, rest.strip())

    def _reply(self, reply: Callable[[Callable[[str], None], Callable[[], bool]], str]) -> None:
        """Print a reply as it comes, up to its end or to Ctrl-C."""
        remark = ""
        try:
            with self.interrupts.reply():
                remark = reply(lambda text: say(text, end="", flush=True), self.interrupts.stopped)
        except KeyboardInterrupt:  # a second one: not even the next token is waited for, and nothing is kept
            pass
        say(" [stopped]" if self.interrupts.asked else "", flush=True)
        if remark:
            say(f"({remark})")

    def strengthen(self, text: str) -> None:
        """/k"""
        if text:
            self.talk.handle.k = parse_number(text, "/k")
            self._warn(self.talk.k)
        elif self.strength:
            say(f"k = {self.talk.k:g}; {self.strength.described}")
        else:
            say(f"k = {self.talk.k:g}; the vector's card has no tested range")

    def _warn(self, k: float) -> None:
        if self.strength and (warning := self.strength.warning([k])):
            say(warning)

    def again(self, text: str) -> None:
        """/again"""
        k = parse_number(text, "/again") if text else None
        if k is not None:
            self._warn(k)
        shown = self.talk.k if k is None else k
        say(f"[k = {shown:g}] ", end="", flush=True)
        self._reply(lambda show, stopped: self.talk.again(k, show, stopped))

    def system(self, text: str) -> None:
        """/system"""
        if text:
            self.talk.system = None if text == "none" else text
        now = self.talk.system
        say("system prompt: the template's own" if now is None else f"system prompt: {now}")

    def temperature(self, text: str) -> None:
        """/temperature"""
        if text:
            value = parse_number(text, "/temperature")
            if value < 0:
                raise SteerError(f"/temperature: expected 0 or more, found {text}")
            self.talk.temperature = value
        now = self.talk.temperature
        say(f"temperature {now:g}" if now else "temperature 0: always the likeliest token")

    def save(self, text: str) -> None:
        """/save"""
        if not text:
            raise SteerError("/save: expected a file, such as /save talk.json")
        self.talk.save(expanded(text))
        say(f"{text}: the talk so far, {len(self.talk.turns)} of your turns")

    def reset(self, text: str) -> None:
        """/reset"""
        self.talk.turns.clear()
        say("the talk begins anew")

    def help(self, text: str) -> None:
        """/help"""
        for shape, does, _ in COMMANDS.values():
            say(f"{shape:<18}{does}")

    def quit(self, text: str) -> None:
        """/quit"""
        self.goes_on = False


COMMANDS: dict[str, tuple[str, str, Callable[[_Chat, str], None]]] = {  # name -> shape, what it does, how
    "/k": ("/k [NUMBER]", "turn the dial; without a number, show it", _Chat.strengthen),
    "/again": (
        "/again [K]",
        "reply to the last turn anew, at K if given; the dial stays, and the new reply counts",
        _Chat.again,
    ),
    "/system": ("/system [TEXT]", "set the system prompt (none: the template's own), or show it", _Chat.system),
    "/temperature": ("/temperature [T]", "sample at this temperature; 0 takes the likeliest token", _Chat.temperature),
    "/save": ("/save FILE", "write the talk to FILE (JSON)", _Chat.save),
    "/reset": ("/reset", "forget the talk, which every reply follows", _Chat.reset),
    "/help": ("/help", "show this list", _Chat.help),
    "/quit": ("/quit", "end the talk, as Ctrl-D does; Ctrl-C stops a reply", _Chat.quit),
}


@contextmanager
def _line_editing() -> Iterator[None]:
    """On a terminal: arrow keys, a history that stays from talk to talk, and Tab for the commands."""
    if not sys.stdin.isatty():
        yield
        return
    try:
        import readline
    except ImportError:  # a Python that was built without it
        yield
        return
    path = cache_folder() / HISTORY
    readline.clear_history()
    with suppress(OSError):  # the first talk has none
        readline.read_history_file(path)
    readline.set_completer(_complete)
    readline.set_completer_delims(" \t\n")
    readline.parse_and_bind("tab: complete")
    try:
        yield
    finally:
        readline.set_history_length(HISTORY_LINES)
        with suppress(OSError):  # nowhere to write: the next talk begins without it
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch(mode=0o600)
            readline.write_history_file(path)


def _complete(text: str, number: int) -> str | None:
    found = [name for name in COMMANDS if text.startswith("/") and name.startswith(text)]
    return found[number] if number < len(found) else None
