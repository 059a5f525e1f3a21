"""Benchmarks: each module is one command, `python -m bench.NAME`, and writes bench/results/NAME.json."""
