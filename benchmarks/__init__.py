"""Benchmarks on real models and real data: `python -m benchmarks.run`."""
