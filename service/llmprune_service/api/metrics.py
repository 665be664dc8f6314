"""Prometheus metrics, worked out from the database when they are asked for: nothing to keep in step between processes."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import sqlalchemy as sa
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric, SummaryMetricFamily
from prometheus_client.registry import Collector

from llmprune_service.database import now
from llmprune_service.settings import Settings
from llmprune_service.tables import blocks, deliveries, jobs, workers

MEDIA_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def render(engine: sa.Engine, settings: Settings) -> bytes:
    """The metrics as text."""
    registry = CollectorRegistry()
    registry.register(_Database(engine, settings))
    return generate_latest(registry)


class _Database(Collector):
    def __init__(self, engine: sa.Engine, settings: Settings) -> None:
        self._engine = engine
        self._settings = settings

    def describe(self) -> list[Metric]:
        """Nothing: or registering would already collect."""
        return []

    def collect(self) -> Iterator[Metric]:
        """All families, from one look at the database."""
        with self._engine.connect() as connection:
            yield from _jobs(connection)
            yield from _totals(connection)
            yield _workers(connection, self._settings)
        free = shutil.disk_usage(self._settings.data_dir).free
        yield GaugeMetricFamily("llmprune_disk_free_bytes", "Free space of the data directory.", value=free)


def _jobs(connection: sa.Connection) -> Iterator[Metric]:
    count = sa.func.count()
    by_status = GaugeMetricFamily("llmprune_jobs", "Jobs by status.", labels=["status"])
    for status, number in connection.execute(sa.select(jobs.c.status, count).group_by(jobs.c.status)):
        by_status.add_metric([status], number)
    yield by_status
    queued = jobs.c.status == "queued"
    depth = GaugeMetricFamily("llmprune_queue_depth", "Queued jobs by priority.", labels=["priority"])
    for priority, number in connection.execute(sa.select(jobs.c.priority, count).where(queued).group_by(jobs.c.priority)):
        depth.add_metric([str(priority)], number)
    yield depth
    oldest = connection.execute(sa.select(now(connection) - sa.func.min(jobs.c.created_at)).where(queued)).scalar()
    yield GaugeMetricFamily("llmprune_oldest_queued_seconds", "Age of the oldest queued job.", value=max(oldest or 0.0, 0.0))
    durations = SummaryMetricFamily(
        "llmprune_job_duration_seconds", "Seconds from first claim to end, of finished jobs by status.", labels=["status"]
    )
    total = sa.func.sum(jobs.c.finished_at - jobs.c.started_at)
    ended = jobs.c.finished_at.is_not(None) & jobs.c.started_at.is_not(None)
    for status, number, seconds in connection.execute(
        sa.select(jobs.c.status, count, total).where(ended).group_by(jobs.c.status)
    ):
        durations.add_metric([status], count_value=number, sum_value=seconds)
    yield durations


def _totals(connection: sa.Connection) -> Iterator[Metric]:
    pruned = _scalar(connection, sa.select(sa.func.count()).select_from(blocks))
    yield CounterMetricFamily("llmprune_blocks_total", "Finished blocks of the jobs there are.", value=pruned)
    recovered = _scalar(connection, sa.select(sa.func.sum(jobs.c.recoveries)))
    yield CounterMetricFamily("llmprune_recoveries_total", "Times a dead worker's job was given to another.", value=recovered)
    dead = sa.select(sa.func.count()).select_from(deliveries).where(deliveries.c.status == "dead")
    yield CounterMetricFamily(
        "llmprune_webhook_failures_total", "Webhook deliveries that were given up.", value=_scalar(connection, dead)
    )


def _workers(connection: sa.Connection, settings: Settings) -> Metric:
    up = GaugeMetricFamily("llmprune_worker_up", "1 if the worker was seen lately.", labels=["worker", "slot"])
    alive = workers.c.seen_at >= now(connection) - settings.heartbeat_ttl
    for worker, slot, seen in connection.execute(sa.select(workers.c.id, workers.c.slot, alive)):
        up.add_metric([worker, str(slot)], float(bool(seen)))
    return up


def _scalar(connection: sa.Connection, query: sa.Select[Any]) -> float:
    return float(connection.execute(query).scalar() or 0)
