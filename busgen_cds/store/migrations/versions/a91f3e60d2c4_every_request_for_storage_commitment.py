"""every request for storage commitment."""

import sqlalchemy as sa
from alembic import op

revision = "a91f3e60d2c4"
down_revision = "5e8d24c1b7a6"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "commitment",
        sa.Column("transaction_uid", sa.String(length=64), nullable=False),
        sa.Column("delivery_ref", sa.String(length=32), nullable=False),
        sa.ForeignKeyConstraint(["delivery_ref"], ["delivery.ref"], name=op.f("fk_commitment_delivery_ref")),
        sa.PrimaryKeyConstraint("transaction_uid", name=op.f("pk_commitment")),
    )
    with op.batch_alter_table("commitment", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_commitment_delivery_ref"), ["delivery_ref"], unique=False)
    op.execute(
        "INSERT INTO commitment (transaction_uid, delivery_ref) "
        "SELECT transaction_uid, ref FROM delivery WHERE transaction_uid <> ''"
    )
