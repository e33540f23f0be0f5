"""One row, in any format that is known -> a prompt with its answer, or with both answers.

Where two fields could both be the prompt, or both be the answer, they have to say the same. A field that says
something which our example has no place for is refused; every other field is passed over.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..behavior import ContrastPair, Example, Message
from ..errors import SteerError
from .conversation import check_order, checked_text, decoded, read_turns
from .rows import Row, described

PROMPTS = ("prompt", "question", "instruction")
ANSWERS = ("answer", "completion", "response", "output")
TALKS = ("messages", "conversations", "conversation")
BOTH_ANSWERS = (
    ("positive", "negative"),
    ("chosen", "rejected"),
    ("answer_matching_behavior", "answer_not_matching_behavior"),
)
ADDITIONS = ("input", "context")  # what an instruction is about
NOT_CARRIED = (
    "tools",
    "functions",
    "images",
    "image",
    "videos",
    "video",
    "audios",
    "audio",
    "documents",
    "choices",  # of a multiple choice: the prompt does not hold them
    "options",
    "chat_template_kwargs",
)
SYSTEMS = ("system", "system_prompt", "system_message")
WANTED = ("label", "kto_tag")  # which of two kinds an answer is
FLAGS = ("true", "false", "0", "1", "desirable", "undesirable")
KNOWN_FIELDS = {*PROMPTS, *ANSWERS, *TALKS, *(name for both in BOTH_ANSWERS for name in both), "text"}
FIELDS = {*KNOWN_FIELDS, *ADDITIONS, *NOT_CARRIED, *SYSTEMS, *WANTED, "history", "topic", "train", "weight"}
Turns = tuple[Message, ...]


def example_of(row: Row) -> Example:
    """The example in a row; of a talk, the last answer is what is trained on.

    Raises:
        SteerError: the row is in no known format, holds two that disagree, or what cannot be carried over.
    """
    _refuse_not_carried(row)
    for both in BOTH_ANSWERS:
        if all(row.filled(name) is not None for name in both):
            raise row.error(
                f"holds both answers, {both[0]!r} and {both[1]!r}; expected one: a file of pairs goes in by --pairs, "
                "where there is such an option"
            )
    field = _filled_field(row, TALKS)
    if field is not None:
        talk = _read_talk(row, field)
        answer = _filled_field(row, ANSWERS)
        if answer is not None and row.fields[answer] != talk[-1].content:
            raise row.error(f"fields {field!r} and {answer!r} hold different answers; keep one of them")
    else:
        prompt, field = _present_field(row, PROMPTS), _present_field(row, ANSWERS)
        if prompt is None or field is None:
            raise _unknown(row, "'prompt' and 'answer'")
        talk = (*_flat_prompt(row, prompt), *_answer_turns(row, field))
    talk = _with_system(row, talk)
    check_order(row, field, talk, last="assistant")
    return Example(talk[:-1], talk[-1].content)


def pair_of(row: Row) -> ContrastPair:
    """The contrast pair in a row: of `chosen` and `rejected`, the chosen answer is the positive one.

    Raises:
        SteerError: as `example_of`, or the two sides are not answers to the same turns.
    """
    _refuse_not_carried(row)
    found = [both for both in BOTH_ANSWERS if any(row.filled(name) is not None for name in both)]
    if not found:
        if _filled_field(row, ANSWERS) or _filled_field(row, TALKS):
            raise row.error("holds one answer, not both; give the files of the two sides as --positive and --negative")
        raise _unknown(row, "'prompt', 'positive' and 'negative'")
    if len(found) > 1:
        raise row.error(f"fields {found[0][0]!r} and {found[1][0]!r} both hold an answer; keep one pair of them")
    names = found[0]
    context = _pair_context(row, names)
    positive, negative = (_with_system(row, _whole(row, name, context)) for name in names)
    for name, talk in zip(names, (positive, negative), strict=True):
        check_order(row, name, talk, last="assistant")
    if positive[:-1] != negative[:-1]:
        raise row.error(f"fields {names[0]!r} and {names[1]!r} differ before their last turn; expected one prompt")
    topic = row.fields.get("topic")
    return ContrastPair(positive[:-1], positive[-1].content, negative[-1].content, "" if topic is None else str(topic))


def _pair_context(row: Row, names: Sequence[str]) -> Turns | None:
    """The turns before both answers, where they stand in a field of their own; None if the answers hold them too."""
    field = _filled_field(row, TALKS)
    if field is None:
        prompt = _present_field(row, PROMPTS)
        return None if prompt is None else _flat_prompt(row, prompt)
    talk = _read_talk(row, field)
    if talk[-1].role == "assistant":  # some sets repeat one of the sides
        if row.fields[field] not in [row.fields.get(name) for name in names]:
            raise row.error(f"field {field!r} is neither {names[0]!r} nor {names[1]!r}; keep the pair alone")
        return None
    return talk


def _whole(row: Row, field: str, context: Turns | None) -> Turns:
    """One side of a pair, from its first turn to its answer."""
    value = decoded(row, field, row.fields.get(field))
    if field in BOTH_ANSWERS[2] and isinstance(value, list) and len(value) == 1:
        value = value[0]
    if not isinstance(value, list | dict):
        text = checked_text(row, field, value)
        if context is None:
            raise row.error(f"field {field!r} is a text without its prompt; expected a field 'prompt' beside it")
        if text.lstrip().startswith("Human:") and "\n\nAssistant:" in text:
            raise row.error(
                f"field {field!r} is a whole dialogue in one text ('Human: ... Assistant: ...'); expected the answer "
                "alone, or a list of messages"
            )
        return (*context, Message("assistant", text.strip() if field in BOTH_ANSWERS[2] else text))
    turns = read_turns(row, field, value)
    if turns[0].role == "assistant" and context is not None:
        return (*context, *turns)
    if context and context[0].role == "system" and turns[0].role != "system":
        turns = (context[0], *turns)
    if context is not None and not _begins_with(turns, context):
        raise row.error(f"field {field!r} holds a talk that does not begin with the prompt; keep one of them")
    return turns


def _begins_with(talk: Turns, context: Turns) -> bool:
    """True if a talk begins with these turns, or ends on them before its answer; it may have a system turn of its own.

    Some sets put only the first user turn, or only the last, into the prompt beside a talk of several.
    """
    if context[0].role == "system" and context[0] != talk[0]:
        return False
    bare, asked = (tuple(turn for turn in turns if turn.role != "system") for turns in (talk, context))
    return bare[: len(asked)] == asked or bare[-1 - len(asked) : -1] == asked


def _flat_prompt(row: Row, field: str) -> Turns:
    """The turns that `prompt`, `question` or `instruction` give, after those of `history`."""
    value = decoded(row, field, row.fields[field])
    if isinstance(value, list | dict):
        _refuse_additions(row, field, (*ADDITIONS, "history"))
        turns = read_turns(row, field, value)
        check_order(row, field, turns, last="user")
        return turns
    text = checked_text(row, field, value)
    additions = [name for name in ADDITIONS if row.filled(name) is not None]
    if field != "instruction" or len(additions) > 1:
        _refuse_additions(row, field, ADDITIONS)
    for name in additions:
        text = f"{text}\n\n{checked_text(row, name, row.fields[name])}"
    return (*_history(row), Message("user", text))


def _history(row: Row) -> Turns:
    """Earlier exchanges, as LLaMA-Factory's Alpaca files list them: [[user, assistant], ...]."""
    history, turns = decoded(row, "history", row.filled("history")), []
    if history is not None and not isinstance(history, list):
        raise row.error(f"field 'history' is {described(history)}; expected a list of [user, assistant]")
    for number, exchange in enumerate(history or []):
        field = f"history[{number}]"
        if not isinstance(exchange, list) or len(exchange) != 2:
            raise row.error(f"field {field!r} is {described(exchange)}; expected [user, assistant]")
        texts = [checked_text(row, field, text) for text in exchange]
        turns += [Message("user", texts[0]), Message("assistant", texts[1])]
    return tuple(turns)


