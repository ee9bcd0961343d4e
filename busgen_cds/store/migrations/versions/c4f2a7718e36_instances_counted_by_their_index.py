"""instances counted by their index."""

from alembic import op

revision = "c4f2a7718e36"
down_revision = "b7d41c9e5f08"
branch_labels = None
depends_on = None


def upgrade() -> None:
    with op.batch_alter_table("instance", schema=None) as batch_op:
        batch_op.drop_index("ix_instance_study_ref")
        batch_op.create_index("ix_instance_study_ref", ["study_ref", "conflict", "received_at"], unique=False)
