"""Index tensors that are copied to a device together, without synchronisation."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


class Indices:
    """Index arrays for one device. The first use of one copies all that were added so far."""

    def __init__(self, device: torch.device) -> None:
        self.device: torch.device = device
        self._waiting: list[DeviceIndex] = []

    def add(self, numbers: Sequence[int] | np.ndarray) -> DeviceIndex:
        """An array that will be used on the device."""
        index = DeviceIndex(self, np.asarray(numbers, np.int64))
        self._waiting.append(index)
        return index

    def send(self) -> None:
        """Copy the arrays added since the last copy."""
        waiting, self._waiting = self._waiting, []
        sent = on_device(np.concatenate([index.array.ravel() for index in waiting]), self.device)
        for index, part in zip(waiting, sent.split([index.array.size for index in waiting]), strict=True):
            index.sent = part.view(index.array.shape)


class DeviceIndex:
    """An array of numbers, on the host and on the device."""

    def __init__(self, home: Indices, array: np.ndarray) -> None:
        self.home: Indices = home
        self.array: np.ndarray = array
        self.sent: Tensor | None = None

    @property
    def tensor(self) -> Tensor:
        """The numbers on the device."""
        if self.sent is None:
            self.home.send()
        assert self.sent is not None
        return self.sent


def on_device(numbers: Sequence[int] | Sequence[Sequence[int]] | np.ndarray, device: torch.device) -> Tensor:
    """An index tensor on a device, copied without waiting for the device."""
    return torch.as_tensor(np.asarray(numbers, np.int64)).to(device, non_blocking=True)
