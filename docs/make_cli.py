"""Write docs/cli.md from the command line's own help texts: `make docs`."""

from __future__ import annotations

from pathlib import Path

from typer.testing import CliRunner

from weightsteer.cli import app, export


def cli_page() -> str:
    """The page: the overview, then every verb's help."""
    verbs = [command.callback.__name__ for command in app.registered_commands if command.callback]
    verbs += ["export", *(f"export {command.callback.__name__}" for command in export.app.registered_commands)]
    parts = ["# Command line", "", "Generated from the help texts by `make docs`.", ""]
    for verb in ("", *verbs):
        parts += [f"## weightsteer {verb}".rstrip(), "", "```text", _help(verb), "```", ""]
    return "\n".join(parts)


def _help(verb: str) -> str:
    words = [*verb.split(), "--help"]
    result = CliRunner().invoke(app, words, prog_name="weightsteer", env={"COLUMNS": "100", "TERMINAL_WIDTH": "100"})
    return "\n".join(line.rstrip() for line in result.output.strip().splitlines())


if __name__ == "__main__":
    (Path(__file__).parent / "cli.md").write_text(cli_page())
