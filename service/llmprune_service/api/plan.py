"""What a job would need, worked out by ``llmprune plan`` in a child process: this one never imports torch."""

from __future__ import annotations

import json
import os
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anyio import to_thread

from llmprune.spec import PruneConfig
from llmprune_service import processes
from llmprune_service.commands import arguments
from llmprune_service.problems import Problem
from llmprune_service.settings import Settings

_SECONDS = 60.0
_AT_ONCE = 2
_NOT_PLANNED = {"latency", "prompt", "tasks", "tasks_path", "task_limit", "num_fewshot"}
"""What `llmprune plan` takes no option for."""
_PASSED_ON = ("PATH", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "PYTHONPATH", "CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES")
_PATH = re.compile(r"(?<![\w/])/[^\s'\",;:)]+")


@dataclass(frozen=True)
class Outcome:
    """The plan as ``llmprune plan --json`` prints it, or None; ``warning`` says what is wrong with it or why there is none."""

    plan: dict[str, Any] | None
    warning: str | None


class Planner:
    """Runs a few children at a time."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._running = 0

    async def plan(self, config: PruneConfig, revision: str | None) -> Outcome:
        """The plan of a job; raises Problem 429 while others are being made."""
        if self._running >= _AT_ONCE:
            raise Problem(429, "too-many-plans", "Other plans are being made; try again.", headers={"Retry-After": "5"})
        self._running += 1
        try:
            return await to_thread.run_sync(self._run, config, revision)
        finally:
            self._running -= 1

    def _run(self, config: PruneConfig, revision: str | None) -> Outcome:
        """The child works in an empty directory on the disk the job would use, and is told of no secret."""
        asked = config.model_dump(exclude_unset=True, exclude=_NOT_PLANNED) | {"revision": revision}
        command = [str(self._settings.job_python), "-P", "-m", "llmprune", "plan", "--json", *arguments(PruneConfig(**asked))]
        with tempfile.TemporaryDirectory(dir=self._settings.data_dir, prefix="plan-") as folder:
            environment = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
            environment |= {
                "HOME": folder,
                "HF_HOME": str(self._settings.hub_dir),
                "HF_HUB_OFFLINE": "1",
                "OMP_NUM_THREADS": "1",
            }
            process = processes.spawn(
                command, env=environment, cwd=Path(folder), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                memory_bytes=self._settings.child_memory_bytes,
            )  # fmt: skip
            with process:
                try:
                    output, errors = process.communicate(timeout=_SECONDS)
                except subprocess.TimeoutExpired:
                    return Outcome(None, f"The plan was not ready within {_SECONDS:g} seconds.")
                finally:
                    processes.end(process)
        return _outcome(process.returncode, output, errors.decode(errors="replace"))


def _outcome(code: int, output: bytes, errors: str) -> Outcome:
    last = _PATH.sub("...", " ".join(errors.partition("Error:")[2].split()))
    try:
        plan = json.loads(output)
    except ValueError:
        return Outcome(None, f"No plan: {last or 'it could not be made on this host; the job may still run on a worker.'}")
    plan["problems"] = [_PATH.sub("...", problem) for problem in plan["problems"]]
    return Outcome(plan, f"This host cannot run it: {last}" if code else None)
