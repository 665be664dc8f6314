"""Measurements: `make bench` runs them all and writes benchmarks/results/*.json and the README's table."""
