"""how often what is in quarantine came."""

import sqlalchemy as sa
from alembic import op

from busgen_cds.store import database as store

revision = "4c1d0a7be932"
down_revision = "7459ee5fc129"
branch_labels = None
depends_on = None


def upgrade() -> None:
    with op.batch_alter_table("quarantine", schema=None) as batch_op:
        # what was set aside before has no hash: should it come again, it is set aside once more
        batch_op.add_column(sa.Column("sop_uid_blind", store.Blind(), server_default="", nullable=False))
        batch_op.add_column(sa.Column("sha256", sa.String(length=64), server_default="", nullable=False))
        batch_op.add_column(sa.Column("times", sa.Integer(), server_default="1", nullable=False))
        batch_op.create_index("ix_quarantine_content", ["sop_uid_blind", "sha256"], unique=False)
