"""Convert a checkpoint whose names and shapes are not the model's, without ever holding it in memory.

python examples/06_checkpoints.py
"""

import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from nnsplice import checkpoints as ck
from nnsplice import models

logging.disable_progress_bar()
toy = models.embedded("toy-llama")  # a folder like any other: yours is "./my-checkpoint"
checkpoint = ck.Checkpoint.open(toy)
print(f"{len(checkpoint)} tensors, {sum(checkpoint.sizes().values()) / 1e6:.1f} MB")

with tempfile.TemporaryDirectory() as folder:
    # 1. Declare. Mappers say which tensors are made of which; there is no tensor yet.
    stages = []
    for layer in range(1 + max(ck.layer_of(name) or 0 for name in checkpoint)):
        old, new = f"model.layers.{layer}.self_attn", f"blocks.{layer}"
        fused = ck.ConcatenateTensors([f"{old}.{part}_proj.weight" for part in "qkv"], f"{new}.qkv.weight", 0)
        stages += [fused, ck.Rename(f"{old}.o_proj.weight", f"{new}.out.weight")]
    fuse = ck.Parallel([*stages, ck.Copy("model.embed_tokens.weight", ["embed.weight", "unembed.weight"])])

    # 2. Check. A dry run reads the headers of the files, and nothing else.
    print("\n", fuse.explain(toy), "\n", sep="")

    # 3. Stream. One group is in memory at a time; the new folder is there when it is whole, or not at all.
    ck.convert(toy, f"{folder}/fused", fuse, show_progress=False)
    fused = ck.Checkpoint.open(f"{folder}/fused")
    print("tied, and stored once:", fused.tied)

    # 4. The way back: cut into uneven parts, since key/value heads are fewer than heads.
    q, k, v = (checkpoint.entry(f"model.layers.0.self_attn.{part}_proj.weight").shape[0] for part in "qkv")
    back = ck.Split("blocks.0.qkv.weight", ["q", "k", "v"], [q, k, v], dim=0)
    for name, tensor in ck.read_model_state(f"{folder}/fused", back, "cpu", show_progress=False):
        same = torch.equal(tensor, checkpoint.tensor(f"model.layers.0.self_attn.{name}_proj.weight"))
        print(f"  {name} {list(tensor.shape)} comes back {'bit for bit' if same else 'CHANGED'}")

    # 5. Fewer layers, other numbers; the command is
    #    nnsplice convert SRC DST --layers 0:2 --dtype bf16
    small = ck.renaming(toy, layers=slice(0, 2), dtype=torch.bfloat16)
    config = ck.adapted_config((Path(toy) / "config.json").read_text(), layers=2, dtype=torch.bfloat16)
    ck.convert(toy, f"{folder}/small", small, show_progress=False, carry={"config.json": config})
    model = AutoModelForCausalLM.from_pretrained(f"{folder}/small", dtype="auto")
    print("\ntransformers reads", model.config.num_hidden_layers, "layers in", model.dtype)

    # 6. What is wrong is told before anything is read.
    try:
        ck.read_model_state(toy, ck.Rename("model.layers.0.self_attn.q.weight", "q"))
    except ck.MapperError as error:
        print("\n", error, sep="")
