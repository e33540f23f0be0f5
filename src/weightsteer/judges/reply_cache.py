"""A file of replies by their keys: read once, and written in batches beside the work."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import SteerError
from ..files import append_jsonl, read_finished

GATHERED = 0.01  # seconds in which replies are gathered
Stamp = tuple[int, int] | None  # when the file was changed last, and its size; None: there is none


@dataclass
class ReplyCache:
    """What is in the file, and what is still to be written to it.

    To bring a line to the disk takes milliseconds, in which many replies come: those that come while a write goes on
    are the next write. A kill loses the replies of the write under way.
    """

    path: Path
    _replies: dict[str, str] = field(default_factory=dict)
    _stamp: Stamp = (-1, -1)  # of the file when it was read or written last
    _waiting: list[dict[str, str]] = field(default_factory=list)
    _writer: asyncio.Task[None] | None = None

    def replies(self) -> dict[str, str]:
        """Key -> reply; the file is read again only if somebody else has changed it.

        Raises:
            SteerError: the file holds something else.
        """
        if self._stamp != _stamp_of(self.path):
            rows = read_finished(self.path)
            if not all(isinstance(row.get("key"), str) and isinstance(row.get("reply"), str) for row in rows):
                raise SteerError(
                    f"{self.path}: expected lines with texts 'key' and 'reply'; name another file as cache"
                )
            self._replies = {row["key"]: row["reply"] for row in rows}
            self._stamp = _stamp_of(self.path)
        return self._replies

    def add(self, key: str, reply: str) -> None:
        """A reply that is to be kept, inside `writing`.

        Raises:
            SteerError: the disk has refused what came before.
        """
        if self._writer is not None and self._writer.done():
            self._writer.result()
        self._waiting.append({"key": key, "reply": reply})

    @asynccontextmanager
    async def writing(self) -> AsyncIterator[None]:
        """Inside, what is added is written; at the end, however that comes, all of it is."""
        ended = asyncio.Event()
        self._writer = asyncio.create_task(self._write_until(ended))
        try:
            yield
        finally:
            ended.set()
            await self._writer

    async def _write_until(self, ended: asyncio.Event) -> None:
        while self._waiting or not ended.is_set():
            with suppress(TimeoutError):
                await asyncio.wait_for(ended.wait(), GATHERED)
            rows, self._waiting = self._waiting, []
            await asyncio.to_thread(self._write, rows)

    def _write(self, rows: list[dict[str, str]]) -> None:
        if rows:
            known = self.replies()  # before, so that what another has written meanwhile is there
            append_jsonl(self.path, rows)
            known.update((row["key"], row["reply"]) for row in rows)
            self._stamp = _stamp_of(self.path)


def _stamp_of(path: Path) -> Stamp:
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_mtime_ns, found.st_size
