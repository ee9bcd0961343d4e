"""the rule that orders the worklist."""

import sqlalchemy as sa
from alembic import op

revision = "b7d41c9e5f08"
down_revision = "a91f3e60d2c4"
branch_labels = None
depends_on = None


def upgrade() -> None:
    with op.batch_alter_table("worklist_followed", schema=None) as batch_op:
        batch_op.add_column(sa.Column("rule", sa.String(length=32), nullable=False, server_default=""))
