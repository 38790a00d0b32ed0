"""The benchmark suite. `python benchmarks/run.py` runs it."""
