"""Run every benchmark."""

from bench import activations, adapters, attribution, checkpoints, loading, paths, steering, sweeps, tracing, weights

for benchmark in (loading, activations, sweeps, paths, tracing, attribution, steering, weights, adapters):
    benchmark.main([])
checkpoints.main(["--gb", "1"])
