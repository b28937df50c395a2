"""Where in a model is a fact? Change every site by itself and see which one decides the answer.

The model is SmolLM2-135M, which `nnsplice fetch smollm2` gets.

python examples/02_causal_tracing.py [FOLDER]
"""

import sys
import tempfile
from pathlib import Path

import torch

import nnsplice as ns

torch.set_num_threads(1)  # so small a model only waits for a second thread
model = ns.load("smollm2")
clean = "The Eiffel Tower is located in the city of"
corrupted = "The Brandenburg Gate is located in the city of"
metric = ns.logit_diff(" Paris", " Berlin")
columns = ["path", "value", "effect"]
print(f"clean:     {clean} -> Paris\ncorrupted: {corrupted} -> Berlin\n")

# 1. A sweep: for each layer and token, the corrupted run with the clean run's residual stream written in there.
#    An effect of 1 is the clean run's answer, 0 the corrupted run's.
stream = ns.sweep(model, clean, corrupted, "layers[:].output[:]", metric, progress=False)
print(stream, stream.best(4)[columns], "", sep="\n")
print(stream.effect().isel(prompt=0, layer=slice(0, None, 5)).to_pandas().round(2), "\n")  # an xarray, axes named

# 2. A picture and a page that stands by itself.
folder = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp())
folder.mkdir(parents=True, exist_ok=True)
ns.plots.save(stream.plot(), folder / "stream.png", close=True)
stream.to_html(folder / "stream.html")
stream.to_file(folder / "stream.safetensors")
print("written to", folder, "\n")

# 3. Which heads carry the fact to the last token, where it is said?
heads = ns.sweep(model, clean, corrupted, "layers[:].heads[:].output[-1]", metric, progress=False)
print("heads at the last token:", heads.best(4)[columns], "", sep="\n")

# 4. ROME's question: drown the subject in noise, restore one state at a time; here the MLPs of nine layers together.
traced = ns.causal_trace(model, clean, "Eiffel Tower", kind="mlp", window=9, samples=3, progress=False)
print(f"P(Paris) {traced.clean[0]:.3f}, with noise {traced.corrupted[0]:.3f}; nine MLPs restored:")
print(traced.best(4)[columns], "\n")

# 5. And the other way round: what does the answer lose without a head? The change is in the unit of the metric.
without = ns.ablate(model, clean, "layers[:].heads[:]", metric, operation="mean", progress=False)
print("heads, each replaced by its mean:", without.best(4)[["path", "value", "change"]], "", sep="\n")

# 6. A large sweep in parts, on as many machines as there are: a plan is data, and parts become one result again.
plan = ns.plan_sweep(model, clean, corrupted, "layers[:].output[:]", metric)
parts = [ns.run(plan.shard(i, 3), model, progress=False) for i in range(3)]
print(plan.preview(3), [len(plan.shard(i, 3)) for i in range(3)], sep="\n")
print("three parts are the whole:", ns.SweepResult.merge(parts) == stream)
