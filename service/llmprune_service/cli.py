"""The service's commands, added to ``llmprune``. What they need is imported when they run, not by ``--help``."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from llmprune.cli_options import Json, config_fields
from llmprune.errors import ConfigError
from llmprune_service import cli_jobs, cli_sweeps
from llmprune_service.cli_jobs import with_config_options

if TYPE_CHECKING:
    import sqlalchemy as sa

    from llmprune_service.settings import Settings

Slots = Annotated[
    int | None, typer.Option("--slots", min=1, help="Jobs at a time; by default one per GPU, or one without a GPU.")
]
Port = Annotated[int | None, typer.Option("--port", min=0, max=65535, help="Port to listen on; 0 picks a free one.")]

keys = typer.Typer(name="keys", help="API keys, in the database of this host's service.", no_args_is_help=True)
_errors = Console(stderr=True, soft_wrap=True)


def register(app: typer.Typer) -> None:
    """Add the service's commands to the library's."""
    for command in (serve, worker, quickstart, cli_jobs.submit, migrate):
        app.command()(command)
    app.command("hub-token")(hub_token)
    app.command("submit-auto")(cli_sweeps.submit_auto)
    app.add_typer(cli_jobs.jobs)
    app.add_typer(cli_sweeps.sweeps)
    app.add_typer(keys)


def serve(
    host: Annotated[str | None, typer.Option("--host", help="Address to listen on; 127.0.0.1 by default.")] = None,
    port: Port = None,
    no_worker: Annotated[bool, typer.Option("--no-worker", help="Only the API; workers run elsewhere.")] = False,
    slots: Slots = None,
) -> None:
    """Run the service: the API, and a worker for each GPU of this host. Ctrl-C or SIGTERM ends it."""
    from llmprune_service import ports, supervisor

    settings = load_settings(host=host, port=port, slots=slots)
    if settings.port == 0:
        settings = load_settings(host=host, port=ports.find_free(settings.host), slots=slots)
    elif not ports.is_free(settings.host, settings.port):
        raise ConfigError(f"Port {settings.port} of {settings.host} is taken; choose another one with --port, 0 for any.")
    with database(settings) as engine:
        _greet(engine, settings)
    for number in (signal.SIGTERM, signal.SIGINT):
        # The web server raises the signal again when it has ended; its default would end the workers in mid-block.
        signal.signal(number, lambda *_: sys.exit(0))
    supervisor.serve(settings, workers=not no_worker)


def worker(
    slots: Slots = None,
    slot: Annotated[int | None, typer.Option("--slot", min=0, hidden=True)] = None,
    check: Annotated[bool, typer.Option("--check", help="Say whether a worker of this host is alive; exit 1 if not.")] = False,
) -> None:
    """Run the workers of this host for a service elsewhere: LLMPRUNE_DATABASE_URL and LLMPRUNE_STORE_URL name it."""
    from llmprune_service import supervisor

    settings = load_settings(slots=slots)
    if check:
        _check_worker(settings)
        return
    if slot is None:
        with database(settings):
            pass  # its errors are one line, not a crash of every worker
    supervisor.work(settings, slot=slot)


@with_config_options
def quickstart(
    *,
    out: cli_jobs.Out = None,
    once: Annotated[bool, typer.Option("--once", help="End the service with the job.")] = False,
    port: Port = None,
    **config: Any,
) -> None:
    """Start the service, prune MODEL through it, show the report, and leave the service up."""
    from llmprune_service import quickstart as tour

    tour.main(config_fields(config), load_settings(host="127.0.0.1", port=port), out=out, once=once)


def migrate() -> None:
    """Bring the database up to date, or make it."""
    with database(load_settings()) as engine:
        typer.echo(f"{engine.url.render_as_string(hide_password=True)} is up to date.")


def hub_token(tenant: Annotated[str, typer.Argument(help="Whose jobs may use it.")] = "default") -> None:
    """Set the Hugging Face token of a tenant; it is read from stdin."""
    from getpass import getpass

    from llmprune_service.tokens import set_hub_token

    token = getpass("Hugging Face token: ") if sys.stdin.isatty() else sys.stdin.readline()
    try:
        set_hub_token(load_settings(), tenant, token.strip())
    except ValueError as error:
        raise ConfigError(f"The token was not set: {error}") from None
    typer.echo(f"Jobs of {tenant} use it from now on.")


@keys.command("create")
def create_key(
    name: Annotated[str, typer.Argument(help="What it is for.")],
    tenant: Annotated[str, typer.Option("--tenant", help="Whose jobs it sees and makes.")] = "default",
    scope: Annotated[list[str] | None, typer.Option("--scope", help="read, write or admin; repeatable.")] = None,
    expires_in_s: Annotated[int | None, typer.Option("--expires-in-s", help="Seconds it is valid; else for ever.")] = None,
    as_json: Json = False,
) -> None:
    """Make an API key; it is shown this once."""
    from pydantic import ValidationError

    from llmprune.spec import describe
    from llmprune_service.api.auth import create_key as make
    from llmprune_service.schemas import ApiKeyRequest

    given = {"name": name, "tenant": tenant, "scopes": scope, "expires_in_s": expires_in_s}
    try:
        request = ApiKeyRequest.model_validate({field: value for field, value in given.items() if value is not None})
    except ValidationError as error:
        raise ConfigError(describe(error)) from None
    with database(load_settings()) as engine:
        view = make(engine, request)
    if as_json:
        cli_jobs.print_json(view)
    else:
        typer.echo(view.key)


@keys.command("list")
def list_keys(as_json: Json = False) -> None:
    """List API keys; the keys themselves are not kept."""
    from llmprune_service.api.auth import list_keys as find

    with database(load_settings()) as engine:
        found = find(engine)
    if as_json:
        typer.echo(json.dumps({"data": [key.model_dump(mode="json") for key in found]}, indent=1))
        return
    for key in found:
        typer.echo(f"{key.id}  {key.tenant}  {','.join(key.scopes)}  {key.name}")


@keys.command("revoke")
def revoke_key(key: Annotated[str, typer.Argument(help="Its id, key_...")], as_json: Json = False) -> None:
    """Make an API key worthless."""
    from llmprune_service.api.auth import delete_key

    with database(load_settings()) as engine:
        delete_key(engine, key)
    typer.echo(json.dumps({"deleted": key}) if as_json else f"{key} is revoked.")


@keys.command()
def link(url: cli_jobs.Url = cli_jobs.DEFAULT_URL, as_json: Json = False) -> None:
    """Print a link that signs a browser in as the administrator: once, within ten minutes."""
    settings = load_settings()
    with database(settings) as engine:
        address = login_link(engine, settings, url)
    typer.echo(json.dumps({"url": address}) if as_json else address)


def load_settings(**given: Any) -> Settings:
    """The configuration of the environment, and what the command line gives; raises ConfigError."""
    from pydantic import ValidationError
    from pydantic_settings import SettingsError

    from llmprune_service.settings import Settings

    try:
        return Settings(**{name: value for name, value in given.items() if value is not None})
    except ValidationError as error:
        parts = [(f"LLMPRUNE_{item['loc'][0]}".upper() if item["loc"] else "", item["msg"]) for item in error.errors()]
        raise ConfigError("; ".join(f"{name}: {text}".removeprefix(": ") for name, text in parts)) from None
    except SettingsError as error:
        raise ConfigError(str(error)) from None


@contextmanager
def database(settings: Settings) -> Iterator[sa.Engine]:
    """The service's database, made and up to date; its errors become the command line's."""
    from sqlalchemy.exc import OperationalError

    from llmprune_service.client import ApiError, ServiceUnreachable
    from llmprune_service.database import make_engine
    from llmprune_service.problems import Problem
    from llmprune_service.supervisor import prepare

    engine = make_engine(settings.url, pool_size=1)
    try:
        prepare(settings)
        yield engine
    except Problem as problem:
        raise ApiError(problem.status, problem.code, problem.detail, problem.errors) from None
    except OperationalError:
        name = engine.url.render_as_string(hide_password=True)
        raise ServiceUnreachable(f"The database {name} does not answer. Check LLMPRUNE_DATABASE_URL.") from None
    except OSError as error:
        raise ConfigError(f"{settings.data_dir} cannot be used ({error.strerror}). Set LLMPRUNE_DATA_DIR.") from None
    finally:
        engine.dispose()


def login_link(engine: sa.Engine, settings: Settings, url: str) -> str:
    """A link into the pages of the service; where keys are not asked for, its address will do."""
    from llmprune_service.api.auth import login_code

    return f"{url}/login?code={login_code(engine, settings)}" if settings.auth else url


def _greet(engine: sa.Engine, settings: Settings) -> None:
    """Say where it will be, and how to get in."""
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    url = f"http://{host}:{settings.port}"
    lines = [f"Serving {url}, API documentation at {url}/docs. Ctrl-C ends it."]
    if settings.auth:
        from llmprune_service.api.auth import ensure_first_key

        ensure_first_key(engine, settings)
        if settings.key_file.exists():
            lines.append(f"API key of the first start: {settings.key_file}")
    if settings.is_loopback:
        lines.append(f"In a browser, once and within ten minutes: {login_link(engine, settings, url)}")
    for line in lines:
        _errors.print(line, markup=False, highlight=False)


def _check_worker(settings: Settings) -> None:
    import socket

    import sqlalchemy as sa
    from sqlalchemy.exc import SQLAlchemyError

    from llmprune_service import tables
    from llmprune_service.database import make_engine, now

    workers = tables.workers
    engine = make_engine(settings.url, pool_size=1)
    try:
        with engine.connect() as connection:
            fresh = workers.c.seen_at >= now(engine) - settings.heartbeat_ttl
            count = sa.select(sa.func.count()).select_from(workers).where(workers.c.host == socket.gethostname(), fresh)
            alive = connection.execute(count).scalar_one()
    except SQLAlchemyError:
        alive = 0
    finally:
        engine.dispose()
    if not alive:
        _errors.print("No worker of this host has been heard of lately.", style="red")
        raise typer.Exit(1)
    typer.echo(f"{alive} of this host's workers are alive.")
