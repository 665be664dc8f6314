"""Write requirements.lock: the exact versions of this environment, without local build tags.

The lock is for `make`; anyone who installs llmprune into an environment of their own gets the ranges of pyproject.toml.
"""

from __future__ import annotations

import importlib.metadata
import re
from pathlib import Path

ROOTS = ("llmprune", "pip", "setuptools", "wheel")
EXTRA = ("setuptools",)  # builds the editable install, without a build environment of its own


def main() -> None:
    pins = {}
    for distribution in importlib.metadata.distributions():
        name = re.sub(r"[-_.]+", "-", distribution.metadata["Name"]).lower()
        if name not in ROOTS or name in EXTRA:
            pins[name] = distribution.version.split("+")[0]
    lines = [f"{name}=={version}" for name, version in sorted(pins.items())]
    header = "# Made by `make lock`. torch is installed first, in the build that suits the machine (scripts/setup.sh).\n"
    Path("requirements.lock").write_text(header + "\n".join(lines) + "\n")
    print(f"{len(lines)} packages locked")


if __name__ == "__main__":
    main()
