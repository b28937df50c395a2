"""Run every benchmark."""

from bench import activations, loading, sweeps

for benchmark in (loading, activations, sweeps):
    benchmark.main([])
