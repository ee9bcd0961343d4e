"""whose a study is by a person's word."""

import sqlalchemy as sa
from alembic import op

from busgen_cds.store import database as store

revision = "5e8d24c1b7a6"
down_revision = "4c1d0a7be932"
branch_labels = None
depends_on = None


def upgrade() -> None:
    with op.batch_alter_table("study", schema=None) as batch_op:
        batch_op.add_column(sa.Column("issuer", store.Sealed(), nullable=True))
        batch_op.add_column(sa.Column("stated", sa.String(length=32), nullable=True))
