"""The service's commands: against a real `llmprune serve` with its workers, whose jobs are light."""

from __future__ import annotations

import inspect
import io
import json
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import light_child
import pytest
from live_service import Served, free_port, is_ready, make_environment, processes_of, start, until

from llmprune.cli import prune
from llmprune.spec import PruneConfig
from llmprune_service.cli_jobs import submit
from llmprune_service.client import Client
from llmprune_service.settings import Settings
from llmprune_service.tokens import hub_token
from tests.conftest import Outcome

LIGHT = ("--damping", "0.02", "--num-samples", "3", "--no-latency")
Cli = Callable[..., Outcome]


# Jobs -----------------------------------------------------------------------------------------------------------------


def test_submit_has_the_options_of_prune() -> None:
    """All that describe a job, as the same objects; none of them runs a model's own code."""
    of_prune = inspect.signature(prune, eval_str=True).parameters
    of_submit = inspect.signature(submit).parameters
    shared = [name for name in of_prune if name in PruneConfig.model_fields or name in ("no_eval", "no_prompt")]
    assert len(shared) > 15
    for name in shared:
        assert name == "trust_remote_code" or of_submit[name] == of_prune[name]
    assert "trust_remote_code" not in of_submit


def test_a_job_from_submission_to_checkpoint(cli: Cli, here: Served, tmp_path: Path) -> None:
    """`submit --out` draws progress on stderr, prints the report, and leaves the files."""
    outcome = cli("submit", "demo", *LIGHT, "--seed", 5, "--metadata", "team=nlp", "--out", tmp_path / "out")
    assert outcome.code == 0, outcome.err
    assert "Queued\nRunning on worker_" in outcome.err
    assert "Pruning blocks: started" in outcome.err and "Pruning blocks: done in 1.0 s" in outcome.err
    assert f"Written to {tmp_path / 'out'}" in outcome.out.replace("\n", "")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == light_child.checkpoint_bytes(3, 5)
    listed = json.loads(cli("jobs", "list", "--metadata", "team=nlp", "--json").out)["data"]
    assert [(job["status"], job["config"]["seed"]) for job in listed] == [("succeeded", 5)]
    assert listed[0]["config"] == {"model": "demo", "damping": 0.02, "num_samples": 3, "latency": False, "seed": 5}


def test_looking_at_a_finished_job(cli: Cli, here: Served, tmp_path: Path) -> None:
    """show, list, events, report and download, for people and as JSON."""
    job = cli("submit", *LIGHT).out.strip()
    assert job.startswith("job_")
    events = cli("jobs", "events", job)  # to its end
    assert events.out.splitlines()[0].split(maxsplit=2) == ["1", "job.queued", '{"priority": 5}']
    assert json.loads(cli("jobs", "events", job, "--json", "--after", 1).out.splitlines()[-1])["type"] == "job.succeeded"
    assert "Status    succeeded" in cli("jobs", "show", job).out
    assert json.loads(cli("jobs", "show", job, "--json").out)["id"] == job
    assert f"{job} " in cli("jobs", "list", "--limit", 3).out
    assert "50.00 % zeros" in cli("jobs", "list", "--status", "succeeded").out
    assert "demo: wanda" in cli("jobs", "report", job).out
    assert json.loads(cli("jobs", "report", job, "--json").out)["config"]["num_samples"] == 3
    assert json.loads(cli("jobs", "download", job, tmp_path, "--json").out) == {"directory": str(tmp_path)}
    assert (tmp_path / "model.safetensors").is_file()
    assert cli("jobs", "delete", job).out == f"{job} is deleted.\n"
    assert cli("jobs", "show", job).code == 2


def test_steering_a_job(cli: Cli, here: Served) -> None:
    """Cancel a running one, resume it, cancel it again; retry is refused with the reason."""
    job = json.loads(cli("submit", *LIGHT, "--skip", "hang-1", "--json").out)["id"]
    until(lambda: "running" in cli("jobs", "show", job).out, "the job runs")
    assert json.loads(cli("jobs", "cancel", job, "--json").out)["status"] in ("cancelling", "cancelled")
    until(lambda: "cancelled" in cli("jobs", "show", job).out, "the job is cancelled")
    refused = cli("jobs", "retry", job)
    assert (refused.code, refused.out) == (2, "")
    assert "to be retried it must be failed" in refused.err
    assert "queued" in cli("jobs", "resume", job).out
    cli("jobs", "cancel", job)
    until(lambda: "cancelled" in cli("jobs", "show", job).out, "the job is cancelled again")


