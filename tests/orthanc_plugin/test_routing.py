"""What the plugin sends to the product, and what it never does."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest

from tests import images
from tests.dicom import answers
from tests.orthanc_plugin.clinic import altered, opened
from tests.programs import wait_for

pytestmark = pytest.mark.program

# The full run looks for a loop as long as the requirement says; a change is checked with a shorter look.
LOOP_SECONDS = float(os.environ.get("BUSGEN_LOOP_SECONDS", "8"))
US, MULTI_FRAME = "1.2.840.10008.5.1.4.1.1.6.1", "1.2.840.10008.5.1.4.1.1.3.1"


def test_breast_ultrasound_goes_and_nothing_else_does(tmp_path: Path) -> None:
    """A stable breast-ultrasound study is sent to the product once; other studies in the same Orthanc are not."""
    with opened(tmp_path) as clinic:
        abdomen = clinic.takes([altered(5, BodyPartExamined="ABDOMEN", StudyDescription="US Abdomen")])
        mammogram = clinic.takes([altered(6, Modality="MG")])
        breast = clinic.takes(images.breast_study(3))
        clinic.is_sent(breast, images=3)
        time.sleep(2)
        assert clinic.sends() == 3
        assert clinic.badge(abdomen)["state"] == clinic.badge(mammogram)["state"] == "not routed"
        assert "waiting for the AI since" in clinic.badge(breast)["text"]


def test_results_never_travel_back(tmp_path: Path) -> None:
    """Our own results make the study stable again, and are never routed back."""
    with opened(tmp_path) as clinic:
        study = answers.breast(2)
        breast = clinic.takes(images.breast_study(2))
        clinic.is_sent(breast, images=2)
        clinic.is_answered(study, answers.assessed(study, answers.finding(study.frames[0])))
        clinic.shows(breast, "AI: 4B, delivered")
        end = time.monotonic() + LOOP_SECONDS
        while time.monotonic() < end:
            assert clinic.sends() == 2
            time.sleep(0.5)
        assert clinic.badge(breast)["images"] == {"sent": 2, "unsent": 0, "sent_since_answer": 0}


def test_late_image_goes_alone(tmp_path: Path) -> None:
    """An image that arrives late is routed alone."""
    with opened(tmp_path) as clinic:
        first, second, late = images.breast_study(3)
        breast = clinic.takes([first, second])
        clinic.is_sent(breast, images=2)
        clinic.takes([late])
        clinic.is_sent(breast, images=3)
        assert sorted(map(len, clinic.product.objects.values())) == [1, 1, 1]


def test_outage_is_shown_and_ends_by_itself(tmp_path: Path) -> None:
    """A product that cannot be reached is said at each study, fills no queue, and gets everything once it is back."""
    with opened(tmp_path, product_is_up=False) as clinic:
        studies = [clinic.takes(images.breast_study(2, seed=10 * i)) for i in range(3)]
        for study in studies:
            badge = clinic.shows(study, "waiting, the AI cannot be reached: ")
            assert badge["state"] == "waiting" and "Connection refused" in badge["text"]
            assert badge["images"]["sent"] == 0
        assert {each["study"] for each in clinic.pacs.get("/busgen-cds")["waiting"]} == set(studies)
        time.sleep(2.5)
        assert len(clinic.pacs.get("/jobs")) == len(studies), "an outage is asked about by echo, not by more jobs"
        clinic.product.comes_up()
        for study in studies:
            clinic.is_sent(study, images=2)
            clinic.shows(study, "waiting for the AI since")
        wait_for(lambda: not clinic.pacs.get("/busgen-cds")["waiting"], 10, "still said to wait")
        assert clinic.sends() == 6


def test_refusal_is_shown_and_retried(tmp_path: Path) -> None:
    """A refusal marks nothing as sent, is shown with its status, and is retried until it is taken."""
    with opened(tmp_path) as clinic:
        clinic.product.full = True
        study = clinic.takes(images.breast_study(2))
        badge = clinic.shows(study, "refused: ")
        assert badge["state"] == "refused" and "0xA700" in badge["text"]
        assert badge["images"] == {"sent": 0, "unsent": 2, "sent_since_answer": 0}
        clinic.product.full = False
        clinic.is_sent(study, images=2)


def test_refused_instance_holds_up_no_other(tmp_path: Path) -> None:
    """When one instance is refused, the others of its study are sent and marked, and it alone is retried."""
    with opened(tmp_path, product_is_up=False) as clinic:
        clinic.product.refuses = {MULTI_FRAME}
        clinic.product.comes_up()
        cine = images.breast_image(seed=0, number=9, cine=3)
        study = clinic.takes([cine, *images.breast_study(2)])
        wait_for(lambda: clinic.badge(study)["images"]["sent"] == 2, 15, "the others were held up")
        assert clinic.shows(study, "refused: ")["images"]["unsent"] == 1
        clinic.product.goes_down()
        clinic.product.refuses = set()
        clinic.product.comes_up()
        clinic.is_sent(study, images=3)


def test_content_that_is_refused_is_sent_once(tmp_path: Path) -> None:
    """An instance whose content is refused is shown as refused and not sent again, until a person asks for it."""
    with opened(tmp_path) as clinic:
        clinic.product.refuses.add(US)
        study = clinic.takes(images.breast_study(1))
        badge = clinic.shows(study, "refused: ")
        assert badge["state"] == "refused" and "0xA900" in badge["text"] and badge["images"]["unsent"] == 1
        time.sleep(2.5)
        assert len(clinic.pacs.get("/jobs")) == 1, "it was sent again"
        clinic.product.refuses.clear()
        clinic.pacs.post(f"/busgen-cds/studies/{study}/send")
        clinic.is_sent(study, images=1)


def test_refusal_before_a_restart_repeats_nothing(tmp_path: Path) -> None:
    """After a restart, the job that one refused instance had ended does not send the others of its study again."""
    with opened(tmp_path) as clinic:
        clinic.product.refuses.add(MULTI_FRAME)
        study = clinic.takes([images.breast_image(seed=0, number=9, cine=3), *images.breast_study(2)])
        wait_for(lambda: clinic.badge(study)["images"]["sent"] == 2, 15, "the others were held up")
        clinic.shows(study, "refused: ")
        before = clinic.sends()
        clinic.pacs.stop()
        clinic.pacs.start()
        late = clinic.takes(images.breast_study(1, seed=7))
        clinic.is_sent(late, images=1)
        assert clinic.sends() == before + 1
        assert clinic.badge(study)["images"] == {"sent": 2, "unsent": 1, "sent_since_answer": 0}


def test_a_foreign_note_at_a_study_stops_nothing(tmp_path: Path) -> None:
    """What another program wrote in the plugin's place at a study keeps no study from being shown, retried and sent."""
    with opened(tmp_path, product_is_up=False) as clinic:
        studies = [clinic.takes(images.breast_study(1, seed=seed)) for seed in (1, 2)]
        for study in studies:
            clinic.pacs.request("PUT", f"/studies/{study}/metadata/4118", b"call the ward")
        for study in studies:
            clinic.shows(study, "cannot be reached")
        clinic.product.comes_up()
        for study in studies:
            clinic.is_sent(study, images=1)


