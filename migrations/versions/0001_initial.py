"""The tables of the first release.

A migration names its types itself: it must still build the same tables when the code has moved on.
"""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "component",
        sa.Column("digest", sa.String(length=64), nullable=False),
        sa.Column("kind", sa.String(length=32), nullable=False),
        sa.Column("provider", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("options", sa.JSON(), nullable=False),
        sa.Column("fingerprint", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("digest", name=op.f("pk_component")),
    )
    op.create_table(
        "run",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("grid_name", sa.Text(), nullable=False),
        sa.Column("grid_toml", sa.Text(), nullable=False),
        sa.Column("settings", sa.JSON(), nullable=False),
        sa.Column("code", sa.JSON(), nullable=False),
        sa.Column("started_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("finished_at", sa.DateTime(timezone=True)),
        sa.Column("status", sa.String(length=16), nullable=False),
        sa.CheckConstraint("status IN ('running', 'finished', 'failed', 'interrupted')", name=op.f("ck_run_status")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_run")),
    )
    op.create_table(
        "cell",
        sa.Column("key", sa.String(length=64), nullable=False),
        sa.Column("dataset_digest", sa.String(length=64), nullable=False),
        sa.Column("model_digest", sa.String(length=64), nullable=False),
        sa.Column("weight_perturbation_digest", sa.String(length=64)),
        sa.Column("defense_digest", sa.String(length=64)),
        sa.Column("attack_digest", sa.String(length=64)),
        sa.Column("norm", sa.String(length=8)),
        sa.Column("eps", sa.Double()),
        sa.Column("targeted", sa.Boolean()),
        sa.Column("access", sa.String(length=16)),
        sa.Column("seed", sa.BigInteger()),
        sa.Column("prefix_seed", sa.BigInteger()),
        sa.Column("examples", sa.Integer(), nullable=False),
        sa.Column("precision", sa.String(length=16), nullable=False),
        sa.Column("batch_size", sa.Integer()),
        sa.Column("cell_version", sa.Integer(), nullable=False),
        sa.ForeignKeyConstraint(["attack_digest"], ["component.digest"], name=op.f("fk_cell_attack_digest_component")),
        sa.ForeignKeyConstraint(
            ["dataset_digest"], ["component.digest"], name=op.f("fk_cell_dataset_digest_component")
        ),
        sa.ForeignKeyConstraint(
            ["defense_digest"], ["component.digest"], name=op.f("fk_cell_defense_digest_component")
        ),
        sa.ForeignKeyConstraint(["model_digest"], ["component.digest"], name=op.f("fk_cell_model_digest_component")),
        sa.ForeignKeyConstraint(
            ["weight_perturbation_digest"],
            ["component.digest"],
            name=op.f("fk_cell_weight_perturbation_digest_component"),
        ),
        sa.PrimaryKeyConstraint("key", name=op.f("pk_cell")),
    )
    op.create_table(
        "excluded",
        sa.Column("run_id", sa.Integer(), nullable=False),
        sa.Column("ordinal", sa.Integer(), nullable=False),
        sa.Column("description", sa.Text(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(["run_id"], ["run.id"], name=op.f("fk_excluded_run_id_run")),
        sa.PrimaryKeyConstraint("run_id", "ordinal", name=op.f("pk_excluded")),
    )
    op.create_table(
        "evaluation",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("cell_key", sa.String(length=64), nullable=False),
        sa.Column("run_id", sa.Integer(), nullable=False),
        sa.Column("status", sa.String(length=16), nullable=False),
        sa.Column("started_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("seconds", sa.Double(), nullable=False),
        sa.Column("forwards", sa.Double(), nullable=False),
        sa.Column("backwards", sa.Double(), nullable=False),
        sa.Column("device", sa.Text(), nullable=False),
        sa.Column("environment", sa.JSON(), nullable=False),
        sa.Column("flags", sa.JSON(), nullable=False),
        sa.Column("error", sa.Text()),
        sa.Column("examples_sha256", sa.String(length=64)),
        sa.CheckConstraint("status IN ('ok', 'failed')", name=op.f("ck_evaluation_status")),
        sa.ForeignKeyConstraint(["cell_key"], ["cell.key"], name=op.f("fk_evaluation_cell_key_cell")),
        sa.ForeignKeyConstraint(["run_id"], ["run.id"], name=op.f("fk_evaluation_run_id_run")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_evaluation")),
    )
    op.create_index(op.f("ix_evaluation_cell_key_status_id"), "evaluation", ["cell_key", "status", "id"])
    op.create_table(
        "run_cell",
        sa.Column("run_id", sa.Integer(), nullable=False),
        sa.Column("cell_key", sa.String(length=64), nullable=False),
        sa.Column("disposition", sa.String(length=16), nullable=False),
        sa.CheckConstraint("disposition IN ('reused', 'computed', 'failed')", name=op.f("ck_run_cell_disposition")),
        sa.ForeignKeyConstraint(["cell_key"], ["cell.key"], name=op.f("fk_run_cell_cell_key_cell")),
        sa.ForeignKeyConstraint(["run_id"], ["run.id"], name=op.f("fk_run_cell_run_id_run")),
        sa.PrimaryKeyConstraint("run_id", "cell_key", name=op.f("pk_run_cell")),
    )
    op.create_index(op.f("ix_run_cell_cell_key"), "run_cell", ["cell_key"])
    op.create_table(
        "measurement",
        sa.Column("evaluation_id", sa.Integer(), nullable=False),
        sa.Column("probe", sa.Text(), nullable=False),
        sa.Column("subject", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("value", sa.Double()),
        sa.ForeignKeyConstraint(
            ["evaluation_id"], ["evaluation.id"], name=op.f("fk_measurement_evaluation_id_evaluation")
        ),
        sa.PrimaryKeyConstraint("evaluation_id", "probe", "subject", "name", name=op.f("pk_measurement")),
    )
    op.create_table(
        "record",
        sa.Column("evaluation_id", sa.Integer(), nullable=False),
        sa.Column("format", sa.String(length=16), nullable=False),
        sa.Column("sha256", sa.String(length=64), nullable=False),
        sa.Column("data", sa.LargeBinary(), nullable=False),
        sa.ForeignKeyConstraint(["evaluation_id"], ["evaluation.id"], name=op.f("fk_record_evaluation_id_evaluation")),
        sa.PrimaryKeyConstraint("evaluation_id", name=op.f("pk_record")),
    )
    op.create_table(
        "score",
        sa.Column("evaluation_id", sa.Integer(), nullable=False),
        sa.Column("metric", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("metric_version", sa.Integer(), nullable=False),
        sa.Column("value", sa.Double()),
        sa.Column("low", sa.Double()),
        sa.Column("high", sa.Double()),
        sa.Column("n", sa.Integer(), nullable=False),
        sa.ForeignKeyConstraint(["evaluation_id"], ["evaluation.id"], name=op.f("fk_score_evaluation_id_evaluation")),
        sa.PrimaryKeyConstraint("evaluation_id", "metric", "name", name=op.f("pk_score")),
    )


def downgrade() -> None:
    for table in ("score", "record", "measurement", "run_cell", "evaluation", "excluded", "cell", "run", "component"):
        op.drop_table(table)
