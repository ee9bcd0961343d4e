"""A night over a site's cases: durable, bounded, and never live by itself."""

from __future__ import annotations

import dataclasses
import shutil
import time
from pathlib import Path

import pytest
from dbos import DBOS

from busgen_cds.bundle import Bundle
from busgen_cds.errors import Misconfigured
from busgen_cds.flows import adapt_site
from busgen_cds.operations import learning_loop
from busgen_cds.store import audit
from tests.flows.nights import VERIFIER, Ward, begun_in_its_own_process, in_its_own_process, laboratory

STAGES = [
    f"{stage} {when}"
    for stage in ("plan", "adapter", "images", "privacy", "members", "candidate", "verdict", "shelf")
    for when in ("before", "after")
]


@pytest.fixture(scope="module")
def confirmed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A site with twenty cases."""
    folder = tmp_path_factory.mktemp("ward")
    ward = Ward(folder)
    ward.confirm(20)
    ward.database.close()
    return folder


@pytest.fixture
def ward(confirmed: Path, tmp_path: Path) -> Ward:
    shutil.copytree(confirmed, tmp_path / "ward")
    return Ward(tmp_path / "ward")


@pytest.fixture(scope="module")
def undisturbed(confirmed: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The digest of a night that nothing disturbed."""
    folder = tmp_path_factory.mktemp("quiet") / "ward"
    shutil.copytree(confirmed, folder)
    return Ward(folder).night(laboratory()).split()[1]


def test_a_night_ends_on_the_shelf_and_no_further(ward: Ward) -> None:
    """An accepted candidate is shelved, signed by the night job's key, and not live."""
    word, digest = ward.night(laboratory()).split()
    assert word == "shelved" and ward.shelf.get(digest).state == "shelved"
    assert Bundle.open(ward.folder / "shelf" / digest, VERIFIER).digest == digest
    assert ward.shelf.standing().number == 0
    assert list((ward.folder / "nights").iterdir()) == []  # no pixels are left behind
    (run,) = ward.book.adaptations()
    assert run.outcome == "shelved" and run.digest == digest and audit.verify(ward.database).sound


def test_what_the_judge_refuses_is_kept_with_its_reasons(ward: Ward) -> None:
    """A refused candidate is kept as refused, with every reason, and cannot be opened."""
    word, digest = ward.night(laboratory(reasons=("AUC drops by 0.2", "one patient"))).split()
    kept = ward.shelf.get(digest)
    assert word == "refused" and kept.state == "refused" and kept.reasons == ("AUC drops by 0.2", "one patient")


def test_the_same_candidate_judged_again(ward: Ward) -> None:
    """Shelved in the morning and refused at noon, it is not on the shelf; refused once, it stays refused."""
    shelved, digest = ward.night(laboratory()).split()
    refused = ward.night(laboratory(reasons=("AUC drops by 0.2",)), anyway=True)
    assert (shelved, refused) == ("shelved", f"refused {digest}")
    assert (ward.shelf.get(digest).state, ward.shelf.get(digest).reasons) == ("refused", ("AUC drops by 0.2",))
    assert ward.night(laboratory(), anyway=True) == f"refused {digest}"
    assert [run.outcome for run in ward.book.adaptations()].count("refused") == 2


def test_the_disk_is_full_when_the_cases_are_written(ward: Ward) -> None:
    """Nothing begins, no pixels stay behind, and the next night removes what one that never came back has left."""

    def full(*what: object) -> Path:
        learning_loop.write_cases(*what)  # type: ignore[arg-type]
        raise OSError(28, "No space left on device")

    stations = dataclasses.replace(ward.stations(laboratory()), write_cases=full)
    adapt_site.launch(stations, f"sqlite:///{ward.folder / 'workflows.sqlite'}")
    with pytest.raises(Exception, match="No space left"):
        adapt_site.run()
    adapt_site.end()
    assert list(stations.folder.iterdir()) == [] and ward.book.adaptations() == []
    (stations.folder / "0123.partial/cases").mkdir(parents=True)
    assert ward.night(laboratory()).startswith("shelved") and list(stations.folder.iterdir()) == []