def test_a_sweep_is_shown_side_by_side_and_grows(cli: Cli, here: Served, tmp_path: Path) -> None:
    """From its submission to its end, with the jobs it is made of."""
    outcome = cli("sweeps", "submit", *LIGHT, "--sparsities", "50%,0.6", "--metadata", "of=sweep", "--wait")
    assert outcome.code == 0, outcome.err
    assert "wanda-0.5" in outcome.out and "sparsity" in outcome.out
    (job, _) = json.loads(cli("jobs", "list", "--metadata", "of=sweep", "--json").out)["data"]
    sweep = job["sweep_id"]
    assert job["point"] == "wanda-0.6" and sweep in cli("jobs", "list", "--sweep", sweep, "--json").out
    assert cli("sweeps", "extend", sweep, "--sparsities", "0.6,0.7").out == "Added: wanda-0.7. There already: wanda-0.6.\n"
    assert f"{sweep}  " in cli("sweeps", "list").out
    shown = cli("sweeps", "show", sweep, "--plot", tmp_path / "front.svg", "--x", "bytes")
    assert shown.code == 0 and "bytes" not in shown.err and (tmp_path / "front.svg").read_text().startswith("<svg")
    assert json.loads(cli("sweeps", "show", sweep, "--json").out)["data"][0]["name"] == "wanda-0.5"
    assert cli("sweeps", "show", sweep, "--csv").out.count("\n") == 4
    until(lambda: "3 succeeded" in cli("sweeps", "list").out, "all have ended")
    assert "none of its jobs is failed" in cli("sweeps", "retry", sweep).err
    assert cli("sweeps", "delete", sweep).out == f"{sweep} is deleted.\n"


def test_a_sweep_that_fails_says_how_to_go_on(cli: Cli, here: Served) -> None:
    """Exit code 1, and the command for it."""
    outcome = cli("sweeps", "submit", *LIGHT, "--skip", "gated", "--methods", "wanda", "--wait")
    assert outcome.code == 1 and "wanda-0.5: failed: demo is gated" in outcome.out
    sweep = outcome.err.rpartition("llmprune sweeps retry ")[2].partition("`")[0]
    assert json.loads(cli("sweeps", "retry", sweep, "--json").out)["counts"] == {"queued": 1}
    until(lambda: "failed (1 failed)" in cli("sweeps", "list").out, "it has failed again")
    assert "none of its jobs is cancelled" in cli("sweeps", "resume", sweep).err


def test_a_search_is_submitted_and_followed(cli: Cli, here: Served, tmp_path: Path) -> None:
    """Its files come with what was tried; where nothing meets the budget, the error says how close it came."""
    outcome = cli("submit-auto", *LIGHT, "--max-kl", "0.5", "--methods", "wanda", "--out", tmp_path / "out")
    assert outcome.code == 0, outcome.err
    assert json.loads((tmp_path / "out" / "auto.json").read_text())["config"]["max_kl"] == 0.5
    assert "auto" in cli("jobs", "list", "--method", "auto").out
    refused = cli("submit-auto", *LIGHT, "--skip", "unmet", "--max-kl", "0.5", "--wait")
    assert refused.code == 1 and "failed (budget_not_met): Nothing met the budget" in refused.err


