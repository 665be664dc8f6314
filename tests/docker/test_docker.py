"""The Dockerfile: what it takes from the repository, how it installs, and how hard it makes things for an intruder."""

from __future__ import annotations

import ast
import http.server
import os
import re
import shutil
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from dockerfile import ROOT, TARGETS, is_ignored, read
from typer.main import get_command

from llmprune.cli import with_plugins

DOCKERFILE = read()
PACKAGES = ("llmprune", "service", "triton_kernels")
COMPUTE = {"torch", "transformers", "accelerate", "datasets", "pyarrow", "safetensors", "numpy", "pandas", "tokenizers"}
TOOLS = {"pytest", "mypy", "ruff", "hypothesis", "schemathesis"}


def _pins(file: str) -> dict[str, str]:
    lines = [line for line in (ROOT / file).read_text().splitlines() if not line.startswith("#")]
    return dict(line.partition(";")[0].split("==") for line in lines)


def _package_files() -> list[str]:
    """What git would keep of the three packages."""
    files = [path for name in PACKAGES for path in (ROOT / name).rglob("*") if path.is_file()]
    files = [path for path in files if "__pycache__" not in path.parts and ".egg-info/" not in str(path)]
    beside = ROOT / "triton_kernels" / "README.md"
    return [str(path.relative_to(ROOT)) for path in files if path != beside]


def test_both_targets_are_stages() -> None:
    """And what builds without --target is the worker, which can do everything."""
    assert set(TARGETS) <= set(DOCKERFILE.stages)
    assert list(DOCKERFILE.stages)[-1] == "worker"


def test_what_is_copied_exists_and_is_in_the_context() -> None:
    """All of the context, and what the packages alone are installed from."""
    instructions = [instruction for stage in DOCKERFILE.stages.values() for instruction in stage.instructions]
    sources = {path for instruction in instructions for path in instruction.context_paths()}
    assert sources == {".", "scripts/setup.sh", "requirements-web.lock", "requirements-worker.lock"}
    for source in sources - {"."}:
        assert (ROOT / source).is_file(), source
        assert not is_ignored(source), source


def test_stages_copied_from_come_before() -> None:
    """COPY --from names an earlier stage."""
    seen: set[str] = set()
    copied = []
    for stage in DOCKERFILE.stages.values():
        for instruction in stage.instructions:
            sources = [flag.removeprefix("--from=") for flag in instruction.flags if flag.startswith("--from=")]
            assert set(sources) <= seen
            copied += sources
        seen.add(stage.name)
    assert copied == ["web-packages", "worker-packages"]


def test_the_context_is_the_packages_and_nothing_private() -> None:
    """Every file of the packages is in it, and no repository, environment, cache or secret."""
    files = _package_files()
    assert len(files) > 50
    for file in [*files, "pyproject.toml", "README.md", "LICENSE"]:
        assert not is_ignored(file), file
    private = ".git/config .venv/bin/python .env llmprune.env runs/x/model.safetensors tests/tiny.py build/lib/x.py"
    made = "llmprune/__pycache__/spec.pyc llmprune.egg-info/PKG-INFO service/x.egg-info/PKG-INFO"
    for file in f"{private} {made}".split():
        assert is_ignored(file), file


def test_the_installed_packages_have_all_their_files(tmp_path: Path) -> None:
    """Templates, static files, migrations and the demo model are in the wheel built from the context."""
    files = _package_files()
    for file in [*files, "pyproject.toml", "README.md", "LICENSE"]:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / file, tmp_path / file)
    build = "from setuptools import build_meta; build_meta.build_wheel('dist')"
    subprocess.run([sys.executable, "-c", build], cwd=tmp_path, check=True, capture_output=True, timeout=120)
    (wheel,) = (tmp_path / "dist").iterdir()
    wanted = {file.removeprefix("service/").removeprefix("triton_kernels/") for file in files}
    assert wanted - set(zipfile.ZipFile(wheel).namelist()) == set()


@pytest.mark.parametrize("target", TARGETS)
def test_packages_are_installed_by_the_script_make_uses(target: str) -> None:
    """One step a layer, both of scripts/setup.sh, and pip is called nowhere else."""
    assert "bash scripts/setup.sh" in (ROOT / "Makefile").read_text()
    steps = [*DOCKERFILE.chain(f"{target}-packages"), *DOCKERFILE.stages[target].instructions]
    runs = [step.rest for step in steps if step.keyword == "RUN" and "setup.sh" in step.rest]
    assert [run.partition("setup.sh ")[2].split()[0] for run in runs] == ["packages", "llmprune"]
    for run in runs:
        assert f"PARTS={target} " in run
        assert "VENV=/opt/llmprune bash /src/scripts/setup.sh" in run
    assert not any("pip install" in step.rest for stage in DOCKERFILE.stages.values() for step in stage.instructions)


def test_the_build_of_torch_is_chosen_by_the_argument() -> None:
    """--build-arg TORCH reaches the script."""
    worker = DOCKERFILE.stages["worker-packages"].instructions
    assert [step.rest for step in worker if step.keyword == "ARG"] == ["TORCH=cpu"]
    assert any(step.keyword == "RUN" and "TORCH=${TORCH} " in step.rest for step in worker)


def test_the_web_image_never_hears_of_torch() -> None:
    """In none of the stages it is made from."""
    for step in (*DOCKERFILE.chain("web-packages"), *DOCKERFILE.chain("web")):
        assert "torch" not in step.rest.lower()


