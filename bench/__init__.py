"""Benchmarks, one command each: `python -m bench.NAME` writes bench/results/NAME.json."""
