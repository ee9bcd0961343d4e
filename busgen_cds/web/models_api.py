"""The shelf, the comparison in shadow and drift, for programs: what the page of models shows and does."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field, SecretStr

from busgen_cds.store.people import Person
from busgen_cds.store.shadow import Comparison
from busgen_cds.store.shelf import State
from busgen_cds.web import api, auth, models
from busgen_cds.web.models import Digest


class _Answer(BaseModel):
    model_config = ConfigDict(from_attributes=True)


class ShelvedOut(_Answer):
    digest: str
    name: str
    version: str
    state: State
    since: datetime
    who: str
    reasons: list[str]
    report: dict[str, Any]


class StandingOut(_Answer):
    number: int = Field(description="Of the last statement; 0: nobody has said anything yet.")
    digest: str


class ShelfOut(_Answer):
    standing: StandingOut
    bundles: list[ShelvedOut]


class ChangeOut(BaseModel):
    live: str
    shadow: str
    studies: int


class ComparisonOut(_Answer):
    digest: str
    studies: int
    same: int
    up: int
    down: int
    failed: int
    agreement: float | None
    difference: float | None
    seconds: float | None
    live_seconds: float | None
    changes: list[ChangeOut]


class FigureOut(_Answer):
    name: str
    value: float
    limit: float
    chance: float
    alarming: bool


class WeekOut(_Answer):
    week: str
    device: str
    studies: int
    figures: list[FigureOut]


class DriftOut(BaseModel):
    digest: str
    reference_studies: int
    of: int
    weeks: list[WeekOut]


class Spoken(BaseModel):
    model_config = ConfigDict(extra="forbid")
    passphrase: SecretStr = Field(max_length=512, description="The promoter's.")
    number: int = Field(ge=0, le=1 << 53, description="Of the statement that stood when you decided.")


class Along(BaseModel):
    model_config = ConfigDict(extra="forbid")
    reads: bool = Field(description="true: it reads along from now on; false: no longer.")


router = APIRouter(responses=api.PROBLEMS, tags=["models"])
Looking = Annotated[Person, auth.caller("models.read")]
Acting = Annotated[Person, auth.caller("models.act")]


@router.get("/shelf", summary="What is on the shelf, and the last statement (models.read)")
def shelf(request: Request, person: Looking) -> ShelfOut:
    found = models.of(auth.front_of(request)).shelf
    standing = StandingOut.model_validate(found.standing())
    return ShelfOut(standing=standing, bundles=[_shelved(each) for each in found.listing()])


@router.get("/shelf/{digest}/comparison", summary="How a bundle read beside the live one (models.read)")
def comparison(request: Request, digest: Digest, person: Looking) -> ComparisonOut:
    return _comparison(digest, models.of(auth.front_of(request)).shadow.comparison(digest))


@router.post("/shelf/{digest}/shadow", summary="Let a bundle read along, or no longer (models.act)")
def shadow(request: Request, digest: Digest, along: Along, person: Acting) -> ShelvedOut:
    return _shelved(models.read_along(auth.front_of(request), person, digest, along.reads))


@router.post("/shelf/{digest}/promote", summary="Make a bundle live (models.act)")
def promote(request: Request, digest: Digest, spoken: Spoken, person: Acting) -> StandingOut:
    said = models.say(auth.front_of(request), person, spoken.passphrase.get_secret_value(), spoken.number, digest)
    return StandingOut.model_validate(said)


@router.post("/roll-back", summary="Make live again what was live before (models.act)")
def roll_back(request: Request, spoken: Spoken, person: Acting) -> StandingOut:
    said = models.say(auth.front_of(request), person, spoken.passphrase.get_secret_value(), spoken.number)
    return StandingOut.model_validate(said)


@router.get("/drift", summary="How each week differs from the live bundle's first studies here (models.read)")
def drift(request: Request, person: Looking) -> DriftOut:
    front = auth.front_of(request)
    watched, bundle = models.of(front).drift, front.bundle()
    digest = bundle.name.digest if bundle else ""
    weeks = [
        WeekOut(
            week=each.week,
            device=each.device,
            studies=each.sums.studies,
            figures=[FigureOut.model_validate(figure) for figure in each.figures],
        )
        for each in watched.weeks(digest)
    ]
    return DriftOut(digest=digest, reference_studies=watched.filled(digest), of=watched.reference_studies, weeks=weeks)


def _shelved(entry: Any) -> ShelvedOut:
    return ShelvedOut.model_validate(entry)


def _comparison(digest: str, found: Comparison) -> ComparisonOut:
    changes = [ChangeOut(live=live, shadow=said, studies=n) for (live, said), n in sorted(found.changes.items())]
    figures = {name: value for name, value in vars(found).items() if name not in ("changes", "largest")}
    return ComparisonOut(digest=digest, changes=changes, **figures)
