"""A PACS for tests, on a real socket: it stores, answers queries and commits, and can be made to misbehave.

Nothing it says is a mock of ours: it speaks DICOM through pynetdicom, and keeps what it got as encoded.
"""

from __future__ import annotations

import io
import socket
import ssl
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import pydicom
from pydicom.dataset import Dataset
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian
from pynetdicom import AE, ALL_TRANSFER_SYNTAXES, AllStoragePresentationContexts, build_context, evt
from pynetdicom.sop_class import (
    StorageCommitmentPushModel,
    StorageCommitmentPushModelInstance,
    StudyRootQueryRetrieveInformationModelFind,
    Verification,
)

from busgen_cds.dicom.outbox import Node
from tests.programs import free_port

SR = "1.2.840.10008.5.1.4.1.1.88.33"


class Pacs:
    def __init__(self, name: str = "pacs") -> None:
        self.name, self.ae_title = name, name.upper()
        self.host, self.port = "127.0.0.1", free_port()
        self.objects: dict[str, list[bytes]] = defaultdict(list)  # SOP Instance UID → each data set it came with
        self.studies: dict[str, str] = {}  # SOP Instance UID → Study Instance UID
        self.stored_at: dict[str, float] = {}
        self.classes: dict[str, str] = {}  # SOP Instance UID → SOP class UID
        self.refuses: set[str] = set()  # SOP class UIDs
        self.full = False
        self.seconds = 0.0  # that it takes to store an object
        self.says: dict[str, int] = {}  # SOP class UID → the status it answers with, without keeping the object
        self.knows: list[str] = []  # calling AE titles; empty: everybody
        self.patients: dict[str, str] = {}  # Study Instance UID → patient id
        self.counts: dict[str, int] = {}  # Study Instance UID → ultrasound images it says it holds
        self.commits: bool | None = True  # None: takes the request and says nothing
        self.lost: set[str] = set()  # SOP Instance UIDs that it will not commit to
        self.offers_commitment = True
        self.tls: ssl.SSLContext | None = None
        self._server: Any = None
        self._lock = threading.Lock()

    @property
    def node(self) -> Node:
        return Node(self.name, self.ae_title, self.host, self.port, timeout_seconds=10)

    # -- verbs

    def comes_up(self) -> Pacs:
        entity = AE(ae_title=self.ae_title)
        entity.maximum_associations = 50
        entity.require_calling_aet = self.knows
        for context in AllStoragePresentationContexts:
            if context.abstract_syntax not in self.refuses:
                entity.add_supported_context(context.abstract_syntax, ALL_TRANSFER_SYNTAXES)
        for other in (Verification, StudyRootQueryRetrieveInformationModelFind):
            entity.add_supported_context(other)
        if self.offers_commitment:
            entity.add_supported_context(StorageCommitmentPushModel)
        handlers = [
            (evt.EVT_CONN_OPEN, _no_delay),
            (evt.EVT_C_STORE, self._store),
            (evt.EVT_C_FIND, self._find),
            (evt.EVT_N_ACTION, self._commit),
        ]
        self._server = entity.start_server(
            (self.host, self.port), block=False, evt_handlers=handlers, ssl_context=self.tls
        )
        return self

    def goes_down(self) -> None:
        if self._server is not None:
            self._server.shutdown()
            self._server = None

    # -- what it holds

    def datasets(self) -> list[Dataset]:
        return self._newest(list(self.objects))

    def of(self, study_uid: str, *, modality: str | None = None) -> list[Dataset]:
        mine = self._newest([uid for uid, study in list(self.studies.items()) if study == study_uid])
        return [each for each in mine if modality in (None, each.Modality)]

    def _newest(self, uids: list[str]) -> list[Dataset]:
        with self._lock:
            encoded = [self.objects[uid][-1] for uid in uids]
        return [_open(each) for each in encoded]

    def twice(self) -> list[str]:
        """What came with two contents."""
        return [uid for uid, versions in self.objects.items() if len(set(versions)) > 1]

    # -- inside

    def _store(self, event: evt.Event) -> int:
        time.sleep(self.seconds)
        if self.full:
            return 0xA700
        if event.request.AffectedSOPClassUID in self.refuses:
            return 0xA900
        if event.request.AffectedSOPClassUID in self.says:
            return self.says[event.request.AffectedSOPClassUID]
        uid, encoded = str(event.request.AffectedSOPInstanceUID), event.encoded_dataset()
        header = pydicom.dcmread(io.BytesIO(encoded), specific_tags=["StudyInstanceUID"], stop_before_pixels=True)
        with self._lock:
            self.objects[uid].append(encoded)
            self.studies[uid] = str(header.StudyInstanceUID)
            self.stored_at[uid] = time.monotonic()
            self.classes[uid] = str(event.request.AffectedSOPClassUID)
        return 0

    def _find(self, event: evt.Event) -> Iterator[tuple[int, Dataset | None]]:
        wanted = event.identifier
        study = str(wanted.StudyInstanceUID)
        answer = Dataset()
        answer.QueryRetrieveLevel = wanted.QueryRetrieveLevel
        answer.StudyInstanceUID = study
        if wanted.QueryRetrieveLevel == "STUDY" and study in self.patients:
            answer.PatientID = self.patients[study]
            yield 0xFF00, answer
        if wanted.QueryRetrieveLevel == "SERIES" and study in self.counts:
            answer.Modality, answer.SeriesInstanceUID = "US", f"{study}.1"
            answer.NumberOfSeriesRelatedInstances = self.counts[study]
            yield 0xFF00, answer
        yield 0x0000, None

    def _commit(self, event: evt.Event) -> tuple[int, None]:
        asked = event.action_information
        if self.commits is not None:
            threading.Thread(target=self._report, args=(event.assoc, asked), daemon=True).start()
        return 0x0000, None

    def _report(self, association: Any, asked: Dataset) -> None:
        time.sleep(0.05)  # after the answer to the request
        report = Dataset()
        report.TransactionUID = asked.TransactionUID
        kept, failed = [], []
        for item in asked.ReferencedSOPSequence:
            uid = str(item.ReferencedSOPInstanceUID)
            if uid in self.objects and uid not in self.lost:
                kept.append(item)
            else:
                item.FailureReason = 0x0112
                failed.append(item)
        report.ReferencedSOPSequence = kept
        if failed:
            report.FailedSOPSequence = failed
        association.send_n_event_report(
            report, 2 if failed else 1, StorageCommitmentPushModel, StorageCommitmentPushModelInstance
        )


def _open(encoded: bytes) -> Dataset:
    return pydicom.dcmread(io.BytesIO(encoded), force=True)


def _no_delay(event: evt.Event) -> None:
    event.assoc.dul.socket.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


__all__ = ["SR", "ExplicitVRLittleEndian", "ImplicitVRLittleEndian", "Pacs", "build_context"]
