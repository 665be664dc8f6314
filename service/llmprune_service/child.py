"""``python -m llmprune_service.child PARENT MEMORY COMMAND...``: become COMMAND, under limits and tied to the parent.

The kernel kills it when the parent dies (however it dies), it writes no core dumps, and it has its own process group, so
that a job ends with everything it started. Imports the standard library only: it is on the way of every start.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import sys

_PR_SET_PDEATHSIG = 1
_PR_SET_NO_NEW_PRIVS = 38


def main() -> None:
    """Set the limits, then replace this process by the command."""
    parent, memory, *command = sys.argv[1:]
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        if os.getppid() != int(parent):  # it died before the kernel knew
            sys.exit(1)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if int(memory):
        resource.setrlimit(resource.RLIMIT_AS, (int(memory), int(memory)))
    os.umask(0o077)
    os.execv(command[0], command)


if __name__ == "__main__":
    main()
