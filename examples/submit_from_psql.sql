-- Submit a job in plain SQL, to a service on PostgreSQL; any client of the database can do the same.
--
--   psql "$LLMPRUNE_DATABASE_URL" -f examples/submit_from_psql.sql
--
-- The config is the library's: every field has a default. The worker validates it before anything is loaded. The job is
-- queued when the transaction commits; repeating an idempotency_key with the same config returns the same job.
SELECT llmprune_submit(
    '{"model": "demo", "method": "wanda", "sparsity": 0.5, "num_samples": 16}',
    priority => 7,
    metadata => '{"team": "nlp"}',
    idempotency_key => 'nightly-demo'
) AS job \gset

SELECT id, status, phase, progress, error FROM jobs WHERE id = :'job';

SELECT seq, type, data FROM events WHERE job_id = :'job' ORDER BY seq;
