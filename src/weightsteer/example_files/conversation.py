"""Turns as OpenAI, ShareGPT and TRL write them -> messages with the roles system, user and assistant."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ..behavior import Message
from .rows import Row, described, has_content, is_unfilled

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
}
TOOL_ROLES = ("tool", "function", "function_call", "observation", "ipython")
TEXT_PARTS = ("text", "input_text", "output_text")
# Keys of a message that change what it says or whether it is trained on, and that a message of ours has no place for.
NOT_CARRIED = (
    "tool_calls",
    "tool_call_id",
    "function_call",
    "tools",
    "images",
    "image",
    "audio",
    "video",
    "name",
    "prefix",
    "refusal",
    "thinking",
    "reasoning",
    "reasoning_content",
    "train_detail",
)
TRAINED_FLAGS = {  # the value that changes nothing
    "weight": 1,
    "train": True,
    "trainable": True,
    "loss": True,
    "masked": False,
    "end_turn": True,
    "channel": "final",
}
ENCODED = re.compile(r"""^\s*(\[\s*)?\{\s*['"](role|from|content|value)['"]\s*:|^\s*\[\s*\[\s*['"]""")


def checked_text(row: Row, field: str, value: Any) -> str:
    """A text that has content and can be encoded.

    Raises:
        SteerError: it is no text, blank, or holds half of a surrogate pair or a NUL.
    """
    if not isinstance(value, str) or not has_content(value):
        hint = "; put numbers in quotes" if isinstance(value, int | float) and not is_unfilled(value) else ""
        missing = "[" not in field and "." not in field and field not in row.fields
        found = "missing" if missing else "blank" if isinstance(value, str) else described(value)
        raise row.error(f"field {field!r} is {found}; expected a text{hint}")
    return encodable(row, field, value)


def encodable(row: Row, field: str, text: str) -> str:
    """The text, if it can be written in UTF-8 and holds no NUL."""
    for char in text:
        if char == "\0" or "\ud800" <= char <= "\udfff":
            found = "a NUL character" if char == "\0" else f"half of a surrogate pair (\\u{ord(char):04x})"
            raise row.error(f"field {field!r} holds {found}, which is no text; remove it")
    return text


def decoded(row: Row, field: str, value: Any) -> Any:
    """Messages or exchanges that stand in a text, as a cell of CSV must hold them; any other value as it is."""
    if not isinstance(value, str) or not ENCODED.match(value):
        return value
    try:
        return json.loads(value)
    except ValueError:
        raise row.error(f"field {field!r} holds messages, but not as JSON; write them by json.dumps") from None


def read_turns(row: Row, field: str, value: Any) -> tuple[Message, ...]:
    """The messages of a field, each by itself; `check_order` checks what follows what.

    Raises:
        SteerError: a message that is malformed, or that says what a message of ours cannot.
    """
    turns = [value] if isinstance(value, Mapping) else value
    if not isinstance(turns, list) or not turns:
        raise row.error(f"field {field!r} is {described(value)}; expected a list of messages")
    return tuple(_message(row, f"{field}[{number}]", turn) for number, turn in enumerate(turns))


def _message(row: Row, field: str, turn: Any) -> Message:
    if not isinstance(turn, Mapping):
        raise row.error(f"field {field!r} is {described(turn)}; expected an object with 'role' and 'content'")
    role = _role(row, field, turn)
    for key in NOT_CARRIED:
        if not is_unfilled(turn.get(key)):
            raise row.error(f"field '{field}.{key}' cannot be carried over; remove it, or leave the entry out")
    for key, neutral in TRAINED_FLAGS.items():
        if not is_unfilled(turn.get(key)) and not _says(turn[key], neutral):
            raise row.error(
                f"field '{field}.{key}' is {turn[key]!r}: the last answer of each entry is trained on, and no other "
                "turn; leave the entry out, or cut it after the turn to be trained on"
            )
    return Message(role, _content(row, field, turn, role))


def _says(value: Any, neutral: object) -> bool:
    """Whether a value is this one, perhaps as the text that YAML and tables have for it."""
    if not isinstance(value, str) or not isinstance(neutral, int):
        return bool(value == neutral)
    return value.strip().lower() in {str(neutral).lower(), str(int(neutral)), str(float(neutral))}


def _role(row: Row, field: str, turn: Mapping[str, Any]) -> str:
    name = _one_of(row, field, turn, "role", "from")
    role = turn.get(name)
    if not isinstance(role, str):
        raise row.error(f"field '{field}.{name}' is {described(role)}; expected one of {', '.join(ROLES)}")
    if role.lower() in TOOL_ROLES:
        raise row.error(f"field '{field}.{name}' is {role!r}: calls of tools cannot be carried over; leave them out")
    if role.lower() not in ROLES:
        raise row.error(f"field '{field}.{name}' is {role!r}; expected one of {', '.join(ROLES)}")
    return ROLES[role.lower()]


def _content(row: Row, field: str, turn: Mapping[str, Any], role: str) -> str:
    name = _one_of(row, field, turn, "content", "value")
    content, where = turn.get(name), f"{field}.{name}"
    if isinstance(content, list) and content:
        content = "".join(_part(row, f"{where}[{number}]", part) for number, part in enumerate(content))
    if role == "system" and content == "":
        return ""  # asks the template for an empty system prompt
    return checked_text(row, where, content)


def _part(row: Row, field: str, part: Any) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, Mapping):
        raise row.error(f"field {field!r} is {described(part)}; expected a part with its 'type'")
    kind = part.get("type", "text" if "text" in part else None)
    others = [key for key in part if key not in ("type", "text", "index") and not is_unfilled(part[key])]
    if kind not in TEXT_PARTS or not isinstance(part.get("text"), str) or others:
        raise row.error(f"field {field!r} is a part of type {others[0] if others else kind!r}; only text is read")
    return str(part["text"])


def _one_of(row: Row, field: str, turn: Mapping[str, Any], ours: str, theirs: str) -> str:
    """Which of two names for one thing a message uses."""
    if ours in turn and theirs in turn and turn[theirs] is not None and turn[ours] not in (None, turn[theirs]):
        raise row.error(f"field {field!r} has both {ours!r} and {theirs!r}, which differ; keep one of them")
    return ours if turn.get(ours) is not None or theirs not in turn else theirs


def check_order(row: Row, field: str, turns: Sequence[Message], *, last: str) -> None:
    """Check that a talk goes: perhaps system, then user and assistant in turn, up to `last`.

    Raises:
        SteerError: the turn that is out of order.
    """
    talk = turns[1:] if turns and turns[0].role == "system" else turns
    expected = "user"
    for number, turn in enumerate(talk, start=len(turns) - len(talk)):
        if turn.role != expected:
            raise row.error(
                f"field '{field}[{number}]' is a turn of the {turn.role}, where one of the {expected} is due; "
                "a talk is: system (or not), then user and assistant in turn"
            )
        expected = "assistant" if expected == "user" else "user"
    if not talk or talk[-1].role != last:
        found = f"with a turn of the {talk[-1].role}" if talk else "before any turn of the user"
        raise row.error(f"field {field!r} ends {found}; expected the {last}'s turn at its end")
