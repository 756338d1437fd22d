"""Migrations are the only way to a schema, and they lead to exactly the schema of the code."""

from __future__ import annotations

import importlib.util
import io
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.operations import Operations
from alembic.script import ScriptDirectory
from sqlalchemy import CheckConstraint, create_engine, inspect
from sqlalchemy.dialects import postgresql
from sqlalchemy.engine import make_url
from sqlalchemy.schema import CreateIndex, CreateTable

import benchbox
from benchbox import shipped as shipping
from benchbox.errors import BenchboxError, StoreError
from benchbox.shipped import shipped
from benchbox.store import Store, migrate
from benchbox.store.database import parse_url, writer_engine
from benchbox.store.migrate import describe_revision, prepare, revisions, upgrade
from benchbox.store.tables import metadata
from builders import cell, fill

NEXT = """
import sqlalchemy as sa
from alembic import op

revision, down_revision = "{next}", "{last}"


def upgrade():
    with op.batch_alter_table("run", recreate="always") as table:
        table.add_column(sa.Column("note", sa.Text()))
    {more}
"""


NEWEST = revisions()[-1]
AFTER = f"{int(NEWEST) + 1:04}"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "benchbox.db"


@pytest.fixture
def newer_benchbox(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    """Makes this benchbox one that knows one migration more, which rebuilds a table that others refer to."""

    def install(more: str = "") -> None:
        folder = tmp_path / "migrations"
        shutil.copytree(shipped("migrations"), folder, dirs_exist_ok=True)
        text = NEXT.format(next=AFTER, last=NEWEST, more=more)
        (folder / "versions" / f"{AFTER}_note.py").write_text(text)
        monkeypatch.setattr(migrate, "shipped", lambda _: folder)

    return install


def test_migrations_lead_to_the_schema_of_the_code(file: Path) -> None:
    upgrade(str(file))

    engine = create_engine(f"sqlite:///{file}")
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, metadata) == []
        built = inspect(connection)
        for table in metadata.sorted_tables:
            checks = {item["name"]: item["sqltext"] for item in built.get_check_constraints(table.name)}
            declared = {c.name: str(c.sqltext) for c in table.constraints if isinstance(c, CheckConstraint)}
            assert checks == declared
    engine.dispose()


def test_the_file_names_tell_the_history_that_alembic_sees() -> None:
    config = Config()
    config.set_main_option("script_location", str(shipped("migrations")))
    history = [script.revision for script in ScriptDirectory.from_config(config).walk_revisions()]

    assert revisions() == history[::-1]


def test_migrations_for_postgresql_make_the_tables_of_the_code() -> None:
    output = io.StringIO()
    options = {"as_sql": True, "output_buffer": output}
    context = MigrationContext.configure(dialect_name="postgresql", opts=options)
    with Operations.context(context):
        for path in sorted((shipped("migrations") / "versions").glob("*.py")):
            spec = importlib.util.spec_from_file_location(path.stem, path)
            assert spec is not None
            assert spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            module.upgrade()

    def lines(sql: str) -> list[str]:
        sql = re.sub(r"ALTER TABLE \w+ ADD (COLUMN )?", "", sql)  # what came later counts as if it had been there
        return sorted(" ".join(line.split()).strip(",;") for line in sql.splitlines() if line.strip())

    dialect = postgresql.dialect()
    declared = "".join(str(CreateTable(table).compile(dialect=dialect)) for table in metadata.sorted_tables)
    indexes = [index for table in metadata.sorted_tables for index in table.indexes]
    declared += "\n".join(str(CreateIndex(index).compile(dialect=dialect)) for index in indexes)
    assert lines(output.getvalue()) == lines(declared)


def test_cells_of_the_first_schema_have_neither_source_nor_limit_nor_curve(file: Path) -> None:
    item = cell()
    fill(str(file), [item])
    migrated(file, command.downgrade, "0001")
    assert not {"source_digest", "max_passes", "curve"} & columns(file, "cell")

    upgrade(str(file))

    (row,) = benchbox.open_results(file).rows()
    assert row.cell == item
    assert row.key == item.key
    engine = create_engine(f"sqlite:///{file}")
    with engine.connect() as connection:
        added = connection.exec_driver_sql("SELECT source_digest, max_passes, curve FROM cell").all()
        assert [tuple(values) for values in added] == [(None, None, None)]
        assert connection.exec_driver_sql("PRAGMA foreign_key_check").all() == []
    engine.dispose()


def migrated(file: Path, move: Callable[[Config, str], None], target: str) -> None:
    """Let Alembic ``move`` the schema of the file to ``target``."""
    engine = create_engine(f"sqlite:///{file}")
    with engine.begin() as connection:
        config = Config(attributes={"connection": connection})
        config.set_main_option("script_location", str(shipped("migrations")))
        move(config, target)
    engine.dispose()


def test_an_empty_database_is_built_and_then_left_alone(file: Path) -> None:
    assert upgrade(f"sqlite:///{file}") == f"{file}: created at revision {revisions()[-1]}"
    assert upgrade(f"sqlite:///{file}") == f"{file}: already at revision {revisions()[-1]}"
    assert describe_revision(f"sqlite:///{file}") == f"{file}: revision {NEWEST} (current); newest {NEWEST}"
    assert list(file.parent.glob("*.backup")) == []