def test_a_failed_job_is_one_line_with_the_remedy(cli: Cli, here: Served, tmp_path: Path) -> None:
    """And exit code 1; nothing is downloaded."""
    outcome = cli("submit", *LIGHT, "--skip", "gated", "--wait", "--out", tmp_path / "out")
    assert outcome.code == 1
    last = outcome.err.splitlines()[-1]
    assert "failed (gated_model): demo is gated" in last and "llmprune jobs retry job_" in last
    assert not (tmp_path / "out").exists()
    job = json.loads(cli("jobs", "list", "--status", "failed", "--json").out)["data"][0]["id"]
    assert "gated_model" in cli("jobs", "show", job).out
    assert json.loads(cli("jobs", "retry", job, "--from-start", "--json").out)["status"] == "queued"
    assert cli("jobs", "events", job).out.count("job.failed") == 2


def test_progress_shows_what_is_tried_again(cli: Cli, here: Served) -> None:
    """And where it goes on; with --json the report is one object."""
    outcome = cli("submit", *LIGHT, "--skip", "crash-1-1", "--wait", "--json")
    assert json.loads(outcome.out)["model"]["num_blocks"] == 3
    assert "Warning: The job's process was ended by SIGKILL" in outcome.err and "Trying again." in outcome.err
    assert outcome.err.count("Pruning blocks: started") == 1
    assert "Pruning blocks: resumed at 1/3" in outcome.err


