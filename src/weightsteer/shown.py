"""Text that is not ours, made harmless for the place where it is shown: one function for each place.

Replies, names, errors and the fields of cards come from models, servers and other people's files. On a terminal they
could send escape sequences, in a spreadsheet be formulas, and in a model card be Markdown or YAML.
An HTML page escapes by itself (`reporting/pages.py`), after `visible`.
"""

from __future__ import annotations

import json
import math
import re
import sys
import unicodedata
from collections.abc import Sequence
from numbers import Real
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

KEPT = "\n\t\u200c\u200d"  # line, tab, and the joiners that scripts and emoji are written with
HIDDEN = ("Cc", "Cf", "Cs", "Co", "Zl", "Zp")  # Unicode's categories of what acts on other characters, or is not seen
FORMULA = re.compile(r"\s*[=+\-@\t\r]")
NUMBER = re.compile(r"\s*[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?\s*|[+-]?(inf|nan)", re.IGNORECASE)
MARKDOWN = re.compile(r"([\\`*_{}\[\]()<>#!|~&$:])")
HEX = {1: "\\x{:02x}", 2: "\\u{:04x}", 4: "\\U{:08x}"}


def visible(text: str) -> str:
    """The text with what acts on a terminal, or on the order of its characters, written out: ESC becomes `\\x1b`."""
    text = text.replace("\r\n", "\n")
    if text.isascii() and text.isprintable():
        return text
    return "".join(char if char in KEPT or not _acts(char) else _written_out(char) for char in text)


def _acts(char: str) -> bool:
    return unicodedata.category(char) in HIDDEN


def _written_out(char: str) -> str:
    code = ord(char)
    return HEX[1 if code < 0x100 else 2 if code < 0x10000 else 4].format(code)


def one_line(text: str) -> str:
    """The text on one line, for messages and the fields of tables."""
    return visible(" ".join(text.split()))


def say(text: object = "", *, error: bool = False, end: str = "\n", flush: bool = False) -> None:
    """Print to the terminal, on stdout or stderr. Nothing else of the package does, so that nothing gets by.

    What the stream's encoding does not have is written out too, instead of ending in an error.
    """
    stream = sys.stderr if error else sys.stdout
    encoding = getattr(stream, "encoding", None) or "utf-8"
    shown = visible(str(text)).encode(encoding, "backslashreplace").decode(encoding)
    print(shown, file=stream, end=end, flush=flush)


def say_json(value: object) -> None:
    """Print a JSON document for programs: ASCII alone, so that nothing in it acts on a terminal; NaN becomes null."""
    say(json.dumps(_finite(value), indent=2, allow_nan=False))


def _finite(value: object) -> object:
    if isinstance(value, dict):
        return {str(name): _finite(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


_quiet = False


def be_quiet(quiet: bool) -> None:
    """Leave out notes and progress from now on, or no longer."""
    global _quiet
    _quiet = quiet


def is_quiet() -> bool:
    """Whether notes and progress are left out."""
    return _quiet


def note(text: str) -> None:
    """Say on stderr what is good to know and no result, unless the user wants none of it."""
    if not _quiet:
        say(text, error=True)


def ask(prompt: str) -> str:
    """Read a line from the terminal.

    Raises:
        EOFError: there is none.
    """
    return input(visible(prompt))


def console(*, error: bool = False, width: int | None = None) -> Console:
    """Rich's console, for tables and bars; what is put into them has to be `visible`."""
    from rich.console import Console

    return Console(stderr=error, width=width)


def say_columns(heads: Sequence[str], cells: Sequence[str]) -> None:
    """Print texts side by side under their heads, as wide as the terminal is."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table
    from rich.text import Text

    table = Table(*[escape(visible(head)) for head in heads], box=box.SIMPLE_HEAD)
    table.add_row(*[Text(visible(cell)) for cell in cells])  # Text: a model's brackets are not markup
    console(width=None if sys.stdout.isatty() else 160).print(table)


def say_table(rows: Sequence[Sequence[str]]) -> None:
    """Print lines of texts in columns as wide as their longest text; the first column is left, the others are right."""
    widths = [max(len(one_line(cell)) for cell in column) for column in zip(*rows, strict=True)]
    for row in rows:
        first, *others = [one_line(cell) for cell in row]
        cells = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))]
        say("  ".join(cells).rstrip())


def csv_cell(value: object) -> object:
    """A value for a spreadsheet's cell: a text that would be a formula gets an apostrophe before it; numbers stay."""
    if value is None or isinstance(value, Real):
        return value
    text = visible(str(value))
    return f"'{text}" if FORMULA.match(text) and not NUMBER.fullmatch(text) else text


def markdown_text(text: str) -> str:
    """The text as plain words of one line within Markdown: nothing in it is a link, a heading or HTML."""
    return MARKDOWN.sub(r"\\\1", one_line(text)).replace("\\<", "&lt;").replace("\\>", "&gt;").replace("\\&", "&amp;")


def yaml_text(text: str) -> str:
    """The text as a YAML value of one line, in quotes: JSON's form is YAML's too, but for characters beyond 16 bits."""
    quoted = json.dumps(one_line(text), ensure_ascii=False)
    return "".join(char if char.isprintable() else _written_out(char) for char in quoted)
