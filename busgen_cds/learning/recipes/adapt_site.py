"""A night's run over a site's cases, stage by stage; each reads what the one before left in the run's folder.

    cases → adapter → generated images → privacy report → members → candidate → verdict

Rules:
- Every stage may be begun again at any time: what it left behind is whole or is made anew, and the same every time.
- The site's test patients are looked at by the judge alone; a quarter of the teaching patients calibrates.
- Half of the teaching patients, these among them, are held back from the generator, as the strangers of its privacy
  audit; where they are too few for one, no generator is adapted. Images that the audit does not find clean are removed
  before a reader is trained. The report says either.
- One person may have two ids: a teaching patient who shows a test patient's very images is that patient, and left out.
- A site without a generator adapts its reader without generated images of its own; the report says so.
- A candidate is put together as the live reader is: so many members, the same of them drawing, mirrored or not.
- The release's images take part in training and calibration where generated images have a share of the lessons; those
  of them that judge are never among these.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from busgen_cds import bundle, signing
from busgen_cds.bundle import Bundle, Candidate
from busgen_cds.errors import Misconfigured
from busgen_cds.learning import calibrate, checkpoint, data, embed, export, figures, judge, release, tasks
from busgen_cds.learning.generator import ADAPTER as ADAPTER_FILE
from busgen_cds.learning.generator import VARIOUS, Generator
from busgen_cds.learning.judge import Evidence, Material, Read, Rules, Verdict
from busgen_cds.learning.recipes import adapt_reader, audit, fewshot, make_bundle, synthesise, value

SITE = "site"
CASES, SHOTS, ADAPTER, IMAGES, PRIVACY = "cases", "shots", "adapter", "images", "privacy.json"
MEMBERS, LESSONS, CANDIDATE, VERDICT, SKIPPED = "members", "lessons", "candidate", "verdict.json", "skipped.json"
VAL_SHARE = 4  # one teaching patient in so many calibrates
GENERATOR_SHARE = 2  # one teaching patient in so many is held back from the generator: all who calibrate are among them
JUDGING = 3  # one release image in so many judges, where no real test set is at hand


@dataclass(frozen=True)
class Settings:
    start: tuple[Path, ...]  # members of the live reader, to go on from
    release: Path | None = None  # folder of the release's generated images, with labels
    release_name: str = ""  # what the report calls it
    data: Path | None = None  # the real data that the release was trained on, where a site has them
    generator: Path | None = None
    init: Path | None = None  # ImageNet encoder, a second embedding for the audit
    reader: adapt_reader.Settings = field(default_factory=adapt_reader.Settings)
    adapter: fewshot.Settings = field(default_factory=fewshot.Settings)
    generated: int = 200
    strangers: int = (
        20  # patients with a lesion to hold back from it; with fewer, one member in twenty outdoes them all
    )
    audit: audit.Settings = field(default_factory=audit.Settings)
    rules: Rules = field(default_factory=Rules)
    sweeps: int = 20
    sweep_frames: int = 24
    threads: int = 1


# ---- The generator


def adapt_generator(run: Path, settings: Settings) -> str:
    """LoRA on the site's own images; says why not, where it is not done."""
    if settings.generator is None:
        return _skip(run, "no generator is at hand")
    if not settings.reader.generated:
        return _skip(run, "the generator was not adapted: generated images have no share of the lessons")
    if (run / ADAPTER / ADAPTER_FILE).exists():
        return ""
    shots, strangers = _sides(run)
    if (patients := len({row.patient for row in strangers})) < settings.strangers:
        return _skip(
            run,
            f"the generator was not adapted: {patients} teaching patients with a lesion can be held back from it, and"
            f" its privacy audit takes {settings.strangers} to compare with",
        )
    _manifest(run / SHOTS, [value.moved(row, run / CASES) for row in shots])
    _manifest(run / SHOTS / "and strangers", [value.moved(row, run / CASES) for row in (*shots, *strangers)])
    how = dataclasses.replace(settings.adapter, shots=min(len(shots), fewshot.MOST))
    torch.set_num_threads(settings.threads)
    try:
        makes, gate = Generator.load(settings.generator), release.of(settings.generator)
        fewshot.adapt(makes, run / SHOTS, _task(), run / ADAPTER, how, gate=gate)
    except Misconfigured as why:
        return _skip(run, f"the generator was not adapted: {why}")
    return ""


def _sides(run: Path) -> tuple[list[data.Row], list[data.Row]]:
    """Teaching cases with a drawn lesion: the generator's to learn from, and those of patients held back from it."""
    teaching = teachers(run)[0]
    held, lesions = _one_in(GENERATOR_SHARE, teaching), [row for row in teaching if row.lesion and row.outlined]
    return [r for r in lesions if r.patient not in held], [r for r in lesions if r.patient in held]


