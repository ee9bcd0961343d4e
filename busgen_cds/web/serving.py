"""Runs the pages: no address and no identifier reaches a log, and whoever listens for news is let go at the end.

Rules:
- Who connects and does not ask, or does not finish asking, is let go: a connection costs a descriptor.
- Where a request comes from is what the network says, unless it comes from a proxy that the site named.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Sequence

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

LAST_ANSWERS = 5  # seconds
FIRST_WORD = 10.0  # seconds for the head of a request
MOST_AT_ONCE = 512  # connections; 503 beyond


class Door(H11Protocol):
    """One connection; it must have asked for something in time."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._patience = self.loop.call_later(FIRST_WORD, self._let_go)

    def handle_events(self) -> None:
        before = self.cycle
        super().handle_events()
        if self.cycle is not before:
            self._patience.cancel()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._patience.cancel()
        self._patience = self.loop.call_later(self.timeout_keep_alive + FIRST_WORD, self._let_go)

    def connection_lost(self, exc: Exception | None) -> None:
        self._patience.cancel()
        super().connection_lost(exc)

    def _let_go(self) -> None:
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()


class Server(uvicorn.Server):
    """`run()` serves until a signal comes, or until `should_exit` is set."""

    def __init__(self, app: FastAPI, host: str, port: int, proxies: Sequence[str] = ()) -> None:
        self.app = app
        super().__init__(
            uvicorn.Config(
                app,
                host=host,
                port=port,
                http=Door,
                ws="none",
                log_level="warning",
                access_log=False,  # a search has a patient id in its address
                server_header=False,
                limit_concurrency=MOST_AT_ONCE,
                proxy_headers=bool(proxies),
                forwarded_allow_ips=list(proxies),
                timeout_graceful_shutdown=LAST_ANSWERS,
            )
        )

    @property
    def bound(self) -> int:
        """The port really taken, once started: 0 asks for any."""
        port: int = self.servers[0].sockets[0].getsockname()[1]
        return port

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.app.state.news.close()
        await super().shutdown(sockets)
