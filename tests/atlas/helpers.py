"""What the tests of the atlas share: a bare recorder of module ends, which knows nothing of the atlas but Site."""

from __future__ import annotations

from typing import Any

import torch

import zoo
from nnsplice.atlas import Atlas, Site
from nnsplice.paths import parse_path


def record(model, inputs):
    """Every value at both ends of every module during one forward: (module, end, call) -> what was met there."""
    values, calls, handles = {}, {}, []

    def copy(value):
        # Some blocks add into a branch's output in place afterwards.
        return (
            tuple(v.clone() if isinstance(v, torch.Tensor) else v for v in value)
            if isinstance(value, tuple)
            else (value.clone() if isinstance(value, torch.Tensor) else value)
        )

    def before(name):
        def hook(_, args, kwargs):
            first = args[0] if args else next(iter(kwargs.values()), None)
            values[name, "input", calls.get((name, "input"), 0)] = copy(first)
            calls[name, "input"] = calls.get((name, "input"), 0) + 1

        return hook

    def after(name):
        def hook(_, args, output):
            values[name, "output", calls.get((name, "output"), 0)] = copy(output)
            calls[name, "output"] = calls.get((name, "output"), 0) + 1

        return hook

    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(before(name), with_kwargs=True))
        handles.append(module.register_forward_hook(after(name)))
    try:
        with torch.no_grad():
            model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    return values


def value_at(values, site: Site, batch=None):
    """The tensor that a plain or pattern site means, among recorded values."""
    value = values[site.module, site.end, site.occurrence]
    if isinstance(value, tuple):
        value = value[site.item or 0]
    elif site.item is not None:
        value = value[site.item]
    assert isinstance(value, torch.Tensor), f"{site} holds {type(value).__name__}"
    if site.kind == "pattern":
        return value[:, site.index]
    if batch is not None and value.ndim == 2:  # OPT and routers flatten prompts and tokens
        value = value.unflatten(0, (batch, -1))
    return value if site.columns is None else value[..., slice(*site.columns)]


def sites(atlas: Atlas, text: str) -> list[Site]:
    """The sites of a path, in order."""
    found = [path.site for path in atlas.expand(parse_path(text))]
    assert all(isinstance(site, Site) for site in found)
    return found  # pyright: ignore[reportReturnType]


class Recorded:
    """One family, run once in float64: `self("layers[0].mid")` is the value that the atlas says lies there."""

    def __init__(self, name: str, *, eager: bool = False, rows: int = 2, length: int = 5, **overrides: Any) -> None:
        if eager:
            overrides["attn_implementation"] = "eager"
        self.model: Any = zoo.build(name, **overrides).double()
        self.rows = rows
        self.atlas = Atlas.of(self.model)
        self.values = record(self.model, zoo.inputs(name, length, rows))

    name = ""

    def site(self, text: str) -> Site:
        (found,) = sites(self.atlas, text)
        return found

    def __call__(self, text: str) -> torch.Tensor:
        return value_at(self.values, self.site(text), self.rows)

    def all(self, text: str) -> list[torch.Tensor]:
        return [value_at(self.values, site, self.rows) for site in sites(self.atlas, text)]


def close(one: torch.Tensor, other: torch.Tensor, tolerance: float = 1e-12) -> bool:
    return one.shape == other.shape and bool((one - other).abs().max() <= tolerance)
