"""``python -m benchmarks.NAME [--quick]`` prints a table, then ``figure <name> <value> <unit>`` lines."""
