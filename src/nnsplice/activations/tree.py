"""Captures as trees that follow their paths: `values.transformer.h[2].output[10]`, and back from nested mappings."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor

from nnsplice.errors import BadArgument, BadType, PathError, UnknownPath, closest, named
from nnsplice.paths import Path, Span, parse_path


class ValueTree:
    """A part of a capture by attribute and index, as in the paths; its leaves are tensors `[prompt, width]`."""

    __slots__ = ("_children", "_name")

    def __init__(self, name: str, children: Mapping[str | int, Any]) -> None:
        self._name = name
        self._children = dict(children)

    def __getattr__(self, name: str) -> Any:
        # copy, pickle and notebooks look for such names, also before `_children` exists.
        if name.startswith("_"):
            raise AttributeError(f"{name} is no site of a model")
        if name not in self._children:
            raise AttributeError(
                f"nothing captured at {self._name}.{name}; there is {closest(name, map(str, self._children))}"
            )
        return self._children[name]

    def __getitem__(self, index: int | str) -> Any:
        if isinstance(index, slice | tuple | list):
            raise BadType(
                f"{self._name} goes down by one name or number at a time",
                expected="saved.get(path) or saved.subset(path), which take slices and lists",
            )
        if index not in self._children:
            raise UnknownPath(
                f"nothing captured at {self._name}[{index}]",
                expected=closest(str(index), map(str, self._children)),
            )
        return self._children[index]

    def __dir__(self) -> list[str]:
        return [name for name in self._children if isinstance(name, str)]

    def _ipython_key_completions_(self) -> list[str | int]:
        return [name for name in self._children if isinstance(name, int)]

    def __iter__(self) -> Iterator[Any]:
        return iter(self._children)

    def __len__(self) -> int:
        return len(self._children)

    def __repr__(self) -> str:
        return f"<{self._name}: {', '.join(str(name) for name in self._children)}>"


class Values(ValueTree):
    """All tensors of a capture: as a list when called, and as the tree of their paths.

    The tree is built when it is first used, as some captures have none: with the keys `h[0].output[0]` and
    `h[0].output[0][-1]`, the index 0 would be a position and an item.
    """

    __slots__ = ("_entries",)

    def __init__(self, entries: Iterable[tuple[Path, Tensor]]) -> None:
        self._name = "values"
        self._entries = list(entries)

    def __call__(self) -> list[Tensor]:
        """The tensors `[prompt, width]`, in the order of the keys."""
        return [tensor for _, tensor in self._entries]

    def __getattr__(self, name: str) -> Any:
        if name == "_children":
            self._children = grow(self._entries)._children
            return self._children
        return super().__getattr__(name)


def grow(entries: Iterable[tuple[Path, Tensor]]) -> ValueTree:
    """The tree of these entries."""
    root: dict[str | int, Any] = {}
    for path, tensor in entries:
        *branches, leaf = _names(path)
        node: Any = root
        for name in branches:
            node = node.setdefault(name, {}) if isinstance(node, dict) else None
        if not isinstance(node, dict) or leaf in node:
            raise BadArgument(
                "two keys stand at one branch of the tree", path=path, write=f"saved[{str(path)!r}], without the tree"
            )
        node[leaf] = tensor
    return _wrap("values", root)


def _wrap(name: str, node: dict[str | int, Any]) -> ValueTree:
    def child(key: str | int, value: Any) -> Any:
        inner = f"{name}[{key}]" if isinstance(key, int) else f"{name}.{key}"
        return _wrap(inner, value) if isinstance(value, dict) else value

    return ValueTree(name, {key: child(key, value) for key, value in node.items()})


def _names(path: Path) -> list[str | int]:
    names: list[str | int] = [path.tower] if path.tower else []
    for step in path.steps:
        names.append(step.name)
        if isinstance(step.index, int):
            names.append(step.index)
    names.append(path.value or "output")
    if path.sae is not None:
        names += ["sae", path.sae.name, "error" if path.sae.features is None else "features"]
        names += [path.sae.features] if isinstance(path.sae.features, int) else []
    if path.item is not None:
        names.append(path.item)
    position = path.position
    if isinstance(position, Span):
        names.append(position.name)
        if position.token is not None:
            names.append(position.token)
    elif isinstance(position, int):
        names.append(position)
    return names


def flatten(tree: Mapping[Any, Any]) -> Iterator[tuple[Path, Tensor]]:
    """The entries of a nested mapping: attribute names and indices down to token positions and tensors."""
    for names, tensor in _leaves(tree, ()):
        yield _path(names), tensor


def _leaves(tree: Mapping[Any, Any], names: tuple[str | int, ...]) -> Iterator[tuple[tuple[str | int, ...], Tensor]]:
    for name, child in tree.items():
        if isinstance(name, bool) or not isinstance(name, str | int):
            raise BadType(
                f"{named(name)} cannot be a key of the tree: {name!r}",
                expected="attribute names (str), indices and token positions (int)",
            )
        if isinstance(child, Mapping):
            yield from _leaves(child, (*names, name))
        elif isinstance(child, Tensor):
            yield (*names, name), child
        else:
            raise BadType(f"a leaf of the tree is a tensor, not {named(child)}", expected="{10: tensor}")


def _path(names: tuple[str | int, ...]) -> Path:
    text = "".join(f"[{name}]" if isinstance(name, int) else f".{name}" for name in names)
    # The names are roles, or attributes of the model, which may be called `model` too. Roles come first.
    try:
        path = parse_path(text[1:])
    except PathError:
        return parse_path(f"model{text}")
    return parse_path(f"model{text}") if path.native else path
