"""Benchmarks: ``python -m benchmarks.NAME [--quick]``; each prints a table and ``figure <name> <value> <unit>`` lines."""
