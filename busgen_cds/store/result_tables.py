"""The rows of what was said: results, the objects that say it, and how far each object got at each destination."""

from __future__ import annotations

from datetime import datetime
from typing import Literal

import sqlalchemy as sa
from sqlalchemy.orm import Mapped, mapped_column

from busgen_cds.store.database import Base, Blind, Sealed, UtcTime

Outcome = Literal["assessed", "declined", "not-for-us"]
# A delivery: one result, one destination.
DeliveryState = Literal["waiting", "asked", "done", "parked", "withdrawn"]
# An object at a destination. `sent`: the PACS said success; `confirmed`: it also committed to keep it.
ObjectState = Literal["waiting", "sent", "confirmed", "refused"]

ALARMING = sa.text("current AND alarm <> ''")


class ResultTable(Base):
    __tablename__ = "result"
    __table_args__ = (
        sa.UniqueConstraint("study_ref", "revision"),
        sa.Index("ix_result_current", "current", "made_at"),
        sa.Index("ix_result_alarm", "made_at", sqlite_where=ALARMING, postgresql_where=ALARMING),
        sa.Index(
            "uq_result_current",
            "study_ref",
            unique=True,
            sqlite_where=sa.text("current"),
            postgresql_where=sa.text("current"),
        ),
    )

    ref: Mapped[str] = mapped_column(sa.String(32), primary_key=True)
    study_ref: Mapped[str] = mapped_column(sa.ForeignKey("study.ref"))
    revision: Mapped[int]
    evidence_digest: Mapped[str] = mapped_column(sa.String(64))
    bundle_digest: Mapped[str] = mapped_column(sa.String(64))
    instances: Mapped[int]  # how many it was read from
    outcome: Mapped[str] = mapped_column(sa.String(16))
    reason: Mapped[str] = mapped_column(sa.Text)
    birads: Mapped[str | None] = mapped_column(sa.String(2))
    probability: Mapped[float | None]
    images_read: Mapped[int]
    made_at: Mapped[datetime] = mapped_column(UtcTime)
    current: Mapped[bool]
    supersedes: Mapped[str | None] = mapped_column(sa.String(32))
    alarm: Mapped[str] = mapped_column(sa.Text)
    accession_blind: Mapped[str] = mapped_column(Blind(of="accession"), index=True)
    accession: Mapped[bytes | None] = mapped_column(Sealed)
    document: Mapped[bytes] = mapped_column(sa.LargeBinary)  # under the study's key


class RenderedTable(Base):
    __tablename__ = "rendered"

    ref: Mapped[str] = mapped_column(sa.String(32), primary_key=True)
    result_ref: Mapped[str] = mapped_column(sa.ForeignKey("result.ref"), index=True)
    number: Mapped[int]  # in the order rendered
    kind: Mapped[str] = mapped_column(sa.String(4))
    sop_class_uid: Mapped[str] = mapped_column(sa.String(64))
    sop_instance_uid: Mapped[str] = mapped_column(sa.String(64), unique=True)  # made by us; names nobody
    series_instance_uid: Mapped[str] = mapped_column(sa.String(64))
    transfer_syntax_uid: Mapped[str] = mapped_column(sa.String(64))
    sha256: Mapped[str] = mapped_column(sa.String(64))
    data: Mapped[bytes] = mapped_column(sa.LargeBinary)  # under the study's key


class DeliveryTable(Base):
    __tablename__ = "delivery"
    __table_args__ = (
        sa.UniqueConstraint("result_ref", "destination"),
        sa.Index("ix_delivery_state", "state", "destination", "next_try_at"),
    )

    ref: Mapped[str] = mapped_column(sa.String(32), primary_key=True)
    result_ref: Mapped[str] = mapped_column(sa.ForeignKey("result.ref"))
    study_ref: Mapped[str] = mapped_column(sa.String(32), index=True)
    destination: Mapped[str] = mapped_column(sa.String(64))
    state: Mapped[str] = mapped_column(sa.String(16))
    since: Mapped[datetime] = mapped_column(UtcTime)
    tries: Mapped[int]
    next_try_at: Mapped[datetime] = mapped_column(UtcTime)
    reason: Mapped[str] = mapped_column(sa.Text)
    transaction_uid: Mapped[str] = mapped_column(sa.String(64), index=True)


class CommitmentTable(Base):
    """Every request for storage commitment: a PACS may answer an early one after a later one was made."""

    __tablename__ = "commitment"

    transaction_uid: Mapped[str] = mapped_column(sa.String(64), primary_key=True)
    delivery_ref: Mapped[str] = mapped_column(sa.ForeignKey("delivery.ref"), index=True)


class DeliveredTable(Base):
    __tablename__ = "delivered"
    __table_args__ = (sa.Index("ix_delivered_state", "state", "delivery_ref"),)

    delivery_ref: Mapped[str] = mapped_column(sa.ForeignKey("delivery.ref"), primary_key=True)
    rendered_ref: Mapped[str] = mapped_column(sa.ForeignKey("rendered.ref"), primary_key=True)
    state: Mapped[str] = mapped_column(sa.String(16))
    reason: Mapped[str] = mapped_column(sa.Text)
    at: Mapped[datetime] = mapped_column(UtcTime)
