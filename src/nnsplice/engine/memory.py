"""The number of tokens that run at once, by free memory."""

from __future__ import annotations

import torch

from nnsplice.atlas import Atlas, unwrap
from nnsplice.engine.tracing import Model
from nnsplice.errors import BadArgument, NnspliceError

#: Tokens at once on a CPU, where more is no faster.
TOKENS_ON_CPU = 4096
#: The most on a GPU: beyond it, products of matrices are as fast as they get.
TOKENS_ON_GPU = 131072
#: The usable share of free memory.
SHARE = 0.5
#: Copies of a block's values that are alive at once: before and after an edit, gathered keys and values.
COPIES = 4


def tokens_at_once(model: Model, asked: int | None = None) -> int:
    """The number of tokens that run at once: as requested, or by the memory of the machine."""
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
    """The memory of one token: the values of one block in some copies, and its logits."""
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
    """The number of values of one token that the matrices and norms of a part compute."""
    return sum(max(p.shape) for p in root.get_submodule(name).parameters() if p.dim() in (1, 2))


#: Texts of torch's untyped errors when memory runs out: on Linux, on Windows, of GPUs (drivers, Apple's), of cuBLAS.
_OUT_OF_MEMORY = (
    "can't allocate memory", "not enough memory", "out of memory", "STATUS_ALLOC_FAILED",
)  # fmt: skip


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    ours = isinstance(error, NnspliceError) or not isinstance(error, RuntimeError)
    return not ours and any(text in str(error) for text in _OUT_OF_MEMORY)
