"""A Study in, a Result kept, its objects made.

Rules:
- A study is complete by evidence: silence, a closed association, and the PACS's own count where it can be asked.
- The model runs once for the same evidence. A late image makes new evidence, and so a new revision.
- Result, objects and act are kept in one transaction; delivering is another workflow's business.
- A held study is not read; what was sent of it is recalled when it shows a second patient.
- What fails is tried again, parked or stops the engine, as the exception's type says.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence

from dbos import DBOS

from busgen_cds.dicom import outbox
from busgen_cds.errors import Misconfigured
from busgen_cds.flows import desk as desks
from busgen_cds.flows.desk import Desk
from busgen_cds.flows.services import Services, failed, in_use, log
from busgen_cds.result import Answer, Declined, Rendered, Result
from busgen_cds.store.deliveries import Addressee
from busgen_cds.store.inbox import Instance, Stated
from busgen_cds.store.results import Previous, Results
from busgen_cds.study import Held, NotForUs, Study, evidence_digest

RECALLED = "a second patient id came under this study after it was answered: the results sent are recalled"
RECOVERIES = 8  # a study that ends the worker this often is parked
# PS3.6 table A-1: ultrasound, ultrasound multi-frame, and both retired.
_ULTRASOUND = {f"1.2.840.10008.5.1.4.1.1.{last}" for last in ("6", "6.1", "3", "3.1")}

_desk: list[Desk] = []


def use(desk: Desk | None) -> None:
    """Where these workflows ask for the next ones."""
    _desk[:] = [desk] if desk else []


def desk_in_use() -> Desk:
    return _desk[0]


# ---- Is it complete?


@DBOS.workflow(name=desks.COMPLETE_STUDY, max_recovery_attempts=100)
def complete_study(study_ref: str, quiet_seconds: float) -> str:
    while (wait := _still_to_wait(study_ref, quiet_seconds)) > 0:
        DBOS.sleep(wait)
    return _ask_for_reading(study_ref)


@DBOS.step(name="still to wait")
def _still_to_wait(study_ref: str, quiet_seconds: float) -> float:
    services = in_use()
    try:
        return _evidence(services, study_ref, quiet_seconds)
    except Exception as error:  # noqa: BLE001 - evidence that cannot be had is no reason not to read
        log.warning("Study %s: %s", study_ref, failed(error).reason)
        return 0.0


def _evidence(services: Services, study_ref: str, quiet_seconds: float) -> float:
    instances = services.inbox.instances(study_ref)
    if not instances:
        return 0.0
    last = max(instance.received_at for instance in instances)
    silent_for = (services.clock() - last).total_seconds()
    if silent_for < quiet_seconds:
        return max(0.001, quiet_seconds - silent_for)
    if services.query_node is None or silent_for > quiet_seconds + services.waits.count:
        return 0.0
    ours = sum(instance.sop_class_uid in _ULTRASOUND for instance in instances)
    theirs = outbox.count_images(services.inbox.study_uid(study_ref), services.query_node)
    return services.waits.count_again if theirs > ours else 0.0


@DBOS.step(name="ask for reading")
def _ask_for_reading(study_ref: str) -> str:
    services = in_use()
    try:
        instances = services.inbox.instances(study_ref)
        known = services.results.current(study_ref)
        if not instances:
            return "nothing there"
        if services.inbox.held(study_ref):
            return _recall(services, study_ref, instances)
        digest = digest_of(instances, services.results, services.inbox.stated(study_ref))
        if known and known.evidence_digest == digest:
            services.results.covers(known.ref, len(instances))
            return "read already"
        return desk_in_use().read(study_ref, digest)
    except Exception as error:  # noqa: BLE001 - the sweep asks again
        log.warning("Study %s: %s", study_ref, failed(error).reason)
        return "not asked"


def _recall(services: Services, study_ref: str, instances: Sequence[Instance]) -> str:
    """A second patient under a study that was answered: take back what was sent, and send nothing more (rule 8)."""
    known = services.results.current(study_ref)
    if known is None or known.instances >= len(instances) or not services.inbox.two_patients(study_ref):
        return "held"
    read = instances[: known.instances]  # in the order received: what the answer was made of
    stated = services.inbox.stated(study_ref)
    study = services.intake(_opened(services, read), stated.patient if stated else None)
    replaced = services.results.previous(study_ref)
    shown = services.results.show(known.ref)
    if not isinstance(study, Study) or replaced is None or shown is None or isinstance(shown.answer, NotForUs):
        services.results.covers(known.ref, len(instances))  # nothing was said of it
        return "held"
    digest, revision = digest_of(instances, services.results, stated), services.results.next_revision(study_ref)
    answer, ours = _taken_back(shown.answer, revision), dataclasses.replace(study, ref=study_ref)
    notes = tuple(each for each in services.render(ours, answer, replaced) if each.kind == "ko")
    services.results.keep(
        study_ref, answer, notes, evidence_digest=digest, instances=len(instances), revision=revision,
        bundle_digest=answer.bundle.digest, addressees=[each.addressee for each in services.destinations],
        recalled=RECALLED,
    )  # fmt: skip
    log.error("Study %s: %s", study_ref, RECALLED)
    _ask_for_delivery(study_ref)
    return "recalled"


def _opened(services: Services, instances: Iterable[Instance]) -> Iterator[tuple[bytes, str]]:
    return ((services.inbox.open(instance), instance.sha256) for instance in instances)


def _taken_back(answer: Result, revision: int) -> Declined:
    fields = {each.name: getattr(answer, each.name) for each in dataclasses.fields(Answer)}
    return Declined(**{**fields, "revision": revision}, reason=RECALLED)


# ---- Read it


@DBOS.workflow(name=desks.READ_STUDY, max_recovery_attempts=RECOVERIES)
def read_study(study_ref: str, digest: str, attempt: int) -> str:
    word = _read(study_ref, digest, attempt)
    if word == "kept":
        _ask_for_delivery(study_ref)
    return word


@DBOS.step(name="read")
def _read(study_ref: str, digest: str, attempt: int) -> str:
    services = in_use()
    try:
        return _gather_and_keep(services, study_ref, digest)
    except Exception as error:  # noqa: BLE001 - every exception is answered by its type, and none reaches DBOS's tables
        return _answer_failure(services, study_ref, digest, attempt, error)


def _gather_and_keep(services: Services, study_ref: str, digest: str) -> str:
    # 1. Is there anything to do?
    instances = services.inbox.instances(study_ref)
    stated = services.inbox.stated(study_ref)
    held = services.inbox.held(study_ref)  # after the images: another patient's that comes meanwhile is not counted
    now_there = digest_of(instances, services.results, stated)
    known = services.results.current(study_ref)
    if held:
        services.jobs.drop(study_ref, digest, now_there)
        return "held"
    if known and known.evidence_digest == now_there:
        services.jobs.drop(study_ref, digest, now_there)
        return "kept"
    if services.jobs.engine_stopped() is not None:
        return "engine stopped"
    # 2. Bytes → Study → Result → objects.
    study = services.intake(_opened(services, instances), stated.patient if stated else None)
    revision = services.results.next_revision(study_ref)
    if isinstance(study, Held):
        services.inbox.hold_two_patients(study_ref, study.reason, "reading")
        services.jobs.drop(study_ref, digest, now_there)
        return _recall(services, study_ref, instances)
    if isinstance(study, NotForUs):
        return _keep_refusal(services, study_ref, study, now_there, len(instances), revision, digest)
    result = services.assess(study, revision)
    replaced = services.results.previous(study_ref)
    rendered = services.render(dataclasses.replace(study, ref=study_ref), result, replaced)
    # 3. One transaction keeps them.
    services.results.keep(
        study_ref,
        result,
        rendered,
        evidence_digest=now_there,
        instances=len(instances),
        revision=revision,
        bundle_digest=result.bundle.digest,
        addressees=_addressees(services, result, rendered, replaced),
        accession_number=study.header.accession_number,
        session_also=lambda session: services.jobs.done(session, study_ref, digest, now_there),
    )
    if services.watch is not None:
        services.watch.count(study, result)
    return "kept"


def _keep_refusal(
    services: Services, study_ref: str, refusal: NotForUs, now_there: str, instances: int, revision: int, digest: str
) -> str:
    """Not for us is an answer too; but it never silently takes the place of one that was delivered."""
    known = services.results.current(study_ref)
    if known and known.outcome != "not-for-us":
        raise Misconfigured(
            f"Revision {known.revision} was delivered, and now the study reads as not for us ({refusal.reason}): "
            "compare both versions of this program, then retry."
        )
    services.results.keep(
        study_ref,
        refusal,
        (),
        evidence_digest=now_there,
        instances=instances,
        revision=revision,
        bundle_digest="",
        session_also=lambda session: services.jobs.done(session, study_ref, digest, now_there),
    )
    return "kept"


def _addressees(
    services: Services, result: Result, rendered: Iterable[Rendered], replaced: Previous | None
) -> list[Addressee]:
    """Who gets it. A site may keep first refusals to itself; one that replaces a result always goes out."""
    quiet = isinstance(result, Declined) and replaced is None
    return [each.addressee for each in services.destinations if each.deliver_declined or not quiet]


def _answer_failure(services: Services, study_ref: str, digest: str, attempt: int, error: Exception) -> str:
    failure = failed(error)
    log.error("Study %s was not read: %s", study_ref, failure.reason)
    if failure.then == "stop":
        services.jobs.stop_engine(failure.reason)
    if failure.then == "again" and attempt < services.waits.reading_tries:
        desk_in_use().read_later(study_ref, digest, services.waits.retry(attempt - 1))
        return "again"
    if failure.then == "drop":
        services.jobs.drop(study_ref, digest)
        return "dropped"
    services.jobs.park(study_ref, digest, failure.reason)
    return "parked"


@DBOS.step(name="ask for delivery")
def _ask_for_delivery(study_ref: str) -> int:
    results = in_use().results
    current = results.current(study_ref)
    waiting = [each for each in results.deliveries.of(current.ref) if each.state == "waiting"] if current else []
    try:
        for delivery in waiting:
            desk_in_use().deliver(delivery)
    except Exception as error:  # noqa: BLE001 - the sweep asks again
        log.warning("Study %s: %s", study_ref, failed(error).reason)
    return len(waiting)


def digest_of(instances: Iterable[Instance], results: Results, stated: Stated | None) -> str:
    """Of what was received, without our own objects: a PACS that sends them back asks for no new answer. What a person
    stated of it is evidence too."""
    received = [(each.sop_instance_uid, each.sha256) for each in instances]
    ours = results.ours(uid for uid, _ in received)
    word = [("stated", stated.word)] if stated else []
    return evidence_digest([*word, *(pair for pair in received if pair[0] not in ours)])
