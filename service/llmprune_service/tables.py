"""The service's own tables, beside those of the job engine in the same database. SQLite and PostgreSQL.

Times are unix seconds of the database's clock. ``jobs`` is the truth about a job; the engine's queue only carries its id.
"""

from __future__ import annotations

import sqlalchemy as sa

metadata = sa.MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)
_JSON = sa.JSON(none_as_null=True)

sweeps = sa.Table(
    "sweeps",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("tenant", sa.Text, nullable=False),
    sa.Column("model", sa.Text, nullable=False),
    sa.Column("revision", sa.Text),  # the commit of every point
    sa.Column("config", _JSON, nullable=False),  # SweepConfig, the fields that were set
    sa.Column("fields", _JSON, nullable=False),  # of every point's submission: priority, timeout_s, metadata, webhook
    sa.Column("num_points", sa.Integer, nullable=False),  # ever made: the next one's number
    sa.Column("created_at", sa.Double, nullable=False),
    sa.Column("updated_at", sa.Double, nullable=False),
    sa.Index(None, "tenant", "created_at", "id"),
)

jobs = sa.Table(
    "jobs",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("tenant", sa.Text, nullable=False),
    sa.Column("kind", sa.Text, nullable=False, server_default="prune"),  # prune auto
    sa.Column("sweep_id", sa.Text),  # the sweep that the job is a point of
    sa.Column("sweep_index", sa.Integer),  # 0, 1, 2 ... within it
    sa.Column("point", sa.Text),  # its name there, such as sparsegpt-2-4
    sa.Column("status", sa.Text, nullable=False),  # queued running cancelling succeeded failed cancelled
    sa.Column("phase", sa.Text),  # resolve fetch prune evaluate benchmark package
    sa.Column("model", sa.Text, nullable=False),
    sa.Column("revision", sa.Text),  # the commit everything is read from
    sa.Column("method", sa.Text, nullable=False),
    sa.Column("pattern", sa.Text, nullable=False),
    sa.Column("sparsity", sa.Float, nullable=False),
    sa.Column("config", _JSON, nullable=False),  # PruneConfig, the fields that were set
    sa.Column("priority", sa.Integer, nullable=False),  # 0 to 9, 9 first
    sa.Column("timeout_s", sa.Integer, nullable=False),
    sa.Column("metadata", _JSON, nullable=False),
    sa.Column("webhook", _JSON),  # {url, events} of this job alone
    sa.Column("run", sa.Integer, nullable=False, server_default="1"),  # one per enqueue: resume, retry, priority make a new one
    sa.Column("generation", sa.Integer, nullable=False, server_default="1"),  # a new one forgets the finished blocks
    sa.Column("claim", sa.Text),  # fencing token of the execution that may write
    sa.Column("worker", sa.Text),
    sa.Column("attempt", sa.Integer, nullable=False, server_default="0"),  # executions begun
    sa.Column("recoveries", sa.Integer, nullable=False, server_default="0"),  # of this run: workers lost
    sa.Column("retries", _JSON, nullable=False),  # {cause: count} of this run
    sa.Column("batch_size", sa.Integer),  # set after running out of memory
    sa.Column("progress", _JSON),  # {stage, done, total}
    sa.Column("error", _JSON),  # {code, message}
    sa.Column("result", _JSON),  # headline numbers of the report
    sa.Column("last_seq", sa.Integer, nullable=False, server_default="0"),
    sa.Column("bytes_reserved", sa.BigInteger, nullable=False, server_default="0"),
    sa.Column("created_at", sa.Double, nullable=False),
    sa.Column("updated_at", sa.Double, nullable=False),
    sa.Column("started_at", sa.Double),  # first claim of this run
    sa.Column("finished_at", sa.Double),
    sa.Index(None, "tenant", "created_at", "id"),
    sa.Index(None, "tenant", "status"),
    sa.Index(None, "status", "created_at"),
    sa.Index(None, "tenant", "model"),
    sa.Index(None, "sweep_id", "sweep_index"),
)

reports = sa.Table(  # apart from the jobs: a report of a large model is a megabyte, and lists have no use for it
    "reports",
    metadata,
    sa.Column("job_id", sa.Text, sa.ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True),
    sa.Column("report", _JSON, nullable=False),
)

job_metadata = sa.Table(
    "job_metadata",
    metadata,
    sa.Column("job_id", sa.Text, sa.ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True),
    sa.Column("key", sa.Text, primary_key=True),
    sa.Column("value", sa.Text, nullable=False),
    sa.Index(None, "key", "value"),
)

events = sa.Table(
    "events",
    metadata,
    sa.Column("job_id", sa.Text, sa.ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True),
    sa.Column("seq", sa.Integer, primary_key=True),  # 1, 2, 3 ... without holes
    sa.Column("type", sa.Text, nullable=False),
    sa.Column("data", _JSON, nullable=False),
    sa.Column("created_at", sa.Double, nullable=False),
)

