"""Objects → PACS → confirmed; tried for days, and never by running the model again.

Rules:
- Nothing is sent for a held study (but the note that rejects what was sent), for a superseded result, or to a PACS
  that says the study is another patient's (safety rule 8).
- What the PACS said of each object is written down before the next is sent; a refused object stops no other.
- A PACS that cannot be reached is tried again with a growing delay. When one answers again, all that waits for it goes.
- Where it offers storage commitment, sent is not yet confirmed; it is asked until it says so.
"""

from __future__ import annotations

from datetime import timedelta

from dbos import DBOS

from busgen_cds.dicom import outbox
from busgen_cds.flows import desk as desks
from busgen_cds.flows.read_study import RECOVERIES, desk_in_use
from busgen_cds.flows.services import Services, failed, in_use, log
from busgen_cds.store.deliveries import Delivery
from busgen_cds.store.result_tables import DeliveryState


@DBOS.workflow(name=desks.DELIVER_RESULT, max_recovery_attempts=RECOVERIES)
def deliver_result(delivery_ref: str, tries: int) -> str:
    word = _send(delivery_ref, tries)
    if word == "sent":
        word = _confirm(delivery_ref, tries)
    if word == "later":
        _ask_again(delivery_ref)
    return word


@DBOS.step(name="send")
def _send(delivery_ref: str, tries: int) -> str:
    services = in_use()
    delivery = services.deliveries.get(delivery_ref)
    if delivery is None or delivery.tries != tries or delivery.state not in ("waiting", "asked"):
        return "overtaken"
    try:
        if not services.results.is_current(delivery.result_ref):
            services.deliveries.move(delivery, "withdrawn", reason="superseded")
            return "superseded"
        refusal = _may_not(services, delivery)
        if refusal:
            services.deliveries.move(delivery, "parked", reason=refusal)
            return "parked"
        return _send_all(services, delivery)
    except Exception as error:  # noqa: BLE001 - every exception is answered by its type, and none reaches DBOS's tables
        return _answer_failure(services, delivery, error)


def _may_not(services: Services, delivery: Delivery) -> str | None:
    """Why nothing may be sent, if so (safety rule 8); what only takes back may always go."""
    if services.deliveries.only_takes_back(delivery.ref):
        return None
    held = services.inbox.held(delivery.study_ref)
    if held or services.query_node is None:
        return held
    study_uid, _ = services.results.identity(delivery.study_ref)
    theirs = outbox.patient_ids(study_uid, services.query_node)
    ours = {outbox.patient_id_in(each.data) for each in services.deliveries.to_send(delivery.ref)}
    if not theirs or not ours or ours == set(theirs):
        return None
    reason = (
        f"{services.query_node} says that this study belongs to another patient than its results were made for: "
        "correct it there or delete it here, then release the study."
    )
    services.inbox.hold(delivery.study_ref, reason, "delivery")
    return reason


def _send_all(services: Services, delivery: Delivery) -> str:
    destination = services.destination(delivery.destination)
    objects = services.deliveries.to_send(delivery.ref)
    for sent in outbox.send(objects, to=destination.node) if objects else ():
        state = "sent" if sent.stored else "refused"
        services.deliveries.said(delivery, sent.sop_instance_uid, state, sent.reason)  # type: ignore[arg-type]
        if not services.results.is_current(delivery.result_ref):
            return "superseded"
        held = services.inbox.held(delivery.study_ref)
        if held and not services.deliveries.only_takes_back(delivery.ref):
            services.deliveries.move(delivery, "parked", reason=held)
            return "parked"
    if objects:
        desk_in_use().hasten(services.deliveries.hasten(delivery.destination))
    if destination.commitment and any(each.state == "sent" for each in services.deliveries.delivered(delivery.ref)):
        return "sent"
    services.deliveries.move(delivery, "done")
    return "done"


@DBOS.step(name="confirm")
def _confirm(delivery_ref: str, tries: int) -> str:
    services = in_use()
    delivery = services.deliveries.get(delivery_ref)
    if delivery is None or delivery.tries != tries:
        return "overtaken"
    try:
        return _ask_commitment(services, delivery)
    except Exception as error:  # noqa: BLE001 - as above
        return _answer_failure(services, delivery, error)


def _ask_commitment(services: Services, delivery: Delivery) -> str:
    if _given_up(services, delivery, "stored, but storage commitment was never confirmed."):
        return "parked"
    transaction = outbox.new_transaction_uid()
    wait = max(services.waits.commitment_again, services.waits.retry(delivery.tries))
    again_at = services.clock() + timedelta(seconds=wait)
    services.deliveries.move(
        delivery, "asked", reason="Waiting for storage commitment.", next_try_at=again_at, transaction_uid=transaction
    )
    sent = [each for each in services.deliveries.delivered(delivery.ref) if each.state == "sent"]
    word = outbox.request_commitment(
        [outbox.Instance(each.sop_class_uid, each.sop_instance_uid) for each in sent],
        services.destination(delivery.destination).node,
        transaction_uid=transaction,
        wait_seconds=services.waits.commitment,
    )
    if word is None:
        return "later"
    again_at = services.clock() + timedelta(seconds=services.waits.retry(delivery.tries))
    now = services.deliveries.heard(word.transaction_uid, word.kept, word.failed, again_at=again_at)
    return "done" if now and now.state == "done" else "later"


def _answer_failure(services: Services, delivery: Delivery, error: Exception) -> str:
    failure = failed(error)
    log.warning("Study %s, delivery to %s: %s", delivery.study_ref, delivery.destination, failure.reason)
    now = services.deliveries.get(delivery.ref) or delivery
    if failure.then == "stop":
        services.jobs.stop_engine(failure.reason)
    if failure.then == "again":
        return _later(services, now, failure.reason)
    state: DeliveryState = "withdrawn" if failure.then == "drop" else "parked"
    services.deliveries.move(now, state, reason=failure.reason)
    return state


def _given_up(services: Services, delivery: Delivery, reason: str) -> bool:
    waited = (services.clock() - delivery.since).total_seconds()
    if waited <= services.waits.give_up:
        return False
    services.deliveries.move(delivery, "parked", reason=f"Given up after {waited / 86400:.0f} days: {reason}")
    return True


def _later(services: Services, delivery: Delivery, reason: str) -> str:
    if _given_up(services, delivery, reason):
        return "parked"
    delay = timedelta(seconds=services.waits.retry(delivery.tries))
    services.deliveries.move(delivery, "waiting", reason=reason, next_try_at=services.clock() + delay)
    return "later"


@DBOS.step(name="ask again")
def _ask_again(delivery_ref: str) -> None:
    services = in_use()
    delivery = services.deliveries.get(delivery_ref)
    if delivery is None or delivery.state not in ("waiting", "asked"):
        return
    try:
        delay = (delivery.next_try_at - services.clock()).total_seconds()
        desk_in_use().deliver(delivery, after_seconds=max(0.0, delay))
    except Exception as error:  # noqa: BLE001 - the sweep asks again
        log.warning("Study %s: %s", delivery.study_ref, failed(error).reason)
