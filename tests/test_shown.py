from __future__ import annotations

import ast
import csv
import io
import json
import re
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

import weightsteer
from weightsteer import shown
from weightsteer.reporting.pages import write_figures
from weightsteer.vectors.similarity import table

SOURCE = Path(weightsteer.__file__).parent
HOSTILE = (
    "\x1b]0;pwned\x07",
    "\x1b[2J",
    "\x9b31m",
    "a\rb",
    "\x08\x08\x08",
    "\u202egnp.exe",
    "\u2066x\u2069",
    "\u200f",
    "\ufeff",
    "\u2028",
    "\U000e0041",
    "\ud800",
    "\x00",
    "\x7f",
)
ACTING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")


@pytest.mark.parametrize("text", HOSTILE, ids=ascii)
def test_what_acts_on_a_terminal_is_written_out(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    shown.say(f"before {text} after")
    shown.say(text, error=True)
    shown.say_columns([text], [text])
    out, err = capsys.readouterr()
    assert "before" in out
    assert not ACTING.search(out + err)
    assert not ACTING.search(shown.one_line(text))


@given(st.text())
def test_any_text_can_be_shown(text: str) -> None:
    assert not ACTING.search(shown.visible(text))
    assert "\n" not in shown.one_line(text)
    assert yaml.safe_load(f"name: {shown.yaml_text(text)}") == {"name": shown.one_line(text)}
    cell = shown.csv_cell(text)
    line = io.StringIO()
    csv.writer(line).writerow([cell])
    assert list(csv.reader(io.StringIO(line.getvalue()))) == [[cell]] or "\n" in str(cell)


def test_ordinary_text_stays() -> None:
    for text in ("Zwei Sätze.\n\tEine Zeile.", "한국어 हिन्दी العربية", "👩\u200d🚀", "1 < 2 & [b]", "a\r\nb"):
        assert shown.visible(text) == text.replace("\r\n", "\n")


def test_what_a_streams_encoding_lacks_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    narrow = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", narrow)
    shown.say("± 0.1")
    narrow.flush()
    assert narrow.buffer.getvalue() == b"\\xb1 0.1\n"  # type: ignore[attr-defined]


@pytest.mark.parametrize("text", ["=1+1", "+cmd", "-2+3", "@sum", "\t=1", "\n=1", ' =HYPERLINK("x")', "-", "=", "--1"])
def test_no_cell_is_a_formula(text: str) -> None:
    cell = shown.csv_cell(text)
    assert isinstance(cell, str)
    assert cell.startswith("'")


def test_numbers_stay_numbers_in_a_table() -> None:
    for number in (-1.5, 3, 0.0, float("-inf"), None, True):
        assert shown.csv_cell(number) is number
    for text in ("-1.5", "+2", "1e-3", "-inf", "nan", "runs/syc"):
        assert shown.csv_cell(text) == text


@pytest.mark.parametrize(
    "name", ["x\n---\nlicense: mit", "[a](http://b)", "<script>", "# head", "a|b", "**x**", "`x`", "a\n\n# b", "$x$"]
)
def test_a_name_is_plain_words_in_markdown(name: str) -> None:
    text = shown.markdown_text(name)
    assert "\n" not in text
    assert not re.search(r"(?<!\\)[<>|`*#\[\]$]", text)


def test_a_page_shows_the_order_of_its_characters(tmp_path: Path) -> None:
    page = write_figures(tmp_path / "p.html", "t\u202e", [({"mark": "bar"}, "c\x1b")], table=[["h"], ["<b>\u2066"]])
    text = page.read_text(encoding="utf-8").split("<script")[0]
    assert not ACTING.search(text)
    assert "&lt;b&gt;" in text


def test_a_name_with_lines_is_one_line_of_a_table() -> None:
    import numpy as np

    assert len(table(["a\nb", "c\x1b"], np.eye(2)).splitlines()) == 3


def test_nothing_is_printed_past_the_one_function() -> None:
    """No `print`, `input`, `echo`, console or write to a standard stream outside of `shown.py`."""
    banned = {"print", "input", "echo", "secho", "Console", "print_exc", "rprint"}
    found = []
    for path in SOURCE.rglob("*.py"):
        if path.name == "shown.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            stream = ast.unparse(node.func).endswith(("stdout.write", "stderr.write", "stdout.buffer.write"))
            if name in banned or stream:
                found.append(f"{path.relative_to(SOURCE)}:{node.lineno} {ast.unparse(node.func)}")
    assert not found


def test_every_csv_is_written_by_cells() -> None:
    """A module that writes CSV takes its cells from `csv_cell`."""
    for path in SOURCE.rglob("*.py"):
        text = path.read_text()
        if "csv.writer" in text or "csv.DictWriter" in text:
            assert "csv_cell" in text, path


def test_json_is_a_form_of_yaml_text() -> None:
    assert json.loads(shown.yaml_text('a"b\\')) == 'a"b\\'
