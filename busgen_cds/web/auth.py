"""Who is asking, and whether they may: sessions, tokens, forms, limits and the headers of every answer.

Rules:
- A page is reached by a session's cookie, the API also by a bearer token; each route names the right it needs.
- Whatever changes something through a cookie must carry the session's form key and come from our own pages.
- Scripts, styles and pictures come from here alone: nothing inline, nothing from elsewhere, no frames.
- What shows a study is kept in no cache.
- Tokens are made and revoked by who is logged in, never by a token.
- Guessing passwords is slow by account (`store.people`) and by address (here); the API is limited by caller, and who
  gives no valid token by address.
- A request is at most 1 MiB, said or counted, and its body is here within half a minute.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from typing import Annotated, Any
from urllib.parse import quote, urlsplit

from fastapi import Depends, HTTPException, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import MutableHeaders
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from busgen_cds.store.people import Person, Right
from busgen_cds.web.front import Front

UNSAFE = frozenset({"POST", "PUT", "PATCH", "DELETE"})
MOST_BODY = 1 << 20
SLOWEST_BODY = 30.0  # seconds

POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' blob:",
        "connect-src 'self'",
        "form-action 'self'",
        "frame-ancestors 'none'",
        "base-uri 'none'",
    )
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), microphone=(), geolocation=(), payment=(), usb=()",
}

bearer = HTTPBearer(auto_error=False, description="A token made on the account page.")


class LogInFirst(Exception):
    """A page was asked for by nobody we know."""


def front_of(request: Request) -> Front:
    front: Front = request.app.state.front
    return front


def cookie_name(front: Front) -> str:
    return "__Host-busgen" if front.site.secure else "busgen"


def flow_name(front: Front) -> str:
    """The cookie of a log-in that the provider has not answered yet."""
    return f"{cookie_name(front)}-flow"


def set_flow(response: Response, front: Front, sealed: str) -> None:
    """Lax: it must come back with the browser that the provider sends to us."""
    response.set_cookie(
        flow_name(front), sealed, httponly=True, secure=front.site.secure, samesite="lax", path="/", max_age=600
    )


def set_session(response: Response, front: Front, secret: str) -> None:
    response.set_cookie(
        cookie_name(front), secret, httponly=True, secure=front.site.secure, samesite="strict", path="/", max_age=43200
    )


def route_of(request: Request) -> str:
    """What was asked for, without what it was asked of: an address can hold an identifier."""
    return str(getattr(request.scope.get("route"), "path", "a page"))


def address_of(request: Request) -> str:
    return request.client.host if request.client else "unknown"


def person_of_cookie(request: Request) -> Person | None:
    front = front_of(request)
    secret = request.cookies.get(cookie_name(front))
    return front.people.of_session(secret) if secret else None


def same_origin(request: Request) -> bool:
    """A browser says where a form comes from; another site's form is not ours."""
    if request.headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
        return False
    origin = request.headers.get("origin")
    return origin is None or urlsplit(origin).netloc == request.headers.get("host")


async def _form_key(request: Request) -> str:
    given = request.headers.get("x-form-key")
    if given is None and "form" in request.headers.get("content-type", ""):
        given = (await request.form()).get("form_key")  # type: ignore[assignment]
    return given if isinstance(given, str) else ""


async def check_form(request: Request, person: Person) -> None:
    if request.method not in UNSAFE:
        return
    given = await _form_key(request)
    if not same_origin(request) or not secrets.compare_digest(given.encode(), person.form_key.encode()):
        raise HTTPException(403, "This form is not from a page of your session: load the page again.")


def page(right: Right | None = None) -> Any:
    """A person at a browser, with this right."""

    async def find(request: Request) -> Person:
        person = await run_in_threadpool(person_of_cookie, request)
        if person is None:
            raise LogInFirst
        await check_form(request, person)
        return await run_in_threadpool(_allowed, request, person, right)

    return Depends(find)


def caller(right: Right | None = None) -> Any:
    """A program with a token, or a page of ours through its session."""

    async def find(
        request: Request, given: Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)] = None
    ) -> Person:
        front = front_of(request)
        if given:
            person = await run_in_threadpool(front.people.of_token, given.credentials)
        else:
            person = await run_in_threadpool(person_of_cookie, request)
        if not front.calls.take(person.account.ref if person else address_of(request)):
            raise HTTPException(429, "Too many calls: wait a moment.", headers={"Retry-After": "5"})
        if person is None:
            raise HTTPException(401, "Give a valid token.", headers={"WWW-Authenticate": "Bearer"})
        if not given:
            await check_form(request, person)
        return await run_in_threadpool(_allowed, request, person, right)

    return Depends(find)


def owner() -> Any:
    """Somebody who is logged in: a token that made tokens would outlive its day and its revocation."""

    async def find(person: Annotated[Person, caller()]) -> Person:
        if not person.form_key:
            raise HTTPException(403, "Tokens are made and revoked by who is logged in, not by a token.")
        return person

    return Depends(find)


def _allowed(request: Request, person: Person, right: Right | None) -> Person:
    request.state.person = person
    if right is not None and not person.may(right):
        front_of(request).refused(person, right, route_of(request))
        raise HTTPException(403, f"Your account may not do this: it needs the right “{right}”.")
    return person


def to_log_in(request: Request) -> Response:
    if request.headers.get("hx-request"):
        return Response(status_code=401, headers={"HX-Redirect": "/login"})
    wanted = request.url.path if request.method == "GET" and request.url.path != "/" else ""
    return RedirectResponse(f"/login?next={quote(wanted)}" if wanted else "/login", 303)


def add_headers(headers: MutableHeaders, path: str, secure: bool) -> None:
    """What every answer carries, whoever gives it."""
    for name, value in HEADERS.items():
        headers.setdefault(name, value)
    if not path.startswith("/static/"):
        headers.setdefault("Cache-Control", "no-store")
    if secure:
        headers["Strict-Transport-Security"] = "max-age=31536000"


class Guard:
    """Around every request: how much comes in, how long that may take, and the headers of what goes out."""

    def __init__(self, app: ASGIApp, secure: bool, slowest: float = SLOWEST_BODY) -> None:
        self.app, self.secure, self.slowest = app, secure, slowest

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                add_headers(MutableHeaders(scope=message), scope["path"], self.secure)
            await send(message)

        if _said_length(scope) > MOST_BODY:
            await PlainTextResponse("That is more than is taken here.", 413)(scope, receive, send_with_headers)
        else:
            await self.app(scope, _measured(receive, self.slowest), send_with_headers)


def _said_length(scope: Scope) -> int:
    said = dict(scope["headers"]).get(b"content-length", b"0")
    return int(said) if said.isdigit() else 0


def _measured(receive: Receive, slowest: float) -> Receive:
    """The same, but no more and no slower than is taken here."""
    taken, whole, until = 0, False, time.monotonic() + slowest

    async def receive_some() -> Message:
        nonlocal taken, whole
        if whole:  # what comes now is only that the other side left
            return await receive()
        try:
            message = await asyncio.wait_for(receive(), max(0.0, until - time.monotonic()))
        except TimeoutError:
            raise HTTPException(408, "The request did not arrive in time: send it again.") from None
        taken += len(message.get("body", b""))
        whole = not message.get("more_body", False)
        if taken > MOST_BODY:
            raise HTTPException(413, "That is more than is taken here.")
        return message

    return receive_some
