"""The server's process: its socket, its worker, and its end."""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import FrameType
from typing import Any

import uvicorn

from ..errors import SteerError
from ..lm import LM
from ..places import public_name
from ..vectors.weight_vector import WeightVector
from .app import Served, make_app
from .described import OutOfRange
from .dial import Dial
from .guard import LOOPBACK, Guard
from .requests import Reader
from .worker import MOST_ROWS, MOST_WAITING, Worker

HOST, PORT = "127.0.0.1", 8080
LAST_WORDS = 3  # seconds in which open replies are told that the server ends


@dataclass(frozen=True)
class Settings:
    """How to serve. `port` 0: a free one."""

    host: str = HOST
    port: int = PORT
    api_key: str | None = None
    out_of_range: OutOfRange = "warn"
    most_rows: int = MOST_ROWS
    most_waiting: int = MOST_WAITING


class _Server(uvicorn.Server):
    """Tells the worker of the end at once, so that open streams end too."""

    def __init__(self, config: uvicorn.Config, worker: Worker) -> None:
        super().__init__(config)
        self.worker = worker

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal ends the server, a second one does not wait; neither is raised again afterwards."""
        self.force_exit = self.should_exit
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """See `uvicorn.Server`."""
        self.worker.stop()
        await super().shutdown(sockets)


def serve(
    lm: LM,
    vectors: Mapping[str, WeightVector],
    settings: Settings | None = None,
    *,
    ready: Callable[[str, uvicorn.Server], None] | None = None,
) -> None:
    """Serve until a signal comes, or until the `should_exit` of the server that `ready` gets is set.

    `ready` gets the address, such as http://127.0.0.1:8080, once requests are taken.

    Raises:
        SteerError: the port is in use, a name cannot be one, or a vector does not fit the model.
    """
    settings = settings or Settings()
    dial = Dial(public_name(lm.name), vectors, settings.out_of_range)
    with (
        _listening(settings.host, settings.port) as listening,
        Worker(lm, vectors, most_rows=settings.most_rows, most_waiting=settings.most_waiting) as worker,
    ):
        app = Guard(make_app(Served(lm, Reader(lm, dial), worker)), settings.api_key, _hosts(settings.host))
        config = uvicorn.Config(
            app,
            log_level="warning",
            lifespan="off",
            server_header=False,
            timeout_graceful_shutdown=LAST_WORDS,
        )
        server = _Server(config, worker)
        if ready is not None:
            ready(_address(listening), server)
        server.run(sockets=[listening])


def _hosts(host: str) -> tuple[str, ...] | None:
    """The names under which the server may be asked for: on this machine alone its own, else any."""
    return LOOPBACK if host in LOOPBACK else None


def _listening(host: str, port: int) -> socket.socket:
    """A socket on which clients can queue from now on."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    found = socket.socket(family, socket.SOCK_STREAM)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind((host, port))
        found.listen(1024)
    except OSError as error:
        found.close()
        if error.errno == errno.EADDRINUSE:
            raise SteerError(f"port {port} is in use on {host}; choose another, such as --port {port + 1}") from None
        raise SteerError(f"{host}:{port}: cannot be listened on ({error.strerror or error})") from None
    except OverflowError:
        found.close()
        raise SteerError(f"port: expected 0 to 65535, found {port}") from None
    return found


def _address(listening: socket.socket) -> str:
    host, port = listening.getsockname()[:2]
    shown: Any = f"[{host}]" if ":" in host else host
    return f"http://{shown}:{port}"
