"""``python -m llmprune``: the command line."""

from llmprune.cli import main

main()
