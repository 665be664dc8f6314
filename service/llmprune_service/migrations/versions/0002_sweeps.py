"""sweeps"""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Apply. Columns are added in place: a new table in place of the old one would take along what refers to its rows."""
    op.create_table(
        "sweeps",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("tenant", sa.Text(), nullable=False),
        sa.Column("model", sa.Text(), nullable=False),
        sa.Column("revision", sa.Text(), nullable=True),
        sa.Column("config", sa.JSON(none_as_null=True), nullable=False),
        sa.Column("fields", sa.JSON(none_as_null=True), nullable=False),
        sa.Column("num_points", sa.Integer(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("updated_at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_sweeps")),
    )
    op.create_index(op.f("ix_sweeps_tenant_created_at_id"), "sweeps", ["tenant", "created_at", "id"])
    op.add_column("jobs", sa.Column("kind", sa.Text(), server_default="prune", nullable=False))
    op.add_column("jobs", sa.Column("sweep_id", sa.Text(), nullable=True))
    op.add_column("jobs", sa.Column("sweep_index", sa.Integer(), nullable=True))
    op.add_column("jobs", sa.Column("point", sa.Text(), nullable=True))
    op.create_index(op.f("ix_jobs_sweep_id_sweep_index"), "jobs", ["sweep_id", "sweep_index"])
