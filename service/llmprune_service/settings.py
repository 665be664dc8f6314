"""Configuration of the service: LLMPRUNE_* environment variables, with defaults that suit one machine."""

from __future__ import annotations

import ipaddress
import os
import sys
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

GIB = 2**30


def _default_data_dir() -> Path:
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "llmprune"


class Settings(BaseSettings):
    """Every field is an environment variable: ``data_dir`` is LLMPRUNE_DATA_DIR. Lists are separated by colons."""

    model_config = SettingsConfigDict(env_prefix="LLMPRUNE_", extra="ignore", frozen=True)

    data_dir: Path = Field(default_factory=_default_data_dir, description="Database, models, jobs and artifacts of this host.")
    database_url: SecretStr | None = Field(
        None, description="postgresql://USER:PASSWORD@HOST/NAME to scale out; default: a SQLite file in the data directory."
    )
    store_url: str | None = Field(
        None, description="fsspec URL of the artifacts, such as s3://bucket/llmprune; default: the data directory."
    )

    host: str = Field("127.0.0.1", description="Address to listen on; a public one needs keys and should stand behind TLS.")
    port: Annotated[int, Field(ge=0, le=65535)] = Field(8000, description="Port to listen on; 0 picks a free one.")
    auth: bool = Field(True, description="Require API keys; false is accepted on a loopback address only.")
    allowed_hosts: Annotated[tuple[str, ...], NoDecode] = Field(
        (), description="Host names browsers may use, beside the address itself; '*' for any (behind a checking proxy)."
    )

    slots: Annotated[int, Field(ge=1)] | None = Field(
        None, description="Jobs at a time on this host; default: one per GPU, or one without a GPU."
    )
    poll_seconds: Annotated[float, Field(gt=0)] = Field(
        0.5, description="How often queue, cancellations and events are looked at."
    )
    heartbeat_ttl: Annotated[float, Field(gt=0)] = Field(
        30.0, description="Seconds without a heartbeat after which a worker counts as dead; it beats five times as often."
    )
    drain_seconds: Annotated[float, Field(ge=0)] = Field(
        30.0, description="On SIGTERM, how long a worker waits for the current block to be finished."
    )
    max_recoveries: Annotated[int, Field(ge=0)] = Field(
        3, description="A job whose worker died this often is given up: it may be what kills them."
    )
    job_python: Path = Field(
        Path(sys.executable), description="Python whose llmprune runs the jobs, where it is not the service's own."
    )
    child_memory_bytes: Annotated[int, Field(ge=1)] | None = Field(None, description="Address space limit of a job's process.")
    cache_gb: Annotated[float, Field(ge=0, allow_inf_nan=False)] = Field(
        20.0, description="Statistics of dense models that the jobs of a tenant share, on each worker's disk; 0 keeps none."
    )

    model_roots: Annotated[tuple[Path, ...], NoDecode] = Field(
        (), description="Directories under which requests may name local models and texts; none by default."
    )
    max_body_bytes: int = Field(64 * 1024, description="Largest request body.")
    max_queued: int = Field(1000, description="Queued and running jobs of one tenant.")
    max_sweep_points: Annotated[int, Field(ge=1)] = Field(100, description="Jobs of one sweep.")
    max_submissions_per_minute: Annotated[int, Field(ge=1)] = Field(600, description="Submissions of one tenant.")
    max_streams: int = Field(1000, description="Event streams open at a time for one key.")
    max_calibration_tokens: int = Field(2**26, description="num_samples * seq_len a request may ask for.")
    max_timeout_s: int = Field(7 * 86400, description="Longest time limit of a job, and its default, in seconds.")
    max_download_bytes: int = Field(500 * GIB, description="Largest model to download.")
    tenant_quota_bytes: int = Field(1024 * GIB, description="Disk space of one tenant's jobs and artifacts.")
    disk_floor_bytes: int = Field(
        2 * GIB, description="Free space that is never used: below it jobs wait and fail, and /readyz is 503."
    )
    retention_days: float | None = Field(
        None, description="Delete finished jobs and their files after so long; default: never."
    )
    webhook_hosts: Annotated[tuple[str, ...], NoDecode] = Field(
        (), description="Hosts webhooks may reach without the checks against private addresses."
    )
    hf_endpoint: str | None = Field(None, description="Hub to use in place of huggingface.co.")
    hf_token: SecretStr | None = Field(None, description="Hub token of the tenant 'default'.")
    log_format: Literal["auto", "json", "text"] = Field("auto", description="json, text, or auto: text on a terminal.")

    @field_validator("model_roots", "allowed_hosts", "webhook_hosts", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return tuple(filter(None, value.split(os.pathsep))) if isinstance(value, str) else value

    @field_validator("data_dir")
    @classmethod
    def _absolute(cls, value: Path) -> Path:
        return value.expanduser().absolute()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.auth and not self.is_loopback:
            raise ValueError(
                f"LLMPRUNE_AUTH=false would open this machine to all who reach {self.host}; listen on 127.0.0.1 or keep keys."
            )
        return self

    @property
    def is_loopback(self) -> bool:
        """Whether the service can be reached from this machine only."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    @cached_property
    def url(self) -> str:
        """SQLAlchemy URL of the database."""
        if self.database_url is None:
            return f"sqlite:///{self.data_dir / 'llmprune.db'}"
        return self.database_url.get_secret_value()

    @property
    def work_dir(self) -> Path:
        """Where jobs run: one directory a job, one below it an attempt."""
        return self.data_dir / "work"

    @property
    def hub_dir(self) -> Path:
        """The hub cache of this host: HF_HOME of the jobs."""
        return self.data_dir / "hub"

    @property
    def cache_dir(self) -> Path:
        """Statistics of dense models for later jobs: one directory a tenant."""
        return self.data_dir / "cache"

    @property
    def key_file(self) -> Path:
        """Holds the key that the first start makes, readable by the owner only."""
        return self.data_dir / "admin.key"
