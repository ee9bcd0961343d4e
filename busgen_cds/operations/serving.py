"""Runs a site until it is told to stop (SIGTERM or Ctrl-C): the listener, a worker and the pages, together or apart."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from busgen_cds import app, web
from busgen_cds.operations import housekeeping
from busgen_cds.operations import pages as pages_of
from busgen_cds.settings import Settings


@dataclass(frozen=True)
class Shown:
    """Where the pages are, and the code that lets one make the first account, if there is none yet."""

    address: str
    first_code: str


log = logging.getLogger("busgen_cds.operations.serving")


def everything(chosen: Settings) -> None:
    with receiving(chosen), reading(chosen), showing(chosen):
        until_told()


def listener(chosen: Settings) -> None:
    with receiving(chosen):
        until_told()


def worker(chosen: Settings, name: str = "") -> None:
    with reading(chosen, name):
        until_told()


def pages(chosen: Settings) -> None:
    with showing(chosen):
        until_told()


@contextmanager
def receiving(chosen: Settings) -> Iterator[int]:
    """The port that scanners send to."""
    site = app.open_site(chosen)  # the database and keys are there before the first connection
    site.inbox.sweep()
    site.close()
    door = app.listener(chosen)
    door.start()
    log.info("Listening as %s on port %d.", chosen.listener.ae_title, door.port)
    try:
        yield door.port
    finally:
        door.stop()


@contextmanager
def reading(chosen: Settings, name: str = "") -> Iterator[app.Site]:
    with app.opened_site(chosen) as site, app.live_engine(site) as reader:
        hand = app.worker(site, reader, name=name)
        hand.start()
        bundle = reader.engine.bundle
        log.info("Worker %s reads with %s %s on %s.", hand.name, bundle.name, bundle.version, reader.engine.provider)
        try:
            with housekeeping.kept(site):
                yield site
        finally:
            hand.stop()


@contextmanager
def showing(chosen: Settings) -> Iterator[Shown]:
    with app.opened_site(chosen) as site:
        code = pages_of.first_code(site)
        server = web.Server(pages_of.of(site, code), chosen.web.host, chosen.web.port, chosen.web.proxies)
        thread = threading.Thread(target=server.run, name="pages", daemon=True)
        thread.start()
        while not server.started and thread.is_alive():
            thread.join(0.05)
        if not server.started:
            raise OSError(f"The pages cannot be shown on {chosen.web.host}:{chosen.web.port}.")
        address = f"http://{chosen.web.host}:{server.bound}"
        log.info("Pages: %s%s", address, f"  First account: {address}/first with the code {code}" if code else "")
        try:
            yield Shown(address, code)
        finally:
            server.should_exit = True
            thread.join(10)


def until_told() -> None:
    told = threading.Event()

    def tell(*_: object) -> None:
        told.set()

    before: list[tuple[int, Callable[..., object] | int | None]] = [
        (each, signal.signal(each, tell)) for each in (signal.SIGINT, signal.SIGTERM)
    ]
    while not told.wait(1):
        pass
    for number, handler in before:
        signal.signal(number, handler)
