"""The Python client against the real API: over connections that break, and against services that cannot be trusted."""

from __future__ import annotations

import hashlib
import random
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import uvicorn
from proxy import Proxy

from llmprune.errors import ConfigError, OutputError
from llmprune.report import Report
from llmprune.spec import PruneConfig
from llmprune.sweep_spec import AutoConfig, SweepConfig
from llmprune_service.api.app import create_app
from llmprune_service.client import ApiError, Client, ServiceUnreachable
from llmprune_service.database import migrate
from llmprune_service.execution import Execution
from llmprune_service.jobs import Jobs
from llmprune_service.runner import headline
from llmprune_service.schemas import ApiKeyRequest
from llmprune_service.settings import Settings
from llmprune_service.store import Store
from reports import sample_report

FILES = {"model.safetensors": random.Random(1).randbytes(2_500_000), "config.json": b"{}", "empty.txt": b""}
DOWNLOAD = r"GET /v1/jobs/\w+/artifacts/model.safetensors "
STREAM = r"GET /v1/jobs/\w+/events "


@dataclass
class Service:
    """The API on a free port, and what a worker would do to its jobs."""

    url: str
    port: int
    key: str
    jobs: Jobs
    settings: Settings

    def claim(self, job_id: str) -> Execution:
        """Begin a job."""
        execution = Execution.claim(self.jobs, job_id, self.jobs.get(None, job_id).run, "worker_test")
        assert execution is not None
        return execution

    def block(self, execution: Execution, number: int) -> None:
        """Say that a block is finished."""
        facts = {"block": number, "name": f"blocks.{number}", "sparsity": 0.5, "error": None, "seconds": 1.0, "sha256": None}
        execution.add_block(facts, 20)

    def succeed(self, job_id: str, files: dict[str, bytes] = FILES) -> None:
        """Run a job to its end; these are the files of its result."""
        execution = self.claim(job_id)
        self.block(execution, 0)
        folder = self.settings.data_dir / "made" / job_id
        folder.mkdir(parents=True)
        for name, content in files.items():
            (folder / name).write_bytes(content)
        digests = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
        artifacts = Store(self.settings).put(folder, digests, tenant="default", job_id=job_id, attempt=1)
        report = sample_report(out=None)
        execution.succeed(report, headline(report), artifacts)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """The real application under uvicorn, on SQLite."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        settings = Settings(data_dir=tmp_path_factory.mktemp("service"), port=port, poll_seconds=0.05, disk_floor_bytes=0)
        migrate(settings.url)
        app = create_app(settings)
        server = uvicorn.Server(uvicorn.Config(app, log_config=None, timeout_graceful_shutdown=1))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        while not server.started:
            time.sleep(0.02)
        key = settings.key_file.read_text().strip()
        yield Service(f"http://127.0.0.1:{port}", port, key, app.state.jobs, settings)
        server.should_exit = True
        thread.join()


@pytest.fixture
def client(service: Service) -> Iterator[Client]:
    """An administrator of the service."""
    with Client(service.url, service.key) as client:
        yield client


@pytest.fixture
def proxy(service: Service) -> Iterator[Proxy]:
    """What breaks connections on the way to the service."""
    proxy = Proxy(service.port)
    yield proxy
    proxy.close()


@pytest.fixture
def through(proxy: Proxy, service: Service) -> Iterator[Client]:
    """A client behind the proxy."""
    with Client(proxy.url, service.key, patience=20) as client:
        yield client


# Submitting -----------------------------------------------------------------------------------------------------------


def test_a_submission_is_queued_with_what_was_given(client: Client) -> None:
    """A config and fields beside it; only what was set is sent."""
    job = client.submit(PruneConfig(method="magnitude", pattern="2:4"), priority=7, metadata={"a": "b"}, seq_len=None)
    assert (job.status, job.model, job.priority, job.metadata) == ("queued", "demo", 7, {"a": "b"})
    assert job.config == {"method": "magnitude", "pattern": "2:4", "sparsity": 0.5}
    assert client.get(job.id) == job


def test_the_same_key_is_one_job(client: Client) -> None:
    """And another request under the same key is refused."""
    first = client.submit(seed=1, idempotency_key="once")
    assert client.submit(seed=1, idempotency_key="once").id == first.id
    with pytest.raises(ApiError) as refused:
        client.submit(seed=2, idempotency_key="once")
    assert (refused.value.status, refused.value.code) == (422, "idempotency-key-reused")


def test_a_submission_whose_answer_is_lost_is_one_job(through: Client, proxy: Proxy) -> None:
    """It is sent again under its key."""
    proxy.budgets += [0, 20]
    job = through.submit(metadata={"lost": "answer"})
    keys = proxy.header("POST /v1/jobs ", "idempotency-key")
    assert len(keys) == 3 and len(set(keys)) == 1
    assert [found.id for found in through.list(metadata={"lost": "answer"})] == [job.id]


def test_what_is_no_job_is_refused_at_home_and_by_the_service(client: Client) -> None:
    """The config's own rules need no service; the service's come as a problem with pointers."""
    with pytest.raises(ConfigError, match="sparsity"):
        client.submit(sparsity=1.5)
    with pytest.raises(ApiError) as refused:
        client.submit(device="cuda:1")
    assert refused.value.exit_code == 2
    assert [error["pointer"] for error in refused.value.errors] == ["/device"]
    assert "/device: Use one of auto" in str(refused.value)


def test_validation_queues_nothing(client: Client) -> None:
    """It says what the job would be."""
    before = [job.id for job in client.list()]
    assert client.validate(seed=3)["model"] == "demo"
    assert [job.id for job in client.list()] == before


# Sweeps ---------------------------------------------------------------------------------------------------------------


def test_a_sweep_from_submission_to_deletion(client: Client, service: Service) -> None:
    """Fields of a job are those of all its jobs; its points are compared as they end."""
    sweep = client.sweep(SweepConfig(sparsities=(0.5, 0.6)), methods=["wanda"], num_samples=8, metadata={"of": "sweep"})
    assert (sweep.status, sweep.num_points, sweep.metadata) == ("queued", 2, {"of": "sweep"})
    assert sweep.config == {"base": {"num_samples": 8}, "methods": ["wanda"], "sparsities": [0.5, 0.6]}
    assert client.sweeps.extend(sweep.id, patterns=["unstructured", "2:4"]).added == ("wanda-2-4",)
    with pytest.raises(TimeoutError, match="still queued after 0.1 seconds"):
        client.sweeps.wait(sweep.id, timeout=0.1)
    jobs = {job.point: job.id for job in client.list(sweep=sweep.id)}
    service.succeed(jobs["wanda-0.5"])
    service.claim(jobs["wanda-2-4"]).fail("out_of_memory", "too large")
    assert client.sweeps.cancel(sweep.id).status == "failed"
    assert client.sweeps.resume(sweep.id).counts == {"succeeded": 1, "queued": 1, "failed": 1}
    client.sweeps.retry(sweep.id)
    for name in ("wanda-0.6", "wanda-2-4"):
        service.succeed(jobs[name])
    assert client.sweeps.wait(sweep.id, timeout=30) == next(client.sweeps.list())
    points = client.sweeps.points(sweep.id, x="bytes")
    assert (points.x, points.y, [point.job_id for point in points.data]) == ("bytes", "perplexity", list(jobs.values())[::-1])
    assert client.sweeps.csv(sweep.id).count("\n") == 4 and client.sweeps.plot(sweep.id).startswith("<svg")
    client.sweeps.delete(sweep.id)
    with pytest.raises(ApiError, match="no such sweep"):
        client.sweeps.get(sweep.id)


def test_a_search_is_one_job(client: Client) -> None:
    """Budgets and fields of its jobs by name."""
    job = client.auto(AutoConfig(max_kl=0.25), num_samples=8, methods=["wanda"])
    assert (job.kind, job.config) == ("auto", {"base": {"num_samples": 8}, "max_kl": 0.25, "methods": ["wanda"]})
    with pytest.raises(ConfigError, match="no budget"):
        client.auto(num_samples=8)


def test_what_is_no_sweep_is_refused_at_home_and_by_the_service(client: Client) -> None:
    """As with jobs."""
    with pytest.raises(ConfigError, match="methods names wanda twice"):
        client.sweep(methods=["wanda", "wanda"])
    with pytest.raises(ApiError, match="/methods: .*Did you mean 'wanda'"):
        client.sweep(methods=["wnda"])


# Looking --------------------------------------------------------------------------------------------------------------


def test_a_list_has_all_pages(client: Client) -> None:
    """Newest first, over the service's page of twenty."""
    made = [client.submit(metadata={"page": "yes"}).id for _ in range(23)]
    assert [job.id for job in client.list(metadata={"page": "yes"}, status="queued")] == made[::-1]
    assert list(client.list(method="sparsegpt", metadata={"page": "yes"})) == []


