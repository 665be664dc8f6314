"""Jobs submitted to PostgreSQL by a plain function call."""

from __future__ import annotations

import json
from collections.abc import Iterator

import psycopg
import pytest

from fleet import Fleet, light_request


@pytest.fixture
def database_url(postgres_url: str) -> str:
    """PostgreSQL alone has functions."""
    return postgres_url


@pytest.fixture
def psql(database_url: str) -> Iterator[psycopg.Connection[tuple[str]]]:
    """A client that knows nothing of the service but its function."""
    with psycopg.connect(database_url, autocommit=True) as connection:
        yield connection


def test_sql_submits_a_job(fleet: Fleet, psql: psycopg.Connection[tuple[str]]) -> None:
    """One call queues a job, a second with its key finds it, and a rolled back one leaves nothing."""
    config = json.dumps(light_request(num_blocks=2, seed=3).config.model_dump(mode="json", exclude_unset=True))
    call = "SELECT llmprune_submit(%s::jsonb, priority => 9, metadata => '{\"team\": \"a\"}', idempotency_key => %s)"
    [job_id] = psql.execute(call, (config, "key")).fetchone() or ()
    assert psql.execute(call, (config, "key")).fetchone() == (job_id,)
    with pytest.raises(psycopg.errors.RaiseException, match="another config"):
        psql.execute(call, ("{}", "key"))
    with psql.transaction(force_rollback=True):
        psql.execute(call, (config, "other"))
    assert [row.id for row in fleet.jobs.list("default", metadata={"team": "a"})[0]] == [job_id]
    fleet.start()
    fleet.wait(job_id)
    fleet.check(job_id)


@pytest.mark.parametrize(
    ("config", "more"),
    [
        ('{"sparsity": 7}', ""),
        ('{"method": "nonsense"}', ""),
        ('{"nonsense": 1}', ""),
        ('{"model": 5}', ""),
        ('{"model": "/etc"}', ""),
        ('{"num_samples": 1000000, "seq_len": 4096}', ""),
        ("{}", ", metadata => '{\"team\": 1}'"),
        ("{}", ", metadata => '{\"a team\": \"a\"}'"),
    ],
)
def test_sql_that_the_api_would_refuse_fails_the_job(
    fleet: Fleet, psql: psycopg.Connection[tuple[str]], config: str, more: str
) -> None:
    """The worker judges as the API does: nothing hangs, and the job says why."""
    [job_id] = psql.execute(f"SELECT llmprune_submit('{config}'{more})").fetchone() or ()
    fleet.start()
    row = fleet.wait(job_id, "failed")
    assert row.error["code"] == "invalid_config"
    fleet.check(job_id, "job.failed")
    fleet.wait(fleet.submit(num_blocks=1))


@pytest.mark.parametrize("arguments", ["'[]'", "'{}', priority => 10", "'{}', metadata => '5'", "'{\"sparsity\": \"x\"}'"])
def test_sql_that_makes_no_sense_is_refused(fleet: Fleet, psql: psycopg.Connection[tuple[str]], arguments: str) -> None:
    """What cannot even be filed raises in the call, and nothing is there."""
    with pytest.raises(psycopg.Error):
        psql.execute(f"SELECT llmprune_submit({arguments})")
    assert fleet.jobs.list(None)[0] == []
