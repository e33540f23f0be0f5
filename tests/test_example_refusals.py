"""What cannot be read or carried over is refused, by line and field."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from test_example_files import write
from weightsteer.behavior import Example
from weightsteer.errors import SteerError
from weightsteer.example_files import rows
from weightsteer.example_files.load import load_examples, load_pairs
from weightsteer.files import read_jsonl

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
    ({"prompt": "Q?", "answer": "A.", "weight": "0.0"}, "field 'weight' is '0.0'"),
    ({"prompt": "Q?", "completion": "A.", "label": "False"}, "field 'label' tells wanted from unwanted"),
    ({"prompt": "Q?", "response": "A.", "label": 0}, "field 'label' tells wanted from unwanted"),
    ({"messages": [USER, ANSWER], "label": "true"}, "field 'label' tells wanted from unwanted"),
    ({"messages": [USER, ANSWER], "kto_tag": False}, "field 'kto_tag' tells wanted from unwanted"),
    ({"question": "Q?", "A": "x", "B": "y", "answer": "B"}, "fields 'A' and 'B' hold options"),
    ({"question": "Q?", "choices": ["x", "y"], "answer": "B"}, "field 'choices' cannot be carried over"),
    ({"question": "Q?", "options": "x; y", "answer": "B"}, "field 'options' cannot be carried over"),
    ({"messages": [USER, ANSWER], "chat_template_kwargs": {"a": 1}}, "field 'chat_template_kwargs' cannot"),
    ({"messages": [USER, {**ANSWER, "masked": True}]}, r"'messages\[1\].masked' is True"),
    ({"messages": [USER, {**ANSWER, "end_turn": False}]}, r"'messages\[1\].end_turn' is False"),
    ({"messages": [USER, {**ANSWER, "channel": "analysis"}]}, r"'messages\[1\].channel' is 'analysis'"),
    ({"messages": [USER, {**ANSWER, "train_detail": "x"}]}, r"'messages\[1\].train_detail' cannot be carried"),
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


def test_what_never_ends_or_unpacks_to_more_than_the_memory_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SteerError, match="/dev/zero: is a device; expected a file"):
        load_examples("/dev/zero")
    with pytest.raises(SteerError, match="/dev/zero: is a device; expected a file"):
        read_jsonl(Path("/dev/zero"))
    packed = tmp_path / "d.jsonl.gz"
    packed.write_bytes(gzip.compress(b" " * 10_000))
    monkeypatch.setattr(rows, "MOST_ROWS_BYTES", 5_000)
    with pytest.raises(SteerError, match="is larger than"):
        load_examples(packed)


HH = "\n\nHuman: Q?\n\nAssistant: "
REFUSED_PAIRS: list[tuple[dict[str, Any], str]] = [
    ({"prompt": "Q?", "chosen": f"{HH}A.", "rejected": f"{HH}B."}, "field 'chosen' is a whole dialogue in one text"),
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
        (b"5\n", "expected JSON, JSONL, YAML, CSV or Parquet; it begins with '5'"),
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
        (b"name,age\na,b\n", "expected JSON, JSONL, YAML, CSV or Parquet; it begins with 'name,age'"),
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