def test_waiting_ends_with_the_job(client: Client, service: Service) -> None:
    """Or with the time that was given for it."""
    job = client.submit()
    with pytest.raises(TimeoutError, match="still queued after 0.3 seconds"):
        client.wait(job.id, timeout=0.3)
    worker = threading.Timer(0.3, service.succeed, (job.id,))
    worker.start()
    assert client.wait(job.id, timeout=20).status == "succeeded"
    worker.join()


def test_events_come_once_each_over_broken_connections(through: Client, proxy: Proxy, service: Service) -> None:
    """In order and without holes: a broken stream is gone on with after its last event."""
    job = through.submit()
    through.close()

    def work() -> None:
        execution = service.claim(job.id)
        for block in range(20):
            service.block(execution, block)
            time.sleep(0.03)
        execution.fail("out_of_memory", "too large")

    proxy.budgets += [900, 1500, 0, 1200]
    with Client(proxy.url, service.key) as client:
        worker = threading.Thread(target=work)
        worker.start()
        events = list(client.events(job.id))
        worker.join()
    assert [event.seq for event in events] == list(range(1, 24))
    assert events[-1].type == "job.failed"
    taken_up = [int(value) for value in proxy.header(STREAM, "last-event-id")]
    assert len(taken_up) >= 5 and taken_up == sorted(taken_up) and taken_up[-1] > 5