def _answer_turns(row: Row, field: str) -> Turns:
    value = decoded(row, field, row.fields[field])
    if isinstance(value, list | dict):
        return read_turns(row, field, value)
    return (Message("assistant", checked_text(row, field, value)),)


def _with_system(row: Row, talk: Turns) -> Turns:
    """The talk under the row's own system prompt, if there is one."""
    field = _filled_field(row, SYSTEMS)
    if field is None:
        return talk
    system = Message("system", checked_text(row, field, row.fields[field]))
    if talk[0].role != "system":
        return (system, *talk)
    if talk[0] != system:
        raise row.error(f"field {field!r} is not the system turn of the talk; keep one of them")
    return talk


def _filled_field(row: Row, names: Sequence[str]) -> str | None:
    """The field of these that says something; several have to say the same."""
    filled = [name for name in names if row.filled(name) is not None]
    for name in filled[1:]:
        if row.fields[name] != row.fields[filled[0]]:
            raise row.error(f"fields {filled[0]!r} and {name!r} could both be meant and differ; keep one of them")
    return filled[0] if filled else None


def _present_field(row: Row, names: Sequence[str]) -> str | None:
    """As `_filled_field`, else one that is there and says nothing, to be named in a message."""
    return _filled_field(row, names) or next((name for name in names if name in row.fields), None)


