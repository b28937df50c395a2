"""Keep a model on its device when nnsight wraps it.

nnsight makes a pipeline of transformers of every model, which moves the model to the first GPU unless a device is
given. For models split over devices, no device may be given, and the pipeline does not move them.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

#: The model's own device, as an argument of a pipeline.
_OWN = -1
#: Values of `device_map` with which accelerate chooses devices.
_LEFT_OPEN = ("auto", "balanced", "balanced_low_0", "sequential")


@contextmanager
def staying(name_or_module: str | nn.Module, given: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The arguments to add so that a model is not moved; transformers' warning about them is off in the block.

    Args:
        given: the arguments that the model is loaded with.
    """
    if "device" in given or not _has_one_device(name_or_module, given):
        yield {}
        return
    logger = logging.getLogger("transformers.pipelines")
    logger.addFilter(_is_no_warning_of_both)
    try:
        yield {"device": _OWN}
    finally:
        logger.removeFilter(_is_no_warning_of_both)


def _has_one_device(name_or_module: str | nn.Module, given: Mapping[str, Any]) -> bool:
    if isinstance(name_or_module, nn.Module):
        return getattr(name_or_module, "hf_device_map", None) is None
    device_map = given.get("device_map")
    if not given.get("dispatch", True):
        return False
    if isinstance(device_map, Mapping):
        named = set(map(str, device_map.values()))
        return len(named) == 1 and named != {"disk"}
    return isinstance(device_map, int | torch.device) or (isinstance(device_map, str) and device_map not in _LEFT_OPEN)


def _is_no_warning_of_both(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("Both `device` and `device_map`")
