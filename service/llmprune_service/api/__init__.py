"""The HTTP surface: JSON under /v1, pages for people, probes and metrics."""