def test_who_stops_watching_leaves_the_job_alone(served: Served) -> None:
    """Ctrl-C says how to go on."""
    process = start("submit", *LIGHT, "--skip", "hang-1", "--wait", "--url", served.url, environment=served.environment)
    read_until(process, "Pruning blocks: started")
    process.send_signal(signal.SIGINT)
    out, errors = process.communicate(timeout=20)
    assert (process.returncode, out) == (130, "")
    job = errors.rpartition("llmprune jobs cancel ")[2].partition("`")[0]
    with Client(served.url, (Path(served.environment["LLMPRUNE_DATA_DIR"]) / "admin.key").read_text()) as client:
        assert client.get(job).status == "running"
        client.cancel(job)
        assert client.wait(job, timeout=20).status == "cancelled"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["submit", "--sparsity", "2"], "sparsity"),
        (["submit", "--method", "wnda"], "Did you mean 'wanda'?"),
        (["submit", "--device", "cuda:7"], "/device: Use one of auto"),
        (["submit", "--metadata", "novalue"], "not KEY=VALUE"),
        (["submit", "--database-url", "sqlite:///none.db", "--wait"], "only queues the job"),
        (["submit", "--database-url", "sqlite:////nowhere/none.db"], "llmprune migrate"),
        (["submit", "--out", "/proc"], "is there and not empty"),
        (["submit", "--url", "nonsense"], "is not the URL of a service"),
        (["submit", "--url", "http://127.0.0.1:1"], "Start one with `llmprune serve`"),
        (["jobs", "list", "--key", "prn_wrong"], "A valid API key is needed"),
        (["jobs", "show", "job_x"], "no such job"),
        (["sweeps", "submit"], "a sweep of nothing"),
        (["submit-auto"], "no budget"),
        (["sweeps", "submit", "--sparsities", "half"], "is not a list of numbers"),
        (["sweeps", "show", "sweep_x", "--x", "beauty"], "is no axis"),
        (["sweeps", "show", "sweep_x"], "no such sweep"),
        (["keys", "create", "x", "--scope", "root"], "scopes"),
        (["keys", "revoke", "key_none"], "no such API key"),
        (["hub-token", "Bad Tenant"], "is not a name"),
        (["serve", "--host", "256.1.1.1"], "is taken"),
    ],
)
def test_mistakes_are_one_red_line(
    cli: Cli, here: Served, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    """With the remedy, and exit code 2."""
    monkeypatch.setattr("sys.stdin", io.StringIO("hf_token"))
    outcome = cli(*arguments)
    assert (outcome.code, outcome.out) == (2, "")
    assert message in outcome.err
    assert outcome.err.startswith("Error: ") and outcome.err.count("\n") == 1


def test_submission_without_http(cli: Cli, here: Served) -> None:
    """Straight into the queue; the service's worker takes it."""
    url = f"sqlite:///{here.environment['LLMPRUNE_DATA_DIR']}/llmprune.db"
    job = cli("submit", *LIGHT, "--priority", 8, "--database-url", url).out.strip()
    assert cli("jobs", "events", job).out.splitlines()[-1].split()[1] == "job.succeeded"
    assert json.loads(cli("jobs", "show", job, "--json").out)["priority"] == 8


# The host -------------------------------------------------------------------------------------------------------------


def test_keys(cli: Cli, here: Served) -> None:
    """A key that is made can be used, is listed without its secret, and is worthless once revoked."""
    key = cli("keys", "create", "for a test", "--tenant", "team", "--scope", "read").out.strip()
    assert cli("jobs", "list", "--key", key, "--json").out.split() == ["{", '"data":', "[]", "}"]
    assert "lacks the scope 'write'" in cli("submit", "--key", key).err
    (entry,) = [line for line in cli("keys", "list").out.splitlines() if "team  read  for a test" in line]
    listed = json.loads(cli("keys", "list", "--json").out)["data"]
    assert key not in json.dumps(listed) and {view["name"] for view in listed} >= {"first", "for a test"}
    assert json.loads(cli("keys", "revoke", entry.split()[0], "--json").out) == {"deleted": entry.split()[0]}
    until(lambda: cli("jobs", "list", "--key", key).code == 2, "the key is refused", 10)
    assert json.loads(cli("keys", "create", "x", "--expires-in-s", "5", "--json").out)["expires_at"] > time.time()


def test_a_link_opens_the_pages_once(cli: Cli, here: Served) -> None:
    """It ends in a session of the browser's."""
    import httpx2

    link = cli("keys", "link").out.strip()
    assert link.startswith(f"{here.url}/login?code=")
    assert httpx2.get(link).cookies["llmprune_session"]
    assert httpx2.get(link).status_code == 401


def test_a_hub_token_is_read_from_stdin(cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It is on no command line, and in a file of the owner's."""
    monkeypatch.setenv("LLMPRUNE_DATA_DIR", str(tmp_path))
    monkeypatch.setattr("sys.stdin", io.StringIO("hf_abcdefgh\n"))
    assert cli("hub-token", "team").out == "Jobs of team use it from now on.\n"
    assert hub_token(Settings(), "team") == "hf_abcdefgh"


def test_the_health_of_workers(cli: Cli, here: Served, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Exit code 0 while one of this host is heard of, 1 where none is, or no database."""
    # On a busy machine it may be heard of late.
    outcome = until(lambda: (found := cli("worker", "--check")).code == 0 and found, "the worker is heard of")
    assert outcome.out == "1 of this host's workers are alive.\n"
    monkeypatch.setenv("LLMPRUNE_DATA_DIR", str(tmp_path))
    assert cli("worker", "--check").code == 1
    assert "is up to date" in cli("migrate").out
    outcome = cli("worker", "--check")
    assert (outcome.code, outcome.out) == (1, "")
    assert "No worker of this host" in outcome.err


def test_bad_settings_name_their_variable(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the operator knows them."""
    monkeypatch.setenv("LLMPRUNE_SLOTS", "many")
    outcome = cli("serve")
    assert outcome.code == 2
    assert "LLMPRUNE_SLOTS: Input should be a valid integer" in outcome.err


def test_a_taken_port_is_said_before_anything_starts(cli: Cli, here: Served) -> None:
    """With the way out."""
    outcome = cli("serve", "--port", here.port)
    assert outcome.code == 2
    assert f"Port {here.port} of 127.0.0.1 is taken; choose another one with --port" in outcome.err


def test_a_service_that_is_ended_lets_its_workers_finish_their_block(tmp_path: Path, light_python: Path) -> None:
    """SIGTERM: a block that was begun is done, then the worker leaves the job and says goodbye."""
    environment, port = make_environment(tmp_path, light_python), free_port()
    process = start("serve", "--port", port, environment=environment)
    with Client(f"http://127.0.0.1:{port}", "prn_none", patience=0) as client:
        until(lambda: is_ready(client), "the service is ready")
    with Client(f"http://127.0.0.1:{port}", (tmp_path / "admin.key").read_text()) as client:
        job = client.submit(num_samples=100, damping=0.5, latency=False)
        next(event for event in client.events(job.id) if event.type == "job.block")
    told = time.time()
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 0
    lines = [json.loads(line) for line in (tmp_path / light_child.LOG).read_text().splitlines()]
    finished = [line["block"] for line in lines if line["what"] == "done" and line["time"] > told]
    assert 1 <= len(finished) < 20
    with closing(sqlite3.connect(tmp_path / "llmprune.db")) as database:
        assert database.execute("SELECT count(*) FROM workers").fetchone() == (0,)  # it said goodbye
    assert processes_of(tmp_path) == []


def test_the_commands_are_light_until_they_run() -> None:
    """Every start of llmprune imports them, those of jobs too."""
    code = (
        "import sys, llmprune.cli; before = set(sys.modules); import llmprune_service.cli\n"
        "print(sorted({name.partition('.')[0] for name in set(sys.modules) - before}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['llmprune_service']"


# The quick start ------------------------------------------------------------------------------------------------------


def quickstart(data_dir: Path, python: Path, *arguments: object) -> subprocess.Popen[str]:
    """In an environment that holds the key of some other service."""
    environment = {**make_environment(data_dir, python), "LLMPRUNE_API_KEY": "prn_of_another"}
    return start("quickstart", "demo", *LIGHT, *arguments, environment=environment)


def read_until(process: subprocess.Popen[str], text: str) -> str:
    """Lines of stderr up to one that holds a text."""
    assert process.stderr is not None
    seen = ""
    for line in process.stderr:
        seen += line
        if text in line:
            return seen
    pytest.fail(f"ended without {text!r}:\n{seen}")


def test_quickstart_does_the_whole_way_and_stays_up(light_python: Path, tmp_path: Path) -> None:
    """On another port where the usual one is taken; Ctrl-C ends it, and everything it started."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        process = quickstart(tmp_path / "data", light_python, "--port", port, "--out", tmp_path / "out")
        seen = read_until(process, "The service stays up at")
    assert f"Port {port} is taken: the service listens on " in seen
    url = seen.rpartition("stays up at ")[2].split()[0]
    key = (tmp_path / "data" / "admin.key").read_text().strip()
    with Client(url, key) as client:
        assert [job.status for job in client.list()] == ["succeeded"]
    process.send_signal(signal.SIGINT)
    out, errors = process.communicate(timeout=30)
    assert process.returncode == 0, errors
    assert f"In a browser {url}/login?code=" in out and str(tmp_path / "out") in out.replace("\n", "")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == light_child.checkpoint_bytes(3)
    assert processes_of(tmp_path / "data") == []


@pytest.mark.parametrize(("ending", "code"), [(signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)])
def test_nothing_outlives_a_quickstart(light_python: Path, tmp_path: Path, ending: signal.Signals, code: int) -> None:
    """Interrupted in the middle of a job, or killed."""
    process = quickstart(tmp_path, light_python, "--port", 0, "--once", "--skip", "hang-1")
    read_until(process, "Pruning blocks: started")
    assert len(processes_of(tmp_path)) >= 3
    process.send_signal(ending)
    _, errors = process.communicate(timeout=40)
    assert process.returncode == code
    assert ("Cancelled." in errors) == (ending == signal.SIGINT)
    until(lambda: processes_of(tmp_path) == [], "all processes are gone", 10)


def test_quickstart_uses_a_service_that_runs_and_says_what_failed(served: Served, tmp_path: Path) -> None:
    """A job that fails is a command that fails; the service that was there stays."""
    arguments = ("quickstart", "demo", *LIGHT, "--port", served.port, "--once")
    failed = start(*arguments, "--skip", "gated", environment=served.environment)
    out, errors = failed.communicate(timeout=60)
    assert (failed.returncode, out) == (1, "")
    assert f"Using the service at {served.url}" in errors
    assert "failed (gated_model)" in errors.splitlines()[-1]
    (tmp_path / "file").touch()
    refused = start(*arguments, "--out", tmp_path, environment=served.environment)
    _, errors = refused.communicate(timeout=60)
    assert refused.returncode == 2
    assert "is there and not empty" in errors
    with Client(served.url, patience=0) as client:
        client.check()
