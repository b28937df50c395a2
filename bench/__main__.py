"""Run every benchmark."""

from bench import activations, adapters, attribution, checkpoints, loading, paths, steering, sweeps, weights

for benchmark in (loading, activations, sweeps, paths, attribution, steering, weights, adapters):
    benchmark.main([])
checkpoints.main(["--gb", "1"])
