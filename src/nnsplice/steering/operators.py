"""Operators: functions `f(h, v, c) -> h` of states `[row, token, width]`, a vector and a coefficient.

    add            h + c v
    project_out    h less c times its component along v
    clamp          the component along v becomes c times the length of v
    scale          h + c v, rescaled to the norm of h
    rotate         h rotated by c radians: towards v in the plane of h and v, or in the plane of v and `plane=`

Users may give a function of the same signature. `c` is a number, or `[row, 1, 1]`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Coefficient = float | Tensor
Operator = Callable[[Tensor, Tensor, Coefficient], Tensor]


def add(h: Tensor, v: Tensor, c: Coefficient) -> Tensor:
    """A step along the vector."""
    return h + c * v


def project_out(h: Tensor, v: Tensor, c: Coefficient) -> Tensor:
    """Without the component along the vector."""
    u = _unit(v)
    return h - c * _along(h, u) * u


def clamp(h: Tensor, v: Tensor, c: Coefficient) -> Tensor:
    """With the component along the vector set to a value."""
    u = _unit(v)
    return h + (c * v.norm(dim=-1, keepdim=True) - _along(h, u)) * u


def scale(h: Tensor, v: Tensor, c: Coefficient) -> Tensor:
    """A step along the vector that keeps the norm."""
    moved = h + c * v
    length = moved.norm(dim=-1, keepdim=True)
    # A state that becomes zero cannot be rescaled.
    return torch.where(length > 0, moved * (h.norm(dim=-1, keepdim=True) / length), moved)


def rotate(h: Tensor, v: Tensor, c: Coefficient) -> Tensor:
    """Rotated towards the vector in the plane of both."""
    u = _unit(v)
    length = h.norm(dim=-1, keepdim=True)
    aside = u - _along(u, h / length) * h / length
    width = aside.norm(dim=-1, keepdim=True)
    angle = torch.as_tensor(c, dtype=h.dtype, device=h.device)
    turned = torch.cos(angle) * h + torch.sin(angle) * length * aside / width
    # A state along the vector, or a zero state, spans no plane with it.
    return torch.where((length > 0) & (width > 1e-6), turned, h)


def rotation(plane: Tensor) -> Operator:
    """A rotation in the plane of the vector and another direction."""

    def rotate_in_plane(h: Tensor, v: Tensor, c: Coefficient) -> Tensor:
        first = _unit(v)
        other = plane.to(h)
        second = _unit(other - _along(other, first) * first)
        angle = torch.as_tensor(c, dtype=h.dtype, device=h.device)
        x, y = _along(h, first), _along(h, second)
        new_x, new_y = torch.cos(angle) * x - torch.sin(angle) * y, torch.sin(angle) * x + torch.cos(angle) * y
        return h + (new_x - x) * first + (new_y - y) * second

    return rotate_in_plane


OPERATORS: dict[str, Operator] = {
    "add": add,
    "project_out": project_out,
    "clamp": clamp,
    "scale": scale,
    "rotate": rotate,
}


def _unit(v: Tensor) -> Tensor:
    return v / v.norm(dim=-1, keepdim=True)


def _along(h: Tensor, u: Tensor) -> Tensor:
    return (h * u).sum(-1, keepdim=True)
