"""Run every benchmark."""

from bench import activations, adapters, loading, sweeps, weights

for benchmark in (loading, adapters, activations, sweeps, weights):
    benchmark.main([])
