"""The door for scanners: sockets, processes and places.

The gate (this process) accepts connections and hands each to the least busy of its processes, where a thread of its
own serves it from the TLS handshake on: nobody who is slow or silent stands in anybody's way. Places are counted by
the gate over all processes, from the moment a peer has said who it is; before that it waits in a waiting room, from
which the longest waiting is sent away when it is full.

Rules:
- `processes=0` serves in threads of this process: for tests and the demo.
- A process that dies is replaced; what it had not acknowledged is the sender's still.
- When the gate dies, its processes end with it.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import logging
import multiprocessing
import os
import platform
import queue
import selectors
import signal
import socket
import ssl
import struct
import sys
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from busgen_cds.dicom import upper_layer as ul
from busgen_cds.dicom.association import REFUSED, Association, Caller, Desk, Noted, Places, Rules
from busgen_cds.dicom.tls import strict
from busgen_cds.errors import Misconfigured

log = logging.getLogger(__name__)

_BELL_SECONDS = 0.2
REFUSALS_PER_MINUTE = 30  # of one address, each an act of its own
REFUSALS_IN_ALL = 300
TOO_OFTEN = "refused too often to be recorded one by one"
_RECEIVE_BUFFER = 1 << 20
_SCHED_SETATTR = {"x86_64": 314, "aarch64": 274}
_SLICE_NANOSECONDS = 100_000
_START_SECONDS = 120
_SWITCH_SECONDS = 0.0005  # between threads: each holds the interpreter for a moment, and waits for the disk for many


@dataclass(frozen=True)
class Tls:
    certificate: str  # PEM files
    key: str
    authorities: str  # who may vouch for the peers' certificates
    port: int = 2762


@dataclass(frozen=True)
class ListenerConfig:
    rules: Rules = field(default_factory=Rules)
    host: str = "0.0.0.0"
    port: int | None = 11112  # 0: any free one; None: no plain DICOM
    tls: Tls | None = None
    processes: int = 2
    most_associations: int = 64
    most_per_peer: int = 16
    waiting_room: int = 512


DeskOf = Callable[[], Desk]
Helper = Callable[[], None]


class Listener:
    """Build it with what makes a Desk: each process makes its own. A helper is run in a process beside them."""

    def __init__(self, config: ListenerConfig, desk: DeskOf, helper: Helper | None = None) -> None:
        self._config, self._desk, self._helper = config, desk, helper
        self._sockets: list[tuple[socket.socket, bool]] = []
        self._stopping = threading.Event()
        self._places = _Counted(config.most_associations, config.most_per_peer)
        self._crew: _Crew | None = None
        self._thread: threading.Thread | None = None

    @property
    def port(self) -> int:
        return self._port_of(secure=False)

    @property
    def tls_port(self) -> int:
        return self._port_of(secure=True)

    def start(self) -> None:
        """Bound and served when it returns."""
        config = self._config
        tls_context(config.tls)  # a wrong certificate stops us here, not at the first association
        if config.port is not None:
            self._sockets.append((_bind(config.host, config.port), False))
        if config.tls is not None:
            self._sockets.append((_bind(config.host, config.tls.port), True))
        self._crew = self._processes() if config.processes else self._threads()
        for listening, _ in self._sockets:
            listening.listen(1024)  # only now: whoever connects is served at once
        self._thread = threading.Thread(target=self._accept, name="gate", daemon=True)
        self._thread.start()

    def stop(self, seconds: float = 10) -> None:
        """No new associations; those that are open may end within the time."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join()
        for listening, _ in self._sockets:
            listening.close()
        if self._crew is not None:
            self._crew.stop(seconds)

    def _processes(self) -> _Processes:
        return _Processes(self._config, self._desk, self._places, self._helper)

    def _threads(self) -> _Room:
        return _Room(self._config, self._desk(), self._places)

    def _port_of(self, secure: bool) -> int:
        return next(int(s.getsockname()[1]) for s, is_secure in self._sockets if is_secure is secure)

    def _accept(self) -> None:
        assert self._crew is not None
        with selectors.DefaultSelector() as selector:
            for listening, secure in self._sockets:
                selector.register(listening, selectors.EVENT_READ, secure)
            while not self._stopping.is_set():
                for key, _ in selector.select(0.2):
                    self._take_all(key.fileobj, bool(key.data))

    def _take_all(self, listening: Any, secure: bool) -> None:
        while True:
            try:
                connection, address = listening.accept()
            except BlockingIOError:
                return
            except OSError as failed:  # out of descriptors: the peer waits in the backlog
                log.error("No connection can be accepted: %s", failed.strerror)
                time.sleep(0.1)
                return
            assert self._crew is not None
            self._crew.take(connection, str(address[0]), secure)


class _Crew(Protocol):
    def take(self, connection: socket.socket, address: str, secure: bool) -> None: ...
    def stop(self, seconds: float) -> None: ...


