"""The way in: the first account, logging in and out, and what a person does with the own account."""

from __future__ import annotations

import secrets
from typing import Annotated, Any
from urllib.parse import quote

from fastapi import APIRouter, Form, HTTPException, Request
from starlette.responses import RedirectResponse, Response

from busgen_cds.store.people import ALL_RIGHTS, People, Person, Refused, Right
from busgen_cds.web import auth, render
from busgen_cds.web.front import Front
from busgen_cds.web.oidc import NotVouched, Provider

_HOME: tuple[tuple[Right, str], ...] = (
    ("studies.read", "/worklist"),
    ("operations.read", "/operations"),
    ("audit.read", "/audit"),
)
_NOT_THAT = "The present password is not that, or the account is locked for now."
BACK = "/login/back"  # where the log-in provider sends browsers: registered there
Text = Annotated[str, Form(max_length=256)]

router = APIRouter()


def home(person: Person) -> str:
    return next((path for right, path in _HOME if person.may(right)), "/account")


@router.get("/")
def start(person: Person = auth.page()) -> Response:
    return RedirectResponse(home(person), 303)


# -- the first account


@router.get("/first")
def first(request: Request) -> Response:
    front = auth.front_of(request)
    if not front.people.nobody_yet():
        return RedirectResponse("/login", 303)
    return render.page(request, "first.html", {"problem": ""})


@router.post("/first")
def make_first(request: Request, code: Text, name: Text, password: Text) -> Response:
    front = auth.front_of(request)
    _from_here(request, front)
    expected = front.site.first_code
    if not expected or not secrets.compare_digest(code.strip().encode(), expected.encode()):
        problem = "That is not the code this program showed when it started." if expected else ""
        return render.page(request, "first.html", {"problem": problem}, 403)
    try:
        front.people.add(name, password, ("admin", "operator", "reader"), "first start", first=True)
    except Refused as refused:
        return render.page(request, "first.html", {"problem": str(refused)}, 409)
    return _log_in(request, front, name, password, "", "/worklist")


# -- in and out


@router.get("/login")
def ask(request: Request, next: str = "") -> Response:
    front = auth.front_of(request)
    if front.people.nobody_yet():
        return RedirectResponse("/first", 303)
    return render.page(request, "login.html", {"problem": "", "next": _inside(next)})


@router.post("/login")
def log_in(
    request: Request,
    name: Text,
    password: Text,
    code: Text = "",
    next: Text = "",
) -> Response:
    front = auth.front_of(request)
    _from_here(request, front)
    return _log_in(request, front, name, password, code, _inside(next))


@router.post("/logout")
def log_out(request: Request, person: Person = auth.page()) -> Response:
    front = auth.front_of(request)
    front.people.log_out(request.cookies.get(auth.cookie_name(front), ""))
    response = RedirectResponse("/login", 303)
    response.delete_cookie(
        auth.cookie_name(front), path="/", secure=front.site.secure, httponly=True, samesite="strict"
    )
    response.headers["Clear-Site-Data"] = '"cache"'
    return response


# -- by the hospital's own provider


@router.get("/login/provider")
def ask_provider(request: Request, next: str = "") -> Response:
    front = auth.front_of(request)
    _from_here(request, front)
    begun = _provider(front).begin(_inside(next))
    response = RedirectResponse(begun.address, 303)
    auth.set_flow(response, front, begun.cookie)
    return response


@router.get(BACK)
def back_from_provider(request: Request) -> Response:
    """The provider sends the browser here; it goes on by a page, as no strict cookie follows a foreign redirect."""
    front = auth.front_of(request)
    _slowly(request, front)
    try:
        who, to = _provider(front).finish(request.cookies.get(auth.flow_name(front), ""), request.query_params)
    except NotVouched as refused:
        front.people.note_not_vouched(str(refused), auth.address_of(request))
        return _not_in(request, "The log-in did not hold: begin again.")
    secret = front.people.log_in_vouched(who, auth.address_of(request))
    if secret is None:
        return _not_in(request, "You are known there, but may not come in here: ask this site's administrator.")
    person = front.people.of_session(secret)
    response = render.page(request, "entered.html", {"to": to or (home(person) if person else "/")})
    auth.set_session(response, front, secret)
    response.delete_cookie(auth.flow_name(front), path="/", secure=front.site.secure, httponly=True, samesite="lax")
    return response


