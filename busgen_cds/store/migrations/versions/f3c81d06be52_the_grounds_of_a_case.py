"""the grounds of a case."""

import sqlalchemy as sa
from alembic import op

revision = "f3c81d06be52"
down_revision = "e6b0a3d94f17"
branch_labels = None
depends_on = None


def upgrade() -> None:
    with op.batch_alter_table("site_case", schema=None) as batch_op:
        batch_op.add_column(sa.Column("grounds", sa.String(length=64), nullable=False, server_default=""))