def teachers(run: Path) -> tuple[list[data.Row], list[data.Row]]:
    """The cases that teach; and, left out of them, all of those patients who show an image of a test patient."""
    rows = data.read_manifest(run / CASES)
    shown = {row.image: signing.digest((run / CASES / row.image).read_bytes()) for row in rows}
    tested = {shown[row.image] for row in rows if row.split == "site-test"}
    teaching = [row for row in rows if row.split == "train"]
    same = {row.patient for row in teaching if shown[row.image] in tested}
    return [r for r in teaching if r.patient not in same], [r for r in teaching if r.patient in same]


def _task() -> fewshot.Source:
    classes = tuple(tasks.TaskClass(name, (name,)) for name in ("benign", "malignant"))
    named = tuple(each.name for each in classes)
    return fewshot.Source(tasks.Task("site", "pathology", classes), (SITE,), ("train",), named, fewshot.MOST, "")


def generate(run: Path, settings: Settings) -> str:
    """Images of the adapted generator; each passes the release filter, where the generator has one."""
    if settings.generator is None or _skipped(run):
        return ""
    adapter = run / ADAPTER / ADAPTER_FILE
    gate = release.of(settings.generator, adapter) or release.of(settings.generator)
    makes = Generator.load(settings.generator, adapter=adapter)
    used = {row.labels.get("device", "") for row in data.read_manifest(run / CASES)}
    how = synthesise.Settings(
        count=settings.generated,
        devices=tuple(sorted(used & set(makes.card.vocabulary.names["device"]))),  # a shot showed each
        filtered=gate is not None,
        shard=32,
        sampling=VARIOUS,
    )
    torch.set_num_threads(settings.threads)
    synthesise.generate(makes, run / IMAGES, how, gate)
    return ""


def audit_privacy(run: Path, settings: Settings) -> str:
    """Why the generated images may not be used: then none is. Empty: they may, or there are none."""
    if settings.generator is None or _skipped(run):
        return ""
    if not (run / PRIVACY).exists():
        torch.set_num_threads(settings.threads)
        makes = Generator.load(settings.generator, adapter=run / ADAPTER / ADAPTER_FILE)
        shots = fewshot.learnt_from(run / ADAPTER / ADAPTER_FILE, data.read_manifest(run / SHOTS), _task())
        found = audit.audit(
            makes, "the site's adapter", run / SHOTS / "and strangers", run / IMAGES,
            embed.for_copies(makes.coder, settings.init, None), settings.audit, None, shots,
        )  # fmt: skip
        checkpoint.write_text(run / PRIVACY, found.to_json())
    if why := _unclean(run):
        for folder in (run / IMAGES, run / ADAPTER):
            shutil.rmtree(folder, ignore_errors=True)
        return _skip(run, f"the generator's images took no part: {why}")
    return ""


def _unclean(run: Path) -> str:
    """What the privacy report does not find clean; without a report nothing is."""
    if not (run / PRIVACY).exists():
        return "the generated images were not audited"
    report = json.loads((run / PRIVACY).read_text(encoding="utf-8"))
    if not report["findings"]:
        return "the privacy audit looked at nothing"
    for verdict in ("fails", "concludes nothing"):
        if attacks := [f["attack"] for f in report["findings"] if f["verdict"] == verdict]:
            return f"the privacy audit {verdict}: {', '.join(attacks)}"
    return ""


def _skip(run: Path, reason: str) -> str:
    checkpoint.write_json(run / SKIPPED, reason)
    return reason


