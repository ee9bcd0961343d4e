"""Runs the pages: no address and no identifier reaches a log, and whoever listens for news is let go at the end."""

from __future__ import annotations

import socket

import uvicorn
from fastapi import FastAPI

LAST_ANSWERS = 5  # seconds


class Server(uvicorn.Server):
    """`run()` serves until a signal comes, or until `should_exit` is set."""

    def __init__(self, app: FastAPI, host: str, port: int) -> None:
        self.app = app
        super().__init__(
            uvicorn.Config(
                app,
                host=host,
                port=port,
                log_level="warning",
                access_log=False,  # a search has a patient id in its address
                server_header=False,
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
