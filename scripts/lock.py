"""Write the locks: the exact versions of this environment, without local build tags.

requirements.lock is all of it, for `make`; requirements-worker.lock and requirements-web.lock are what the two container
images run, so without tests and linters, and the web one without torch. Anyone who installs llmprune into an environment
of their own gets the ranges of pyproject.toml.

``lock.py docs``, run by the Python of the documentation's environment, writes requirements-docs.lock: what the extra docs
asks for, without llmprune.
"""

from __future__ import annotations

import importlib.metadata
import sys
import tomllib
from collections.abc import Collection, Iterable
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

UNLOCKED = {"llmprune", "pip", "wheel"}
BUILD = "setuptools"  # builds llmprune itself, without a build environment of its own
IMAGE = Requirement("llmprune[service,telemetry]")
MARKERS = {"triton": "; platform_system == 'Linux'"}  # the release this torch's GPU build asks for; the CPU build has none
COMPUTE = ("accelerate", "datasets", "pyarrow", "safetensors", "torch", "transformers")  # nothing the web process imports


def main() -> None:
    if sys.argv[1:] == ["docs"]:
        extras = tomllib.loads(Path("pyproject.toml").read_text())["project"]["optional-dependencies"]
        _write("requirements-docs.lock", _closure(map(Requirement, extras["docs"])))
        return
    installed = {canonicalize_name(found.metadata["Name"]) for found in importlib.metadata.distributions()}
    _write("requirements.lock", installed - UNLOCKED | {BUILD})
    _write("requirements-worker.lock", _closure([IMAGE]) - UNLOCKED | {BUILD})
    _write("requirements-web.lock", _closure([IMAGE], without=COMPUTE) - UNLOCKED | {BUILD})


def _closure(roots: Iterable[Requirement], without: Collection[str] = ()) -> set[str]:
    """What the roots need on this machine, directly or not, themselves included; nothing in `without` is followed."""
    seen: set[Requirement] = set()
    pending = list(roots)
    for root in pending:
        missing = root.extras - set(importlib.metadata.metadata(root.name).get_all("Provides-Extra", []))
        if missing:
            raise SystemExit(f"{root.name} has no extra {', '.join(missing)} here: install it again, then lock.")
    while pending:
        requirement = pending.pop()
        if requirement not in seen and canonicalize_name(requirement.name) not in without:
            seen.add(requirement)
            pending += _requirements(requirement)
    return {canonicalize_name(requirement.name) for requirement in seen}


def _requirements(requirement: Requirement) -> list[Requirement]:
    """What one distribution needs for the extras asked of it."""
    try:
        lines = importlib.metadata.requires(requirement.name) or []
    except importlib.metadata.PackageNotFoundError:
        raise SystemExit(f"{requirement.name} is required and not installed: pip install '{requirement}', then lock.") from None
    needed = [Requirement(line) for line in lines]
    extras = ("", *requirement.extras)
    return [need for need in needed if not need.marker or any(need.marker.evaluate({"extra": extra}) for extra in extras)]


def _write(file: str, names: Collection[str]) -> None:
    pins = [f"{name}=={_version(name)}{MARKERS.get(name, '')}" for name in sorted(names)]
    torch = " torch is installed first, in the build that suits the machine (scripts/setup.sh)." if "torch" in names else ""
    Path(file).write_text(f"# Made by `make lock`.{torch}\n" + "\n".join(pins) + "\n")
    print(f"{file}: {len(pins)} packages")


def _version(name: str) -> str:
    return importlib.metadata.version(name).split("+")[0]


if __name__ == "__main__":
    main()
