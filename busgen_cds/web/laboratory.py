"""The laboratory's page: choose what an image shall show, draw where, watch the images come, take them away.

Rules:
- There only where the training packages are installed; without weights it says what to do.
- Every image is made, none is of a patient, and page and package say so.
- The images lie in memory and nowhere else.
- That images were made, and taken away, are acts.
"""

from __future__ import annotations

import asyncio
import io
import json
import time
import zipfile
from collections.abc import AsyncIterator, Mapping
from typing import Annotated, Any

from fastapi import APIRouter, Form, HTTPException, Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from busgen_cds.store.audit import Act
from busgen_cds.store.people import Person
from busgen_cds.web import auth, render
from busgen_cds.web.bench import Bench, Picture, Run, Studio
from busgen_cds.web.front import Front

MOST_IMAGES = 16
LOOK_EVERY = 0.2  # seconds
BEAT_EVERY = 15.0
_NOTICE = "SYNTHETIC DATA = YES. Every image here was made by a generator; none is of a patient. Not for diagnosis.\n"

router = APIRouter()


def _bench(front: Front) -> Bench:
    if front.bench is None:
        raise HTTPException(404, "The laboratory is not installed here: it comes with the training packages.")
    return front.bench


# -- asking


@router.get("/laboratory")
def show(request: Request, person: Person = auth.page("models.read")) -> Response:
    studio = _bench(auth.front_of(request)).studio
    problem = studio.problem()
    values: dict[str, Any] = {"problem": problem, "most": MOST_IMAGES}
    if not problem:
        values |= {"choices": studio.choices(), "healthy": studio.healthy()}
    return render.page(request, "laboratory.html", values)


@router.get("/laboratory/healthy/{name}.png")
def healthy(request: Request, name: str, person: Person = auth.page("models.read")) -> Response:
    try:
        return Response(_bench(auth.front_of(request)).studio.healthy_png(name), media_type="image/png")
    except KeyError:
        raise HTTPException(404, "There is no such healthy image.") from None


@router.post("/laboratory/runs")
def begin(
    request: Request,
    pathology: Annotated[str, Form(max_length=32)],
    birads: Annotated[str, Form(max_length=32)] = "",
    device: Annotated[str, Form(max_length=64)] = "",
    healthy: Annotated[str, Form(max_length=32)] = "",
    box: Annotated[str, Form(max_length=100)] = "",
    count: Annotated[int, Form(ge=1, le=MOST_IMAGES)] = 4,
    seed: Annotated[int, Form(ge=0, le=2**31)] = 0,
    person: Person = auth.page("models.read"),
) -> Response:
    front = auth.front_of(request)
    bench = _bench(front)
    if problem := bench.studio.problem():
        raise HTTPException(409, problem)
    asked = {"pathology": pathology, "birads": birads, "device": device, "healthy": healthy, "box": box_of(box)}
    _check(bench.studio, asked)
    run = Run(person.account.ref, count, asked, seed)
    bench.begin(run)
    front.note(Act("images asked for", person.name, "", None, {**asked, "count": count, "seed": seed}))
    return JSONResponse({"ref": run.ref}, 202)


def box_of(text: str) -> list[float] | None:
    """left, top, right, bottom in percent of the image → fractions."""
    if not text.strip():
        return None
    try:
        left, top, right, bottom = (float(each) / 100 for each in text.split(","))
    except ValueError:
        raise HTTPException(
            422, "A box is left, top, right and bottom in percent of the image: fill in all four, or none."
        ) from None
    if not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):
        raise HTTPException(422, "The box must lie in the image: left before right, top before bottom, 0 to 100.")
    return [left, top, right, bottom]


def _check(studio: Studio, asked: Mapping[str, Any]) -> None:
    choices = studio.choices()
    for name in ("pathology", "birads", "device"):
        if asked[name] and asked[name] not in choices.get(name, ()):
            raise HTTPException(422, f"This generator knows no {name} {asked[name][:40]!r}.")
    if asked["healthy"] and asked["healthy"] not in studio.healthy():
        raise HTTPException(422, "There is no such healthy image.")
    if asked["pathology"] == "normal" and (asked["box"] or asked["healthy"]):
        raise HTTPException(422, "A normal image has no lesion: no box, no healthy image, or another class.")


# -- watching


@router.get("/laboratory/runs/{ref}/events")
async def events(request: Request, ref: str, person: Person = auth.page("models.read")) -> StreamingResponse:
    run = _bench(auth.front_of(request)).run(ref, person.account.ref)
    return StreamingResponse(_events(run), media_type="text/event-stream")


async def _events(run: Run) -> AsyncIterator[str]:
    said, beat = "", time.monotonic()
    while True:
        over, now = run.over, json.dumps(run.state())
        if now != said:
            said, beat = now, time.monotonic()
            yield f"event: state\ndata: {now}\n\n"
        elif time.monotonic() - beat > BEAT_EVERY:
            beat = time.monotonic()
            yield ": still here\n\n"
        if over:
            return
        await asyncio.sleep(LOOK_EVERY)


@router.get("/laboratory/runs/{ref}/images/{number}.png")
def image(request: Request, ref: str, number: int, person: Person = auth.page("models.read")) -> Response:
    return Response(_picture(request, ref, number, person).image, media_type="image/png")


@router.get("/laboratory/runs/{ref}/masks/{number}.png")
def mask(request: Request, ref: str, number: int, person: Person = auth.page("models.read")) -> Response:
    return Response(_picture(request, ref, number, person).mask, media_type="image/png")


def _picture(request: Request, ref: str, number: int, person: Person) -> Picture:
    run = _bench(auth.front_of(request)).run(ref, person.account.ref)
    if not 1 <= number <= len(run.pictures):
        raise HTTPException(404, "This image is not made yet.")
    return run.pictures[number - 1]


# -- taking away


@router.get("/laboratory/runs/{ref}.zip")
def package(request: Request, ref: str, person: Person = auth.page("models.read")) -> Response:
    front = auth.front_of(request)
    run = _bench(front).run(ref, person.account.ref)
    if not run.pictures:
        raise HTTPException(409, "No image is made yet.")
    front.note(Act("images taken away", person.name, "", None, {"count": len(run.pictures), "seed": run.seed}))
    headers = {"Content-Disposition": f'attachment; filename="busgen-{run.seed}-{run.ref[:8]}.zip"'}
    return Response(packed(run), media_type="application/zip", headers=headers)


def packed(run: Run) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        lines = [{"image": f"images/{n:02d}.png", "mask": f"masks/{n:02d}.png", **each.facts, "synthetic": True}
                 for n, each in enumerate(run.pictures, 1)]  # fmt: skip
        for line, each in zip(lines, run.pictures, strict=True):
            _add(archive, line["image"], each.image)
            _add(archive, line["mask"], each.mask)
        _add(archive, "labels.json", json.dumps(lines, indent=1).encode() + b"\n")
        _add(archive, "README.txt", _NOTICE.encode())
    return out.getvalue()


def _add(archive: zipfile.ZipFile, name: str, data: bytes) -> None:
    """Without the time: the same images are the same package."""
    archive.writestr(zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0)), data)
