"""Benchmarks: `python -m bench` runs them all, `python -m bench.activations` one. RESULTS.md holds a table of each."""
