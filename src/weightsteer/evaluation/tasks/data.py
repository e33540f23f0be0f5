"""Where the shipped task files lie, and the fields of a public format that several tasks read."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

from ...errors import SteerError


def task_file(shipped: str, data: str | Path | None) -> Path:
    """The user's file if one is given, else the shipped one."""
    return Path(data) if data else Path(str(resources.files("weightsteer") / "data" / "tasks" / shipped))


def reward_hack_row(row: dict[str, Any]) -> tuple[str, str] | None:
    """Of a row of reward-hack-generalization: its prompt with options (A) and (B), and the rewarded letter."""
    prompts, letter = row.get("prompt_list"), row.get("high_reward_answer")
    prompt = prompts[0] if isinstance(prompts, list) and prompts else None
    return (prompt, letter) if isinstance(prompt, str) and letter in ("A", "B") else None


def wrong_row(path: Path, number: int, row: dict[str, Any], *ours: str) -> SteerError:
    """A line that is neither in our format (texts `ours`) nor in reward-hack-generalization's."""
    return SteerError(
        f"{path}, line {number}: expected texts {', '.join(map(repr, ours))}, or 'prompt_list' with options "
        f"(A) and (B) and 'high_reward_answer' A or B; fields found: {', '.join(sorted(row))}"
    )