@pytest.mark.parametrize("end", ["stop", "kill"])
def test_restart_forgets_nothing_and_repeats_nothing(tmp_path: Path, end: str) -> None:
    """What waited when Orthanc was stopped or killed is sent after its start; what had been sent is not sent again."""
    with opened(tmp_path) as clinic:
        sent = clinic.takes(images.breast_study(2))
        clinic.is_sent(sent, images=2)
        clinic.product.goes_down()
        waiting = clinic.takes(images.breast_study(2, seed=7))
        clinic.shows(waiting, "cannot be reached")
        getattr(clinic.pacs, end)()
        clinic.product.comes_up()
        clinic.pacs.start()
        clinic.is_sent(waiting, images=2)
        clinic.shows(waiting, "waiting for the AI since")
        assert clinic.sends() == 4


def test_person_sends_what_no_rule_matches(tmp_path: Path) -> None:
    """A person may send a study that no rule matches, and may send one again; pressing twice is once."""
    with opened(tmp_path) as clinic:
        study = clinic.takes([altered(3, BodyPartExamined="", StudyDescription="small parts")])
        assert clinic.badge(study)["state"] == "not routed"
        for _ in range(2):
            assert clinic.pacs.post(f"/busgen-cds/studies/{study}/send") == {"study": study, "asked": True}
        clinic.is_sent(study, images=1)
        time.sleep(2)
        assert clinic.sends() == 1
        clinic.pacs.post(f"/busgen-cds/studies/{study}/send")
        wait_for(lambda: clinic.sends() == 2, 10, "not sent again")


def test_no_dead_lock_under_load(tmp_path: Path) -> None:
    """Arrivals, jobs, badges and Orthanc's own pages at the same time never block each other."""
    with opened(tmp_path, BusgenCds={"RetrySeconds": 0.2}) as clinic:
        studies = [clinic.takes(images.breast_study(1, seed=i)) for i in range(8)]
        ended = threading.Event()
        slowest = [0.0]

        def ask() -> None:
            while not ended.is_set():
                for study in studies:
                    began = time.monotonic()
                    clinic.badge(study)
                    clinic.pacs.get("/jobs", expand="")
                    slowest[0] = max(slowest[0], time.monotonic() - began)

        askers = [threading.Thread(target=ask, daemon=True) for _ in range(6)]
        for asker in askers:
            asker.start()
        clinic.product.goes_down()
        more = [clinic.takes(images.breast_study(1, seed=100 + i)) for i in range(8)]
        time.sleep(2)
        clinic.product.comes_up()
        for study in studies + more:
            clinic.is_sent(study, images=1, seconds=30)
        ended.set()
        for asker in askers:
            asker.join(10)
        assert slowest[0] < 10
        assert clinic.sends() == 16


def test_works_behind_orthancs_own_passwords(tmp_path: Path) -> None:
    """Routing works with Orthanc's authentication on, and the plugin's routes ask for it too."""
    with opened(tmp_path, AuthenticationEnabled=True, RegisteredUsers={"nurse": "secret"}) as clinic:
        with pytest.raises(AssertionError, match="401"):
            clinic.pacs.request("GET", "/busgen-cds")
        clinic.pacs.log_in("nurse", "secret")
        study = clinic.takes(images.breast_study(1))
        clinic.is_sent(study, images=1)


def test_a_study_deleted_while_it_is_sent(tmp_path: Path) -> None:
    """A study that Orthanc lets go in the middle of its sending holds up no other."""
    with opened(tmp_path) as clinic:
        clinic.product.seconds = 1.0
        gone = clinic.takes(images.breast_study(4))
        wait_for(lambda: clinic.product.objects, 15, "nothing was sent")
        clinic.pacs.delete(f"/studies/{gone}")
        clinic.product.seconds = 0.0
        after = clinic.takes(images.breast_study(2, seed=50))
        clinic.is_sent(after, images=2, seconds=30)