def test_events_of_a_retried_job_do_not_stop_at_its_first_end(client: Client, service: Service) -> None:
    """They end with the run that is the last."""
    job = client.submit()
    service.claim(job.id).fail("killed", "again, please")
    assert client.retry(job.id).status == "queued"
    service.succeed(job.id)
    kinds = [event.type for event in client.events(job.id)]
    assert kinds.count("job.failed") == 1
    assert kinds[-1] == "job.succeeded"
    assert [event.type for event in client.events(job.id, after=len(kinds) - 1)] == ["job.succeeded"]
    assert list(client.events(job.id, after=len(kinds))) == []


def test_what_is_not_there_is_an_error_with_a_code(client: Client) -> None:
    """Also in the middle of an iteration."""
    for ask in (client.get, client.report, client.delete, client.wait, lambda job: list(client.events(job))):
        with pytest.raises(ApiError) as missing:
            ask("job_" + "0" * 26)
        assert (missing.value.status, missing.value.code, missing.value.exit_code) == (404, "not-found", 2)


# Verbs ----------------------------------------------------------------------------------------------------------------


def test_verbs(client: Client, service: Service) -> None:
    """Cancel, resume, patch, retry from the start, delete."""
    job = client.submit()
    assert client.patch(job.id, priority=9, metadata={"x": "y"}).priority == 9
    assert client.get(job.id).metadata == {"x": "y"}
    assert client.cancel(job.id).status == "cancelled"
    assert client.cancel(job.id).status == "cancelled"
    assert client.resume(job.id).status == "queued"
    with pytest.raises(ApiError, match="must be failed") as conflict:
        client.retry(job.id, from_start=True)
    assert conflict.value.status == 409
    execution = service.claim(job.id)
    service.block(execution, 0)
    execution.fail("killed", "by a test")
    assert [block.name for block in client.checkpoints(job.id)] == ["blocks.0"]
    assert client.retry(job.id, from_start=True).status == "queued"
    assert client.checkpoints(job.id) == ()
    client.cancel(job.id)
    client.delete(job.id)
    with pytest.raises(ApiError):
        client.get(job.id)


def test_what_must_not_be_done_twice_is_not_repeated(client: Client, service: Service, proxy: Proxy) -> None:
    """A verb whose answer is lost is the caller's to look after."""
    job = client.submit()
    client.cancel(job.id)
    proxy.budgets += [0]
    with Client(proxy.url, service.key) as behind, pytest.raises(ServiceUnreachable):
        behind.resume(job.id)
    assert len(proxy.requests("POST ")) == 1
    assert client.get(job.id).status == "queued"


def test_methods_workers_and_keys(client: Client) -> None:
    """What an administrator sees; a key that is revoked is worth nothing."""
    assert {"wanda", "sparsegpt"} <= {method["name"] for method in client.methods()}
    assert client.workers() == ()
    with pytest.raises(ApiError, match="no such worker"):
        client.drain("worker_none")
    made = client.create_key(ApiKeyRequest(name="of a test", scopes=("read",)))
    assert made.key is not None
    with Client(client.url, made.key) as reader:
        assert len(list(reader.list())) >= 0
        with pytest.raises(ApiError) as refused:
            reader.submit()
        assert refused.value.status == 403
    listed = client.keys()
    assert made.id in [key.id for key in listed]
    client.revoke_key(made.id)
    listed = client.keys()
    assert listed and made.id not in [key.id for key in listed]


