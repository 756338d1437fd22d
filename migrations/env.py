"""Alembic's entry: on the connection that benchbox hands over, or on the database of the settings for developers."""

from typing import Any, Literal

from alembic import context
from sqlalchemy import Connection

from benchbox.config import load_settings
from benchbox.store.database import parse_url, writer_engine
from benchbox.store.tables import UtcDateTime, metadata


def render_item(kind: str, item: Any, _: Any) -> str | Literal[False]:
    """How autogenerate writes a type: migrations import nothing of benchbox."""
    return "sa.DateTime(timezone=True)" if kind == "type" and isinstance(item, UtcDateTime) else False


def migrate(connection: Connection) -> None:
    """Run the asked migrations. ``render_as_batch``: SQLite cannot alter a table in place."""
    context.configure(
        connection=connection,
        target_metadata=metadata,
        render_item=render_item,
        render_as_batch=True,
        transactional_ddl=True,
    )
    with context.begin_transaction():
        context.run_migrations()


if given := context.config.attributes.get("connection"):
    migrate(given)
else:  # `alembic revision --autogenerate`
    with writer_engine(parse_url(load_settings().database)).begin() as opened:
        migrate(opened)
