"""Benchmarks: each is a module to run, `python -m benchmarks.<name>`, and writes to `results/`."""