# Results --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(service: Service) -> str:
    """A job with files; read only."""
    with Client(service.url, service.key) as client:
        job = client.submit()
    service.succeed(job.id)
    return job.id


def check_files(folder: Path) -> None:
    """All files, right, and nothing else."""
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == FILES


def test_the_report_is_the_librarys(client: Client, finished: str) -> None:
    """Every number of it."""
    assert client.report(finished) == sample_report(out=None)
    assert isinstance(client.report(finished), Report)


def test_a_download_is_complete_and_checked(client: Client, finished: str, tmp_path: Path) -> None:
    """Progress goes up to the whole."""
    seen: list[tuple[int, int]] = []
    assert client.download(finished, tmp_path / "a" / "b", progress=lambda *now: seen.append(now)) == tmp_path / "a" / "b"
    check_files(tmp_path / "a" / "b")
    total = sum(map(len, FILES.values()))
    assert seen == sorted(seen) and seen[-1] == (total, total) and len(seen) > 3


def test_a_download_goes_on_where_connections_break(through: Client, proxy: Proxy, finished: str, tmp_path: Path) -> None:
    """By ranges: hardly more is sent than there is."""
    proxy.budgets += [300_000, 0, 700_000, 100, 900_000]
    through.download(finished, tmp_path)
    check_files(tmp_path)
    starts = [int(value.removeprefix("bytes=").removesuffix("-")) for value in proxy.header(DOWNLOAD, "range")]
    assert len(starts) >= 5 and starts == sorted(starts) and starts[-1] > 1_000_000
    assert proxy.sent < 1.1 * len(FILES["model.safetensors"])


def test_another_process_goes_on_with_a_part(
    client: Client, service: Service, proxy: Proxy, finished: str, tmp_path: Path
) -> None:
    """A client that gives up leaves NAME.part; the next one asks for the rest alone."""
    proxy.budgets += [1_000_000]
    with Client(proxy.url, service.key, patience=0) as first, pytest.raises(ServiceUnreachable):
        first.download(finished, tmp_path)
    part = tmp_path / "model.safetensors.part"
    size = part.stat().st_size
    assert 500_000 < size < 1_000_000 and not (tmp_path / "model.safetensors").exists()
    proxy.heads.clear()
    with Client(proxy.url, service.key) as second:
        second.download(finished, tmp_path)
    assert proxy.header(DOWNLOAD, "range") == [f"bytes={size}-"]
    check_files(tmp_path)


@pytest.mark.parametrize("content", [b"of another job", b"x" * 3_000_000], ids=["shorter", "longer"])
def test_a_part_of_something_else_is_begun_anew(client: Client, finished: str, tmp_path: Path, content: bytes) -> None:
    """It shows when the sha256 is wrong, or at once by its length."""
    (tmp_path / "model.safetensors.part").write_bytes(content)
    client.download(finished, tmp_path)
    check_files(tmp_path)


def test_files_that_are_there_are_not_fetched_again(through: Client, proxy: Proxy, finished: str, tmp_path: Path) -> None:
    """And one that is another is not overwritten."""
    through.download(finished, tmp_path)
    proxy.heads.clear()
    through.download(finished, tmp_path)
    assert proxy.requests(DOWNLOAD) == []
    (tmp_path / "config.json").write_bytes(b"[]")
    with pytest.raises(OutputError, match=r"config\.json is there and is another file"):
        through.download(finished, tmp_path)
    assert (tmp_path / "config.json").read_bytes() == b"[]"


def test_a_directory_that_cannot_be_made_is_said(client: Client, finished: str, tmp_path: Path) -> None:
    """In a line with the remedy."""
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="Choose another directory"):
        client.download(finished, tmp_path / "file" / "below")


def test_a_stream_may_be_left_in_the_middle(client: Client, service: Service) -> None:
    """The client goes on to be of use."""
    job = client.submit()
    execution = service.claim(job.id)
    seen = next(event for event in client.events(job.id) if event.type == "job.running")
    assert seen.seq == 2
    execution.fail("killed", "by a test")
    assert client.get(job.id).status == "failed"
