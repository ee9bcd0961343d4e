"""What the controls cost: `python -m tests.bench.controls [--rounds 5] [--json FILE]`

Our listener with all controls on, against the same listener without encryption and without the record of acts: the
same files, the same sender, in turn, round after round; the best round of each is compared. TLS is measured apart.
Beside the rate stands the processor's time that the listener's processes took per gigabyte: on a machine that does
other things meanwhile, it is the steadier of the two.

"Without" is made here, by replacing parts in the bench's own processes: no setting of the product can do it.
Both sync every file and every commit to the disk, and both hash what they receive: that is not a control, but how
the same image is known again.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from pydicom.uid import UltrasoundMultiFrameImageStorage, generate_uid

from busgen_cds.dicom.association import Desk, Rules
from busgen_cds.dicom.listener import Listener, ListenerConfig, Tls
from busgen_cds.store import audit, inbox, vault
from tests import reception
from tests.bench.listener import ENVIRONMENT, _wait_for, make_images
from tests.certificates import Authority
from tests.fuzz import watch
from tests.programs import free_port

CINE_FRAMES = 400  # of 0.48 MB: a long clip, uncompressed
BAR = 0.85
WAYS = ("on", "off", "tls")


class PlainWriter:
    """As `vault.SealedWriter`, but what is written is what came."""

    def __init__(self, path: Path, _key: bytes) -> None:
        self.descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)

    def write(self, data: bytes | memoryview) -> None:
        vault._write_all(self.descriptor, data)

    def sync(self) -> None:
        os.fsync(self.descriptor)

    def close(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


def without_controls() -> None:
    """In this process, from now on: files and rows are plain, and nobody keeps a record of acts."""
    inbox.SealedWriter = PlainWriter  # type: ignore[misc, assignment]
    vault.Vault.seal = lambda _self, data, about=b"": bytes(data)  # type: ignore[method-assign, assignment]
    vault.Vault.open = lambda _self, sealed, about=b"": sealed  # type: ignore[method-assign, assignment]
    vault.Vault.wrap = lambda _self, key: key  # type: ignore[method-assign, assignment]
    vault.Vault.unwrap = lambda _self, wrapped: wrapped  # type: ignore[method-assign, assignment]
    vault.Vault.blind = lambda _self, text: text  # type: ignore[method-assign, assignment]
    vault.Vault.blinds = lambda _self, text: (text,)  # type: ignore[method-assign, assignment]
    vault.wrap_under = lambda _key, data_key: data_key
    audit.record = lambda *_acts, **_when: None


def desk(folder: Path, controls: bool) -> Desk:
    if not controls:
        without_controls()
    return reception.desk(folder)


def keep_books(folder: Path, controls: bool) -> None:
    if not controls:
        without_controls()
    reception.keep_books(folder)


def serve(folder: Path, port: int, controls: bool, tls: bool) -> None:
    reception.open_store(folder)[0].close()
    files = [str(folder / name) for name in ("certificate.pem", "certificate.key", "authority.pem")]
    config = ListenerConfig(
        Rules(), "127.0.0.1", None if tls else port, Tls(*files, port=port) if tls else None, processes=2
    )  # fmt: skip
    listener = Listener(
        config, functools.partial(desk, folder, controls), functools.partial(keep_books, folder, controls)
    )
    listener.start()
    signal.sigwait({signal.SIGTERM, signal.SIGINT})
    listener.stop(seconds=2)


@dataclass
class Target:
    port: int
    words: list[str]  # what a sender must say to speak with it
    process: subprocess.Popen[bytes]

    def cpu_seconds(self) -> float:
        """Of the listener and its processes, up to now."""
        found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(self.process.pid)], capture_output=True, check=False)
        return sum(watch.cpu_seconds(int(pid)) for pid in (self.process.pid, *found.stdout.split()))


@contextmanager
def listening(folder: Path, way: str) -> Iterator[Target]:
    port = free_port()
    words = _certificates(folder) if way == "tls" else []
    command = [sys.executable, "-W", "ignore", "-m", "tests.bench.controls", "--serve", str(folder), str(port), way]
    server = subprocess.Popen(command, env=ENVIRONMENT)
    try:
        _wait_for(port, server)
        yield Target(port, words, server)
    finally:
        server.terminate()
        server.wait(60)


def _certificates(folder: Path) -> list[str]:
    authority = Authority(folder)
    for name, target in (("listener", "certificate"), ("scanner", "scanner")):
        certificate, key, _ = authority.issues(name)
        certificate.rename(folder / f"{target}.pem")
        key.rename(folder / f"{target}.key")
    scanner = folder / "scanner.key", folder / "scanner.pem"
    return ["+tls", *map(str, scanner), "+cf", str(folder / "authority.pem")]


def rate(target: Target, files: Sequence[Path]) -> tuple[float, float]:
    """Megabytes per second over one association, and the listener's processor seconds per gigabyte."""
    megabytes, before, began = (
        sum(file.stat().st_size for file in files) / 1e6,
        target.cpu_seconds(),
        time.perf_counter(),
    )
    command = ["storescu", "-R", *target.words, "-aet", "BENCH", "-aec", "ANY", "127.0.0.1", str(target.port)]
    subprocess.run([*command, *map(str, files)], env=ENVIRONMENT, check=True, capture_output=True)
    seconds = time.perf_counter() - began
    return round(megabytes / seconds, 1), round(1000 * (target.cpu_seconds() - before) / megabytes, 2)


