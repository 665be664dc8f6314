"""Who can write the job database must not be able to run code in a worker."""

from __future__ import annotations

import base64
import pickle
from pathlib import Path

import sqlalchemy as sa
from fleet import Fleet

from llmprune_service.engine import run_id


class _Attack:
    """Unpickling it makes a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.file,)


def test_a_pickle_in_the_queue_is_not_loaded(fleet: Fleet, tmp_path: Path) -> None:
    """The engine would read a row as a pickle if the row says so; the worker refuses it, and serves the next job."""
    file = tmp_path / "attacked"
    payload = base64.b64encode(pickle.dumps({"args": (_Attack(file), 1), "kwargs": {}})).decode()
    pickle.loads(base64.b64decode(payload))
    assert file.exists(), "the attack would work"
    file.unlink()

    attacked, other = fleet.submit(num_blocks=1), fleet.submit(num_blocks=1)
    schema = "" if fleet.engine.dialect.name == "sqlite" else "dbos."
    with fleet.engine.begin() as connection:
        for table, column in ((f"{schema}workflow_status", "inputs"), (f"{schema}workflow_input", "inputs")):
            if _has(connection, table, column):
                update = f"UPDATE {table} SET {column} = :payload WHERE workflow_uuid = :id AND {column} IS NOT NULL"
                connection.execute(sa.text(update), {"payload": payload, "id": run_id(attacked, 1)})
        marked = connection.execute(
            sa.text(f"UPDATE {schema}workflow_status SET serialization = 'py_pickle' WHERE workflow_uuid = :id"),
            {"id": run_id(attacked, 1)},
        )
        assert marked.rowcount == 1
    fleet.start()
    fleet.wait(other)
    assert "is refused in this process" in fleet.workers[0].log.read_text()
    assert not file.exists()


def _has(connection: sa.Connection, table: str, column: str) -> bool:
    schema, _, name = table.rpartition(".")
    inspector = sa.inspect(connection)
    return inspector.has_table(name, schema=schema or None) and column in {
        found["name"] for found in inspector.get_columns(name, schema=schema or None)
    }
