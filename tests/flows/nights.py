"""A night, in this process or in one of its own that may be killed at any stage.

The cases, the workflow, the judge's refusal, the shelf and its keys are real. What stands in for the laboratory leaves
the files that the real stages leave, made from what they were given: the real one takes minutes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from datetime import UTC, datetime
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from busgen_cds import bundle, signing
from busgen_cds.bundle import Candidate
from busgen_cds.case import Case
from busgen_cds.flows import adapt_site, confirm_case
from busgen_cds.flows.adapt_site import Recipes, Stations
from busgen_cds.operations import learning_loop
from busgen_cds.store import database, shelf
from busgen_cds.store.casebook import Casebook
from busgen_cds.store.cases import Cases
from busgen_cds.store.inbox import Inbox
from busgen_cds.store.results import Results
from busgen_cds.store.shelf import Shelf
from busgen_cds.store.vault import Vault
from tests.vision import readers

NIGHT, PROMOTER = (signing.KeySigner(Ed25519PrivateKey.from_private_bytes(bytes([n]) * 32)) for n in (1, 2))
VERIFIER = signing.Verifier.of(
    (NIGHT.key.public_key(), frozenset({bundle.KIND})), (PROMOTER.key.public_key(), frozenset({shelf.KIND}))
)
MADE_ON = datetime(2026, 3, 4, 1, tzinfo=UTC)


@dataclasses.dataclass(frozen=True)
class Said:
    reasons: tuple[str, ...] = ()
    tables: tuple[dict[str, Any], ...] = ({"title": "The judge", "rows": [["accepted"]]},)


class Ward:
    """A site's store with cases in it, and nights over them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.database = database.open(f"sqlite:///{folder / 'site.sqlite'}")
        self.vault = Vault(bytes(range(32)))
        self.book = Casebook(self.database, self.vault, lambda: MADE_ON)
        self.shelf = Shelf(folder / "shelf", self.database, VERIFIER)

    def confirm(self, patients: int) -> None:
        import numpy as np

        rng = np.random.default_rng(0)
        for i in range(patients):
            tissue = rng.integers(0, 200, (40, 50), np.uint8)
            truth: Any = ("benign", "malignant")[i % 2]
            one = Case(f"{i:016x}", tissue, tissue > 190, truth, "3", "reader", "agree", "2026-03-01", None)
            self.book.keep(one, study_ref=f"{i:032x}", revision=1, finding=1, who="ruth", grounds="")

    def stations(self, recipes: Recipes, least_new: int = 8, least_new_asked: int = 8, asked: str = "") -> Stations:
        results = Results(self.database, self.vault)
        inbox, words = Inbox(self.folder / "inbox", self.database, self.vault), Cases(self.database, self.vault)
        return Stations(
            confirm_case.Stations(inbox, results, words, self.book), self.shelf, NIGHT, self.folder / "nights",
            learning_loop.write_cases, recipes, least_new, "site-reader", least_new_asked,
            lambda: asked, lambda: MADE_ON,
        )  # fmt: skip

    def night(self, recipes: Recipes, *, anyway: bool = False, **begins: Any) -> str:
        adapt_site.launch(self.stations(recipes, **begins), f"sqlite:///{self.folder / 'workflows.sqlite'}")
        try:
            return adapt_site.run(anyway=anyway)
        finally:
            adapt_site.end()


def laboratory(die_at: str = "", reasons: tuple[str, ...] = ()) -> Recipes:
    """`die_at`: a stage's name, and `before` or `after` its work."""

    def stage(name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def run(folder: Path, *rest: Any) -> Any:
            _die(die_at, f"{name} before")
            (folder / f"{name}.log").open("a").write("begun\n")
            found = work(folder, *rest)
            _die(die_at, f"{name} after")
            return found

        return run

    def leave(name: str, reads: str) -> Callable[[Path], None]:
        def work(folder: Path) -> None:
            files = sorted((folder / reads).glob("*")) if (folder / reads).is_dir() else [folder / reads]
            digest = hashlib.sha256(b"".join(f.read_bytes() for f in files if f.is_file())).hexdigest()
            (folder / f"{name}.made").write_text(digest)

        return work

    def candidate(folder: Path, name: str, version: str, created: str) -> Candidate:
        card = f"# {name}\n{(folder / 'members.made').read_text()}\n".encode()
        files = {**readers.files(), bundle.CARD: card}
        return Candidate(
            dataclasses.replace(readers.manifest(files), name=name, created=created, version=created), files
        )

    return Recipes(
        adapter=stage("adapter", leave("adapter", "cases")),
        images=stage("images", leave("images", "adapter.made")),
        privacy=stage("privacy", leave("privacy", "images.made")),
        members=stage("members", leave("members", "images.made")),
        candidate=stage("candidate", candidate),
        verdict=stage("verdict", lambda folder: Said(reasons)),
    )


def _die(chosen: str, here: str) -> None:
    if chosen == here:
        os.kill(os.getpid(), signal.SIGKILL)


def killed_shelf(ward: Ward, when: str) -> None:
    """The process dies before the candidate is put there, or when it lies there and nothing else knows."""
    ward.shelf.put = _dying(ward.shelf.put, when, "shelf")  # type: ignore[method-assign]


def killed_plan(ward: Ward, when: str) -> None:
    """The process dies before the cases are written down, or when the run has begun and its folder is not there."""
    ward.book.begin = _dying(ward.book.begin, when, "plan")  # type: ignore[method-assign]


def _dying(call: Callable[..., Any], when: str, stage: str) -> Callable[..., Any]:
    """The same call, before or after which the process dies."""

    def dies(*args: Any, **more: Any) -> Any:
        _die(when, f"{stage} before")
        found = call(*args, **more)
        _die(when, f"{stage} after")
        return found

    return dies


_PROCESSES = multiprocessing.get_context("forkserver")
_PROCESSES.set_forkserver_preload([__name__])  # each begins with what a program takes seconds to import


def in_its_own_process(folder: Path, die_at: str = "") -> tuple[int | None, str]:
    """How the process ended, and what became of the night."""
    ours, theirs = _PROCESSES.Pipe(duplex=False)
    process = _PROCESSES.Process(target=_night, args=(folder, die_at, theirs))
    process.start()
    theirs.close()
    process.join(240)
    try:
        return process.exitcode, ours.recv() if ours.poll() else ""
    except EOFError:
        return process.exitcode, ""
    finally:
        process.kill()


def _night(folder: Path, die_at: str, answer: Connection) -> None:
    ward = Ward(folder)
    killed_plan(ward, die_at)
    killed_shelf(ward, die_at)
    answer.send(ward.night(laboratory(die_at)))


def begun_in_its_own_process(folder: Path) -> Connection:
    """A night that learns until there is a file `go on`; it says when its engine has started, and what became of it."""
    ours, theirs = _PROCESSES.Pipe(duplex=False)
    _PROCESSES.Process(target=_held, args=(folder, theirs), daemon=True).start()
    theirs.close()
    return ours


def _note(folder: Path, what: str) -> None:
    with (folder / "learnt").open("a") as file:
        file.write(f"{what}\n")


def _held(folder: Path, answer: Connection) -> None:
    def members(run: Path) -> None:
        _note(folder, "begins")
        while not (folder / "go on").exists():
            time.sleep(0.05)
        made.members(run)
        _note(folder, "ends")

    made, ward = laboratory(), Ward(folder)
    stations = ward.stations(dataclasses.replace(made, members=members))
    adapt_site.launch(stations, f"sqlite:///{folder / 'workflows.sqlite'}")
    answer.send("started")
    answer.send(adapt_site.run())
    adapt_site.end()
