from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

import weightsteer.judges.reply_cache as module
from weightsteer.errors import SteerError
from weightsteer.files import append_jsonl, read_jsonl
from weightsteer.judges.reply_cache import ReplyCache


def test_replies_are_written_in_few_appends_and_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, sizes, reads = tmp_path / "c.jsonl", list[int](), list[Path]()
    append, read = module.append_jsonl, module.read_finished

    def appending(place: Path, rows: list[dict[str, str]]) -> None:
        sizes.append(len(rows))
        append(place, rows)

    def reading(place: Path) -> list[dict[str, Any]]:
        reads.append(place)
        return read(place)

    monkeypatch.setattr(module, "append_jsonl", appending)
    monkeypatch.setattr(module, "read_finished", reading)
    cache = ReplyCache(path)

    async def work() -> None:
        async with cache.writing():
            for number in range(200):
                cache.add(f"k{number}", "é\n")
                await asyncio.sleep(0.0005)
            raise ZeroDivisionError  # what is added is written however the block ends

    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            asyncio.run(work())
    assert sum(sizes) == 400
    assert len(sizes) < 100
    assert len(read_jsonl(path)) == 400
    assert cache.replies() == {f"k{number}": "é\n" for number in range(200)} == ReplyCache(path).replies()
    assert len(reads) == 2  # ours once, and the other's
    append_jsonl(path, [{"key": "other", "reply": "x"}])
    assert cache.replies()["other"] == "x"


def test_a_disk_that_refuses_ends_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    cache = ReplyCache(tmp_path / "file" / "c.jsonl")

    async def work() -> None:
        async with cache.writing():
            for number in range(1000):
                cache.add(str(number), "x")
                await asyncio.sleep(0.01)

    with pytest.raises((SteerError, OSError)):
        asyncio.run(work())
