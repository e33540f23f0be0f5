"""The overview of all verbs: by what they are for, one line each."""

from __future__ import annotations

from typing import Any

from typer.core import TyperGroup


class VerbsByUse(TyperGroup):
    """A group whose help lists its commands under the headings that `rich_help_panel` gives them."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write one list for each heading."""
        panels: dict[str, list[tuple[str, str]]] = {}
        for name in self.list_commands(ctx):
            command = self.get_command(ctx, name)
            if command is not None and not command.hidden:
                panel = getattr(command, "rich_help_panel", None) or "Commands"
                panels.setdefault(str(panel), []).append((name, first_sentence(command.help or "")))
        for panel, rows in panels.items():
            with formatter.section(panel):
                formatter.write_dl(rows, col_max=12)


def first_sentence(help_text: str) -> str:
    """A verb's help up to where it goes into details."""
    line = " ".join(help_text.partition("\n\n")[0].split())
    for end in (":", ";", ". "):
        line = line.partition(end)[0]
    return f"{line.rstrip('.')}."
