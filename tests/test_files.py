from __future__ import annotations

import os
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weightsteer.errors import SteerError
from weightsteer.files import (
    append_jsonl,
    digest,
    read_finished,
    read_json,
    read_jsonl,
    read_kept,
    refuse_inputs,
    write_jsonl,
    write_text,
)
from weightsteer.run_card import RunCard, StrengthRange, new_folder

json_rows = st.lists(
    st.dictionaries(st.text(max_size=5), st.text() | st.integers() | st.none(), min_size=1), min_size=1
)


@given(json_rows)
def test_jsonl_round_trip(tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, object]]) -> None:
    path = tmp_path_factory.mktemp("r") / "rows.jsonl"
    write_jsonl(path, rows)
    assert read_jsonl(path) == rows


@given(json_rows, st.integers(1, 30))
def test_a_line_cut_short_by_a_kill_is_dropped(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, object]], cut: int
) -> None:
    path = tmp_path_factory.mktemp("r") / "rows.jsonl"
    append_jsonl(path, rows)
    content = path.read_bytes()
    path.write_bytes(content[: max(0, len(content) - cut)].decode(errors="ignore").encode())
    kept = read_finished(path)
    assert kept == rows[: len(kept)]
    append_jsonl(path, rows[len(kept) :])
    assert read_finished(path) == rows


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"a": "x"}\nnonsense\n', "line 2: not JSON"),
        ("[1]\n", "line 1: expected a JSON object"),
        ('{"b": "x"}\n', "line 1: expected a text field 'a'; fields found: b"),
        ("\n", "the file is empty"),
    ],
)
def test_bad_jsonl_names_file_and_line(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text(content)
    with pytest.raises(SteerError, match=f"d.jsonl.*{message}"):
        read_jsonl(path, required=("a",))


@pytest.mark.parametrize("blank", ["", " ", "\\n\\t"])
def test_a_blank_text_names_file_line_and_field(tmp_path: Path, blank: str) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text(f'{{"a": "x", "b": ""}}\n\n{{"a": "{blank}", "b": "y"}}\n')
    with pytest.raises(SteerError, match=r"d\.jsonl, line 3: field 'a' is blank"):
        read_jsonl(path, required=("a",))
    assert len(read_jsonl(path)) == 2


def test_line_ends_and_a_byte_order_mark_are_passed_over(tmp_path: Path) -> None:
    for end in ("\n", "\r\n", "\r"):
        (tmp_path / "d").write_bytes(f'\ufeff{{"a": "x"}}{end}{end}{{"a": "y"}}{end}'.encode())
        assert read_jsonl(tmp_path / "d") == [{"a": "x"}, {"a": "y"}]
    (tmp_path / "d").write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_json(tmp_path / "d") == {"a": 1}


def test_an_output_is_no_input_and_no_folder_around_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    inside = tmp_path / "a" / "b" / "data.jsonl"
    inside.parent.mkdir(parents=True)
    inside.write_text("{}")
    (tmp_path / "link").symlink_to(tmp_path / "a")
    (tmp_path / "twin").hardlink_to(inside)
    for out in (
        inside,
        Path("a/b"),
        Path("a"),
        Path(),
        Path("a/../a/b"),
        Path("link"),
        Path("link/b"),
        Path("twin"),
    ):
        with pytest.raises(SteerError, match="is an input too|holds an input.*choose another output|is a link"):
            refuse_inputs(out, None, "Qwen/Qwen2.5-7B", inside)
    with pytest.raises(SteerError, match="holds an input"):
        refuse_inputs(Path("a"), "link/b/data.jsonl")
    for out in (Path("a/b/data.jsonl.out"), Path("a/b/out"), Path("ab"), Path("Qwen")):
        refuse_inputs(out, inside, "Qwen/Qwen2.5-7B", "x" * 5000, None)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(SteerError, match="cannot be read"):
        read_jsonl(tmp_path / "none.jsonl")


def test_a_folder_appears_only_when_whole(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with pytest.raises(RuntimeError, match="half-way"), new_folder(target, "vector") as part:
        (part / "a").write_text("x")
        assert not target.exists()
        raise RuntimeError("half-way")
    assert list(tmp_path.iterdir()) == []
    umask = os.umask(0o022)
    try:
        with new_folder(target, "vector") as part:
            (part / "a").write_text("x")
    finally:
        os.umask(umask)
    assert target.stat().st_mode & 0o777 == 0o755
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_only_an_artifact_of_the_same_kind_is_replaced(tmp_path: Path) -> None:
    target = tmp_path / "out"
    for text in ("old", "new"):
        with new_folder(target, "vector") as part:
            RunCard("vector").save(part)
            (part / "a").write_text(text)
    assert (target / "a").read_text() == "new"
    assert sorted(p.name for p in target.iterdir()) == ["a", "weightsteer.json"]
    with pytest.raises(SteerError, match="holds a vector, which a merged would replace"), new_folder(target, "merged"):
        pass
    assert (target / "a").read_text() == "new"


def test_writing_a_file_again_leaves_no_parts(tmp_path: Path) -> None:
    write_text(tmp_path / "a", "one")
    write_text(tmp_path / "a", "two")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_text() == "two"


def test_card_round_trip(tmp_path: Path) -> None:
    card = RunCard.now("vector", base_model="m", seed=3, data_sha256={"x": "y"}).with_strength(
        StrengthRange(2.0, -1.5, -4.0, 4.0, {"prose nll": 0.1})
    )
    card.save(tmp_path)
    assert RunCard.load(tmp_path) == card
    assert card.versions["torch"]
    (tmp_path / "weightsteer.json").write_text('{"kind": "vector", "surprise": 1}')
    with pytest.raises(SteerError, match="not a weightsteer card"):
        RunCard.load(tmp_path)


def test_digest_ignores_the_order_of_keys() -> None:
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
    assert digest({"a": 1}) != digest({"a": 2})


def test_what_a_kill_left_is_swept_and_an_older_artifact_comes_back(tmp_path: Path) -> None:
    target = tmp_path / "out"
    dead = tmp_path / ".out.deadbeef.part"
    (dead / ".replaced.part").mkdir(parents=True)
    RunCard("vector", base_model="old").save(dead / ".replaced.part")
    with pytest.raises(ValueError, match="stop"), new_folder(target, "vector"):
        assert RunCard.load(target).base_model == "old"  # killed between the two renames
        raise ValueError("stop")
    assert RunCard.load(target).base_model == "old"
    assert not dead.exists()


def test_two_writers_of_one_folder(tmp_path: Path) -> None:
    """Another thread stands for another process: locks are each thread's own."""

    def second() -> str:
        with pytest.raises(SteerError, match="is writing it") as refused, new_folder(tmp_path / "out", "vector"):
            pass
        return str(refused.value)

    with new_folder(tmp_path / "out", "vector") as first, ThreadPoolExecutor(1) as pool:
        said = pool.submit(second).result()
        assert first.exists()
        RunCard("vector", base_model="first").save(first)
    assert f"process {os.getpid()} on {socket.gethostname()}, since 2" in said
    assert RunCard.load(tmp_path / "out").base_model == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("content", ["", "\0\0", "[", '"7"', "NaN", "[7]"])
def test_what_was_kept_and_is_damaged_is_to_be_made_again(tmp_path: Path, content: str) -> None:
    path = tmp_path / "layer.json"
    assert read_kept(path, int) is None
    path.write_text("7")
    assert read_kept(path, int) == 7
    path.write_text(content)
    with pytest.warns(UserWarning, match=r"layer\.json.*made again"):
        assert read_kept(path, int) is None
