"""results are ordered by the worklist."""

from alembic import op

revision = "e6b0a3d94f17"
down_revision = "c4f2a7718e36"
branch_labels = None
depends_on = None


def upgrade() -> None:
    # not in a batch: that would copy the table, and other tables point at it
    op.drop_index("ix_result_triage", table_name="result")
    op.drop_column("result", "triage")
