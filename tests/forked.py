"""Processes of the tests, forked from one server that has imported what they need: a second or more less for each."""

from __future__ import annotations

import multiprocessing

PROCESSES = multiprocessing.get_context("forkserver")
# One list for all: there is one server, and who sets the list last before it starts decides what it holds.
PROCESSES.set_forkserver_preload(["llmprune.api", "llmprune.cli", "llmprune_service.worker"])