def test_too_few_new_cases_begin_nothing(ward: Ward) -> None:
    """A night waits for enough new cases; those that an ended night saw are not new."""
    teach = len(ward.book.listing("teach"))
    assert "not enough cases" in ward.night(laboratory(), least_new=teach + 1)
    assert ward.night(laboratory(), least_new=teach).startswith("shelved")
    assert ward.night(laboratory(), least_new=1) == "not enough cases: 0 new ones, 1 are asked for"
    assert ward.night(laboratory(), least_new=99, anyway=True).startswith("shelved")


def test_a_drift_alarm_makes_fewer_cases_enough(ward: Ward) -> None:
    """While drift asks for adaptation a night needs fewer new cases, and its report says what asked."""
    teach, why = len(ward.book.listing("teach")), "drift of the images of Bolt S9 in the week of 2026-03-02"
    begins = {"least_new": teach + 1, "least_new_asked": teach}
    assert "not enough cases" in ward.night(laboratory(), **begins)
    assert why in ward.night(laboratory(), least_new=99, least_new_asked=teach + 1, asked=why)
    word, digest = ward.night(laboratory(), **begins, asked=why).split()
    rows = ward.shelf.get(digest).report["tables"][-1]["rows"]
    assert word == "shelved" and ["asked for by", why] in [list(row) for row in rows]


def test_a_stage_that_fails_ends_the_night_with_its_reason(ward: Ward) -> None:
    """A failure names its stage, removes the pixels, and leaves the cases new."""
    recipes = laboratory()

    def fails(folder: Path) -> None:
        raise RuntimeError("a name")

    broken = adapt_site.Recipes(**{**vars(recipes), "members": fails})
    assert ward.night(broken).startswith("failed")
    (run,) = ward.book.adaptations()
    assert run.reason.startswith("members: A fault of ours") and "a name" not in run.reason
    assert ward.night(laboratory()).startswith("shelved")


def test_nights_come_at_their_time(ward: Ward, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the times of a cron line, of the clinic's clock, a night runs by itself, once for each."""
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    adapt_site.launch(ward.stations(laboratory()), f"sqlite:///{ward.folder / 'workflows.sqlite'}")
    try:
        with pytest.raises(Misconfigured, match=r"adaptation\.cron"):
            adapt_site.every("every night")
        adapt_site.every("* * * * * *")
        assert (DBOS.get_schedule(adapt_site.NIGHTLY) or {}).get("cron_timezone") == "Asia/Tokyo"
        until = time.monotonic() + 120
        while not ward.shelf.listing() and time.monotonic() < until:
            time.sleep(0.2)
        adapt_site.every("")
    finally:
        adapt_site.end(wait=60)
    assert [each.state for each in ward.shelf.listing()] == ["shelved"]
    assert len(ward.book.adaptations()) == 1  # the next seconds found no new cases, or this night under way


@pytest.mark.slow
def test_two_processes_never_learn_at_once(ward: Ward, undisturbed: str) -> None:
    """`adapt` typed while another process is at a night: it waits, and both say what became of it."""
    first = begun_in_its_own_process(ward.folder)
    while not (ward.folder / "learnt").exists():
        time.sleep(0.05)
    second = begun_in_its_own_process(ward.folder)
    assert first.recv() == second.recv() == "started"
    time.sleep(1)  # in which the second would begin the stage as well
    (ward.folder / "go on").touch()
    assert first.recv() == second.recv() == f"shelved {undisturbed}"
    noted = (ward.folder / "learnt").read_text().splitlines()
    assert noted == ["begins", "ends"] * (len(noted) // 2) and len(ward.book.adaptations()) == 1


@pytest.mark.slow
@pytest.mark.parametrize("when", STAGES)
def test_killed_at_every_stage_it_resumes_to_the_same_candidate(ward: Ward, undisturbed: str, when: str) -> None:
    """kill -9 at every stage: taken up again, the same digest, no half-made bundle, one act on the shelf."""
    assert in_its_own_process(ward.folder, when) == (-9, "")
    for folder in (ward.folder / "shelf").glob("*"):
        if len(folder.name) == 64:
            Bundle.open(folder, VERIFIER)  # whole, or not there
    assert in_its_own_process(ward.folder) == (0, f"shelved {undisturbed}")
    assert [each.digest for each in ward.shelf.listing()] == [undisturbed]
    assert len(ward.book.adaptations()) == 1 and audit.verify(ward.database).sound