def test_an_outdated_file_is_backed_up_and_then_upgraded(file: Path, newer_benchbox) -> None:  # type: ignore[no-untyped-def]
    item = cell()
    fill(str(file), [item])
    newer_benchbox()

    message = upgrade(str(file))

    backup = file.with_name(f"benchbox.db.revision-{NEWEST}.backup")
    assert message == f"{file}: upgraded from revision {NEWEST} at revision {AFTER}; the old file is kept as {backup}"
    assert columns(file) - columns(backup) == {"note"}
    for place in (file, backup):
        engine = create_engine(f"sqlite:///{place}")
        with engine.connect() as connection:
            assert connection.exec_driver_sql("SELECT count(*) FROM evaluation").scalar() == 1
            assert connection.exec_driver_sql("PRAGMA foreign_key_check").all() == []
        engine.dispose()
    assert [row.key for row in benchbox.open_results(file).rows()] == [item.key]


def columns(file: Path, table: str = "run") -> set[str]:
    engine = create_engine(f"sqlite:///{file}")
    try:
        return {column["name"] for column in inspect(engine).get_columns(table)}
    finally:
        engine.dispose()


def test_a_run_upgrades_an_outdated_file_by_itself_and_keeps_every_backup(file: Path, newer_benchbox) -> None:  # type: ignore[no-untyped-def]
    fill(str(file), [cell()])
    taken = file.with_name(f"benchbox.db.revision-{NEWEST}.backup")
    taken.write_text("precious")
    newer_benchbox()

    Store.open(str(file)).close()

    assert taken.read_text() == "precious"
    assert columns(file.with_name(f"benchbox.db.revision-{NEWEST}.backup-2")) < columns(file)


def test_a_migration_that_fails_changes_nothing(file: Path, newer_benchbox) -> None:  # type: ignore[no-untyped-def]
    fill(str(file), [cell()])
    before = columns(file)
    newer_benchbox(more="op.execute('SELECT * FROM nowhere')")

    with pytest.raises(StoreError, match="no such table: nowhere"):
        Store.open(str(file))

    assert columns(file) == before
    assert describe_revision(str(file)).startswith(f"{file}: revision {NEWEST} (outdated)")


def test_readers_do_not_migrate_but_say_what_to_run(file: Path, newer_benchbox) -> None:  # type: ignore[no-untyped-def]
    fill(str(file), [cell()])
    newer_benchbox()

    with pytest.raises(
        StoreError, match=rf"at revision {NEWEST}, .* needs {AFTER}; .*`benchbox db upgrade --database {file}`"
    ):
        benchbox.open_results(file)

    assert describe_revision(str(file)) == f"{file}: revision {NEWEST} (outdated); newest {AFTER}"


def test_a_database_of_a_newer_benchbox_is_left_alone(file: Path, newer_benchbox, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    newer_benchbox()
    fill(str(file), [cell()])
    monkeypatch.setattr(migrate, "shipped", shipped)

    for opener in (Store.open, benchbox.open_results, upgrade):
        with pytest.raises(StoreError, match=rf"\(revision {AFTER}; this one knows up to {NEWEST}\); upgrade"):
            opener(str(file))


def test_an_outdated_server_is_not_upgraded_by_a_run(file: Path, newer_benchbox) -> None:  # type: ignore[no-untyped-def]
    fill(str(file), [cell()])  # stands in for the server: what is tested is the decision
    newer_benchbox()
    server = make_url("postgresql+psycopg://me:secret@host/lab")

    with pytest.raises(StoreError, match=r"back it up, then run `benchbox db upgrade --database postgresql") as caught:
        prepare(writer_engine(parse_url(str(file))), server)

    assert "secret" not in str(caught.value)
    assert "note" not in columns(file)


def test_a_database_of_somebody_else_is_refused(file: Path) -> None:
    engine = create_engine(f"sqlite:///{file}")
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE customers (id INTEGER)")
    engine.dispose()

    for opener in (Store.open, benchbox.open_results, upgrade):
        with pytest.raises(StoreError, match="holds tables that are not benchbox's; name an empty or a new database"):
            opener(str(file))


def test_a_database_without_a_schema_has_no_results(file: Path) -> None:
    file.touch()

    with pytest.raises(StoreError, match="the database is empty; run `benchbox run --grid FILE` first"):
        benchbox.open_results(file)


def test_downgrading_leaves_no_table(file: Path) -> None:
    upgrade(str(file))

    migrated(file, command.downgrade, "base")

    engine = create_engine(f"sqlite:///{file}")
    assert inspect(engine).get_table_names() == ["alembic_version"]
    engine.dispose()


def test_a_developer_can_run_alembic_on_the_database_of_the_settings(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    upgrade(str(file))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BENCHBOX_DATABASE", f"sqlite:///{file}")
    config = Config(stdout=io.StringIO())
    config.set_main_option("script_location", str(shipped("migrations")))

    command.check(config)  # raises where autogenerate would find a difference


# ------------------------------------------------------------------------------------------------ shipped folders


def test_shipped_folders_are_found_in_a_checkout_and_in_a_wheel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert (shipped("migrations") / "env.py").is_file()
    package = tmp_path / "site-packages" / "benchbox"
    (package / "_shipped" / "grids").mkdir(parents=True)
    (package.parent / "recipes").mkdir()  # as in a checkout
    monkeypatch.setattr(shipping, "_PACKAGE", package)

    assert shipped("grids") == package / "_shipped" / "grids"
    assert shipped("recipes") == package.parent / "recipes"
    with pytest.raises(
        BenchboxError, match="'leaderboard' that comes with benchbox is missing; install benchbox again"
    ):
        shipped("leaderboard")