class _Counted:
    """Places, per peer and in all."""

    def __init__(self, most: int, most_per_peer: int) -> None:
        self._most, self._most_per_peer = most, most_per_peer
        self._taken: Counter[str] = Counter()
        self._lock = threading.Lock()

    def take(self, peer: str) -> bool:
        with self._lock:
            if self._taken.total() >= self._most or self._taken[peer] >= self._most_per_peer:
                return False
            self._taken[peer] += 1
            return True

    def leave(self, peer: str) -> None:
        with self._lock:
            self._taken[peer] -= 1
            self._taken += Counter()  # forget who has none


class _Room:
    """The threads of one process that serve its connections."""

    def __init__(self, config: ListenerConfig, desk: Desk, places: Places) -> None:
        self._config, self._places = config, places
        self._context = tls_context(config.tls)
        self._bell = _Bell(desk)
        self._desk = self._bell.desk
        self._waiting: OrderedDict[socket.socket, None] = OrderedDict()
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()

    def take(
        self, connection: socket.socket, address: str, secure: bool, gone: Callable[[], None] | None = None
    ) -> None:
        with self._lock:
            self._open.add(connection)
            self._waiting[connection] = None
            longest = next(iter(self._waiting)) if len(self._waiting) > self._config.waiting_room else None
        if longest is not None:
            _hang_up(longest)
        threading.Thread(target=self._serve, args=(connection, address, secure, gone), daemon=True).start()

    def stop(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        with self._lock:
            waiting = list(self._waiting)
        for connection in waiting:
            _hang_up(connection)
        while self._open and time.monotonic() < deadline:
            time.sleep(0.02)
        with self._lock:
            left = list(self._open)
        for connection in left:
            _hang_up(connection)
        self._bell.stop()

    def _serve(self, raw: socket.socket, address: str, secure: bool, gone: Callable[[], None] | None) -> None:
        connection = raw
        try:
            raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            caller = Caller(address)
            if secure:
                connection, caller = self._shake_hands(raw, address)
            wire = ul.Wire(connection, self._config.rules.limits)
            Association(wire, caller, self._config.rules, self._desk, self._places).run(
                lambda: self._leave_waiting(raw)
            )
        except (ul.Gone, OSError) as over:
            log.info("A connection from %s ended: %s", address, over)
        except Exception:  # one association's trouble is not the others'
            log.exception("An association from %s failed", address)
        finally:
            self._leave_waiting(raw)
            with contextlib.suppress(OSError):
                connection.close()
            raw.close()
            with self._lock:
                self._open.discard(raw)
            if gone is not None:
                gone()

    def _shake_hands(self, raw: socket.socket, address: str) -> tuple[socket.socket, Caller]:
        assert self._context is not None
        seconds = self._config.rules.limits.first_word_seconds
        timer = threading.Timer(seconds, _hang_up, (raw,))  # a time-out per read would let a byte a second pass
        timer.daemon = True
        timer.start()
        try:
            raw.settimeout(seconds)
            connection = self._context.wrap_socket(raw.dup(), server_side=True)
        finally:
            timer.cancel()
        certificate = connection.getpeercert(binary_form=True) or b""
        return connection, Caller(address, secure=True, certificate_sha256=hashlib.sha256(certificate).hexdigest())

    def _leave_waiting(self, connection: socket.socket) -> None:
        with self._lock:
            self._waiting.pop(connection, None)


class _Bell:
    """Tells the outside what came, off the road of the next image; the same study is told once per ring."""

    def __init__(self, desk: Desk) -> None:
        self._outside = desk
        self._queue: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
        self.desk = Desk(
            receive=desk.receive,
            arrived=lambda ref: self._queue.put(("arrived", ref)),
            association_closed=lambda refs: self._queue.put(("closed", refs)),
            commitment=desk.commitment,
            report_later=desk.report_later,
            committed=desk.committed,
            noted=self._note,
        )
        self._refusals = _Refusals()
        self._thread = threading.Thread(target=self._ring, name="bell", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._queue.put(("stop", None))
        self._thread.join(30)

    def _note(self, noted: Noted) -> None:
        heeded = self._refusals.heed(noted) if noted.kind == REFUSED else noted
        if heeded is not None:
            self._queue.put(("noted", heeded))

    def _ring(self) -> None:
        going = True
        while going:
            pending = [self._queue.get()]
            time.sleep(_BELL_SECONDS)
            with contextlib.suppress(queue.Empty):
                while True:
                    pending.append(self._queue.get_nowait())
            told = set()
            for kind, what in pending:
                if (kind, what) in told and kind != "noted":
                    continue  # one hint is as good as two; each act is one
                told.add((kind, what))
                if kind == "stop":
                    going = False
                else:
                    self._tell(kind, what)

    def _tell(self, kind: str, what: Any) -> None:
        told: dict[str, Callable[[Any], None]] = {
            "arrived": self._outside.arrived,
            "closed": self._outside.association_closed,
            "noted": self._outside.noted,
        }
        try:
            told[kind](what)
        except Exception:  # it is on the disk: the sweep at start-up finds it
            log.exception("What was received could not be told")


class _Refusals:
    """As many refusals a minute as the record can bear: anybody can be refused, under ever new titles.

    The first beyond says that more came; the others are not recorded.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._until = 0.0
        self._counts: Counter[str] = Counter()

    def heed(self, noted: Noted) -> Noted | None:
        with self._lock:
            if time.monotonic() >= self._until:
                self._until = time.monotonic() + 60
                self._counts.clear()
            self._counts.update((noted.address, ""))
            here, in_all = self._counts[noted.address], self._counts[""]
        if here <= REFUSALS_PER_MINUTE and in_all <= REFUSALS_IN_ALL:
            return noted
        first_beyond = here == REFUSALS_PER_MINUTE + 1 or in_all == REFUSALS_IN_ALL + 1
        return replace(noted, what=TOO_OFTEN) if first_beyond else None


# -- processes -------------------------------------------------------------------------------------------------------


class _Processes:
    """The gate's view of its processes."""

    def __init__(self, config: ListenerConfig, desk: DeskOf, places: _Counted, helper: Helper | None) -> None:
        self._config, self._desk, self._places = config, desk, places
        self._stopping, self._started = False, False
        self._assistant = _Assistant(helper) if helper else None
        self._lock = threading.Lock()
        self._members = [self._hire() for _ in range(config.processes)]
        for member in self._members:
            member.ready.wait(_START_SECONDS)
        if any(member.ready.is_set() and not member.served for member in self._members):
            self.stop(0)
            raise Misconfigured("A receiving process could not start: the reason stands in its message before this.")
        self._started = True

    def take(self, connection: socket.socket, address: str, secure: bool) -> None:
        with connection:  # the process has its own copy; ours must not keep a dead process's peers waiting
            with self._lock:
                members = sorted(self._members, key=lambda member: member.load)
            for member in members:
                if member.hand_over(connection, address, secure):
                    return
        log.error("No process could take a connection from %s", address)

    def stop(self, seconds: float) -> None:
        self._stopping = True
        for member in self._members:
            member.say({"stop": seconds})
        for member in self._members:
            member.process.join(seconds + 30)
            if member.process.is_alive():
                member.process.kill()
                member.process.join()
            member.close()
        if self._assistant is not None:
            self._assistant.stop()

    def _hire(self) -> _Member:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        process = multiprocessing.get_context("spawn").Process(
            target=_work, args=(self._config, self._desk, theirs), name="listener", daemon=True
        )
        process.start()
        theirs.close()
        member = _Member(process, ours, self._places)
        threading.Thread(target=self._attend, args=(member,), daemon=True).start()
        return member

    def _attend(self, member: _Member) -> None:
        member.attend()
        member.ready.set()
        if self._stopping or not self._started:
            return
        log.error("A listener process ended unasked; another takes its place")
        time.sleep(0.5)
        with self._lock:
            if not self._stopping:
                self._members[self._members.index(member)] = self._hire()
        member.close()


class _Assistant:
    """The helper's process, kept alive; it ends when the gate does."""

    def __init__(self, helper: Helper) -> None:
        self._helper = helper
        self._stopping = threading.Event()
        self._process: Any = None
        threading.Thread(target=self._attend, daemon=True).start()

    def stop(self) -> None:
        self._stopping.set()
        if self._process is not None:
            self._process.kill()  # what it had not answered is done again by whoever asked

    def _attend(self) -> None:
        while not self._stopping.is_set():
            ours, theirs = socket.socketpair()
            with ours, theirs:
                self._process = multiprocessing.get_context("spawn").Process(
                    target=_help, args=(self._helper, theirs), name="listener helper", daemon=True
                )
                self._process.start()
                theirs.close()
                self._process.join()
            self._stopping.wait(1)


class _Member:
    """One process, and the line to it: a JSON object per packet."""

    def __init__(self, process: Any, line: socket.socket, places: _Counted) -> None:
        self.process, self.ready = process, threading.Event()  # ready: it serves, or it has ended
        self.served = False
        self._line, self._places = line, places
        self._taken: Counter[str] = Counter()
        self._waiting = 0

    @property
    def load(self) -> tuple[int, int]:
        return self._taken.total(), self._waiting

    def hand_over(self, connection: socket.socket, address: str, secure: bool) -> bool:
        message = json.dumps({"address": address, "secure": secure}).encode()
        try:
            socket.send_fds(self._line, [message], [connection.fileno()])
        except OSError:
            return False
        self._waiting += 1
        return True

    def say(self, message: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):
            self._line.send(json.dumps(message).encode())

    def attend(self) -> None:
        """Answer until the process ends; then its places are free again."""
        with contextlib.suppress(OSError):
            while packet := self._line.recv(4096):
                self._handle(json.loads(packet))
        for peer, count in self._taken.items():
            for _ in range(count):
                self._places.leave(peer)
        self._taken.clear()

    def close(self) -> None:
        self._line.close()

    def _handle(self, message: dict[str, Any]) -> None:
        if "ask" in message:
            yes = self._places.take(message["peer"])
            self._taken[message["peer"]] += yes
            self.say({"answer": message["ask"], "yes": yes})
        elif "left" in message:
            self._taken[message["left"]] -= 1
            self._places.leave(message["left"])
        elif "gone" in message:
            self._waiting -= 1
        elif "ready" in message:
            self.served = True
            self.ready.set()


def _work(config: ListenerConfig, desk: DeskOf, line: socket.socket) -> None:
    """A process of the listener: serves what the gate hands over until it says stop, or is no more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the gate decides when to stop
    serve_promptly()
    sys.setswitchinterval(_SWITCH_SECONDS)
    places = _Distant(line)
    room = _Room(config, desk(), places)
    places.say({"ready": True})
    while True:
        packet, descriptors, _, _ = socket.recv_fds(line, 4096, 1)
        if not packet:
            os._exit(0)  # the gate is dead: nothing unacknowledged is ours to finish
        message = json.loads(packet)
        if "stop" in message:
            room.stop(message["stop"])
            return
        if "answer" in message:
            places.answered(message["answer"], message["yes"])
        elif descriptors:
            connection = socket.socket(fileno=descriptors[0])
            room.take(connection, message["address"], message["secure"], lambda: places.say({"gone": True}))


def _help(helper: Helper, line: socket.socket) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    serve_promptly()
    threading.Thread(target=lambda: (line.recv(1), os._exit(0)), daemon=True).start()  # the gate is dead: so are we
    helper()


class _Distant:
    """Places, as a process of the listener asks the gate for them."""

    def __init__(self, line: socket.socket) -> None:
        self._line = line
        self._lock = threading.Lock()
        self._asked = 0
        self._answers: dict[int, queue.SimpleQueue[bool]] = {}

    def take(self, peer: str) -> bool:
        with self._lock:
            self._asked += 1
            number = self._asked
            self._answers[number] = queue.SimpleQueue()
        self.say({"ask": number, "peer": peer})
        try:
            return self._answers[number].get(timeout=10)
        except queue.Empty:
            return False
        finally:
            del self._answers[number]

    def leave(self, peer: str) -> None:
        self.say({"left": peer})

    def answered(self, number: int, yes: bool) -> None:
        waiting = self._answers.get(number)
        if waiting is not None:
            waiting.put(yes)

    def say(self, message: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):
            self._line.send(json.dumps(message).encode())


def serve_promptly() -> None:
    """Ask Linux for short turns: we wait for the disk several times per image, and each time for our turn again.

    No priority is gained: the share of the processor stays the same, in shorter pieces (sched(7), custom slice).
    """
    if platform.machine() not in _SCHED_SETATTR or not hasattr(os, "sched_getscheduler"):
        return
    # struct sched_attr: size, policy, flags, nice, priority, runtime (the slice, in ns), deadline, period
    nice = os.getpriority(os.PRIO_PROCESS, 0)
    attributes = struct.pack("=IIQiIQQQ", 48, os.SCHED_OTHER, 0, nice, 0, _SLICE_NANOSECONDS, 0, 0)
    buffer = ctypes.create_string_buffer(attributes)
    ctypes.CDLL(None).syscall(_SCHED_SETATTR[platform.machine()], 0, buffer, 0)  # an older kernel ignores the slice


# -- sockets ---------------------------------------------------------------------------------------------------------


def tls_context(tls: Tls | None) -> ssl.SSLContext | None:
    """TLS 1.2 or later with the ciphers of BCP 195; a peer without a certificate that we trust is not let in."""
    if tls is None:
        return None
    context = strict(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER))
    try:
        context.load_cert_chain(tls.certificate, tls.key)
        context.load_verify_locations(tls.authorities)
    except (OSError, ssl.SSLError) as broken:
        raise Misconfigured(f"The TLS certificate, key or authorities cannot be used: {broken}") from broken
    context.verify_mode = ssl.CERT_REQUIRED
    return context


def _bind(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BUFFER)  # inherited by what is accepted
    try:
        listening.bind((host, port))
    except OSError as taken:
        listening.close()
        raise Misconfigured(f"Port {port} of {host} cannot be had: {taken.strerror}.") from taken
    listening.setblocking(False)
    return listening


def _hang_up(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
