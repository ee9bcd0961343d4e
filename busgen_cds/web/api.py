"""The REST API: what the pages show and do, for programs.

Rules:
- Each call names the right it needs; a token's scopes are rights.
- A study is named by its opaque reference; its answer is the same document as in `results.json`.
- Lists come in parts: `limit` and `offset`, or `before` for the record of acts.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Annotated, Any, Literal

from fastapi import APIRouter, HTTPException, Query, Request
from fastapi import Path as InPath
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import Response, StreamingResponse

from busgen_cds import case, summary
from busgen_cds.store.audit import Wanted
from busgen_cds.store.cases import Reason, Said
from busgen_cds.store.people import Account, Person, Right, Role, Token
from busgen_cds.store.worklist import Row, Stage, Stuck, View
from busgen_cds.study import NotForUs
from busgen_cds.web import auth, management, reading
from busgen_cds.web.site import NOT_A_DIAGNOSIS

Ref = Annotated[str, InPath(pattern="^[0-9a-f]{32}$", description="The study's reference.")]
Name = Annotated[str, InPath(max_length=64)]
Limit = Annotated[int, Query(ge=1, le=500)]


class _Answer(BaseModel):
    model_config = ConfigDict(from_attributes=True)


class Problem(_Answer):
    detail: str


class StudyLine(_Answer):
    study_ref: str
    received_at: datetime
    last_received_at: datetime
    instances: int
    stage: Stage
    stuck: Stuck
    reason: str
    revision: int
    outcome: str
    birads: str | None
    probability: float | None
    answered_at: datetime | None
    delivered_at: datetime | None
    alarm: str
    read: bool
    word: str
    word_by: str
    word_at: datetime | None


class Count(_Answer):
    unread: int
    read: int
    stuck: int


class Studies(_Answer):
    counts: Count
    studies: list[StudyLine]
    next_offset: int | None


class WordIn(BaseModel):
    model_config = ConfigDict(extra="forbid")

    revision: int = Field(ge=1, le=1_000_000, description="The revision that was looked at.")
    finding: int = Field(ge=0, le=1000, description="Counts from 1; 0: the study as a whole, when nothing was found.")
    word: case.Word
    birads: Literal["2", "3", "4A", "4B", "4C", "5"] | None = None
    contour: list[tuple[float, float]] = Field(default=[], max_length=2000)
    reason: Reason | None = None
    note: str = Field(default="", max_length=2000)


class WhoseIn(BaseModel):
    model_config = ConfigDict(extra="forbid")

    patient_id: str = Field(min_length=1, max_length=64, description="As it stands in images of the study.")
    issuer: str = Field(default="", max_length=64, description="The issuer of that id, if the images state one.")


class WordOut(_Answer):
    revision: int
    finding: int
    word: str
    birads: str | None
    contour: list[tuple[float, float]]
    reason: str | None
    who: str
    at: datetime


class DeliveryOut(_Answer):
    destination: str
    kind: str
    sop_instance_uid: str
    state: str
    reason: str
    at: datetime


class StudyOut(_Answer):
    notice: str = NOT_A_DIAGNOSIS
    line: StudyLine
    answer: dict[str, Any] | None = Field(description="As in results.json; null while there is none.")
    revisions: list[int]
    words: list[WordOut]
    delivered: list[DeliveryOut]


class Done(_Answer):
    done: list[str]


class NodeOut(_Answer):
    name: str
    address: str
    gets: str


class Echo(_Answer):
    node: str
    answers: bool
    said: str


class Bar(_Answer):
    name: str
    count: int


class Operations(_Answer):
    counts: Count
    disk_total: int
    disk_free: int
    jobs_waiting: int
    workers_alive: list[str]
    workers_silent: list[str]
    engine_stopped: str | None
    answer_times: list[Bar]
    delivery_times: list[Bar]


class QuarantinedOut(_Answer):
    ref: str
    received_at: datetime
    calling_ae: str
    address: str
    sop_class_uid: str
    size: int
    reason: str


class BundleOut(_Answer):
    name: str
    version: str
    digest: str
    provider: str
    created: str
    figures: dict[str, Any]
    card: str


class ActOut(_Answer):
    number: int
    at: datetime
    kind: str
    who: str
    what: str
    study_ref: str | None
    detail: str
    hash: str


class Verdict(_Answer):
    entries: int
    sound: bool
    first_bad: int | None
    reason: str
    checkpoints: int = Field(description="Against which it was held; against none, a cut tail does not show.")


class AccountOut(_Answer):
    name: str
    roles: list[Role]
    second_factor: bool
    disabled: bool
    locked_until: datetime | None


class Me(_Answer):
    name: str
    roles: list[Role]
    rights: list[Right]


class NewAccount(BaseModel):
    model_config = ConfigDict(extra="forbid")

    name: str = Field(max_length=64)
    password: str = Field(max_length=256)
    roles: list[Role] = Field(max_length=10)


class ChangedAccount(BaseModel):
    model_config = ConfigDict(extra="forbid")

    roles: list[Role] | None = Field(default=None, max_length=10)
    disabled: bool | None = None


class NewToken(BaseModel):
    model_config = ConfigDict(extra="forbid")

    label: str = Field(max_length=64)
    scopes: list[Right] = Field(max_length=20)
    days: int = Field(default=90, ge=1, le=365)


class TokenOut(_Answer):
    ref: str
    label: str
    scopes: list[Right]
    made_at: datetime
    expires_at: datetime
    revoked: bool


class MadeToken(TokenOut):
    secret: str = Field(description="Shown here and never again.")


PROBLEMS: dict[int | str, dict[str, Any]] = {
    status: {"model": Problem} for status in (400, 401, 403, 404, 405, 409, 413, 422, 429, 502, 503)
}
router = APIRouter(responses=PROBLEMS)


# -- studies


@router.get("/studies", tags=["studies"], summary="The worklist (studies.read)")
def studies(
    request: Request,
    view: View = "unread",
    said: Annotated[str, Query(max_length=16, description="A category, declined, none or not-for-us.")] = "",
    search: Annotated[
        str, Query(max_length=128, description="A whole patient id, accession number or study UID.")
    ] = "",
    limit: Limit = 50,
    offset: Annotated[int, Query(ge=0, le=1_000_000)] = 0,
    person: Person = auth.caller("studies.read"),
) -> Studies:
    worklist = auth.front_of(request).caught_up()
    rows = worklist.rows(view, said=said, search=search, limit=limit + 1, offset=offset)
    return Studies(
        counts=Count.model_validate(worklist.counts()),
        studies=[_line(row) for row in rows[:limit]],
        next_offset=offset + limit if len(rows) > limit else None,
    )


@router.get("/studies/{study_ref}", tags=["studies"], summary="One study and its answer (studies.read)")
def study(
    request: Request,
    study_ref: Ref,
    revision: Annotated[int | None, Query(ge=1, le=1_000_000)] = None,
    person: Person = auth.caller("studies.read"),
) -> StudyOut:
    front = auth.front_of(request)
    opened = reading.open_study(front, study_ref, revision)
    front.looked(person, study_ref, opened.shown.entry.revision if opened.shown else 0)
    return _study(opened)


@router.get(
    "/studies/{study_ref}/frames/{sop_instance_uid}/{frame_number}",
    tags=["studies"],
    summary="One frame (studies.read)",
    response_class=Response,
    responses={200: {"content": {"image/png": {}}}},
)
def frame(
    request: Request,
    study_ref: Ref,
    sop_instance_uid: Annotated[str, InPath(max_length=64)],
    frame_number: Annotated[int, InPath(ge=1, le=100_000)],
    person: Person = auth.caller("studies.read"),
) -> Response:
    return reading.picture(auth.front_of(request), person, study_ref, sop_instance_uid, frame_number)


@router.post("/studies/{study_ref}/words", tags=["studies"], summary="A reader's word (studies.confirm)")
def say(
    request: Request, study_ref: Ref, said: WordIn, person: Person = auth.caller("studies.confirm")
) -> list[WordOut]:
    front = auth.front_of(request)
    opened = reading.keep_word(
        front,
        person,
        study_ref,
        said.revision,
        said.finding,
        said.word,
        said.birads or "",
        tuple((x, y) for x, y in said.contour),
        said.reason or "",
        said.note,
    )
    return [_word(each) for each in opened.words.values()]


@router.post("/studies/{study_ref}/retry", tags=["studies"], summary="Take up what is stuck (studies.retry)")
def retry(
    request: Request, study_ref: Ref, whose: WhoseIn | None = None, person: Person = auth.caller("studies.retry")
) -> Done:
    """A study of two patients goes on only as the study of one of them, who must be stated."""
    front = auth.front_of(request)
    row = front.caught_up().row(study_ref)
    if row is None:
        raise HTTPException(404, "There is no such study here.")
    stated = (whose.patient_id, whose.issuer) if whose else ()
    return Done(done=list(front.take_up(row, person, *stated)))


# -- operations


@router.get("/operations", tags=["operations"], summary="How the site is doing (operations.read)")
def operations(request: Request, person: Person = auth.caller("operations.read")) -> Operations:
    state = management.operation(auth.front_of(request))
    return Operations(
        counts=Count.model_validate(state["counts"]),
        disk_total=state["disk"].total,
        disk_free=state["disk"].free,
        jobs_waiting=len(state["waiting"]),
        workers_alive=state["alive"],
        workers_silent=state["silent"],
        engine_stopped=state["stopped"],
        answer_times=[Bar(name=bar["name"], count=bar["count"]) for bar in state["answers"]],
        delivery_times=[Bar(name=bar["name"], count=bar["count"]) for bar in state["sent"]],
    )


@router.get("/nodes", tags=["operations"], summary="Other systems (operations.read)")
def nodes(request: Request, person: Person = auth.caller("operations.read")) -> list[NodeOut]:
    return [NodeOut.model_validate(node) for node in auth.front_of(request).site.nodes]


@router.post("/nodes/{name}/echo", tags=["operations"], summary="Does it answer? (operations.act)")
def echo(request: Request, name: Name, person: Person = auth.caller("operations.act")) -> Echo:
    answers, said = management.ask_node(auth.front_of(request), person, name)
    return Echo(node=name, answers=answers, said=said)


@router.get("/quarantine", tags=["operations"], summary="What was set aside, and why (operations.read)")
def quarantine(request: Request, person: Person = auth.caller("operations.read")) -> list[QuarantinedOut]:
    return [QuarantinedOut.model_validate(each) for each in management.quarantined(auth.front_of(request))]


@router.post("/engine/resume", tags=["operations"], summary="Let studies be read again (operations.act)")
def resume(request: Request, person: Person = auth.caller("operations.act")) -> Done:
    return Done(done=["resumed"] if auth.front_of(request).site.resume(person.name) else [])


@router.get("/bundle", tags=["models"], summary="The live bundle (models.read)")
def bundle(request: Request, person: Person = auth.caller("models.read")) -> BundleOut:
    live = auth.front_of(request).bundle()
    if live is None:
        raise HTTPException(404, "No bundle is live.")
    return BundleOut(
        name=live.name.name,
        version=live.name.version,
        digest=live.name.digest,
        provider=live.provider,
        created=live.created,
        figures=dict(live.figures),
        card=live.card,
    )


# -- the record of acts


@router.get("/acts", tags=["audit"], summary="The record, newest first (audit.read)")
def acts(
    request: Request,
    who: Annotated[str, Query(max_length=128)] = "",
    kind: Annotated[str, Query(max_length=64)] = "",
    patient: Annotated[str, Query(max_length=128)] = "",
    since: Annotated[str, Query(max_length=40)] = "",
    until: Annotated[str, Query(max_length=40)] = "",
    before: Annotated[int, Query(ge=0, le=1 << 62)] = 0,
    limit: Limit = 100,
    person: Person = auth.caller("audit.read"),
) -> list[ActOut]:
    front = auth.front_of(request)
    found = management.acts(front, management.wanted(front, who, kind, patient, since, until, before), limit)
    return [ActOut.model_validate(each) for each in found]


@router.post("/acts/verify", tags=["audit"], summary="Walk the whole chain (audit.read)")
def verify(request: Request, person: Person = auth.caller("audit.read")) -> Verdict:
    return Verdict.model_validate(management.check_record(auth.front_of(request), person))


@router.get(
    "/acts/export",
    tags=["audit"],
    summary="All of it as NDJSON (audit.read)",
    response_class=StreamingResponse,
    responses={200: {"content": {"application/x-ndjson": {"schema": {"type": "string"}}}}},
)
def export(request: Request, person: Person = auth.caller("audit.read")) -> StreamingResponse:
    return management.exported(auth.front_of(request), person, Wanted())


# -- people


@router.get("/me", tags=["people"], summary="Who this token belongs to, and what it may do")
def me(person: Person = auth.caller()) -> Me:
    return Me(name=person.name, roles=list(person.account.roles), rights=sorted(person.rights))


@router.get("/people", tags=["people"], summary="Accounts (people.manage)")
def people(request: Request, person: Person = auth.caller("people.manage")) -> list[AccountOut]:
    return _accounts(auth.front_of(request).people.accounts())


@router.post("/people", tags=["people"], summary="A new account (people.manage)", status_code=201)
def add(request: Request, new: NewAccount, person: Person = auth.caller("people.manage")) -> AccountOut:
    made = auth.front_of(request).people.add(new.name, new.password, new.roles, person.name)
    return AccountOut.model_validate(made)


@router.patch("/people/{name}", tags=["people"], summary="Change an account (people.manage)")
def change(
    request: Request, name: Name, change: ChangedAccount, person: Person = auth.caller("people.manage")
) -> list[AccountOut]:
    accounts = auth.front_of(request).people
    if change.roles is not None:
        accounts.set_roles(name, change.roles, person.name)
    if change.disabled is not None:
        accounts.set_disabled(name, change.disabled, person.name)
    return _accounts(each for each in accounts.accounts() if each.name == name)


@router.get("/tokens", tags=["people"], summary="My tokens")
def tokens(request: Request, person: Person = auth.caller()) -> list[TokenOut]:
    return [_token(token) for token in auth.front_of(request).people.tokens(person.account)]


@router.post("/tokens", tags=["people"], summary="A new token, by who is logged in", status_code=201)
def make_token(request: Request, new: NewToken, person: Person = auth.owner()) -> MadeToken:
    secret, token = auth.front_of(request).people.make_token(person.account, new.label, new.scopes, new.days)
    return MadeToken(secret=secret, **_token(token).model_dump())


@router.delete("/tokens/{ref}", tags=["people"], summary="Revoke a token of mine", status_code=204)
def revoke_token(request: Request, ref: Ref, person: Person = auth.owner()) -> Response:
    auth.front_of(request).people.revoke_token(person.account, ref)
    return Response(status_code=204)


# -- shapes


def _line(row: Row) -> StudyLine:
    return StudyLine.model_validate(row)


def _study(opened: reading.Open) -> StudyOut:
    shown = opened.shown
    return StudyOut(
        line=_line(opened.row),
        answer=_answer(shown.answer, [each.sop_instance_uid for each in shown.objects]) if shown else None,
        revisions=[entry.revision for entry in opened.history],
        words=[_word(each) for each in opened.words.values()],
        delivered=[DeliveryOut.model_validate(each) for each in shown.delivered] if shown else [],
    )


def _answer(answer: Any, objects: Sequence[str]) -> dict[str, Any]:
    return summary.of_not_for_us(answer, 0.0) if isinstance(answer, NotForUs) else summary.of_result(answer, objects)


def _word(said: Said) -> WordOut:
    word = said.word
    return WordOut(
        revision=word.revision,
        finding=word.finding,
        word=word.word,
        birads=word.birads,
        contour=list(word.contour),
        reason=word.reason,
        who=word.who,
        at=said.at,
    )


def _accounts(accounts: Any) -> list[AccountOut]:
    return [_account(each) for each in accounts]


def _account(account: Account) -> AccountOut:
    return AccountOut.model_validate(account)


def _token(token: Token) -> TokenOut:
    return TokenOut.model_validate(token)
