"""How fast do we receive, beside Orthanc and storescp? `python -m tests.bench.listener [--rounds 3] [--json FILE]`

Rules:
- One run measures all servers in turn, round after round, on the same files with the same sender (storescu,
  TCP_NODELAY=1): the ratios count, because what else the machine does counts for all.
- Ours runs as at a site: own processes, fsync, encryption and the record of acts on.
- The best round of each is compared, as a slower one says what disturbed it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, UltrasoundImageStorage, generate_uid

from tests.programs import free_port

IMAGES, ROWS, COLUMNS = 200, 600, 800
ENVIRONMENT = {**os.environ, "TCP_NODELAY": "1"}

Rates = dict[str, dict[int, list[float]]]
Server = Callable[[Path], "contextmanager[int]"]


def make_images(folder: Path, count: int = IMAGES) -> list[Path]:
    """One study of grey images of 0.48 MB; the pixels are speckle, so that nothing can be compressed away."""
    folder.mkdir(parents=True)
    study, series = generate_uid(), generate_uid()
    noise = np.random.default_rng(0)
    return [_image(folder / f"{n:03d}.dcm", study, series, n, noise) for n in range(count)]


def _image(path: Path, study: str, series: str, number: int, noise: np.random.Generator) -> Path:
    image = Dataset()
    image.SOPClassUID, image.SOPInstanceUID = UltrasoundImageStorage, generate_uid()
    image.StudyInstanceUID, image.SeriesInstanceUID = study, series
    image.PatientID, image.PatientName, image.Modality = "BENCH", "Bench^Mark", "US"
    image.InstanceNumber = number + 1
    image.SamplesPerPixel, image.PhotometricInterpretation = 1, "MONOCHROME2"
    image.Rows, image.Columns = ROWS, COLUMNS
    image.BitsAllocated = image.BitsStored = 8
    image.HighBit, image.PixelRepresentation = 7, 0
    image.PixelData = noise.integers(0, 256, ROWS * COLUMNS, dtype=np.uint8).tobytes()
    image.file_meta = FileMetaDataset()
    image.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    image.save_as(path, enforce_file_format=True)
    return path


def send(port: int, files: Sequence[Path], associations: int) -> float:
    """Images per second over so many associations at once."""
    began = time.perf_counter()
    senders = [
        subprocess.Popen(
            ["storescu", "-R", "-aet", f"BENCH{n}", "-aec", "ANY", "127.0.0.1", str(port)]
            + [str(file) for file in files[n::associations]],
            env=ENVIRONMENT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        for n in range(associations)
    ]
    complaints = [sender.communicate()[1].decode() for sender in senders]
    seconds = time.perf_counter() - began
    if any(sender.returncode for sender in senders):
        raise RuntimeError(f"A sender failed: {complaints}")
    return len(files) / seconds


@contextmanager
def storescp(folder: Path) -> Iterator[int]:
    port = free_port()
    with _running(["storescp", "--fork", "+B", "-od", str(folder), str(port)], port):
        yield port


@contextmanager
def orthanc(folder: Path) -> Iterator[int]:
    port, web = free_port(), free_port()
    settings = {
        "StorageDirectory": str(folder / "storage"),
        "IndexDirectory": str(folder / "storage"),
        "DicomPort": port,
        "HttpPort": web,
        "RemoteAccessAllowed": False,
        "DicomAlwaysAllowStore": True,
        "DicomCheckCalledAet": False,
        "Plugins": [],
    }
    (folder / "orthanc.json").write_text(json.dumps(settings))
    with _running(["Orthanc", str(folder / "orthanc.json")], port):
        yield port


@contextmanager
def _running(command: Sequence[str], port: int) -> Iterator[None]:
    server = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _wait_for(port, server)
        yield
    finally:
        server.terminate()
        server.wait(30)


def _wait_for(port: int, server: subprocess.Popen[bytes]) -> None:
    for _ in range(1200):
        if server.poll() is not None:
            raise RuntimeError(f"The server ended with {server.returncode}.")
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            time.sleep(0.1)
    raise RuntimeError("The server does not answer.")


@contextmanager
def ours(folder: Path) -> Iterator[int]:
    port = free_port()
    with _running([sys.executable, "-m", "tests.reception", str(folder), str(port), "2"], port):
        yield port


SERVERS: dict[str, Server] = {"storescp": storescp, "orthanc": orthanc, "ours": ours}


def measure(rounds: int, associations: Sequence[int], names: Sequence[str]) -> Rates:
    rates: Rates = {name: {n: [] for n in associations} for name in names}
    with tempfile.TemporaryDirectory(prefix="busgen-bench-") as base:
        files = make_images(Path(base) / "images")
        for n in associations:
            for turn in range(rounds):
                for name in names:
                    folder = Path(base) / f"{name}-{n}-{turn}"
                    folder.mkdir()
                    with SERVERS[name](folder) as port:
                        rates[name][n].append(send(port, files, n))
                    shutil.rmtree(folder, ignore_errors=True)
    return rates


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--associations", type=int, nargs="+", default=[1, 4])
    arguments.add_argument("--servers", nargs="+", default=list(SERVERS), choices=list(SERVERS))
    arguments.add_argument("--json", type=Path)
    chosen = arguments.parse_args()
    rates = measure(chosen.rounds, chosen.associations, chosen.servers)
    report = summary(rates)
    print(table(report))
    if chosen.json:
        chosen.json.write_text(json.dumps(report, indent=1) + "\n")


def summary(rates: Rates) -> dict[str, object]:
    best = {name: {n: max(rounds) for n, rounds in by.items()} for name, by in rates.items()}
    ratios = {
        f"ours / {name}": {n: round(best["ours"][n] / rate, 2) for n, rate in by.items()}
        for name, by in best.items()
        if name != "ours" and "ours" in best
    }
    return {"images": IMAGES, "bytes": ROWS * COLUMNS, "images per second": rates, "ratios of the best": ratios}


def table(report: dict[str, Any]) -> str:
    lines = [f"{IMAGES} images of {ROWS * COLUMNS / 1e6:.2f} MB; images per second, each round"]
    for name, by in report["images per second"].items():
        for n, rounds in by.items():
            lines.append(
                f"{name:>18}  {n} association{'s' if n > 1 else ' '}  {'  '.join(f'{r:6.0f}' for r in rounds)}"
            )
    for name, by in report["ratios of the best"].items():
        lines.append(f"{name:>18}  " + "  ".join(f"{ratio:.2f} on {n}" for n, ratio in by.items()))
    return "\n".join(lines)


if __name__ == "__main__":
    main()