def _read_talk(row: Row, field: str) -> Turns:
    """The turns of a talk, which a prompt beside it may repeat in part."""
    talk = read_turns(row, field, decoded(row, field, row.fields[field]))
    _refuse_additions(row, field, (*ADDITIONS, "history"))
    prompt = _filled_field(row, PROMPTS)
    if prompt is not None and not _begins_with(talk, _flat_prompt(row, prompt)):
        raise row.error(f"fields {prompt!r} and {field!r} disagree; keep one of them")
    return talk


def _refuse_additions(row: Row, field: str, names: Sequence[str]) -> None:
    for name in names:
        if row.filled(name) is not None:
            raise row.error(f"field {name!r} has no place beside {field!r}; put it into the prompt, or remove it")


def _refuse_not_carried(row: Row) -> None:
    for name in NOT_CARRIED:
        if row.filled(name) not in (None, "[]", "{}"):
            raise row.error(f"field {name!r} cannot be carried over; remove it, or leave the entry out")
    weight = row.filled("weight")
    if weight is not None and _number(weight) != 1:
        raise row.error(f"field 'weight' is {weight!r}: every example weighs the same; leave it out, or repeat entries")
    for name in WANTED:
        if str(row.filled(name)).strip().lower() in FLAGS:
            raise row.error(f"field {name!r} tells wanted from unwanted answers; put each kind into a file of its own")
    if str(row.fields.get("train")).strip().lower() in ("false", "0"):
        raise row.error("field 'train' is false; leave the entry out")
    if row.filled("A") is not None and row.filled("B") is not None:
        raise row.error("fields 'A' and 'B' hold options that the prompt does not; put them into the prompt")


def _number(value: object) -> float | None:
    """A number, also one that a table holds as text."""
    try:
        return float(str(value))
    except ValueError:
        return None


def _unknown(row: Row, texts: str) -> SteerError:
    fields = ", ".join(sorted(map(str, row.fields))) or "none"
    return row.error(f"expected texts {texts}{_hint(row)}; fields found: {fields}")


def _hint(row: Row) -> str:
    """What a row is that is no example."""
    if "questions" in row.fields and "instruction" in row.fields:
        return " (this is a trait file, from which `weightsteer sample` makes examples)"
    if capitals := sorted(name for name in row.fields if name not in FIELDS and str(name).lower() in KNOWN_FIELDS):
        return f" (names are in lower case: {capitals[0].lower()!r} for {capitals[0]!r})"
    if row.filled("text") is not None:
        return " (a running 'text' does not tell which part is the answer)"
    lists = [name for name, value in row.fields.items() if isinstance(value, list) and value]
    talks = [name for name in lists if any({"role", "from"} & entry.keys() for entry in _objects(row.fields[name]))]
    if talks:
        return f" (a list of messages goes into the field 'messages'; this one is in {talks[0]!r})"
    if lists and all(isinstance(entry, dict) for entry in row.fields[lists[0]]):
        return f" (the entries seem to lie in the field {lists[0]!r}; save that list by itself)"
    return ", or the fields of another format (see the guide 'Make a vector from your own data')"


def _objects(value: list[object]) -> list[dict[str, object]]:
    return [entry for entry in value if isinstance(entry, dict)]
