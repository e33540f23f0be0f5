"""Every format in every container gives the same examples."""

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
        names = dict.fromkeys(name for row in rows for name in row)  # a column that a row lacks is null there
        parquet.write_table(pyarrow.Table.from_pylist([{n: row.get(n) for n in names} for row in rows]), path)
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


@pytest.mark.parametrize("field", ["system", "system_prompt", "system_message"])
def test_a_system_prompt_is_kept_whatever_it_is_called(field: str, tmp_path: Path) -> None:
    row = {field: "Be a pirate.", "question": "Hi?", "response": "Arr."}
    (found,) = load_examples(write([row], tmp_path / "a.jsonl", "JSONL"))
    assert found == Example((Message("system", "Be a pirate."), Message("user", "Hi?")), "Arr.")
    pair = {field: "Be a pirate.", "prompt": "Hi?", "chosen": "Arr.", "rejected": "Hello."}
    (both,) = load_pairs(write([pair], tmp_path / "b.jsonl", "JSONL"))
    assert both == ContrastPair(found.prompt, "Arr.", "Hello.")


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


def test_yamls_null_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "data"
    for null in ("null", "~", "", "Null"):
        path.write_text(f"- system: {null}\n  prompt: hi\n  answer: No\n")
        assert load_examples(path) == [Example("hi", "No")]
    path.write_text('- system: "null"\n  prompt: hi\n  answer: there\n')
    assert load_examples(path)[0].prompt == (Message("system", "null"), Message("user", "hi"))
    path.write_text(
        "- messages:\n  - {role: user, content: hi}\n  - {role: assistant, content: a, weight: 1, train: true}\n"
    )
    assert load_examples(path) == [Example("hi", "a")]


@pytest.mark.parametrize("start", ["---\r\n- ", "--- \n- ", "-\n  ", "# a\n\n---\n- ", "\n-   "])
def test_a_yaml_list_may_begin_in_many_ways(tmp_path: Path, start: str) -> None:
    path = tmp_path / "data"
    second = "    " if start.endswith("   ") else "  "
    path.write_bytes(f"{start}prompt: hi\n{second}answer: there\n".encode())
    assert load_examples(path) == [Example("hi", "there")]


@pytest.mark.parametrize(
    "text",
    [
        "Prompt,ANSWER\nhi,there\n",
        " \nprompt,answer\nhi,there\n",
        "prompt,answer\n  ,  \nhi,there\n",
        "sep=;\nprompt;answer\nhi;there\n",
        'prompt, answer\n"hi", "there"\n',
        "prompt,answer,,\nhi,there,,\n",  # a cell to the right was touched once
        "prompt,answer\nhi,there,,\n",
        ",prompt,answer\n0,hi,there\n",  # pandas' index
        '{"conversation": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "there"}]}\n',
    ],
)
def test_tables_and_talks_as_people_save_them(tmp_path: Path, text: str) -> None:
    path = tmp_path / "data"
    path.write_text(text)
    assert load_examples(path) == [Example("hi", "there")]


def test_what_is_not_known_is_said_with_what_would_be(tmp_path: Path) -> None:
    path = tmp_path / "data"
    for text, message in [
        ("Query,Reply\na,b\n", "a table has columns such as prompt and answer"),
        ('{"Prompt": "a", "Answer": "b"}\n', "names are in lower case: 'answer' for 'Answer'"),
        ('{"talk": [{"role": "user", "content": "hi"}]}\n', "a list of messages goes into the field 'messages'"),
    ]:
        path.write_text(text)
        with pytest.raises(SteerError, match=message):
            load_examples(path)
