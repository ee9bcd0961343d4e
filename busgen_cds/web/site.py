"""What the pages and the API stand on: everything of a site that they read, and the verbs they may use.

Rules:
- The pages read the store themselves. Whatever changes something is a verb handed in here.
- A verb that waits or fails says so by `Transient`, `Misconfigured` or `Untrusted`; the page shows the message.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

from busgen_cds import __version__
from busgen_cds.result import BundleName, HeatMap
from busgen_cds.store.audit import Checkpoint
from busgen_cds.store.cases import Word
from busgen_cds.store.database import Database
from busgen_cds.store.drift import Drift
from busgen_cds.store.shadow import Shadow
from busgen_cds.store.shelf import Shelf, Shelved, Standing
from busgen_cds.store.vault import Vault
from busgen_cds.study import Patient, Source, Spacing
from busgen_cds.triage import Rule
from busgen_cds.web.bench import Studio
from busgen_cds.web.oidc import Provider

NOT_A_DIAGNOSIS = "Research software, not a diagnosis"


class Slide(Protocol):
    """One still picture or one clip of a study."""

    @property
    def source(self) -> Source: ...
    @property
    def spacing(self) -> Spacing | None: ...
    @property
    def seconds_per_frame(self) -> float: ...
    @property
    def patient(self) -> Patient: ...


@dataclass(frozen=True)
class LiveBundle:
    """The bundle that reads at present, and what is known of it."""

    name: BundleName
    provider: str  # the execution provider that really runs it
    created: str
    card: str  # Markdown, as signed
    figures: Mapping[str, Any] = field(default_factory=dict)
    facts: Mapping[str, str] = field(default_factory=dict)  # calibration, thresholds: name → value in words


@dataclass(frozen=True)
class Node:
    name: str
    address: str
    gets: str = ""  # which results it gets, in words


@dataclass(frozen=True)
class Receives:
    """Where studies are sent to, and by whom."""

    ae_title: str
    port: int
    allow: Sequence[str] = ()  # AE titles


@dataclass(frozen=True)
class Models:
    """The shelf and what is known of how its bundles do, to be read; and the verbs that change it."""

    shelf: Shelf
    shadow: Shadow
    drift: Drift
    promote: Callable[[str, str, str, int], Standing]  # digest, who, passphrase, the last statement that was seen
    roll_back: Callable[[str, str, int], Standing]  # who, passphrase, the last statement that was seen
    begin_shadow: Callable[[str, str], Shelved]  # digest, who
    end_shadow: Callable[[str, str], Shelved]
    withdraw: Callable[[str, str, str], Shelved]  # digest, who, why
    wish: Callable[[str], str] = lambda live: ""  # for adaptation, that drift of the live bundle makes; in words


Check = Callable[[], str]  # says in words what it found, or raises


@dataclass(frozen=True)
class Site:
    name: str
    database: Database
    vault: Vault
    folder: Path  # whose disk fills up
    bundle: Callable[[], LiveBundle | None]
    slides: Callable[[str], Sequence[Slide]]  # study_ref → pictures and clips
    picture: Callable[[str, str, int], bytes]  # study_ref, SOP Instance UID, frame number → PNG; KeyError
    evidence: Callable[[HeatMap], bytes]  # → PNG with an alpha channel, to lay over the map's region
    confirm: Callable[[Word, int], bool]  # a reader's word on a result with so many findings; False: said already
    retry: Callable[[str, str], Sequence[str]]  # study_ref, who → what was taken up again
    release: Callable[[str, str, Patient | None], None]  # a held study, who, and whose it is if it is of two patients
    resume: Callable[[str], bool]  # the engine, who
    echo: Callable[[str], float]  # node → seconds
    checkpoints: Callable[[], Sequence[Checkpoint]] = tuple  # of the record, as far as they left this machine
    models: Models | None = None  # None: no shelf, only the bundle that is live
    nodes: Sequence[Node] = ()
    receives: Receives | None = None  # what the first page says before any study came
    checks: Mapping[str, Check] = field(default_factory=dict)  # what must hold before work is taken
    viewer: str = ""  # a link to the site's viewer; {study_uid} and {series_uid} are filled in
    first_code: str = ""  # who knows it may make the first account; empty: only the command line may
    provider: Provider | None = None  # who vouches for people; local accounts work beside it
    studio: Callable[[], Studio] | None = None  # opens what makes images; None: no training packages here
    secure: bool = False  # pages are reached by https: cookies travel by nothing else
    triage: Rule = field(default_factory=Rule)  # in which order unread studies stand
    clock: Callable[[], datetime] = lambda: datetime.now(UTC)
    version: str = __version__