blocks = sa.Table(
    "blocks",
    metadata,
    sa.Column("job_id", sa.Text, sa.ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True),
    sa.Column("block", sa.Integer, primary_key=True),
    sa.Column("name", sa.Text, nullable=False),
    sa.Column("sparsity", sa.Float),
    sa.Column("error", sa.Float),
    sa.Column("seconds", sa.Float),
    sa.Column("sha256", sa.Text),
    sa.Column("attempt", sa.Integer, nullable=False),
    sa.Column("created_at", sa.Double, nullable=False),
)

artifacts = sa.Table(
    "artifacts",
    metadata,
    sa.Column("job_id", sa.Text, sa.ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True),
    sa.Column("name", sa.Text, primary_key=True),
    sa.Column("bytes", sa.BigInteger, nullable=False),
    sa.Column("sha256", sa.Text, nullable=False),
    sa.Column("media_type", sa.Text, nullable=False),
    sa.Column("path", sa.Text, nullable=False),  # in the artifact store
)

workers = sa.Table(
    "workers",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),  # unique to one process
    sa.Column("host", sa.Text, nullable=False),
    sa.Column("pid", sa.Integer, nullable=False),
    sa.Column("slot", sa.Integer, nullable=False),
    sa.Column("device", sa.Text, nullable=False),
    sa.Column("version", sa.Text, nullable=False),
    sa.Column("job_id", sa.Text),
    sa.Column("draining", sa.Boolean, nullable=False, server_default=sa.false()),
    sa.Column("started_at", sa.Double, nullable=False),
    sa.Column("seen_at", sa.Double, nullable=False),
)

leases = sa.Table(
    "leases",
    metadata,
    sa.Column("name", sa.Text, primary_key=True),
    sa.Column("holder", sa.Text, nullable=False),
    sa.Column("seen_at", sa.Double, nullable=False),
)

idempotency_keys = sa.Table(
    "idempotency_keys",
    metadata,
    sa.Column("tenant", sa.Text, primary_key=True),
    sa.Column("key", sa.Text, primary_key=True),
    sa.Column("fingerprint", sa.Text, nullable=False),  # sha256 of the request
    sa.Column("job_id", sa.Text, nullable=False),  # what it made: a job or a sweep
    sa.Column("created_at", sa.Double, nullable=False),
)

api_keys = sa.Table(
    "api_keys",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("tenant", sa.Text, nullable=False),
    sa.Column("name", sa.Text, nullable=False),
    sa.Column("sha256", sa.Text, nullable=False, unique=True),  # of the whole key; the key itself is shown once
    sa.Column("scopes", _JSON, nullable=False),
    sa.Column("created_at", sa.Double, nullable=False),
    sa.Column("expires_at", sa.Double),
    sa.Column("last_used_at", sa.Double),
)

sessions = sa.Table(
    "sessions",
    metadata,
    sa.Column("sha256", sa.Text, primary_key=True),  # of the cookie, or of a login code that makes one
    sa.Column("kind", sa.Text, nullable=False),  # code session
    sa.Column("key_id", sa.Text, sa.ForeignKey("api_keys.id", ondelete="CASCADE"), nullable=False),
    sa.Column("expires_at", sa.Double, nullable=False),
)

webhooks = sa.Table(
    "webhooks",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("tenant", sa.Text, nullable=False),
    sa.Column("url", sa.Text, nullable=False),
    sa.Column("events", _JSON, nullable=False),
    sa.Column("secret", sa.Text, nullable=False),  # needed to sign, so it cannot be hashed
    sa.Column("old_secret", sa.Text),  # also signs until old_secret_until, while receivers change over
    sa.Column("old_secret_until", sa.Double),
    sa.Column("created_at", sa.Double, nullable=False),
)

signing_secrets = sa.Table(
    "signing_secrets",
    metadata,
    sa.Column("tenant", sa.Text, primary_key=True),
    sa.Column("secret", sa.Text, nullable=False),  # signs the webhooks that jobs name themselves
)

deliveries = sa.Table(
    "deliveries",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),  # the webhook-id header: receivers drop what they have seen
    sa.Column("tenant", sa.Text, nullable=False),
    sa.Column("webhook_id", sa.Text),  # null: named by the job, signed with the tenant's secret
    sa.Column("job_id", sa.Text),
    sa.Column("url", sa.Text, nullable=False),
    sa.Column("event", sa.Text, nullable=False),
    sa.Column("body", sa.Text, nullable=False),
    sa.Column("status", sa.Text, nullable=False),  # pending delivered dead
    sa.Column("attempts", sa.Integer, nullable=False, server_default="0"),
    sa.Column("error", sa.Text),
    sa.Column("created_at", sa.Double, nullable=False),
    sa.Column("delivered_at", sa.Double),
    sa.Index(None, "tenant", "created_at"),
)
