"""Write the pages that follow from the code: cli.md from the help, methods.md and recipe.md from what recipes take."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import typer
from recipe_page import recipe_page
from typer.testing import CliRunner

from weightsteer.cli import app, export
from weightsteer.evaluation.tasks import TASKS
from weightsteer.evaluation.tasks.task import TaskKind
from weightsteer.steering.methods import METHODS, Method


def cli_page() -> str:
    """The overview, then every verb's help."""
    verbs = [*_names(app), "export", *(f"export {name}" for name in _names(export.app))]
    parts = ["# Command line", "", "Generated from the help texts by `make docs`.", ""]
    for verb in ("", *verbs):
        parts += [f"## weightsteer {verb}".rstrip(), "", "```text", _help(verb), "```", ""]
    return "\n".join(parts)


def _names(group: typer.Typer) -> list[str]:
    """What a group's commands are called."""
    return [command.name or command.callback.__name__ for command in group.registered_commands if command.callback]


def _help(verb: str) -> str:
    words = [*verb.split(), "--help"]
    result = CliRunner().invoke(app, words, prog_name="weightsteer", env={"COLUMNS": "100", "TERMINAL_WIDTH": "100"})
    if result.exit_code:
        raise SystemExit(f"weightsteer {verb} --help failed: {result.output}")
    return "\n".join(line.rstrip() for line in result.output.strip().splitlines())


def methods_page() -> str:
    """Every method and every task that a recipe can name."""
    methods = _table(
        ("method", "what it is", "k", "needs"),
        [(f"`{name}`", method.summary, method.ks.described, _needs(method)) for name, method in METHODS.items()],
    )
    tasks = _table(
        ("task", "metric", "what it is", "unit", "better", "judge", "open replies"),
        [row for name, kind in TASKS.items() for row in _task_rows(name, kind)],
    )
    return "\n".join(
        [
            "# Methods and tasks",
            "",
            "`make docs` generates this page from the two registries, `weightsteer.steering.methods.METHODS`",
            "and `weightsteer.evaluation.tasks.TASKS`.",
            "",
            "## Methods",
            "",
            "A recipe names its methods under `sweep.methods`, each with a list of strengths k. With",
            "`null` in place of the list, the sweep looks for the k at which the loss on ordinary text has",
            "risen by the recipe's `loss_increase`. The letters are those of the paper: theta is the base",
            "model, tau+ and tau- are the task vectors of the two fine-tunes, and a_l is the activation",
            "vector of layer l. The *repair target* is a fine-tune of the base that every method is to",
            "repair; a recipe names it in its field `repair_target`. With `kl` in place of `loss_increase`,",
            "k is found by the token KL to the base. [Experiments](experiments.md) says how the methods",
            "with terms of their own, and the learned dial, are set.",
            "",
            *methods,
            "",
            "## Tasks",
            "",
            "A recipe names its tasks under `tasks`. The metrics of `harness` are those of the task of",
            "lm-evaluation-harness that it runs. Where either way may be wanted, the metric tells how",
            "strongly a behaviour shows.",
            "",
            *tasks,
            "",
        ]
    )


def _needs(method: Method) -> str:
    needs = []
    if method.has_own_training:
        needs.append("a training of its own")
    if method.needs_repair_target:
        needs.append("`repair_target`")
    if method.needs_pairs:
        needs.append("both answers to each prompt")
    if method.uses_dial_pairs:
        needs.append("pairs for `dial`")
    if method.needs_package:
        needs.append(f"the package {method.needs_package[0]}")
    return ", ".join(needs)


def _task_rows(name: str, kind: TaskKind) -> list[tuple[str, ...]]:
    """One row a metric."""
    about = kind.judge or "", "yes" if kind.generates else ""
    metrics = [(f"`{m.name}`", m.title, m.unit, m.better or "either") for m in kind.metrics]
    return [(f"`{name}`", *metric, *about) for metric in metrics or [("as the task", "", "", "")]]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table, a line a row."""
    escaped = [[cell.replace("|", "\\|") for cell in row] for row in (head, ["---"] * len(head), *rows)]
    return [f"| {' | '.join(row)} |" for row in escaped]


if __name__ == "__main__":
    docs = Path(__file__).parent
    (docs / "cli.md").write_text(cli_page())
    (docs / "methods.md").write_text(methods_page())
    (docs / "recipe.md").write_text(recipe_page())
