"""How many tokens run at once, by free memory; fewer after running out."""

from __future__ import annotations

import torch

from nnsplice.atlas import Atlas, unwrap
from nnsplice.engine.tracing import Model
from nnsplice.errors import BadArgument, NnspliceError

#: Tokens at once on a CPU, where more is no faster.
TOKENS_ON_CPU = 4096
#: The most on a GPU: beyond it, products of matrices are as fast as they get.
TOKENS_ON_GPU = 131072
#: Of the free memory, what may be planned with.
SHARE = 0.5
#: How many copies of what a block computes are alive at once: before and after an edit, gathered keys and values.
COPIES = 4


def room(model: Model, asked: int | None = None) -> int:
    """How many tokens may run at once: as many as were asked for, or as suit the machine."""
    if asked is not None:
        if not isinstance(asked, int) or asked < 1:
            raise BadArgument(f"max_tokens={asked!r}", expected="at least 1, or nothing for what suits the machine")
        return asked
    device = model.device
    if device is None or device.type != "cuda":
        return TOKENS_ON_CPU
    free, _ = torch.cuda.mem_get_info(device)
    return max(min(int(free * SHARE) // bytes_per_token(model), TOKENS_ON_GPU), 1)


def bytes_per_token(model: Model) -> int:
    """What one token takes on its way: everything that one block computes of it, some copies of that, and logits."""
    root = unwrap(model)
    towers = Atlas.of(model).towers
    size = max((p.element_size() for p in root.parameters() if p.is_floating_point()), default=4)
    if "decoder" not in towers:
        return size * COPIES * max((p.shape[0] for p in root.parameters() if p.dim() == 2), default=1)
    tower = towers["decoder"]
    block = max((_computed(root, block.module) for block in tower.blocks), default=1)
    vocabulary = _computed(root, tower.unembed) if tower.unembed else 0
    return size * (COPIES * block + vocabulary)


def _computed(root: torch.nn.Module, name: str) -> int:
    """Numbers that the matrices of a part give for one token, and its norms as many as they have weights."""
    return sum(max(p.shape) for p in root.get_submodule(name).parameters() if p.dim() in (1, 2))


#: What torch says where memory ran out, in errors that have no type of their own: on Linux, on Windows, of GPUs (their
#: drivers, Apple's), of cuBLAS.
_SHORT = (
    "can't allocate memory", "not enough memory", "out of memory", "STATUS_ALLOC_FAILED",
)  # fmt: skip


def is_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    ours = isinstance(error, NnspliceError) or not isinstance(error, RuntimeError)
    return not ours and any(text in str(error) for text in _SHORT)
