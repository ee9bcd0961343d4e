"""The clinic's Orthanc with the routing plugin, and a node on a real socket in the product's place.

Here the plugin is the thing under test: what it sends, when, how often, and what it says about it. The whole
product stands behind it in tests/system/.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydicom import dcmread

from busgen_cds.dicom import objects
from busgen_cds.result import Result
from busgen_cds.study import Study
from tests import images
from tests.dicom import answers
from tests.pacs import Pacs
from tests.programs import wait_for
from tests.system import orthanc
from tests.system.orthanc import Orthanc


@dataclass
class Clinic:
    pacs: Orthanc
    product: Pacs

    def takes(self, files: Sequence[bytes]) -> str:
        """Images arrive; Orthanc's id of their study."""
        self.pacs.upload(*files)
        study = self.pacs.study(str(dcmread(io.BytesIO(files[0])).StudyInstanceUID))
        assert study
        return study

    def sends(self) -> int:
        """How often anything was sent to the product, in all."""
        return sum(len(contents) for contents in self.product.objects.values())

    def badge(self, study: str) -> dict[str, Any]:
        badge: dict[str, Any] = self.pacs.get(f"/busgen-cds/studies/{study}")
        return badge

    def shows(self, study: str, text: str, seconds: float = 15) -> dict[str, Any]:
        """Wait until the badge says so."""
        badge: dict[str, Any] = {}

        def said() -> bool:
            badge.update(self.badge(study))
            return text in badge["text"]

        try:
            wait_for(said, seconds, "")
        except AssertionError:
            raise AssertionError(f"the badge never said {text!r}: {badge}") from None
        return badge

    def is_sent(self, study: str, images: int, seconds: float = 15) -> None:
        wait_for(
            lambda: (
                self.badge(study)["images"] | {"sent_since_answer": 0}
                == {"sent": images, "unsent": 0, "sent_since_answer": 0}
            ),
            seconds,
            f"not marked as sent: {self.badge(study)}",
        )

    def is_answered(self, study: Study, result: Result) -> None:
        """What the product would store: the real objects of a known answer."""
        self.pacs.upload(*(it.data for it in objects.render(study, result, rendered_at=answers.AT)))


@contextmanager
def opened(folder: Path, *, product_is_up: bool = True, **settings: Any) -> Iterator[Clinic]:
    section = {"Modality": "busgen-cds", "RetrySeconds": 1, **settings.pop("BusgenCds", {})}
    product = Pacs("busgen")
    if product_is_up:
        product.comes_up()
    try:
        with orthanc.running(
            folder,
            script=orthanc.PLUGIN,
            BusgenCds=section,
            DicomModalities={"busgen-cds": [product.ae_title, product.host, product.port]},
            **settings,
        ) as pacs:
            yield Clinic(pacs, product)
    finally:
        product.goes_down()


def altered(seed: int = 0, **tags: Any) -> bytes:
    """A breast image with other words in its header."""
    ds = images.breast_dataset(seed=seed)
    for keyword, value in tags.items():
        setattr(ds, keyword, value)
    return images.part10(ds)
