"""How much a generator gives away of the images it learnt from: attacks, each beside its control.

Rules:
- Every figure has an interval, and every attack has shown that it works: on an over-trained generator that is known
  to remember (the positive control), and on copies planted among the generated images.
- An attack that does not catch its control concludes nothing: "not measured" is not "safe".
- Distances are judged against those of held-out patients' images to the training images, never against zero.
- Too few images conclude nothing either.
- Everything that is compared has the decoder's trace: a generator can only draw what its decoder draws, so copies are
  looked for among training images as it would draw them. Against the images themselves a perfect memory looks far off.
- A copy may be mirrored or cropped; two embeddings at least are looked at, one of which the release filter never used.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from busgen_cds.learning import embed, figures, questions
from busgen_cds.learning.embed import Embedding, Squares
from busgen_cds.learning.figures import Interval
from busgen_cds.learning.generator import Generator
from busgen_cds.learning.questions import Odds

COPY_PERCENTILE = 1.0  # of the distances from held-out patients to the training images
MOST_COPIES = 0.01
MOST_MEMBERSHIP = 0.55
CONTROL_MEMBERSHIP = 0.75
MOST_FOUND = 0.05  # members found at 1 % false alarms
FOUND = 0.9  # share of planted copies that an attack must find to conclude anything
FEWEST = 100  # generated images: fewer say nothing of a rate of one in a hundred
SEEN_BESIDE = ("birads", "device")  # labels that are no class: an image's class is its pathology, or a task's own
PLANTED = "control: copies planted among the generated images"
OVERTRAINED = "control: an over-trained generator"
Verdict = Literal["passes", "fails", "concludes nothing"]


@dataclass(frozen=True)
class Seen:
    """Images that a generator did or did not learn from."""

    drawn: Squares = field(repr=False)  # as the generator's decoder draws them
    patients: NDArray[np.str_] = field(repr=False)
    examples: Sequence[questions.Example] = field(repr=False, default=())  # the same, encoded; for attacks on the loss

    def __len__(self) -> int:
        return len(self.drawn)


@dataclass(frozen=True)
class Suspect:
    """A generator under attack, and what an attacker may hold of it."""

    name: str
    makes: Generator = field(repr=False)
    members: Seen
    strangers: Seen  # held-out patients
    generated: Squares = field(repr=False)


@dataclass(frozen=True)
class Finding:
    """One attack on one generator."""

    attack: str
    figure: str
    value: Interval
    control: Interval  # the same figure on the generator or images that are known to leak
    bar: float
    verdict: Verdict
    note: str = ""


class Attack(Protocol):
    def __call__(
        self, suspect: Suspect, control: Suspect | None, embeddings: Mapping[str, Embedding]
    ) -> list[Finding]: ...


# Copies


def distances(images: Squares, known: Squares, embedding: Embedding) -> NDArray[np.float32]:
    """From each image to the nearest known one, mirrored and cropped ones included."""
    variants = [known, embed.mirrored(known), embed.closer(known), embed.mirrored(embed.closer(known))]
    return embed.nearest(embedding(images), np.concatenate([embedding(v) for v in variants]))[0]


def copies(suspect: Suspect, control: Suspect | None, embeddings: Mapping[str, Embedding]) -> list[Finding]:
    """Generated images nearer to a training image than held-out patients' are; and the other way round."""
    found = []
    for name, embedding in embeddings.items():
        limit = copy_threshold(suspect, embedding)
        rate, planted = copy_rate(suspect, embedding, limit), planted_rate(suspect, embedding, limit)
        caught = planted.value >= FOUND and len(suspect.generated) >= FEWEST
        found += [
            _finding(f"copies ({name})", "share of generated images", rate, planted, MOST_COPIES, caught, PLANTED),
            copied(suspect, control, name, embedding, caught),
        ]
    return found


def copied(suspect: Suspect, control: Suspect | None, name: str, embedding: Embedding, caught: bool) -> Finding:
    """Training images to which a generated one comes nearer than to 99 of 100 held-out patients' images.

    The more images are made, the nearer one comes to anybody, and few strangers put that limit where chance will: what
    counts is the share beyond that of the strangers themselves, and it fails where chance does not explain it.
    """
    others = distances(suspect.strangers.drawn, suspect.generated, embedding)
    limit = float(np.percentile(others, COPY_PERCENTILE))
    alike = int((others < limit).sum()), len(others)

    def beyond(who: Suspect) -> Interval:
        near = distances(who.members.drawn, who.generated, embedding) < limit
        return figures.difference((int(near.sum()), len(near)), alike)

    # the control is held to the same limit: that of its few images would be looser
    share, leaky = beyond(suspect), beyond(control) if control is not None else _nothing()
    verdict = _copied_verdict(share, leaky) if caught else "concludes nothing"
    figure = "share of training images beyond that of held-out ones"
    return Finding(f"copied ({name})", figure, share, leaky, MOST_COPIES, verdict, OVERTRAINED)


