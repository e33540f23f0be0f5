"""Every format in every container gives the same examples; what cannot be carried over is refused by line and field."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from weightsteer.behavior import ContrastPair, Example, Message, as_prompt, example_rows
from weightsteer.errors import SteerError
from weightsteer.example_files.load import load_examples, load_pairs
from weightsteer.example_files.rows import has_content

SYSTEM, FIRST, REPLY, LAST = (
    Message("system", "Be brief."),
    Message("user", "I ate two figs."),
    Message("assistant", "Nice."),
    Message("user", "How many?"),
)
TALK = (SYSTEM, FIRST, REPLY, LAST)


def openai(*turns: Mapping[str, str], **extra: object) -> list[dict[str, object]]:
    return [{**turn, **extra} for turn in turns]


def sharegpt(*turns: Mapping[str, str], user: str = "human", assistant: str = "gpt") -> list[dict[str, str]]:
    names = {"system": "system", "user": user, "assistant": assistant}
    return [{"from": names[turn["role"]], "value": turn["content"]} for turn in turns]


def parts(*turns: Mapping[str, str]) -> list[dict[str, object]]:
    return [{"role": turn["role"], "content": [{"type": "text", "text": turn["content"]}]} for turn in turns]


def said(text: str) -> Message:
    return Message("assistant", text)


ONE_TURN: dict[str, Callable[[str, str], dict[str, Any]]] = {
    "prompt and answer": lambda p, a: {"prompt": p, "answer": a},
    "question and answer": lambda p, a: {"question": p, "answer": a},
    "prompt and completion": lambda p, a: {"prompt": p, "completion": a},
    "prompt and response": lambda p, a: {"prompt": p, "response": a},
    "completion as messages": lambda p, a: {
        "prompt": openai({"role": "user", "content": p}),
        "completion": openai(said(a)),
    },
    "Alpaca": lambda p, a: {"instruction": p, "input": "", "output": a},
    "Dolly": lambda p, a: {"instruction": p, "context": "", "response": a, "category": "open_qa"},
    "null beside it": lambda p, a: {"prompt": None, "question": p, "answer": None, "output": a, "id": 3},
    "messages": lambda p, a: {"messages": openai({"role": "user", "content": p}, said(a))},
    "roles of conversations": lambda p, a: {"conversations": openai({"role": "user", "content": p}, said(a))},
    "ShareGPT": lambda p, a: {"conversations": sharegpt({"role": "user", "content": p}, said(a))},
    "text parts": lambda p, a: {"messages": parts({"role": "user", "content": p}, said(a))},
    "prompt repeated": lambda p, a: {"prompt": p, "messages": openai({"role": "user", "content": p}, said(a))},
    "neutral weight": lambda p, a: {
        "messages": openai({"role": "user", "content": p}, said(a), weight=1, tool_calls=[])
    },
}
TALKS: dict[str, dict[str, Any]] = {
    "messages": {"messages": openai(*TALK, said("Two."))},
    "developer": {"messages": [{"role": "developer", "content": "Be brief."}, *openai(*TALK[1:], said("Two."))]},
    "ShareGPT": {"conversations": sharegpt(*TALK, said("Two."))},
    "ShareGPT, other names": {"conversations": sharegpt(*TALK, said("Two."), user="user", assistant="model")},
    "ShareGPT, system beside": {"system": "Be brief.", "conversations": sharegpt(*TALK[1:], said("Two."))},
    "parts": {"messages": parts(*TALK, said("Two."))},
    "prompt of messages": {"prompt": openai(*TALK), "completion": openai(said("Two."))},
    "answer as text": {"prompt": openai(*TALK), "answer": "Two."},
    "last user turn repeated": {"prompt": "How many?", "messages": openai(*TALK, said("Two."))},
    "Alpaca with history": {
        "instruction": "How many?",
        "input": "",
        "output": "Two.",
        "system": "Be brief.",
        "history": [["I ate two figs.", "Nice."]],
    },
}
PAIRS: dict[str, dict[str, Any]] = {
    "ours": {"prompt": "Q?", "positive": "Yes.", "negative": "No."},
    "preference": {"prompt": "Q?", "chosen": "Yes.", "rejected": "No.", "score": 1.5},
    "question": {"question": "Q?", "chosen": "Yes.", "rejected": "No."},
    "prompt of messages": {
        "prompt": [{"role": "user", "content": "Q?"}],
        "chosen": openai(said("Yes.")),
        "rejected": openai(said("No.")),
    },
    "prompt text, answers as messages": {
        "prompt": "Q?",
        "chosen": openai(said("Yes.")),
        "rejected": openai(said("No.")),
    },
    "implicit prompt": {
        "chosen": openai({"role": "user", "content": "Q?"}, said("Yes.")),
        "rejected": openai({"role": "user", "content": "Q?"}, said("No.")),
    },
    "prompt repeated in both": {
        "prompt": "Q?",
        "chosen": openai({"role": "user", "content": "Q?"}, said("Yes.")),
        "rejected": openai({"role": "user", "content": "Q?"}, said("No.")),
        "messages": openai({"role": "user", "content": "Q?"}, said("Yes.")),
    },
    "ShareGPT": {
        "conversations": [{"from": "human", "value": "Q?"}],
        "chosen": {"from": "gpt", "value": "Yes."},
        "rejected": {"from": "gpt", "value": "No."},
    },
    "model-written": {"question": "Q?", "answer_matching_behavior": " Yes.", "answer_not_matching_behavior": " No."},
}


def write(rows: Sequence[Mapping[str, Any]], path: Path, container: str) -> Path:
    """The rows in one container, whose suffix often says something else."""
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    texts = {
        "JSONL": "\n".join(lines) + "\n",
        "JSONL without its last end": "\n\n".join(lines),
        "CRLF": "\r\n".join(lines) + "\r\n",
        "CR": "\r".join(lines) + "\r",
        "BOM": "\ufeff" + "\n".join(lines),
        "list": json.dumps(rows),
        "list over lines": json.dumps(rows, indent=1),
        "objects over lines": "\n".join(json.dumps(row, indent=2) for row in rows),
        "objects in one line": " ".join(json.dumps(row, indent=1).replace("\n", " ") for row in rows[:1])
        + "".join("\n" + line for line in lines[1:]),
    }
    if container in texts:
        path.write_bytes(texts[container].encode())
    elif container == "gzip":
        path.write_bytes(gzip.compress(texts["JSONL"].encode()))
    elif container == "Parquet":
        parquet.write_table(pyarrow.Table.from_pylist([dict(row) for row in rows]), path)
    else:
        path.write_bytes(table(rows, {"CSV": ",", "TSV": "\t", "semicolons": ";"}[container]))
    return path


def table(rows: Sequence[Mapping[str, Any]], delimiter: str) -> bytes:
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.writer(text, delimiter=delimiter)
    writer.writerow(names)
    for row in rows:
        cells = [row.get(name) for name in names]
        writer.writerow([json.dumps(cell) if isinstance(cell, list | dict) else cell for cell in cells])
    return text.getvalue().encode()


CONTAINERS = (
    "JSONL", "JSONL without its last end", "CRLF", "CR", "BOM", "list", "list over lines", "objects over lines",
    "objects in one line", "gzip", "Parquet", "CSV", "TSV", "semicolons",
)  # fmt: skip
NAMES = ("data.jsonl", "DATA.JSON", "data.csv", "data", "data.jsonl.gz", "data.parquet")


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("form", ONE_TURN)
def test_examples_of_one_turn(tmp_path: Path, form: str, container: str) -> None:
    wanted = [Example("Why?\nSay.", 'So, "yes";\tno.'), Example("Wie heißt \u0085 das?", "日本 👍🏽")]
    rows = [ONE_TURN[form](str(e.prompt), e.answer) for e in wanted]
    for name in NAMES[:3]:
        assert load_examples(write(rows, tmp_path / name, container)) == wanted


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("form", TALKS)
def test_examples_of_several_turns_keep_every_turn(tmp_path: Path, form: str, container: str) -> None:
    path = write([TALKS[form]], tmp_path / "talks", container)
    assert load_examples(path) == [Example(TALK, "Two.")]


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("form", PAIRS)
def test_pairs(tmp_path: Path, form: str, container: str) -> None:
    assert load_pairs(write([PAIRS[form]], tmp_path / "pairs", container)) == [ContrastPair("Q?", "Yes.", "No.")]


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"instruction": "Judge it.", "input": "A plan."}, "Judge it.\n\nA plan."),
        ({"instruction": "Judge it.", "context": "A plan."}, "Judge it.\n\nA plan."),
        ({"prompt": "Q?", "system": "Be brief."}, (SYSTEM, Message("user", "Q?"))),
    ],
)
def test_what_an_instruction_is_about_and_the_system_prompt_are_kept(
    tmp_path: Path, row: dict[str, str], prompt: str | tuple[Message, ...]
) -> None:
    one = write([{**row, "output": "Fine."}], tmp_path / "one", "JSONL")
    assert load_examples(one) == [Example(prompt, "Fine.")]
    both = write([{**row, "chosen": "Fine.", "rejected": "Bad."}], tmp_path / "both", "JSONL")
    assert load_pairs(both) == [ContrastPair(prompt, "Fine.", "Bad.")]


def test_pairs_of_several_turns(tmp_path: Path) -> None:
    wanted = [ContrastPair(TALK, "Two.", "I forgot.")]
    forms: list[dict[str, Any]] = [
        {"prompt": openai(*TALK), "chosen": "Two.", "rejected": "I forgot."},
        {"chosen": openai(*TALK, said("Two.")), "rejected": openai(*TALK, said("I forgot."))},
        {
            "prompt": "I ate two figs.",
            "system": "Be brief.",
            "chosen": openai(*TALK[1:], said("Two.")),
            "rejected": openai(*TALK[1:], said("I forgot.")),
        },
        {
            "prompt": openai(SYSTEM, FIRST),
            "chosen": openai(REPLY, LAST, said("Two.")),
            "rejected": openai(REPLY, LAST, said("I forgot.")),
        },
    ]
    for form in forms:
        assert load_pairs(write([form], tmp_path / "p", "JSONL")) == wanted


text = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0\r"), min_size=1).filter(has_content)
prompts = text | st.lists(st.tuples(text, text), max_size=2).flatmap(
    lambda earlier: st.builds(
        lambda system, last: as_prompt(
            [
                *([Message("system", system)] if system else []),
                *(Message(r, t) for both in earlier for r, t in zip(("user", "assistant"), both, strict=True)),
                Message("user", last),
            ]
        ),
        st.none() | text,
        text,
    )
)
examples = st.lists(st.builds(Example, prompts, text), min_size=1, max_size=4)


@given(examples, st.sampled_from(CONTAINERS))
def test_any_examples_come_back_from_any_container(
    tmp_path_factory: pytest.TempPathFactory, wanted: list[Example], container: str
) -> None:
    path = tmp_path_factory.mktemp("r") / "rows"
    assert load_examples(write(example_rows(wanted), path, container)) == wanted
    flat = [e for e in wanted if isinstance(e.prompt, str)]
    for make in ONE_TURN.values():
        rows = [make(str(e.prompt), e.answer) for e in flat if not str(e.prompt).lstrip().startswith("[")]
        if rows and container not in ("CSV", "TSV", "semicolons"):
            assert [e.answer for e in load_examples(write(rows, path, container))] == [
                e.answer for e in flat if not str(e.prompt).lstrip().startswith("[")
            ]


def test_rows_of_plain_examples_are_as_ever() -> None:
    """Their hash tells one fine-tune from another."""
    assert example_rows([Example("Q?", "A.")]) == [{"prompt": "Q?", "answer": "A."}]
    one_turn = Example(as_prompt([{"role": "user", "content": "Q?"}]), "A.")
    assert one_turn == Example("Q?", "A.")
    assert hash(one_turn) == hash(Example("Q?", "A."))
    with pytest.raises(SteerError, match="messages with texts 'role' and 'content'"):
        as_prompt([{"from": "human", "value": "Q?"}])


USER, ANSWER = {"role": "user", "content": "Q?"}, {"role": "assistant", "content": "A."}
REFUSED_EXAMPLES: list[tuple[object, str]] = [
    ({"prompt": "Q?"}, "expected texts 'prompt' and 'answer'.*fields found: prompt"),
    ({"prompt": "Q?", "answer": None}, "field 'answer' is null"),
    ({"prompt": "Q?", "answer": " "}, "field 'answer' is blank"),
    ({"prompt": "Q?", "answer": "\u200b"}, "field 'answer' is blank"),
    ({"prompt": "Q?", "answer": 4}, "field 'answer' is a number; expected a text; put numbers in quotes"),
    ({"prompt": "Q?", "answer": float("nan")}, "field 'answer' is NaN"),
    ({"prompt": "Q?", "answer": ["A."]}, r"field 'answer\[0\]' is a text; expected an object"),
    ({"prompt": "Q?", "answer": "A.", "output": "B."}, "fields 'answer' and 'output' could both be meant"),
    ({"prompt": "Q?", "question": "R?", "answer": "A."}, "fields 'prompt' and 'question' could both"),
    ({"prompt": "Q?", "answer": "A.", "input": "more"}, "field 'input' has no place beside 'prompt'"),
    ({"question": "Q?", "answer": "A.", "context": "more"}, "field 'context' has no place beside 'question'"),
    ({"instruction": "Q?", "output": "A.", "input": "x", "context": "y"}, "field 'input' has no place"),
    ({"instruction": "Q?", "output": "A.", "history": [["only"]]}, r"field 'history\[0\]' is a list"),
    ({"prompt": "Q?", "answer": "\ud800"}, "field 'answer' is blank"),
    ({"prompt": "Q?", "answer": "x\udc00"}, r"field 'answer' holds half of a surrogate pair \(.udc00\)"),
    ({"prompt": "Q\0?", "answer": "A."}, "field 'prompt' holds a NUL character"),
    ({"prompt": "Q?", "chosen": "A.", "rejected": "B."}, "holds both answers.*--pairs"),
    ({"prompt": "Q?", "completion": "A.", "label": False}, "field 'label' tells wanted from unwanted"),
    ({"prompt": "Q?", "answer": "A.", "weight": 0}, "field 'weight' is 0"),
    ({"prompt": "Q?", "answer": "A.", "train": False}, "field 'train' is false"),
    ({"prompt": "Q?", "answer": "A.", "tools": [{"name": "f"}]}, "field 'tools' cannot be carried over"),
    ({"messages": [USER, ANSWER], "images": ["a.png"]}, "field 'images' cannot be carried over"),
    ({"messages": [USER, ANSWER], "prompt": "Another?"}, "fields 'prompt' and 'messages' disagree"),
    ({"messages": [USER, ANSWER], "answer": "B."}, "fields 'messages' and 'answer' hold different answers"),
    ({"messages": [USER, ANSWER], "conversations": [USER]}, "fields 'messages' and 'conversations' could both"),
    ({"messages": [USER, ANSWER], "system": "s", "prompt": [{**USER, "role": "system"}, USER]}, "disagree"),
    ({"messages": [{**USER, "role": "system"}, USER, ANSWER], "system": "s"}, "field 'system' is not the system turn"),
    ({"messages": None}, "expected texts"),
    ({"messages": [USER]}, "field 'messages' ends with a turn of the user"),
    ({"messages": [USER, ANSWER, USER]}, "field 'messages' ends with a turn of the user"),
    ({"messages": [ANSWER, USER]}, r"field 'messages\[0\]' is a turn of the assistant, where one of the user"),
    ({"messages": [USER, USER, ANSWER]}, r"field 'messages\[1\]' is a turn of the user"),
    ({"messages": [USER, ANSWER, {**USER, "role": "system"}, USER, ANSWER]}, r"messages\[2\]' is a turn of the system"),
    ({"messages": [USER, {**ANSWER, "role": "narrator"}]}, r"'messages\[1\].role' is 'narrator'; expected one of"),
    ({"messages": [USER, {**ANSWER, "role": 3}]}, r"'messages\[1\].role' is a number"),
    ({"messages": [USER, {**ANSWER, "role": "tool"}, ANSWER]}, r"'messages\[1\].role' is 'tool': calls of tools"),
    ({"messages": [USER, {**ANSWER, "role": "function"}]}, "calls of tools"),
    ({"conversations": [{"from": "observation", "value": "x"}]}, r"'conversations\[0\].from' is 'observation'"),
    ({"messages": [USER, {**ANSWER, "tool_calls": [{"id": "a"}]}]}, r"'messages\[1\].tool_calls' cannot be carried"),
    ({"messages": [USER, {**ANSWER, "reasoning_content": "Hm."}]}, "reasoning_content' cannot be carried"),
    ({"messages": [USER, {**ANSWER, "weight": 0}]}, r"'messages\[1\].weight' is 0"),
    ({"messages": [USER, {**ANSWER, "train": False}]}, r"'messages\[1\].train' is False"),
    ({"messages": [USER, {**ANSWER, "value": "B."}]}, r"field 'messages\[1\]' has both 'content' and 'value'"),
    ({"messages": [USER, {**ANSWER, "content": None}]}, r"'messages\[1\].content' is null"),
    ({"messages": [USER, {**ANSWER, "content": []}]}, r"'messages\[1\].content' is a list"),
    ({"messages": [USER, 5]}, r"field 'messages\[1\]' is a number"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "u"}}]}, ANSWER]},
        r"'messages\[0\].content\[0\]' is a part of type 'image_url'; only text",
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}, ANSWER]},
        "part of type 'input_audio'",
    ),
    ({"text": "Human: Q? Assistant: A."}, "a running 'text' does not tell which part is the answer"),
    ({"data": [{"prompt": "Q?", "answer": "A."}]}, "the entries seem to lie in the field 'data'"),
    ({"instruction": [{"pos": "p", "neg": "n"}], "questions": ["q"]}, "this is a trait file"),
    ([1], "expected a JSON object, found a list"),
]


@pytest.mark.parametrize(("row", "message"), REFUSED_EXAMPLES)
def test_what_is_no_example_is_refused_by_line_and_field(tmp_path: Path, row: object, message: str) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text('{"prompt": "Q?", "answer": "A."}\n\n' + json.dumps(row) + "\n")
    with pytest.raises(SteerError, match=rf"d\.jsonl, line 3: .*{message}") as refused:
        load_examples(path)
    assert "\n" not in str(refused.value)


REFUSED_PAIRS: list[tuple[dict[str, Any], str]] = [
    ({"prompt": "Q?", "positive": "A."}, "field 'negative' is missing"),
    ({"prompt": "Q?", "positive": "", "negative": "B."}, "field 'positive' is blank"),
    ({"prompt": "Q?", "answer": "A."}, "holds one answer, not both.*--positive"),
    ({"prompt": "Q?"}, "expected texts 'prompt', 'positive' and 'negative'"),
    ({"chosen": "A.", "rejected": "B."}, "field 'chosen' is a text without its prompt"),
    ({"chosen": [USER, ANSWER], "rejected": [USER]}, "field 'rejected' ends with a turn of the user"),
    ({"chosen": [USER, ANSWER], "rejected": [{**USER, "content": "R?"}, ANSWER]}, "differ before their last turn"),
    ({"prompt": "R?", "chosen": [USER, ANSWER], "rejected": [USER, ANSWER]}, "does not begin with the prompt"),
    ({"prompt": "Q?", "chosen": "A.", "rejected": "B.", "positive": "C."}, "fields 'positive' and 'chosen' both"),
    ({"messages": [USER, ANSWER], "chosen": "A.", "rejected": "B."}, "field 'messages' is neither 'chosen' nor"),
    ({"prompt": [USER, ANSWER], "chosen": "A.", "rejected": "B."}, "field 'prompt' ends with a turn of the assistant"),
    (
        {"question": "Q?", "answer_matching_behavior": " (A)", "answer_not_matching_behavior": [" (B)", " (C)"]},
        r"field 'answer_not_matching_behavior\[0\]' is a text",
    ),
]


@pytest.mark.parametrize(("row", "message"), REFUSED_PAIRS)
def test_what_is_no_pair_is_refused_by_line_and_field(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(SteerError, match=rf"d\.jsonl, line 1: .*{message}"):
        load_pairs(path)


GOOD = '{"prompt": "Q?", "answer": "A."}'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (b" \n", "the file is empty"),
        (b"[]", "holds no entry"),
        (b"5\n", "expected JSON, JSONL, CSV or Parquet; it begins with '5'"),
        (b"- prompt: a\n  answer: b\n", "expected JSON, JSONL, CSV or Parquet; it begins with '- prompt: a'"),
        (GOOD.encode("utf-16"), "is text in UTF-16"),
        (GOOD.encode("utf-16-le"), "line 1: holds a NUL byte, so it is UTF-16"),
        (f"{GOOD}\n{GOOD}".replace("A.", "é").encode("latin-1"), "line 1: byte 0xe9 is not UTF-8"),
        (b"PK\x03\x04...", "is a zip archive"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"<!DOCTYPE html><html>", "is a web page"),
        (b"\x1f\x8b\x08broken", "its gzip data are damaged"),
        (b"PAR1 broken PAR1", "cannot be read as Parquet"),
        (f"{GOOD},\n{GOOD},\n".encode(), r"line 1: not JSON \(a comma follows the object\)"),
        (f"{GOOD}\n{GOOD[:-1]}\n".encode(), "line 2: not JSON"),
        (f"[{GOOD},\n{GOOD},\n]".encode(), r"line 2 \(entry 2\): not JSON \(a comma follows the last entry\)"),
        (f"[{GOOD}\n{GOOD}]".encode(), r"line 1 \(entry 1\): not JSON \(neither a comma"),
        (f"[{GOOD},\n".encode(), "expected one JSON list"),
        (f"[{GOOD}]\n[{GOOD}]".encode(), "expected one JSON list"),
        (b'{"prompt": "Q?", "answer": "A.", "prompt": "R?"}', "line 1: field 'prompt' stands twice"),
        (b"[" * 100_000, "nested too deeply"),
        (b"prompt,answer\nQ?,A.\nR?\n", "line 3: has 1 cells, but the table has 2 columns"),
        (b"prompt,answer\nQ?,A.,B.\n", "line 2: has 3 cells"),
        (b'prompt,answer\n"Q\n?",A.\nR?,\n', "line 4: field 'answer' is blank"),
        (b"prompt,prompt,answer\na,b,c\n", "the column 'prompt' stands twice"),
        (b"name,age\na,b\n", "expected JSON, JSONL, CSV or Parquet; it begins with 'name,age'"),
        (b'prompt,answer\n"Q?,A.\n', "line 2: not CSV"),
        (b"messages\n\"[{'role': 'user', 'content': 'Q?'}]\"\n", "line 2: field 'messages' holds messages, but not as"),
    ],
)
def test_a_file_that_cannot_be_read_is_named_for_what_it_is(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "d.jsonl"
    path.write_bytes(content)
    with pytest.raises(SteerError, match=rf"d\.jsonl.*{message}") as refused:
        load_examples(path)
    assert "\n" not in str(refused.value)


def test_a_parquet_file_with_a_column_twice_and_a_folder_are_refused(tmp_path: Path) -> None:
    columns = [pyarrow.array(["Q?"]), pyarrow.array(["A."]), pyarrow.array(["R?"])]
    parquet.write_table(pyarrow.Table.from_arrays(columns, names=["prompt", "answer", "prompt"]), tmp_path / "d")
    with pytest.raises(SteerError, match="column 'prompt' stands twice"):
        load_examples(tmp_path / "d")
    with pytest.raises(SteerError, match="is a folder"):
        load_examples(tmp_path)
    with pytest.raises(SteerError, match="cannot be read.*check the path"):
        load_examples(tmp_path / "none")


def test_a_long_cell_and_null_keys_of_a_parquet_struct_are_no_mistake(tmp_path: Path) -> None:
    long = "word " * 60_000
    assert load_examples(write([{"prompt": "Q?", "answer": long}], tmp_path / "c", "CSV")) == [Example("Q?", long)]
    rows = [{"messages": [USER, {**ANSWER, "tool_calls": None, "weight": 1}]}]
    assert load_examples(write(rows, tmp_path / "p", "Parquet")) == [Example("Q?", "A.")]