@pytest.mark.parametrize("target", TARGETS)
def test_the_image_runs_as_nobody_in_particular(target: str) -> None:
    """A numeric user other than root, which owns nothing but /data, and nothing is built after the change."""
    steps = DOCKERFILE.chain(target)
    assert DOCKERFILE.last(target, "USER").rest == "10001:10001"
    after = steps[steps.index(DOCKERFILE.last(target, "USER")) :]
    assert not {"RUN", "COPY", "ADD"} & {step.keyword for step in after}
    assert DOCKERFILE.last(target, "VOLUME").rest == "/data"
    assert any("LLMPRUNE_DATA_DIR=/data" in step.rest.split() for step in steps if step.keyword == "ENV")


@pytest.mark.parametrize(("target", "command"), [("web", "serve --no-worker --host 0.0.0.0"), ("worker", "worker")])
def test_the_image_starts_its_command_under_tini(target: str, command: str) -> None:
    """In the exec form, so that signals arrive and orphans are reaped."""
    assert DOCKERFILE.last(target, "ENTRYPOINT").exec_form == ["/usr/bin/tini", "--"]
    assert DOCKERFILE.last(target, "CMD").exec_form == ["llmprune", *command.split()]


@pytest.mark.parametrize("words", ["serve --no-worker --host", "worker --check"])
def test_the_commands_of_the_images_exist(words: str) -> None:
    """With the options the Dockerfile gives them."""
    name, *options = words.split()
    parameters = get_command(with_plugins()).commands[name].params  # type: ignore[attr-defined]
    assert set(options) <= {option for parameter in parameters for option in (*parameter.opts, *parameter.secondary_opts)}


@contextmanager
def _server(status: int) -> Iterator[int]:
    """A web server that answers /readyz with the status, and everything else with 404; yields its port."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if self.path == "/readyz" else 404)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize(("status", "code"), [(200, 0), (503, 1)])
def test_the_healthcheck_of_web_asks_readyz(status: int, code: int) -> None:
    """On the port of the service, past any proxy."""
    python, *arguments = DOCKERFILE.last("web", "HEALTHCHECK").exec_form
    assert python == "python"
    with _server(status) as port:
        environment = {**os.environ, "LLMPRUNE_PORT": str(port), "http_proxy": "http://127.0.0.1:1"}
        check = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, timeout=60)
    assert check.returncode == code
    assert check.stderr == b""


def test_the_healthcheck_of_web_fails_where_nobody_listens() -> None:
    """With exit code 1, the only one Docker knows for unhealthy."""
    arguments = DOCKERFILE.last("web", "HEALTHCHECK").exec_form[1:]
    check = subprocess.run([sys.executable, *arguments], env={"LLMPRUNE_PORT": "1"}, capture_output=True, timeout=60)
    assert check.returncode == 1


def test_the_healthcheck_of_the_worker_is_its_own() -> None:
    """The command that looks for a fresh heartbeat."""
    assert DOCKERFILE.last("worker", "HEALTHCHECK").exec_form == ["llmprune", "worker", "--check"]


def test_nothing_secret_is_built_in() -> None:
    """No ARG or ENV is a secret: both stay readable in the image."""
    names = [*DOCKERFILE.arguments]
    for stage in DOCKERFILE.stages.values():
        for step in stage.instructions:
            if step.keyword in ("ARG", "ENV"):
                names += re.findall(r"(\w+)=", step.rest)
    assert len(names) > 4
    assert not [name for name in names if re.search("TOKEN|PASSWORD|SECRET|KEY|CREDENTIAL", name)]


def test_images_from_outside_have_a_tag() -> None:
    """Of one Python, not whatever is newest."""
    assert set(DOCKERFILE.images()) == {"python:3.12-slim"}


def test_the_locks_agree() -> None:
    """One version of a package everywhere; the images have no tools, and the web image no numerics."""
    everything, worker, web = (_pins(f"requirements{name}.lock") for name in ("", "-worker", "-web"))
    assert web.items() < worker.items() < everything.items()
    assert {"fastapi", "dbos", "psycopg-binary", "setuptools"} <= web.keys()
    assert {"torch", "transformers"} <= worker.keys()
    assert not COMPUTE & web.keys()
    assert not TOOLS & worker.keys()


def _imported(path: Path) -> set[str]:
    """The modules a file imports, those inside its functions too."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    found = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return found | {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}


def test_the_service_runs_on_what_the_web_image_has() -> None:
    """Its modules, the library's light ones and what they import later need no package but those of requirements-web.lock."""
    modules = {
        "llmprune.spec",
        "llmprune.report",
        "llmprune.events",
        "llmprune.methods",
        "llmprune.cli",
        "llmprune_service.cli",
    }
    for path in (ROOT / "service").rglob("*.py"):
        modules |= _imported(path)
        if path.name != "env.py":  # Alembic's, run by Alembic
            modules.add(".".join(path.relative_to(ROOT / "service").with_suffix("").parts).removesuffix(".__init__"))
    code = f"import only; only.allow({str(ROOT / 'requirements-web.lock')!r})\nimport importlib\n"
    code += f"for name in {sorted(modules)!r}: importlib.import_module(name)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), str(ROOT / "service"), str(ROOT)])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
