"""The application: routes, headers, and what each failure looks like to whoever asked.

Rules:
- A failure says what happened and what to do; ours gets a number that also stands in the log, and no details.
- The API answers in JSON, pages in HTML, a part of a page in one plain sentence.
- Nothing is fetched from elsewhere: no documentation page with foreign scripts, no fonts, no maps.
"""

from __future__ import annotations

import logging
import secrets
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.staticfiles import StaticFiles
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException as StarletteError
from starlette.responses import JSONResponse, PlainTextResponse, Response

from busgen_cds.errors import Misconfigured, Shredded, Transient, Untrusted
from busgen_cds.store.cases import Unfit
from busgen_cds.store.people import Refused
from busgen_cds.web import (
    api,
    auth,
    entry,
    fhir,
    laboratory,
    live,
    machine,
    management,
    models,
    models_api,
    reading,
    render,
    worklist,
)
from busgen_cds.web.front import Front
from busgen_cds.web.site import NOT_A_DIAGNOSIS, Site

log = logging.getLogger("busgen_cds.web")
STATIC = Path(__file__).parent / "static"
# What is not in the API's description
PAGES = (entry, worklist, reading, management, models, laboratory, live, machine)

_DESCRIPTION = f"""{NOT_A_DIAGNOSIS}. Clinical decision support for breast ultrasound.

Give a token of the account page as `Authorization: Bearer …`. A token has scopes; each call names the one it needs.
Studies are named by an opaque reference; names of patients are nowhere in it."""

# What an exception's type says happens next (see `errors`), as a status.
_STATUS: dict[type[Exception], int] = {
    Transient: 503, Misconfigured: 503, Untrusted: 502, Shredded: 410, Refused: 409, Unfit: 422,
}  # fmt: skip


def create(site: Site, *, slowest: float = auth.SLOWEST_BODY) -> FastAPI:
    """`slowest`: how many seconds the body of a request may take."""
    app = FastAPI(
        title="BUSGen-CDS",
        version=site.version,
        description=_DESCRIPTION,
        openapi_url="/api/v1/openapi.json",
        docs_url=None,
        redoc_url=None,
        lifespan=live.lifespan,
    )
    app.state.front = Front(site)
    app.state.news = live.News(app.state.front)
    for part in PAGES:
        app.include_router(part.router, include_in_schema=False)
    app.include_router(api.router, prefix="/api/v1")
    app.include_router(models_api.router, prefix="/api/v1")
    app.include_router(fhir.router, prefix="/fhir/r4")
    app.mount("/static", StaticFiles(directory=STATIC), name="static")
    app.add_middleware(auth.Guard, secure=site.secure, slowest=slowest)
    app.add_exception_handler(auth.LogInFirst, _log_in)
    app.add_exception_handler(StarletteError, _refusal)
    app.add_exception_handler(RequestValidationError, _not_understood)
    for kind in _STATUS:
        app.add_exception_handler(kind, _known)
    app.add_exception_handler(sa.exc.DataError, _unlike_any)
    app.add_exception_handler(Exception, _ours)
    return app


async def _log_in(request: Request, _: Exception) -> Response:
    return auth.to_log_in(request)


async def _refusal(request: Request, error: Exception) -> Response:
    assert isinstance(error, StarletteError)
    page = not request.url.path.startswith(("/api/", "/fhir/", "/static/"))
    if page and not hasattr(request.state, "person"):  # nobody asked yet who it is: the refusal's page leads on
        request.state.person = await run_in_threadpool(auth.person_of_cookie, request)
    return answer(request, error.status_code, str(error.detail), getattr(error, "headers", None))


async def _not_understood(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    places = "; ".join(f"{'.'.join(map(str, each['loc'][1:]))}: {each['msg']}" for each in error.errors())
    return answer(request, 422, f"Not understood: {places}.")


async def _known(request: Request, error: Exception) -> Response:
    status = next(status for kind, status in _STATUS.items() if isinstance(error, kind))
    return answer(request, status, str(error))


async def _unlike_any(request: Request, _: Exception) -> Response:
    return answer(request, 422, "Not understood: there are characters or numbers in it that no entry here can have.")


async def _ours(request: Request, error: Exception) -> Response:
    number = secrets.token_hex(4)
    log.error("Failure %s at %s %s", number, request.method, auth.route_of(request), exc_info=error)
    response = answer(
        request, 500, f"Something failed here. Nothing was lost; tell your administrator number {number}."
    )
    auth.add_headers(response.headers, request.url.path, auth.front_of(request).site.secure)  # outside of the guard
    return response


def answer(request: Request, status: int, message: str, headers: Any = None) -> Response:
    path = request.url.path
    if path.startswith("/fhir/"):
        return JSONResponse(fhir.outcome(status, message), status, headers, media_type=fhir.MEDIA)
    if path.startswith("/api/"):
        return JSONResponse({"detail": message}, status, headers)
    if request.headers.get("hx-request") or path in ("/health", "/ready", "/metrics"):
        return PlainTextResponse(message, status, headers)
    return render.error(request, status, message, headers)
