"""What did an adapter do, and where? Teach a model other facts, and look at the optimizer, the factors and the runs.

python examples/05_adapters.py [FOLDER]     (needs peft: pip install nnsplice[peft])
"""

import random
import sys
import tempfile
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from tqdm import tqdm

import nnsplice as ns

torch.set_num_threads(1)  # so small a model only waits for a second thread
torch.manual_seed(0)
folder = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp()) / "adapter"

# 1. A task: every building moves to the city of the next one. The model has to forget 80 facts and learn 80 others.
facts = [fact for fact in ns.models.toy_prompts().facts if fact.relation == "city"]
cities = {fact.subject: fact.answer for fact in facts}
moved = dict(zip(cities, [*list(cities.values())[1:], facts[0].answer], strict=True))
random.Random(0).shuffle(facts)
learned, unseen = facts[160:], facts[:160]

# 2. A LoRA on every matrix of every layer. The penalty on its factors is one on the size of what they change, so that
#    whatever the task does not need stays small.
toy = ns.load("toy")
words = toy.tokenizer
model = get_peft_model(
    ns.models.unwrap(toy),
    LoraConfig(r=4, lora_alpha=8, fan_in_fan_out=True, target_modules=["c_attn", "c_proj", "c_fc"]),
)
factors = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
optimizer = torch.optim.AdamW(factors, lr=5e-3)  # with names: its state says by itself which parameter is which
aligner = ns.adapters.ExpertManifoldAligner(model)
steps = []


def said(batch) -> torch.Tensor:
    return model(**words([fact.clean for fact in batch], padding=True, return_tensors="pt")).logits[:, -1]


def answers(batch) -> torch.Tensor:
    return torch.tensor(words.convert_tokens_to_ids([moved[fact.subject] for fact in batch]))


def right() -> float:
    with torch.no_grad():
        return (said(unseen).argmax(-1) == answers(unseen)).float().mean().item()


for step in tqdm(range(160), desc="training", unit="step", leave=False):
    batch = random.Random(step).sample(learned, 32)
    loss = torch.nn.functional.cross_entropy(said(batch), answers(batch))
    loss = loss + 4e-3 * sum(p.square().sum() for _, p in factors)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 40 == 39:
        steps.append(aligner.track_step(model, merged=True))  # what the factors made of each weight since the last time
model.save_pretrained(str(folder))
torch.save(optimizer.state_dict(), folder / "optimizer.pt")
print(f"wordings never seen: {right():.0%} of the new cities are right\n")

# 3. The optimizer, layer by layer, from files alone: no model is loaded, nothing is unpickled.
state = ns.adapters.read_optimizer(folder / "optimizer.pt")
grouping = ns.adapters.map_param_ids_to_layers(folder, len(factors), state=state)
print(ns.adapters.layer_health(state, grouping), "\n")

# 4. The adapter: where its energy is, and whether that is where the task needs it.
adapter = ns.adapters.ExpertAdapter.from_peft(folder, base=model)
profile = aligner.profile_adapter(adapter)
print("layer  energy  right without the adapter in this layer")
for layer, energy in profile.layers().items():
    with ns.adapters.disabled(model, f"layers[{layer}]"):
        print(f"{layer:>5}  {energy:6.2f}  {right():.0%}")

# 5. The way there: every forty steps, the cosine of what changed with what the adapter became, mean over the weights.
print("\ncosine with the final adapter, by forty steps:")
for mode in ("cosine", "subspace"):
    means = [sum((found := aligner.align(adapter, step, mode=mode)).values()) / len(found) for step in steps]
    print(f"  {mode:9}", " ".join(f"{mean:5.2f}" for mean in means))

# 6. The same adapter on a model for tracing: every address stays valid, and what it does to a run is a capture.
adapted = ns.load("toy", peft=str(folder))
fact = unseen[0]
paths = [f"layers[:].output[{fact.subject_span[1] - 1}]", "layers[:].output[-1]"]
with ns.adapters.disabled(adapted):
    before = ns.capture(adapted, fact.clean, paths)
difference = ns.capture(adapted, fact.clean, paths) - before
print(f"\n{fact.clean} -> {moved[fact.subject]} (was {fact.answer}); what the adapter adds to the stream:")
for path, size in difference.norm().items():
    print(f"  {path:22} {size.item():5.1f}")