def _copied_verdict(share: Interval, leaky: Interval) -> Verdict:
    """A share that chance explains passes only where it is surely not the control's."""
    if not leaky.low > MOST_COPIES:
        return "concludes nothing"
    if share.value > MOST_COPIES and share.low > 0:
        return "fails"
    return "passes" if share.high < leaky.low else "concludes nothing"


def copy_threshold(suspect: Suspect, embedding: Embedding) -> float:
    return float(np.percentile(distances(suspect.strangers.drawn, suspect.members.drawn, embedding), COPY_PERCENTILE))


def copy_rate(suspect: Suspect, embedding: Embedding, limit: float) -> Interval:
    near = distances(suspect.generated, suspect.members.drawn, embedding) < limit
    return figures.wilson(int(near.sum()), len(near))


def planted_rate(suspect: Suspect, embedding: Embedding, limit: float, count: int = 50) -> Interval:
    """The share of planted copies that is found: training images, mirrored, brightened and with fresh noise."""
    rng = np.random.default_rng(0)
    chosen = suspect.members.drawn[rng.choice(len(suspect.members), min(count, len(suspect.members)), replace=False)]
    leak = embed.mirrored(chosen).astype(np.float32) * 1.05 + rng.normal(0, 3, chosen.shape)
    planted = dataclasses.replace(suspect, generated=leak.clip(0, 255).astype(np.uint8))
    return copy_rate(planted, embedding, limit)


# Membership


def membership(suspect: Suspect, control: Suspect | None, embeddings: Mapping[str, Embedding]) -> list[Finding]:
    """Can it be told from the generator's loss whether a patient was among those it learnt from?

    Some classes are easier to draw than others, and an adapter's shots are chosen by class: every score is counted from
    what strangers of its own class have, or the class would be found and called membership.
    """
    area, caught_few = _membership(suspect)
    leaky, leaky_few = _membership(control) if control is not None else (_nothing(), _nothing())
    # a few patients' AUC is low by chance: it must tell that it is not as high as the control's has to be
    caught = leaky.value >= CONTROL_MEMBERSHIP and (area.value > MOST_MEMBERSHIP or area.high < CONTROL_MEMBERSHIP)
    return [
        _finding("membership", "AUC", area, leaky, MOST_MEMBERSHIP, caught, OVERTRAINED),
        _finding("membership", "true positives at 1 % false", caught_few, leaky_few, MOST_FOUND, caught, OVERTRAINED),
    ]


def _membership(suspect: Suspect) -> tuple[Interval, Interval]:
    examples = [*suspect.members.examples, *suspect.strangers.examples]
    scores = np.concatenate([member_score(suspect.makes, s.examples) for s in (suspect.members, suspect.strangers)])
    truth = np.r_[np.ones(len(suspect.members.examples), np.int64), np.zeros(len(suspect.strangers.examples), np.int64)]
    patients = np.concatenate([suspect.members.patients, suspect.strangers.patients])
    score, member, patient = figures.by_patient(within_class(scores, examples, truth == 0), truth, patients)
    return (
        figures.auc_interval(score, member, patient),
        figures.bootstrap(lambda i: figures.sensitivity_at_specificity(score[i], member[i], 0.99), patient, 300),
    )


def within_class(
    scores: NDArray[np.float64], examples: Sequence[questions.Example], stranger: NDArray[np.bool_]
) -> NDArray[np.float64]:
    """Scores above the mean of the strangers of the same class; of all strangers where the class has none."""
    counted: NDArray[np.float64] = scores - scores[stranger].mean()
    shown = [tuple(label for name, label in e.labels.items() if name not in SEEN_BESIDE) for e in examples]
    for each in set(shown):
        alike = np.array([one == each for one in shown])
        if (alike & stranger).any():
            counted[alike] = scores[alike] - scores[alike & stranger].mean()
    return counted


