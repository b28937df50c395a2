"""Run every benchmark."""

from bench import activations, adapters, attribution, checkpoints, loading, steering, sweeps, weights

for benchmark in (loading, activations, sweeps, attribution, steering, weights, adapters):
    benchmark.main([])
checkpoints.main(["--gb", "1"])
