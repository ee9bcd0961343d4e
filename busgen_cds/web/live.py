"""News of changes to whoever has the worklist open: server-sent events.

Rules:
- An event says that something changed, never what: the page asks again, with its own rights.
- One look a second for all listeners together, and none when nobody listens; a look that fails is taken again.
- A listener is sent away after some minutes and comes back by itself: a session that ended is noticed then.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import APIRouter, FastAPI, Request
from sqlalchemy.exc import SQLAlchemyError
from starlette.concurrency import run_in_threadpool
from starlette.responses import StreamingResponse

from busgen_cds.store.people import Person
from busgen_cds.web import auth
from busgen_cds.web.front import Front

LOOK_EVERY = 1.0
BEAT_EVERY = 15.0
SENT_AWAY_AFTER = 300.0

router = APIRouter()


class News:
    def __init__(self, front: Front) -> None:
        self._front = front
        self._listeners: set[asyncio.Event] = set()
        self._task: asyncio.Task[None] | None = None
        self.closed = False

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[asyncio.Event]:
        changed = asyncio.Event()
        self._listeners.add(changed)
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._watch())
        try:
            yield changed
        finally:
            self._listeners.discard(changed)

    def close(self) -> None:
        self.closed = True
        for changed in self._listeners:
            changed.set()

    async def _watch(self) -> None:
        seen = None
        while self._listeners and not self.closed:
            with contextlib.suppress(SQLAlchemyError):
                last = await run_in_threadpool(self._front.last_act)
                if seen not in (None, last):
                    for changed in self._listeners:
                        changed.set()
                seen = last
            await asyncio.sleep(LOOK_EVERY)


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    yield
    app.state.news.close()


@router.get("/events")
async def events(request: Request, person: Person = auth.page("studies.read")) -> StreamingResponse:
    return StreamingResponse(_events(request.app.state.news), media_type="text/event-stream")


async def _events(news: News) -> AsyncIterator[str]:
    until = time.monotonic() + SENT_AWAY_AFTER
    async with news.listening() as changed:
        yield "retry: 2000\n\nevent: hello\ndata: .\n\n"
        while time.monotonic() < until and not news.closed:
            try:
                await asyncio.wait_for(changed.wait(), BEAT_EVERY)
            except TimeoutError:
                yield ": still here\n\n"
                continue
            changed.clear()
            if not news.closed:
                yield "event: changed\ndata: .\n\n"