@torch.inference_mode()
def member_score(makes: Generator, examples: Sequence[questions.Example], times: int = 8) -> NDArray[np.float64]:
    """Minus the flow's loss with all conditions told, averaged over times and noises that every image meets alike."""
    odds = Odds(drop=0, drop_all=0, box=1, outline=0, paint=0, propose=0)
    totals = np.zeros(len(examples))
    for k in range(times):
        t = (k + 0.5) / times * 0.8 + 0.1
        for i in range(0, len(examples), 64):
            part = examples[i : i + 64]
            asked = questions.ask(part, makes.card.vocabulary, makes.card.size, odds, torch.Generator().manual_seed(k))
            noise = torch.randn(asked.data[:1].shape, generator=torch.Generator().manual_seed(1000 + k))
            asked = asked._replace(noise=noise.expand_as(asked.data), time=torch.full((len(part),), t))
            with torch.autocast(makes.device.type, torch.bfloat16):
                loss = asked.to(makes.device).loss(makes.network)
            totals[i : i + len(part)] -= loss.cpu().numpy()
    return totals / times


ATTACKS: dict[str, Attack] = {"copies": copies, "membership": membership}


# The report


@dataclass(frozen=True)
class PrivacyReport:
    of: str
    members: int
    strangers: int
    generated: int
    made: int  # before the release filter
    dropped: int
    findings: tuple[Finding, ...]
    control: str  # what the positive control is, or that there is none
    generator: str  # digest of the weights that were audited, an adapter's included
    manner: Mapping[str, Any]  # how the audited images were asked for

    @property
    def holds(self) -> bool:
        """True only when every attack was able to catch a leak and none did."""
        return bool(self.findings) and all(finding.verdict == "passes" for finding in self.findings)

    def to_json(self) -> str:
        document = dataclasses.asdict(self)
        for told, finding in zip(document["findings"], self.findings, strict=True):
            told.update(value=_bounds(finding.value), control=_bounds(finding.control))
        document.update(holds=self.holds, drop_rate=self.dropped / max(1, self.made))
        return json.dumps(_no_nan(document), indent=1)

    def to_markdown(self) -> str:
        lines = [
            f"## Privacy of {self.of}",
            "",
            f"{self.members} training images, {self.strangers} images of held-out patients, {self.generated} generated"
            f" images. The release filter dropped {self.dropped} of {self.made}"
            f" ({100 * self.dropped / max(1, self.made):.1f} %). Positive control: {self.control}.",
            "",
            "| attack | figure | value (95 % interval) | control | bar | verdict |",
            "|---|---|---|---|---|---|",
        ]
        lines += [
            f"| {f.attack} | {f.figure} | {_said(f.value)} | {_said(f.control)} | ≤ {f.bar:g} | {f.verdict} |"
            for f in self.findings
        ]
        verdict = "holds" if self.holds else "does not hold: see the verdicts"
        note = "Copied images pass up to the bar, or where chance explains their share and the control's lies above it."
        return "\n".join([*lines, "", note, "", f"The bar **{verdict}**.", ""])


def audit(
    suspect: Suspect,
    control: Suspect | None,
    embeddings: Mapping[str, Embedding],
    made: int,
    dropped: int,
    manner: Mapping[str, Any],
    attacks: Mapping[str, Attack] = ATTACKS,
) -> PrivacyReport:
    """Run every attack on the suspect and its control."""
    remembered = {name: embed.remembered(embedding) for name, embedding in embeddings.items()}
    findings = [finding for attack in attacks.values() for finding in attack(suspect, control, remembered)]
    said = control.name if control is not None else "none was made: membership concludes nothing"
    counts = (len(suspect.members), len(suspect.strangers), len(suspect.generated))
    return PrivacyReport(suspect.name, *counts, made, dropped, tuple(findings), said, suspect.makes.digest, manner)


def _finding(
    attack: str, figure: str, value: Interval, control: Interval, bar: float, caught: bool, note: str
) -> Finding:
    """An attack that did not catch its control concludes nothing."""
    verdict: Verdict = "concludes nothing" if not caught else "passes" if value.value <= bar else "fails"
    return Finding(attack, figure, value, control, bar, verdict, note)


def _nothing() -> Interval:
    return Interval(math.nan, math.nan, math.nan)


def _said(interval: Interval) -> str:
    return "not measured" if math.isnan(interval.value) else str(interval)


def _bounds(interval: Interval) -> dict[str, float]:
    return dict(interval._asdict())


def _no_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _no_nan(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_no_nan(v) for v in value]
    return None if isinstance(value, float) and math.isnan(value) else value
