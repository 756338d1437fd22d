"""What a cell may be since transfer between models, security curves and limits of passes; NULL in what was there."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    with op.batch_alter_table("cell") as table:
        table.add_column(sa.Column("curve", sa.JSON()))
        table.add_column(sa.Column("source_digest", sa.String(length=64)))
        table.add_column(sa.Column("max_passes", sa.Integer()))
        table.create_foreign_key(op.f("fk_cell_source_digest_component"), "component", ["source_digest"], ["digest"])


def downgrade() -> None:
    with op.batch_alter_table("cell") as table:
        table.drop_constraint(op.f("fk_cell_source_digest_component"), type_="foreignkey")
        for column in ("max_passes", "source_digest", "curve"):
            table.drop_column(column)
