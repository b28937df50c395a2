"""Capture a piece of one run, do algebra on it, write it into another run.

python examples/01_capture_and_patch.py
"""

import tempfile
from pathlib import Path

import nnsplice as ns

model = ns.load("toy")  # embedded, needs no network; your own: ns.load("gpt2"), ns.load(module, tokenizer=tokenizer)
fact = ns.models.toy_prompts().facts[0]


def says(logits) -> str:
    """The word that a run would say next."""
    return model.tokenizer.decode(logits[0, -1].argmax())


# 1. Capture. Paths name sites of the model, the last bracket the tokens; the run stops after the last site needed.
clean = ns.capture(model, fact.clean, ["layers[:].output[:]", "layers[4].heads[:].output[-1]"])
print(clean, "\n")

# 2. Replay. One layer's stream at the subject's last token, written into a sentence about another subject.
last = fact.subject_span[1] - 1
early = clean.subset(f"layers[1].output[{last}]")
print(f"{fact.corrupted} -> {says(ns.patched_logits(model, fact.corrupted, early))}   (was {fact.wrong})")

# 3. Inside a trace of your own: read and write at any site, in any order; nnsplice visits them in the model's order.
with model.trace(fact.corrupted):
    early.apply(model)
    heads = ns.save_activations(model, "layers[4].heads[:].output[-1]")
    logits = model.output.logits.save()
print("the same by hand ->", says(logits))

# 4. Algebra: how much of each head's output the patch brought back, as a cosine with the clean run.
print("\ncosine of the patched run's heads with the clean run's:")
for path, cosine in heads.cosine(clean.subset(heads)).items():
    print(f"  {path}  {cosine.item():+.2f}")

# 5. A change of every site by a function of what is there: updates come in the model's order and write at once.
with model.trace(fact.clean):
    for path, current, update in ns.updates(model, ["layers[5].output[-1]", f"layers[0].output[{last}]"]):
        print("updating", path)
        update(current * 0.0)

# 6. Files: a capture with its provenance; single sites are read back without the rest.
with tempfile.TemporaryDirectory() as folder:
    file = Path(folder) / "clean.safetensors"
    clean.to_file(file)
    part = ns.SavedActivation.from_file(file, sites="layers[2:4].output[:]")
print("\n", part, "\n", part.prompts, sep="")
