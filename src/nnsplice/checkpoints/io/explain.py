"""A dry run: what a mapper would do with a checkpoint, without reading a tensor."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from nnsplice.checkpoints.io.folder import Checkpoint
from nnsplice.checkpoints.mapper.abc import ModelStateMapper, StateGroup, applied, listing, ordered
from nnsplice.errors import circumstances
from nnsplice.shown import shown

#: The number of lines that a text shows.
ROWS = 40


@dataclass(frozen=True, slots=True)
class GroupCost:
    """A group with its sizes in bytes, which are None without a checkpoint.

    Attributes:
        group: the group.
        read: the bytes read.
        made: the bytes of the outputs.
        held: the bytes in memory at once; a tensor that is only renamed counts once.
        files: the files that are read.
    """

    group: StateGroup
    read: int | None = None
    made: int | None = None
    held: int | None = None
    files: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Explanation:
    """A dry run of a mapper; printed as a table in which groups that differ in numbers only share a line.

    >>> from nnsplice.checkpoints import Parallel, StackTensors
    >>> names = "model.layers.{}.self_attn.{}_proj.weight"
    >>> mapper = Parallel([StackTensors([names.format(i, part) for part in "kv"], f"kv.{i}", 0) for i in range(6)])
    >>> mapper.explain()
    6 groups, 12 inputs, 6 outputs
    model.layers.*.self_attn.{k_proj,v_proj}.weight  ->  kv.*   x 6
    >>> mapper.explain(ns.models.embedded("toy-llama")).peak_bytes
    32768

    Attributes:
        costs: the groups, with their bytes and files.
        unused: tensors of the checkpoint that the mapper does not read.
        sized: whether a checkpoint was given, so that bytes are known.
    """

    costs: tuple[GroupCost, ...]
    unused: tuple[str, ...] = ()
    sized: bool = False

    @property
    def read_bytes(self) -> int:
        """The number of bytes read."""
        return sum(cost.read or 0 for cost in self.costs)

    @property
    def made_bytes(self) -> int:
        """The number of bytes made; a tensor with several names counts once."""
        return sum(cost.made or 0 for cost in self.costs)

    @property
    def peak_bytes(self) -> int:
        """The largest number of bytes in memory at once: inputs and outputs of one group."""
        return max((cost.held or 0 for cost in self.costs), default=0)

    @property
    def files(self) -> tuple[str, ...]:
        """The files that are read."""
        return tuple(sorted({file for cost in self.costs for file in cost.files}))

    def __repr__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterable[str]:
        inputs = sum(len(cost.group.inputs) for cost in self.costs)
        outputs = sum(len(cost.group.outputs) for cost in self.costs)
        yield f"{len(self.costs)} groups, {inputs} inputs, {outputs} outputs"
        if self.sized:
            yield (
                f"reads {amount(self.read_bytes)} from {len(self.files)} files, makes {amount(self.made_bytes)}, "
                f"holds at most {amount(self.peak_bytes)} at once"
            )
        kinds: dict[tuple[str, str], list[GroupCost]] = {}
        for cost in self.costs:
            kinds.setdefault((_pattern_of(cost.group.inputs), _pattern_of(cost.group.outputs)), []).append(cost)
        shown = list(kinds.items())[:ROWS]
        width = max((len(source) for (source, _), _ in shown), default=0)
        for (source, target), costs in shown:
            line = f"{source:{width}}  ->  {target}"
            line += f"   x {len(costs)}" if len(costs) > 1 else ""
            yield line + (f"   {amount(sum(cost.made or 0 for cost in costs))}" if self.sized else "")
        if len(kinds) > ROWS:
            yield f"... and {len(kinds) - ROWS} kinds more"
        if self.unused:
            yield f"not read: {listing(self.unused)}"


def explain(mapper: ModelStateMapper, src_dir: str | os.PathLike[str] | None) -> Explanation:
    """See `ModelStateMapper.explain`."""
    if src_dir is None:
        return Explanation(tuple(GroupCost(group) for group in ordered(mapper.state_dependency_groups())))
    checkpoint = Checkpoint.open(src_dir)
    costs: list[GroupCost] = []
    used: set[str] = set()
    for group in checkpoint.plan(mapper):
        entries = {checkpoint.entry(name) for name in group.inputs}
        blanks, made = dry_run(mapper, group, checkpoint)
        files = tuple(sorted({str(entry.path.relative_to(checkpoint.folder)) for entry in entries}))
        held = _bytes([*blanks.values(), *made.values()])
        costs.append(GroupCost(group, sum(entry.nbytes for entry in entries), _bytes(made.values()), held, files))
        used |= group.inputs
    unused = tuple(sorted(name for name in checkpoint if name not in used))
    return Explanation(tuple(costs), unused, sized=True)


def dry_run(
    mapper: ModelStateMapper, group: StateGroup, checkpoint: Checkpoint
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The inputs and the outputs of a group as meta tensors."""
    with circumstances(f"a dry run over {checkpoint.folder}"):
        blanks = {name: checkpoint.blank(name) for name in sorted(group.inputs)}
        return blanks, applied(mapper, group, blanks)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum({id(tensor): tensor.nbytes for tensor in tensors}.values())


def _pattern_of(names: Iterable[str]) -> str:
    """Names as one pattern: a `*` for each number, and braces where they differ: `layers.*.{k,q,v}.weight`."""
    kinds: dict[str, int] = {}
    for name in map(shown, sorted(names)):
        kind = re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)
        kinds[kind] = kinds.get(kind, 0) + 1
    words = [kind.split(".") for kind in kinds]
    if len(kinds) > 1 and set(kinds.values()) == {1} and len({len(every) for every in words}) == 1:
        columns = [list(dict.fromkeys(column)) for column in zip(*words, strict=True)]
        if sum(len(column) > 1 for column in columns) == 1:
            return ".".join(column[0] if len(column) == 1 else f"{{{','.join(column)}}}" for column in columns)
    return " + ".join(kind if count == 1 else f"{kind} ({count})" for kind, count in kinds.items()) or "(nothing)"


def amount(count: int) -> str:
    """A number of bytes with a unit.

    >>> amount(1_500_000)
    '1.5 MB'
    """
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"
