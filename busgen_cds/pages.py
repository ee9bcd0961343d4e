"""The pages and the API of a site: what they read of it, and the verbs they may use."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from functools import cache

from fastapi import FastAPI

from busgen_cds import app, web
from busgen_cds.app import Site
from busgen_cds.bundle import CARD, Bundle
from busgen_cds.dicom import outbox, screen
from busgen_cds.dicom.screen import Screen
from busgen_cds.settings import Settings
from busgen_cds.store.cases import Cases
from busgen_cds.store.people import People


def of(site: Site, first_code: str = "") -> FastAPI:
    """The application; who knows the code may make the first account."""
    chosen = site.settings
    shown = Screen(site.inbox.instances, site.inbox.open)
    words = Cases(site.database, site.vault)

    return web.create(
        web.Site(
            name=chosen.site.name,
            database=site.database,
            vault=site.vault,
            folder=chosen.path(chosen.storage.folder),
            bundle=cache(lambda: _live(chosen)),
            slides=shown.slides,
            picture=shown.picture,
            evidence=screen.evidence,
            confirm=lambda word, findings: words.say(word, findings=findings),
            retry=lambda study_ref, who: site.desk.retry(study_ref, who=who),
            release=lambda study_ref, who: site.desk.release(site.inbox, study_ref, who=who),
            resume=lambda who: site.desk.resume(who=who),
            echo=lambda name: outbox.echo(app.node(chosen, name)),
            nodes=tuple(
                web.Node(each.name, each.url or f"{each.ae_title}@{each.host}:{each.port}", _gets(chosen, each.name))
                for each in chosen.nodes
            ),
            checks=_ready(chosen),
            viewer=chosen.web.viewer,
            first_code=first_code,
            secure=chosen.web.secure,
        )
    )


def first_code(site: Site) -> str:
    """A code for the first account, while there is none; empty afterwards."""
    return secrets.token_urlsafe(9) if People(site.database, site.vault).nobody_yet() else ""


def _gets(chosen: Settings, name: str) -> str:
    words = {"sr": "report", "sc": "capture", "seg": "segmentation", "pr": "presentation state"}
    return ", ".join(words[kind] for each in chosen.destinations if each.node == name for kind in each.kinds)


def _ready(chosen: Settings) -> dict[str, Callable[[], str]]:
    return {"bundle": lambda: app.open_bundle(app.bundle_folder(chosen)).name.digest[:12]}


def _live(chosen: Settings) -> web.LiveBundle:
    opened = app.open_bundle(app.bundle_folder(chosen))
    manifest = opened.manifest
    return web.LiveBundle(
        name=opened.name,
        provider=f"{chosen.reader.device} (each result names what it ran on)",
        created=manifest.created,
        card=opened.files[CARD].decode(),
        figures=manifest.figures,
        facts=_facts(opened, chosen.site.prevalence),
    )


def _facts(opened: Bundle, prevalence: float) -> dict[str, str]:
    manifest = opened.manifest
    return {
        "Trained on": ", ".join(manifest.trained_on) or "not stated",
        "Calibrated at": f"{manifest.calibration.prevalence:.1%} cancers; this site states {prevalence:.1%}",
        "Never “3” from a score of": f"{manifest.thresholds.rule_out:.3f}",
    }
