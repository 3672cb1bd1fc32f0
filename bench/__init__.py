"""Benchmarks against the peers, side by side in one run: `make bench`, or `python -m bench.run --help`."""
