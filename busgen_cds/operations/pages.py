"""The pages and the API of a site: what they read of it, and the verbs they may use."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import secrets
from collections.abc import Callable
from dataclasses import replace

from fastapi import FastAPI

from busgen_cds import app, web
from busgen_cds.app import Site
from busgen_cds.bundle import CARD, Bundle
from busgen_cds.dicom import outbox, screen
from busgen_cds.dicom.screen import Screen
from busgen_cds.errors import Misconfigured, Shredded, Untrusted
from busgen_cds.operations import learning_loop
from busgen_cds.result import Answer
from busgen_cds.settings import Settings
from busgen_cds.store import checkpoints, vault
from busgen_cds.store.people import People
from busgen_cds.store.shelf import Standing

log = logging.getLogger("busgen_cds.operations.pages")


def of(site: Site, first_code: str = "") -> FastAPI:
    """The application; who knows the code may make the first account."""
    chosen = site.settings
    shown = Screen(site.inbox.instances, site.inbox.open)

    return web.create(
        web.Site(
            name=chosen.site.name,
            database=site.database,
            vault=site.vault,
            folder=chosen.path(chosen.storage.folder),
            bundle=_Live(site),
            slides=shown.slides,
            picture=shown.picture,
            evidence=screen.evidence,
            confirm=lambda word, findings: learning_loop.confirm(site, word, findings),
            retry=lambda study_ref, who: site.desk.retry(study_ref, who=who),
            release=lambda study_ref, who, whose: site.desk.release(site.inbox, study_ref, who=who, patient=whose),
            resume=lambda who: site.desk.resume(who=who),
            echo=lambda name: outbox.echo(app.node(chosen, name)),
            nodes=tuple(
                web.Node(each.name, each.url or f"{each.ae_title}@{each.host}:{each.port}", _gets(chosen, each.name))
                for each in chosen.nodes
            ),
            checkpoints=lambda: checkpoints.kept(chosen.checkpoints),
            checks={"bundle": lambda: site.shelf.live().name.digest[:12]},
            models=_models(site),
            receives=web.Receives(
                chosen.listener.ae_title, chosen.listener.port, [peer.ae_title for peer in chosen.listener.allow]
            ),
            viewer=chosen.web.viewer,
            first_code=first_code,
            secure=chosen.web.secure,
            provider=_provider(chosen, site),
            studio=_studio(chosen),
            triage=site.triage,
        )
    )


def _studio(chosen: Settings) -> Callable[[], web.Studio] | None:
    """Opens what makes images, where the training packages are installed."""
    if importlib.util.find_spec("torch") is None:
        return None

    def opened() -> web.Studio:
        from busgen_cds.learning.studio import Studio

        return Studio(chosen.path(chosen.models.generator)) if chosen.models.generator else Studio()

    return opened


def _provider(chosen: Settings, site: Site) -> web.Provider | None:
    """Who vouches for people, if the site named somebody; its roles are checked when settings are read."""
    said = chosen.web.oidc
    if said is None:
        return None
    registration = web.Registration(
        issuer=said.issuer,
        client_id=said.client_id,
        redirect=f"{chosen.web.address}{web.BACK}",
        secret=vault.secret(app.anchored(chosen, said.client_secret)) if said.client_secret else "",
        label=said.label,
        scopes=said.scopes,
        name_claim=said.name_claim,
        role_claim=said.role_claim,
        roles=said.roles,
        authority=chosen.path(said.authority) if said.authority else None,
    )
    return web.Provider(registration, site.vault)


def first_code(site: Site) -> str:
    """A code for the first account, while there is none; empty afterwards."""
    return secrets.token_urlsafe(9) if People(site.database, site.vault).nobody_yet() else ""


def _gets(chosen: Settings, name: str) -> str:
    words = {"sr": "report", "sc": "capture", "seg": "segmentation", "pr": "presentation state"}
    return ", ".join(words[kind] for each in chosen.destinations if each.node == name for kind in each.kinds)


def _models(site: Site) -> web.Models:
    shelf = site.shelf
    return web.Models(
        shelf=shelf,
        shadow=site.shadow,
        drift=site.drift,
        promote=lambda digest, who, passphrase, heard: app.promote(
            site, digest, person=who, passphrase=passphrase, heard=heard
        ),
        roll_back=lambda who, passphrase, heard: app.roll_back(site, person=who, passphrase=passphrase, heard=heard),
        begin_shadow=lambda digest, who: shelf.to_shadow(digest, person=who),
        end_shadow=lambda digest, who: shelf.end_shadow(digest, person=who),
        withdraw=lambda digest, who, why: shelf.withdraw(digest, person=who, reason=why),
        wish=lambda live: learning_loop.wish(site, live),
    )


class _Live:
    """The live bundle as pages show it: verified when another word is said, and remembered until the next."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self._shown: tuple[Standing, web.LiveBundle | None] | None = None
        self._ran: tuple[str, str, str] = "", "", ""  # the newest result, the bundle that made it, what it ran on

    def __call__(self) -> web.LiveBundle | None:
        standing = self._site.shelf.standing()
        if self._shown is None or self._shown[0] != standing:
            self._shown = standing, self._look()
        live = self._shown[1]
        return replace(live, provider=self._provider(live)) if live else None

    def _provider(self, live: web.LiveBundle) -> str:
        """What the newest result of this bundle says that it ran on; until there is one, what was asked for."""
        results = self._site.results
        newest = next((each for each in results.listing(limit=20) if each.outcome != "not-for-us"), None)
        if newest is not None and newest.ref != self._ran[0]:
            answer = None
            with contextlib.suppress(Shredded):
                shown = results.show(newest.ref)
                answer = shown.answer if shown else None
            if isinstance(answer, Answer):
                self._ran = newest.ref, answer.bundle.digest, answer.provider
        return self._ran[2] if self._ran[1] == live.name.digest else live.provider

    def _look(self) -> web.LiveBundle | None:
        try:
            return _described(self._site.shelf.live(), self._site.settings)
        except (Untrusted, Misconfigured) as error:
            log.error("No bundle is live: %s", error)
            return None


def _described(opened: Bundle, chosen: Settings) -> web.LiveBundle:
    manifest = opened.manifest
    return web.LiveBundle(
        name=opened.name,
        provider=f"nothing read yet; device = {chosen.reader.device}",
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