def _provider(front: Front) -> Provider:
    if front.site.provider is None:
        raise HTTPException(404, "This site has no log-in provider.")
    return front.site.provider


def _not_in(request: Request, problem: str) -> Response:
    return render.page(request, "login.html", {"problem": problem, "next": ""}, 401)


def _log_in(request: Request, front: Front, name: str, password: str, code: str, to: str) -> Response:
    secret = front.people.log_in(name, password, code, auth.address_of(request))
    if secret is None:
        problem = "Name, password or code is wrong, or the account is locked for now."
        return render.page(request, "login.html", {"problem": problem, "next": to}, 401)
    person = front.people.of_session(secret)
    response = RedirectResponse(to or (home(person) if person else "/"), 303)
    auth.set_session(response, front, secret)
    return response


def _from_here(request: Request, front: Front) -> None:
    if not auth.same_origin(request):
        raise HTTPException(403, "This form is not from our own page.")
    _slowly(request, front)


def _slowly(request: Request, front: Front) -> None:
    if not front.log_ins.take(auth.address_of(request)):
        raise HTTPException(429, "Too many tries from your address: wait a minute.", {"Retry-After": "60"})


def _inside(path: str) -> str:
    """Only a place of our own: never another host."""
    return quote(path, safe="/-._") if path.startswith("/") and not path.startswith(("//", "/\\")) else ""


# -- the own account


@router.get("/account")
def account(request: Request, person: Person = auth.page()) -> Response:
    return _account(request, person)


@router.post("/account/password")
def change_password(request: Request, before: Text, password: Text, person: Person = auth.page()) -> Response:
    front = auth.front_of(request)
    if not _proves(request, person, before):
        return _account(request, person, problem=_NOT_THAT, status=403)
    try:
        front.people.set_password(person.name, password, person.name)
    except Refused as refused:
        return _account(request, person, problem=str(refused), status=409)
    return RedirectResponse("/login", 303)


@router.post("/account/second-factor")
def second_factor(request: Request, key: Text, code: Text, before: Text, person: Person = auth.page()) -> Response:
    if not (person.account.vouched or _proves(request, person, before)):
        return _account(request, person, problem=_NOT_THAT, status=403, key=key)
    try:
        auth.front_of(request).people.start_second_factor(person.name, key, code)
    except Refused as refused:
        return _account(request, person, problem=str(refused), status=409, key=key)
    return RedirectResponse("/account", 303)


def _proves(request: Request, person: Person, password: str) -> bool:
    return auth.front_of(request).people.knows_password(person.name, password, auth.address_of(request))


@router.post("/account/tokens")
def make_token(
    request: Request,
    label: Text,
    days: Annotated[int, Form()],
    ref: Annotated[str, Form(pattern="^[0-9a-f]{32}$")],
    scopes: Annotated[list[str], Form()] = [],  # noqa: B006 - FastAPI copies it
    person: Person = auth.page(),
) -> Response:
    wanted = [right for right in ALL_RIGHTS if right in scopes]
    try:
        secret, _ = auth.front_of(request).people.make_token(person.account, label, wanted, days, ref)
    except Refused as refused:
        return _account(request, person, problem=str(refused), status=409)
    return _account(request, person, secret=secret)


@router.post("/account/tokens/{ref}/revoke")
def revoke_token(request: Request, ref: str, person: Person = auth.page()) -> Response:
    auth.front_of(request).people.revoke_token(person.account, ref)
    return RedirectResponse("/account", 303)


def _account(
    request: Request, person: Person, *, problem: str = "", secret: str = "", key: str = "", status: int = 200
) -> Response:
    front = auth.front_of(request)
    values: dict[str, Any] = {
        "problem": problem,
        "secret": secret,
        "tokens": front.people.tokens(person.account),
        "key": key or People.new_totp_key(),
        "new_ref": secrets.token_hex(16),
        "scopes": [right for right in ALL_RIGHTS if person.may(right)],
    }
    return render.page(request, "account.html", values, status)
