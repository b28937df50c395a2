"""What the transformers that is installed names a cache: asked of its own code, not of ours."""

from __future__ import annotations

import inspect
from typing import Any

from transformers import LlamaModel

#: The name, and all that are still taken (the older with a warning).
CACHE = "cache" if "cache" in inspect.signature(LlamaModel.forward).parameters else "past_key_values"
TAKEN = sorted({CACHE, "past_key_values"})


def filled(output: Any) -> Any:
    """The cache in an output."""
    return getattr(output, CACHE)