def _skipped(run: Path) -> str:
    path = run / SKIPPED
    return str(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else ""


# ---- The reader


def train(run: Path, settings: Settings, live: Bundle) -> None:
    """Each member goes on from where it was, over the cases with the release's images among them."""
    check_starts(settings, live)
    root, replay = assemble(run, settings), run / LESSONS / "replay"
    for k, start in enumerate(settings.start):
        out = run / MEMBERS / str(k)
        if not (out / "member.safetensors").exists():
            how = dataclasses.replace(settings.reader, seed=settings.reader.seed + k, threads=settings.threads)
            adapt_reader.adapt(start, root, (SITE,), out, how, replay if _any(replay) else None)


def check_starts(settings: Settings, live: Bundle) -> None:
    """Each checkpoint that a night begins from is a member's, and there are as many as the live reader has."""
    members = len(live.manifest.settings.get("members", settings.start))
    if not settings.start or len(settings.start) != members:
        raise Misconfigured(
            f"adaptation.start names {len(settings.start)} checkpoints, and the live reader has {members} members: "
            "name every checkpoint of its release, in their order."
        )
    for start in settings.start:
        member = adapt_reader.open_member(start)
        try:
            adapt_reader.reader_of(member)
        except (KeyError, TypeError, RuntimeError) as other:
            raise Misconfigured(
                f"adaptation.start: {start} is no reader's checkpoint: name those of the live reader's release."
            ) from other


def assemble(run: Path, settings: Settings) -> Path:
    """One manifest of cases, generated and release images; and, apart, those that are replayed in every batch."""
    root = run / LESSONS
    if (root / "manifest.csv").exists():
        return root
    shutil.rmtree(root, ignore_errors=True)
    made = [value.moved(r, run / IMAGES) for r in data.read_manifest(run / IMAGES)] if _any(run / IMAGES) else []
    rows = teachers(run)[0]
    held = _one_in(VAL_SHARE, rows)
    ours = [value.moved(r, run / CASES) | {"split": "val" if r.patient in held else "train"} for r in rows]
    replays = settings.reader.generated > 0
    known = _lessons_of(settings.release, settings.data is not None) if settings.release and replays else []
    known = [r for r in known if r["split"] == "train"]
    replayed = [r | {"source": data.GENERATED} for r in (*made, *(r for r in known if not _calibrates(r)))]
    _manifest(root / "replay", replayed)
    calibrating = [
        r | {"source": SITE, "split": "val", "patient": f"release-{r['image']}"} for r in known if _calibrates(r)
    ]
    _manifest(root, [*ours, *calibrating, *replayed])
    return root


def _calibrates(record: Mapping[str, str]) -> bool:
    return data.fold_of(record["image"].rpartition("/")[2], VAL_SHARE) == 0


def judges(row: data.Row) -> bool:
    """Whether this image of the release judges, where no real test set is at hand."""
    return data.fold_of(f"judge {row.image}", JUDGING) == 0


def _one_in(share: int, rows: Sequence[data.Row]) -> set[str]:
    """One patient in so many, among those with a cancer and among the others."""
    malignant = {row.patient for row in rows if row.malignant}
    sides = (malignant, {row.patient for row in rows} - malignant)
    ordered = [sorted(side, key=lambda name: signing.digest(name.encode())) for side in sides]
    return {name for side in ordered for name in side[share - 1 :: share]}


def _lessons_of(folder: Path, all_of_them: bool) -> list[dict[str, str]]:
    """The release's images that do not judge."""
    rows = data.read_manifest(folder)
    return [value.moved(r, folder) for r in rows if all_of_them or not judges(r)]


def _any(folder: Path) -> bool:
    path = folder / data.MANIFEST
    return path.exists() and len(path.read_text(encoding="utf-8").splitlines()) > 1


def _manifest(folder: Path, rows: Sequence[Mapping[str, str]]) -> None:
    data.write_table(folder / data.MANIFEST, rows, data.COLUMNS)


def candidate_of(settings: Settings, live: Bundle, run: Path, name: str, version: str, created: str) -> Candidate:
    """Export, parity, calibration, thresholds and gate; kept in the run, unsigned."""
    kept = read_candidate(run)
    if kept is not None:
        return kept
    members = [run / MEMBERS / str(k) / "member.safetensors" for k in range(len(settings.start))]
    choice = make_bundle.Choice(
        name,
        version,
        datetime.date.fromisoformat(created),
        **_put_together(live),
        sweeps=settings.sweeps,
        sweep_frames=settings.sweep_frames,
        threads=settings.threads,
    )
    torch.set_num_threads(settings.threads)
    made = make_bundle.make(assemble(run, settings), members, choice, None)
    partial = run / f"{CANDIDATE}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    (partial / "manifest.json").write_bytes(made.manifest.to_bytes())
    for file, content in made.files.items():
        (partial / file).write_bytes(content)
    partial.rename(run / CANDIDATE)
    return made


def _put_together(live: Bundle) -> dict[str, Any]:
    """Who draws the outline, whether mirrored views are read, and the floor of the attention."""
    said = live.manifest.settings
    return {name: said[name] for name in ("mirrored", "drawing", "floor") if name in said}


def read_candidate(run: Path) -> Candidate | None:
    folder = run / CANDIDATE
    if not folder.exists():
        return None
    manifest = bundle.Manifest.from_bytes((folder / "manifest.json").read_bytes())
    files = {name: (folder / name).read_bytes() for name in manifest.files}
    if any(signing.digest(content) != manifest.files[name] for name, content in files.items()):
        raise Misconfigured(f"The candidate in {folder} was altered: remove the folder, and adapt again.")
    return Candidate(manifest, files)


# ---- The judge


def verdict(run: Path, settings: Settings, live: Bundle) -> Verdict:
    """Both readers over the locked sets, and the rules over what they found."""
    path = run / VERDICT
    if not path.exists():
        made = read_candidate(run)
        assert made is not None
        found = judge.judge(evidence(run, settings, live, made), settings.rules)
        notes = [
            {"title": "The release set", "rows": [[_which(settings)]]},
            *_left_out(run),
            {"title": "The generator", "rows": [[_skipped(run) or "adapted; its images took part"]]},
        ]
        checkpoint.write_json(path, {"reasons": found.reasons, "tables": [*found.tables, *notes]})
    document = json.loads(path.read_text(encoding="utf-8"))
    return Verdict(tuple(document["reasons"]), tuple(document["tables"]))


def _left_out(run: Path) -> list[Mapping[str, Any]]:
    twins = teachers(run)[1]
    said = f"{len(twins)} cases of {len({row.patient for row in twins})}: they show images of test patients"
    return [{"title": "Teaching patients left out", "rows": [[said]]}] if twins else []


def evidence(run: Path, settings: Settings, live: Bundle, made: Candidate) -> Evidence:
    readers = (_Opened.of(live.manifest, live.files, settings), _Opened.of(made.manifest, made.files, settings))
    rows = data.read_manifest(run / CASES)
    test = data.load(run / CASES, [r for r in rows if r.split == "site-test"])
    taught = data.load(run / CASES, teachers(run)[0])
    sets = tuple(_read(name, images, readers) for name, images in _release_sets(settings))
    return Evidence(
        _read("the site's test patients", test, readers),
        sets,
        _material(taught, readers[0]),
        _unclean(run) if _any(run / IMAGES) else "",
    )


def _release_sets(settings: Settings) -> list[tuple[str, data.Images]]:
    found = []
    if settings.data is not None:
        rows = [r for r in data.read_manifest(settings.data) if r.split == "test" and r.source == "busbra"]
        found.append(("the release's real test split (BUS-BRA)", data.load(settings.data, rows)))
    if settings.release is not None:
        rows = data.read_manifest(settings.release)
        judging = [r for r in rows if judges(r)] if settings.data is None else []
        if judging:
            found.append(("the release's synthetic images", data.load(settings.release, judging)))
    return found


def _which(settings: Settings) -> str:
    """Which locked set judged, in words."""
    if settings.data is not None:
        replayed = settings.release_name if settings.reader.generated else "nothing"
        return f"the test split of the real data in {settings.data}; replayed: {replayed}"
    return f"generated images, no real ones: {settings.release_name or settings.release}"


@dataclass(frozen=True)
class _Opened:
    """A reader as the judge uses it."""

    manifest: bundle.Manifest
    run: export.Run = field(repr=False)
    gate: calibrate.Gate = field(repr=False)

    @classmethod
    def of(cls, manifest: bundle.Manifest, files: Mapping[str, bytes], settings: Settings) -> _Opened:
        from safetensors.numpy import load

        gate = load(files[bundle.DOMAIN])
        run = export.open_graph(files[bundle.NETWORK], settings.threads)
        return cls(manifest, run, calibrate.Gate(gate["mean"], gate["whiten"]))

    def log_odds(self, read: calibrate.Readings) -> NDArray[np.float64]:
        return self.manifest.calibration.scale * read.malignancy + self.manifest.calibration.offset

    def strange(self, read: calibrate.Readings) -> int:
        """Images beyond the gate: it would decline them."""
        return int((self.gate.distance(read.embedding) > self.manifest.thresholds.domain).sum())

    def overlap(self, read: calibrate.Readings, images: data.Images) -> NDArray[np.float64]:
        """Of each lesion whose outline is known."""
        drawn = np.array([bool(row.mask) for row in images.rows], np.bool_) & (images.lesion == 1)
        return figures.dice(read.mask[drawn] > self.manifest.thresholds.mask, calibrate.half(images.mask[drawn]))

    @property
    def rule_out(self) -> float:
        return make_bundle.lowest_suspicion(self.manifest.thresholds)


def _read(name: str, images: data.Images, readers: tuple[_Opened, _Opened]) -> Read:
    live, made = readers
    if not images.rows:
        return Read(name, np.zeros(0), np.zeros(0), images.malignant, np.zeros(0, np.str_), np.zeros(0, np.str_))
    before, after = (calibrate.read(reader.run, images.image) for reader in readers)
    groups = np.array([row.labels.get("device", "") for row in images.rows])
    return Read(
        name, live.log_odds(before), made.log_odds(after), images.malignant, images.patients, groups,
        live.rule_out, made.rule_out, live.overlap(before, images), made.overlap(after, images),
        live.strange(before), made.strange(after),
    )  # fmt: skip


def _material(images: data.Images, live: _Opened) -> Material:
    read = calibrate.read(live.run, images.image)
    pictures = [image.tobytes() for image in images.image]
    copies = len(pictures) - len(set(pictures))
    return Material(live.log_odds(read), images.malignant, images.patients, copies, live.strange(read))