def make_cine(image: Path, to: Path) -> Path:
    clip = pydicom.dcmread(image)
    clip.SOPClassUID = clip.file_meta.MediaStorageSOPClassUID = UltrasoundMultiFrameImageStorage
    clip.SOPInstanceUID = clip.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    clip.NumberOfFrames = CINE_FRAMES
    noise = np.random.default_rng(1)
    clip.PixelData = noise.integers(0, 256, CINE_FRAMES * clip.Rows * clip.Columns, dtype=np.uint8).tobytes()
    clip.save_as(to, enforce_file_format=True)
    return to


def measure(rounds: int, images: int, ways: Sequence[str], tell: Callable[[str], object]) -> dict[str, Any]:
    found: dict[str, dict[str, list[tuple[float, float]]]] = {
        what: {way: [] for way in ways} for what in ("images", "cine")
    }
    with tempfile.TemporaryDirectory(prefix="busgen-bench-") as base:
        files = {"images": make_images(Path(base) / "images", images)}
        files["cine"] = [make_cine(files["images"][0], Path(base) / "cine.dcm")]
        for turn in range(rounds):
            for way in ways if turn % 2 else tuple(reversed(ways)):
                folder = Path(base) / f"{way}-{turn}"
                folder.mkdir()
                with listening(folder, way) as target:
                    for what, mine in files.items():
                        found[what][way].append(rate(target, mine))
                shutil.rmtree(folder, ignore_errors=True)
                tell(f"round {turn + 1}, {way}: {found['images'][way][-1]} {found['cine'][way][-1]}\n")
    return found


def report(found: dict[str, Any], images: int) -> dict[str, Any]:
    said: dict[str, Any] = {"MB/s, CPU s/GB": found, "images": images, "cine MB": round(CINE_FRAMES * 0.48), "bar": BAR}
    for what, ways in found.items():
        best = {way: (max(rate for rate, _ in rounds), min(cpu for _, cpu in rounds)) for way, rounds in ways.items()}
        for way in ways:
            if way != "off" and "off" in ways:
                said[f"{what}: rate, {way} / off"] = round(best[way][0] / best["off"][0], 3)
                said[f"{what}: processor, off / {way}"] = round(best["off"][1] / best[way][1], 3)
    said["load while it was measured"] = [round(each, 1) for each in os.getloadavg()]
    return said


def main() -> None:
    arguments = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--images", type=int, default=200)
    arguments.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    arguments.add_argument("--json", type=Path)
    chosen = arguments.parse_args()
    said = report(measure(chosen.rounds, chosen.images, chosen.ways, sys.stderr.write), chosen.images)
    print(json.dumps(said, indent=1))
    if chosen.json:
        chosen.json.write_text(json.dumps(said, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
        from tests.bench.controls import serve as _serve  # by its name, so that the listener's processes find it

        _serve(Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4] != "off", sys.argv[4] == "tls")
    else:
        main()
