"""What PostgreSQL has besides: jobs submitted by a plain function call, and clients that hold a lock."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import LiteralString

import psycopg
import pytest
import sqlalchemy as sa
from fleet import Fleet, light_request

from llmprune_service import tables
from llmprune_service.jobs import view


@pytest.fixture
def database_url(postgres_url: str) -> str:
    """PostgreSQL alone has functions."""
    return postgres_url


Ask = Callable[..., str]


@pytest.fixture
def ask(database_url: str) -> Iterator[Ask]:
    """A client that knows nothing of the service but its function: SQL in, one value out."""
    with psycopg.connect(database_url, autocommit=True) as connection:

        def ask(query: LiteralString, *values: str) -> str:
            row = connection.execute(query, values).fetchone()
            assert row is not None
            return str(row[0])

        yield ask


def test_sql_submits_a_job(fleet: Fleet, ask: Ask, database_url: str) -> None:
    """One call queues a job, and a second with its key finds it; a rolled back one leaves nothing."""
    config = light_request(num_blocks=2, seed=3).config.model_dump_json(exclude_unset=True)
    call = 'SELECT llmprune_submit(%s::jsonb, priority => 9, metadata => \'{"team": "a"}\', idempotency_key => %s)'
    job_id = ask(call, config, "key")
    assert ask(call, config, "key") == job_id
    with pytest.raises(psycopg.errors.RaiseException, match="another config"):
        ask(call, "{}", "key")
    with psycopg.connect(database_url) as connection:
        connection.execute(call, (config, "other"))
        connection.rollback()
    assert [row.id for row in fleet.jobs.list("default", metadata={"team": "a"})[0]] == [job_id]
    fleet.start()
    fleet.wait(job_id)
    fleet.check(job_id)


REFUSED = (
    """'{"sparsity": 7}'""",
    """'{"method": "nonsense"}'""",
    """'{"nonsense": 1}'""",
    """'{"model": 5}'""",
    """'{"model": "/etc"}'""",
    """'{"num_samples": 1000000, "seq_len": 4096}'""",
    """metadata => '{"team": 1}'""",
    """metadata => '{"a team": "a"}'""",
)


def test_sql_that_the_api_would_refuse_fails_the_job(fleet: Fleet, ask: Ask) -> None:
    """The worker judges as the API does: nothing hangs, each job says why, and the worker is fit for the next."""
    job_ids = [ask(f"SELECT llmprune_submit({arguments})") for arguments in REFUSED]
    fleet.start()
    for job_id in job_ids:
        assert fleet.wait(job_id, "failed").error["code"] == "invalid_config"
        fleet.check(job_id, "job.failed")
        assert view(fleet.row(job_id)).status == "failed"
    fleet.wait(fleet.submit(num_blocks=1))


@pytest.mark.parametrize(
    "arguments", ["'[]'", "priority => 10", "metadata => '5'", """'{"sparsity": "x"}'""", """metadata => '{"team": null}'"""]
)
def test_sql_that_makes_no_sense_is_refused(fleet: Fleet, ask: Ask, arguments: str) -> None:
    """What cannot even be filed raises in the call, and nothing is there."""
    with pytest.raises(psycopg.Error):
        ask(f"SELECT llmprune_submit({arguments})")
    assert fleet.jobs.list(None)[0] == []


def test_a_transaction_that_stops_does_not_stop_the_fleet(fleet: Fleet) -> None:
    """A process frozen, or cut off, in mid-transaction holds the locks of a job: the server lets go of them in time."""
    fleet.start()
    job_id = fleet.submit(num_blocks=1, seconds=1.0)
    with fleet.engine.connect() as frozen:
        assert frozen.execute(sa.text("SHOW idle_in_transaction_session_timeout")).scalar_one() != "0"
        frozen.execute(sa.update(tables.jobs).values(metadata={}))
        fleet.wait(job_id, seconds=15)
        frozen.invalidate()
