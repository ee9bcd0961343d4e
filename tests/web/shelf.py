"""A practice with a shelf: a bundle that came with the product, one that reads along, one shelved, one refused; weeks
of drift. Keys, signatures, statements and bundles are real; what was read is made up."""

from __future__ import annotations

import io
from dataclasses import replace
from datetime import datetime, timedelta

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from PIL import Image, ImageDraw

from busgen_cds import bundle, drift, signing, web
from busgen_cds.bundle import Candidate
from busgen_cds.drift import Limits
from busgen_cds.result import BundleName
from busgen_cds.store import shelf, site_keys
from busgen_cds.store.drift import Drift
from busgen_cds.store.shadow import Shadow
from busgen_cds.store.shelf import Shelf
from tests.vision import readers
from tests.web.practice import Practice, Says

PASSPHRASE = "a passphrase for tests"
RELEASE = signing.KeySigner(Ed25519PrivateKey.from_private_bytes(b"a key for tests, 32 bytes long.."))
REPORT = {
    "tables": [
        {"title": "The judge", "rows": [["accepted: every rule holds"]]},
        {
            "title": "BUS-BRA test",
            "columns": ["figure", "live", "candidate"],
            "rows": [
                ["images (malignant)", "372 (121)", ""],
                ["AUC", "0.921 (0.894 to 0.945)", "0.926 (0.899 to 0.949)"],
                ["change of AUC, paired", "", "+0.005 (−0.006 to +0.016)"],
                ["calibration error", "0.021", "0.019"],
                ["sensitivity at the rule-out score", "0.984", "0.986"],
            ],
        },
    ]
}


def a_candidate(version: str, name: str = "site-reader") -> Candidate:
    files = {**readers.files(), bundle.CARD: f"# {name} {version}\n\nAdapted to this site at night.\n".encode()}
    figures = {"AUC": [0.926, 0.899, 0.949], "sensitivity at the rule-out score": [0.986, 0.965, 0.996]}
    manifest = replace(readers.manifest(files), name=name, version=version, figures=figures)
    return Candidate(manifest, files)


class Room:
    def __init__(self, practice: Practice) -> None:
        self.practice, self.folder = practice, practice.folder
        keys = self.folder / "keys"
        if not keys.exists():
            site_keys.make(keys, PASSPHRASE)
        self.night, self.promoter = site_keys.night(keys / site_keys.NIGHT), keys / site_keys.PROMOTER
        self.verifier = signing.Verifier.of(
            (RELEASE.key.public_key(), frozenset({bundle.KIND})),
            (self.night.key.public_key(), frozenset({bundle.KIND})),
            (site_keys.promoter_public(self.promoter), frozenset({shelf.KIND})),
        )
        home = self.folder / "product"
        a_candidate("1.2", "reader").seal(home, RELEASE)
        self.shelf = Shelf(
            self.folder / "shelf", practice.database, self.verifier, home=lambda: home, clock=practice.clock
        )
        self.shadow = Shadow(practice.database, practice.clock)
        self.drift = Drift(practice.database, Limits(), 200, practice.clock)

    def site(self) -> web.Site:
        return replace(self.practice.site(), bundle=self._live, models=self._models())

    def _models(self) -> web.Models:
        def promote(digest: str, who: str, passphrase: str, heard: int) -> shelf.Standing:
            signer = site_keys.promoter(self.promoter, passphrase)
            return self.shelf.promote(digest, person=who, signer=signer, heard=heard)

        return web.Models(
            self.shelf,
            self.shadow,
            self.drift,
            promote=promote,
            roll_back=lambda who, passphrase, heard: self.shelf.roll_back(
                person=who, signer=site_keys.promoter(self.promoter, passphrase), heard=heard
            ),
            begin_shadow=lambda digest, who: self.shelf.to_shadow(digest, person=who),
            end_shadow=lambda digest, who: self.shelf.end_shadow(digest, person=who),
            withdraw=lambda digest, who, why: self.shelf.withdraw(digest, person=who, reason=why),
            wish=self.wish,
        )

    def _live(self) -> web.LiveBundle:
        opened = self.shelf.live()
        card = opened.files[bundle.CARD].decode()
        return web.LiveBundle(opened.name, "CPUExecutionProvider", "2026-01-02", card, opened.manifest.figures)

    def wish(self, live: str) -> str:
        alarm = self.drift.asked(live, None)
        return f"Adaptation is asked for by drift of {alarm.device or 'all devices'}." if alarm else ""

    # -- verbs

    def shelved(self, version: str, *, plots: bool = False) -> str:
        pictures = {"reliability.png": a_plot()} if plots else {}
        return self.shelf.put(a_candidate(version), report=REPORT, signer=self.night, plots=pictures).digest

    def shadowed(self, version: str) -> str:
        if other := self.shelf.in_shadow():
            self.shelf.end_shadow(other, person="night")
        return self.shelf.to_shadow(self.shelved(version, plots=True), person="phil").digest

    def refused(self, version: str) -> str:
        reasons = ["BUS-BRA test: AUC fell by 0.031, and 0.01 may be lost", "30 % of labels contradict the live reader"]
        return self.shelf.refuse(a_candidate(version), reasons=reasons, report=REPORT).digest

    def read_beside(self, digest: str, study_ref: str, live: Says, said: Says) -> None:
        """A study that both read."""
        entry = self.practice.answers(study_ref, live)
        first = self.practice.results.show(entry.ref)
        assert first is not None
        other = self.practice._answer(study_ref, said, 1)
        name = BundleName("site-reader", "2", digest)
        self.shadow.keep(digest, entry.ref, study_ref, first.answer, replace(other, bundle=name, seconds=1.6), 1.6)  # type: ignore[arg-type]

    def weeks(self, digest: str, count: int = 4, changed: str = "Bolt S9") -> None:
        """A full reference, ordinary weeks, and in the last a scanner that changed."""
        random, now = np.random.default_rng(1), self.practice.clock()
        shares = {"none": 0.3, "3": 0.25, "4A": 0.2, "4B": 0.15, "4C": 0.1}

        def add(device: str, at: datetime, gain: float) -> None:
            self.drift._clock = lambda: at
            vector = drift.features((random.standard_normal((2, 8)) + gain).astype(np.float32))
            category = str(random.choice(list(shares), p=list(shares.values())))
            self.drift.add(digest, device, drift.one(category, float(random.beta(1, 3)), vector))

        for number in range(200):
            add(("Acme E10", changed)[number % 2], now - timedelta(weeks=count), 0.0)
        for week in range(count):
            for number in range(70):
                device = ("Acme E10", changed)[number % 2]
                last = week == count - 1 and device == changed
                add(device, now - timedelta(weeks=count - 1 - week), 1.2 if last else 0.0)
        self.drift._clock = self.practice.clock
        self.drift.raise_alarms(digest)


def a_plot() -> bytes:
    """A reliability diagram, drawn by hand."""
    image = Image.new("RGB", (480, 320), "white")
    pen = ImageDraw.Draw(image)
    pen.rectangle((40, 20, 460, 280), outline="#666")
    pen.line((40, 280, 460, 20), fill="#bbb")
    points = [(40, 278), (120, 236), (210, 182), (300, 120), (390, 58), (460, 24)]
    pen.line(points, fill="#0b6bcb", width=3)
    for x, y in points:
        pen.ellipse((x - 4, y - 4, x + 4, y + 4), fill="#0b6bcb")
    data = io.BytesIO()
    image.save(data, "PNG")
    return data.getvalue()
