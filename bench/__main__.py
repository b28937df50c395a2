"""Run every benchmark."""

from bench import activations, adapters, loading, sweeps

for benchmark in (loading, adapters, activations, sweeps):
    benchmark.main([])
