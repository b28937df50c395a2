"""Run every benchmark."""

from bench import activations, adapters, loading, sweeps, weights
from bench import activations, adapters, checkpoints, loading, sweeps

for benchmark in (loading, adapters, activations, sweeps, weights):
from bench import activations, adapters, loading, steering, sweeps

for benchmark in (loading, adapters, activations, sweeps, steering):
from bench import activations, adapters, attribution, loading, sweeps

for benchmark in (loading, adapters, activations, sweeps, attribution):
    benchmark.main([])
checkpoints.main(["--gb", "1"])
