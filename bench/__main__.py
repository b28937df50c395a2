"""Run every benchmark."""

from bench import (
    activations,
    adapters,
    attribution,
    checkpoints,
    loading,
    paths,
    scale,
    steering,
    sweeps,
    tracing,
    weights,
)

for benchmark in (loading, activations, sweeps, paths, tracing, attribution, steering, weights, adapters, scale):
    benchmark.main([])
checkpoints.main(["--gb", "1"])
