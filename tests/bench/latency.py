"""How long from a scanner's last success to the report in the PACS? `python -m tests.bench.latency [--studies 30]`

Rules:
- The whole product runs as at a site, by its own command, in a process of its own, with the bundle shipped.
- A study is ten images on one association. Time runs from the success of the last image until the PACS has stored the
  report; the silence that completeness waits for is taken off, as that is the site's choice.
- The first study is not counted: it warms up what a site warms up once.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from busgen_cds.dicom import outbox
from busgen_cds.dicom.outbox import Node
from tests import hospital
from tests.hospital import Scanner
from tests.pacs import SR, Pacs
from tests.programs import free_port

IMAGES = 10
SILENCE = 2.0
BAR = 2.0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--studies", type=int, default=30)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--command", choices=["serve", "apart"], default="serve")
    chosen = parser.parse_args(arguments)
    figures = measure(chosen.studies, apart=chosen.command == "apart")
    print(json.dumps(figures, indent=1))
    if chosen.json:
        chosen.json.write_text(json.dumps(figures, indent=1) + "\n")
    return 0 if figures["p95_seconds"] <= BAR else 1


def measure(studies: int, *, apart: bool = False) -> dict[str, float]:
    pacs = Pacs().comes_up()
    try:
        with tempfile.TemporaryDirectory() as folder, _served(Path(folder), pacs, apart) as port:
            taken = [_one(Scanner(port), pacs, number) for number in range(studies + 1)][1:]
    finally:
        pacs.goes_down()
    taken.sort()
    return {
        "studies": studies,
        "images": IMAGES,
        "p50_seconds": round(statistics.median(taken), 3),
        "p95_seconds": round(taken[min(len(taken) - 1, int(0.95 * len(taken)))], 3),
        "longest_seconds": round(taken[-1], 3),
        "load_average": round(os.getloadavg()[0], 1),
    }


def _one(scanner: Scanner, pacs: Pacs, number: int) -> float:
    known = set(pacs.stored_at)
    study = scanner.sends(hospital.a_lesion(IMAGES, seed=100 * number))
    end = time.monotonic() + 120
    while time.monotonic() < end:
        for uid in set(pacs.classes) - known:
            if pacs.classes[uid] == SR:
                return pacs.stored_at[uid] - scanner.acknowledged_at[study] - SILENCE
        time.sleep(0.05)
    raise AssertionError("no report came within two minutes")


@contextmanager
def _served(folder: Path, pacs: Pacs, apart: bool) -> Iterator[int]:
    port = free_port()
    site = folder / "site"
    _run("init", str(site), "--prevalence", "0.05", "--allow", "US_ROOM_1", "--port", str(port),
         "--pacs", f"{pacs.ae_title}@{pacs.host}:{pacs.port}")  # fmt: skip
    environment = os.environ | {
        "BUSGEN_CDS_STUDY__SILENCE_SECONDS": str(SILENCE),
        "BUSGEN_CDS_WEB__PORT": str(free_port()),
        "BUSGEN_CDS_LISTENER__CHECK_CALLED_AE": "false",
    }
    with (folder / "log").open("wb") as log:
        served = [
            subprocess.Popen([*_COMMAND, verb, "-c", str(site)], env=environment, stdout=log, stderr=log)
            for verb in (("listen", "work") if apart else ("serve",))
        ]
        try:
            _until_it_answers(
                Node("us", "BUSGEN_CDS", "127.0.0.1", port, calling_ae="US_ROOM_1"), served, folder / "log"
            )
            yield port
        except BaseException:
            print((folder / "log").read_text(), file=sys.stderr)
            raise
        finally:
            for process in served:
                process.terminate()
            for process in served:
                process.wait(60)


_COMMAND = [sys.executable, "-m", "busgen_cds"]


def _run(*arguments: str) -> None:
    done = subprocess.run([*_COMMAND, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise AssertionError(done.stdout + done.stderr)


def _until_it_answers(node: Node, processes: Sequence[subprocess.Popen[bytes]], log: Path) -> None:
    end = time.monotonic() + 120
    while time.monotonic() < end:
        try:
            outbox.echo(node)
            return
        except Exception:
            if any(process.poll() is not None for process in processes):
                raise AssertionError(log.read_text()) from None
            time.sleep(0.2)
    raise AssertionError(f"it does not answer:\n{log.read_text()}")


if __name__ == "__main__":
    sys.exit(main())
