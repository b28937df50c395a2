"""The mood of a review as a vector: find it, see where it works, take the best cell, and let the model speak.

python examples/03_steering.py [FOLDER]
"""

import sys
import tempfile
from pathlib import Path

import torch

import nnsplice as ns

torch.set_num_threads(1)  # so small a model only waits for a second thread
model = ns.load("toy")
prompts = ns.models.toy_prompts()
pairs = [(r.text, r.opposite) if r.mood == "good" else (r.opposite, r.text) for r in prompts.reviews]
print(f"good: {pairs[0][0]} ...\nbad:  {pairs[0][1]} ...\n")

# 1. A direction for every layer, and how well each tells moods apart in reviews that it was not fitted on. In the unit
#    of residual norms, a coefficient of 1 is as long as the states themselves are in that layer.
good, bad = zip(*pairs[:100], strict=True)
vector = ns.steering.fit_from_prompts(model, good, bad, "layers[:].output[-1]").in_residual_norms()
print(vector, "\n")

# 2. Every layer with every coefficient, all cells side by side: what the metric gains, and what it disturbs.
bad_reviews = [bad for _, bad in pairs[100:120]]
grid = ns.steering.sweep(
    model, bad_reviews, vector, [-0.5, 0.0, 0.25, 0.5, 0.75, 1.0], ns.logit_diff("great", "awful"), progress=False
)
print(grid, "\n", grid.best(4), "\n")
best = grid.choose(guard="kl", limit=2.5)
print(best, "\n")

# 3. The same prompt with several strengths, each in a row of one batch.
strengths = [-0.5, 0.0, 0.25, best.coefficient]
texts = ns.steering.generate(model, ["I thought the film was"] * 4, vector.at(best.layer), strengths, max_new_tokens=20)
for strength, text in zip(strengths, texts, strict=True):
    print(f"{strength:5.2f}  I thought the film was {text}")

# 4. A block steers every way of calling the model: generate, traces, the Hugging Face module itself.
steering = ns.steering.steer(model, vector.at(best.layer), best.coefficient, where=ns.steering.from_token(-1))
print("\n", steering.show("The meal was awful. I felt"), sep="")
with steering:
    with model.trace("The meal was"):
        steered = ns.save_activations(model, "layers[:].output[-1]")
    print(ns.steering.generate(model, "The meal was", max_new_tokens=8))

# 5. Only where it is needed: reviews that begin badly, told by the state at their last token.
mood = ns.steering.similar(vector, f"layers[{best.layer}].output[-1]", below=0.0)
begun = ["I loved the film. The story was", "I hated the film. The story was"]
print(ns.steering.generate(model, begun, vector.at(best.layer), best.coefficient, when=mood, max_new_tokens=6))

# 6. Files: safetensors with all that is known of the vector, and a control vector for llama.cpp.
folder = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp())
folder.mkdir(parents=True, exist_ok=True)
vector.to_file(folder / "mood.safetensors", coefficient=best.coefficient)
again = ns.steering.SteeringVector.from_file(folder / "mood.safetensors")
ns.steering.to_gguf(again.at(best.layer), folder / "mood.gguf", coefficient=best.coefficient)
ns.plots.save(grid.plot("lines"), folder / "sweep.png", close=True)
print("\nwritten to", folder, "and read back:", again.allclose(vector), again.coefficient)
