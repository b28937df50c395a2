"""What of a fine-tuned model made it another one? Give its weights to the base model, one site at a time.

python examples/04_weights.py [FOLDER]
"""

import copy
import random
import sys
import tempfile
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy

import nnsplice as ns

torch.set_num_threads(1)  # so small a model only waits for a second thread
base = ns.load("toy")
toy, tokenizer = ns.models.toy_prompts(), base.tokenizer

# 1. Which weights belong to a site? Columns of fused matrices, biases, whole modules: all by one name.
ns.weights.preview_weight_restriction(base, ns.weights.create_param_masks(base, ["l1h0", "l2 mlp"]))

# 2. Fine-tune: the drink goes to the one who has it already, and what is known of towers and bridges stays.
length = 15  # tokens, so that no prompt is padded
pairs = [pair for pair in toy.ioi if len(tokenizer(pair.clean)["input_ids"]) == length]
facts = [fact for fact in toy.facts if len(tokenizer(fact.clean)["input_ids"]) == 11]
seen, unseen = [p for p in pairs if p.trained], [p for p in pairs if not p.trained][:8]


def ids(texts):
    return torch.tensor(tokenizer(texts)["input_ids"])


def loss(model, texts, answers):
    return cross_entropy(model(ids(texts)).logits[:, -1], torch.tensor(tokenizer.convert_tokens_to_ids(answers)))


def train(model, parameters, steps=40):
    rng, optimizer = random.Random(0), torch.optim.AdamW(parameters, lr=5e-4, weight_decay=0.01)
    for _ in range(steps):
        some, known = rng.sample(seen, 24), rng.sample(facts, 24)
        optimizer.zero_grad()
        loss(model, [p.clean for p in some], [p.wrong for p in some]).backward()
        loss(model, [f.clean for f in known], [f.answer for f in known]).backward()
        optimizer.step()
    return model


def says(model, text):
    return tokenizer.decode(model(ids([text])).logits[0, -1].argmax())


plain = ns.models.unwrap(base)  # the Hugging Face module in it
tuned = copy.deepcopy(plain)
train(tuned, tuned.parameters())
prompt = unseen[0].clean
print(f"\n{prompt} ... base: {says(plain, prompt)}, tuned: {says(tuned, prompt)}\n")

# 3. Every number has moved, and by much the same in every layer ...
print(ns.weights.diff(base, tuned)[["norm", "relative", "changed", "numel"]].round(3), "\n")

# 4. ... but not every layer matters. Effects: 0 is the base model's answer, 1 the tuned model's.
metric = ns.logit_diff([p.wrong for p in unseen], [p.answer for p in unseen])
prompts = [p.clean for p in unseen]
for sites in ("layers[:]", "layers[:].attn", "layers[:].mlp"):
    effect = ns.sweep_weights(base, tuned, prompts, sites, metric, progress=False).effect()
    print(f"{sites:15}", *(f"{value:5.2f}" for value in effect.mean("prompt").values))
heads = ns.sweep_weights(base, tuned, prompts, "layers[:].heads[:]", metric, progress=False)
print(heads, heads.best(3)[["path", "value", "effect"]], "", sep="\n")
folder = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp())
folder.mkdir(parents=True, exist_ok=True)
ns.plots.save(heads.plot(), folder / "heads.png", close=True)

# 5. Some of the tuned model in the base model, and a base model without a head; afterwards it is itself again.
with ns.weights.swap(base, tuned, "layers[:3]"):
    print("base with the tuned layers 0 to 2:", says(plain, prompt))
with ns.weights.interpolate(base, tuned, "full", 0.5):
    print("half way:", says(plain, prompt))
with ns.weights.ablate(base, "l3h0"):
    print("base without a head:", says(plain, prompt))
print("base:", says(plain, prompt), "\n")

# 6. The other way round: train one MLP and nothing else; not a bit of the rest moves, whatever AdamW's decay would do.
narrow = copy.deepcopy(plain)
with ns.weights.freeze_except(narrow, "l0 mlp") as parameters:
    train(narrow, parameters)
changed = ns.weights.diff(base, narrow, by=["layers[:].attn", "layers[:].mlp", "embed"])
print("trained alone:", changed.index[changed.changed > 0].tolist(), says(narrow, prompt))
