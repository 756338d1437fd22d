"""The schema of the database, in SQLAlchemy Core. Migrations build it; a test asserts that they build exactly this.

Portable between SQLite and PostgreSQL: no arrays, no JSON operators, no native enumerations.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    DateTime,
    Dialect,
    Double,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    TypeDecorator,
)  # fmt: skip

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s_%(referred_table_name)s",
        "pk": "pk_%(table_name)s",
    }
)


class UtcDateTime(TypeDecorator[datetime]):
    """A moment in UTC. SQLite drops time zones, so it is converted on the way in and labelled on the way out."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is not None and value.tzinfo is None:
            raise ValueError(f"{value} has no time zone; only moments in time are stored")
        return value.astimezone(UTC) if value is not None else None

    def process_result_value(self, value: Any, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        return value.astimezone(UTC) if value.tzinfo else value.replace(tzinfo=UTC)


def _digest(name: str, *args: Any, **kwargs: Any) -> Column[str]:
    """A column for a SHA-256, as 64 hexadecimal digits."""
    return Column(name, String(64), *args, **kwargs)


run = Table(
    "run", metadata,
    Column("id", Integer, primary_key=True),
    Column("grid_name", Text, nullable=False),
    Column("grid_toml", Text, nullable=False),  # the file as it was
    Column("settings", JSON, nullable=False),
    Column("code", JSON, nullable=False),  # version, commit, dirty
    Column("started_at", UtcDateTime, nullable=False),
    Column("finished_at", UtcDateTime),
    Column("status", String(16), nullable=False),
    CheckConstraint("status IN ('running', 'finished', 'failed', 'interrupted')", name="status"),
)  # fmt: skip

component = Table(
    "component", metadata,
    _digest("digest", primary_key=True),
    Column("kind", String(32), nullable=False),
    Column("provider", Text, nullable=False),
    Column("name", Text, nullable=False),
    Column("version", Integer, nullable=False),
    Column("options", JSON, nullable=False),
    Column("fingerprint", Text, nullable=False),
)  # fmt: skip

cell = Table(
    "cell", metadata,
    _digest("key", primary_key=True),
    _digest("dataset_digest", ForeignKey("component.digest"), nullable=False),
    _digest("model_digest", ForeignKey("component.digest"), nullable=False),
    _digest("weight_perturbation_digest", ForeignKey("component.digest")),
    _digest("defense_digest", ForeignKey("component.digest")),
    _digest("attack_digest", ForeignKey("component.digest")),
    Column("norm", String(8)),  # norm, eps and targeted: all three, or none where nothing is attacked
    Column("eps", Double),
    Column("targeted", Boolean),
    Column("curve", JSON(none_as_null=True)),  # the radii of the security curve that eps belongs to
    Column("access", String(16)),
    _digest("source_digest", ForeignKey("component.digest")),  # the model of the examples where access is transfer
    Column("max_passes", Integer),
    Column("seed", BigInteger),
    Column("prefix_seed", BigInteger),
    Column("examples", Integer, nullable=False),
    Column("precision", String(16), nullable=False),
    Column("batch_size", Integer),
    Column("cell_version", Integer, nullable=False),
)  # fmt: skip

run_cell = Table(
    "run_cell", metadata,
    Column("run_id", ForeignKey("run.id"), primary_key=True),
    Column("cell_key", ForeignKey("cell.key"), primary_key=True),
    Column("disposition", String(16), nullable=False),
    CheckConstraint("disposition IN ('reused', 'computed', 'failed')", name="disposition"),
    Index(None, "cell_key"),
)  # fmt: skip

evaluation = Table(
    "evaluation", metadata,
    Column("id", Integer, primary_key=True),
    Column("cell_key", ForeignKey("cell.key"), nullable=False),
    Column("run_id", ForeignKey("run.id"), nullable=False),
    Column("status", String(16), nullable=False),
    Column("started_at", UtcDateTime, nullable=False),
    Column("seconds", Double, nullable=False),
    Column("forwards", Double, nullable=False),
    Column("backwards", Double, nullable=False),
    Column("device", Text, nullable=False),
    Column("environment", JSON, nullable=False),
    Column("flags", JSON, nullable=False),
    Column("error", Text),
    _digest("examples_sha256"),  # of the file of adversarial examples
    CheckConstraint("status IN ('ok', 'failed')", name="status"),
    Index(None, "cell_key", "status", "id"),
)  # fmt: skip

score = Table(
    "score", metadata,
    Column("evaluation_id", ForeignKey("evaluation.id"), primary_key=True),
    Column("metric", Text, primary_key=True),
    Column("name", Text, primary_key=True),  # "": the metric was asked and does not apply
    Column("metric_version", Integer, nullable=False),
    Column("value", Double),
    Column("low", Double),
    Column("high", Double),
    Column("n", Integer, nullable=False),
)  # fmt: skip

measurement = Table(
    "measurement", metadata,
    Column("evaluation_id", ForeignKey("evaluation.id"), primary_key=True),
    Column("probe", Text, primary_key=True),
    Column("subject", Text, primary_key=True),
    Column("name", Text, primary_key=True),
    Column("value", Double),
)  # fmt: skip

record = Table(
    "record", metadata,
    Column("evaluation_id", ForeignKey("evaluation.id"), primary_key=True),
    Column("format", String(16), nullable=False),
    _digest("sha256", nullable=False),
    Column("data", LargeBinary, nullable=False),
)  # fmt: skip

excluded = Table(
    "excluded", metadata,
    Column("run_id", ForeignKey("run.id"), primary_key=True),
    Column("ordinal", Integer, primary_key=True),
    Column("description", Text, nullable=False),
    Column("reason", Text, nullable=False),
)  # fmt: skip
