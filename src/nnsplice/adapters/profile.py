"""The kind and depth of every weight that an adapter changes, and the energy of the change."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np

from nnsplice import plots
from nnsplice.adapters.domains import Depth, DomainTable, Kind
from nnsplice.adapters.factors import ExpertAdapter
from nnsplice.atlas import Atlas
from nnsplice.atlas.names import layer_of, unwrapped
from nnsplice.errors import BadArgument, BadType, NnspliceError, named
from nnsplice.paths import Path
from nnsplice.shown import counted, printable

if TYPE_CHECKING:
    import pandas as pd

#: An adapter with less energy over all weights has no domain.
LEAST_ENERGY = 1e-10

#: Unembeddings, whatever else their names contain.
_UNEMBED = re.compile(r"(^|\.)(embed_out|unembed|lm_head|output_projection)(\.|$)")
#: Kind of weight -> parts of names, lower-cased; the first kind that has one wins.
_RULES: tuple[tuple[Kind, tuple[str, ...]], ...] = (
    ("embed", ("embed", "wte")),
    ("attn", ("attn", "query", "key", "value", "q_proj", "k_proj", "v_proj", "out_proj")),
    ("mlp", ("mlp", "dense_h_to_4h", "dense_4h_to_h", "gate_proj", "up_proj", "down_proj")),
)
#: The same for names that are not norms: `post_attention_layernorm` is no attention.
_RULES_BUT_NORMS: tuple[tuple[Kind, tuple[str, ...]], ...] = (
    ("attn", ("attention", "wqkv", "qkv_proj", "o_proj")),
    (
        "mlp",
        ("fc1", "fc2", "fc_in", "fc_out", "c_fc", "experts", "intermediate", "feed_forward", "feedforward", "ffn",
         "moe", "densereludense", "output.dense", "lin1", "lin2"),
    ),
)  # fmt: skip
_NORM = re.compile(r"norm|(^|\.)ln_\w+")
_KIND_OF_STEP: Mapping[str, Kind] = {"embed": "embed", "attn": "attn", "heads": "attn", "mlp": "mlp", "experts": "mlp"}


@dataclass(frozen=True, slots=True)
class WeightInfo:
    """The position of a weight in the model.

    Attributes:
        kind: the kind.
        depth: the depth.
        layer: the layer; None outside the layers.
        tower: `encoder` in a model with two towers.
        part: the part of the layer: `attn.q`, `mlp.up`, ...; the kind where it is not known.
        address: the address; None if the model is not known or has no such name.
    """

    kind: Kind
    depth: Depth
    layer: int | None
    tower: str | None
    part: str
    address: Path | None = None


def describe(name: str, total_layers: int, atlas: Atlas | None = None) -> WeightInfo:
    """The kind and depth of a weight: from the model that has it, else from its name."""
    plain = re.sub(r"\[(\d+)\]", r".\1", name)
    place = _place(name, atlas)
    layer = layer_of(plain)
    number, tower = (layer.number if layer else None), None
    kind: Kind = kind_of(plain)
    part = None
    if place is not None and atlas is not None:
        tower = place.tower
        step = place.steps[0]
        if step.name == "layers" and isinstance(step.index, int):
            number = step.index
            total_layers = atlas.tower(place).n_layers
            part = ".".join(one.name for one in place.steps[1:]) or None
        else:
            number = None
        words = {one.name for one in place.steps}
        named: list[Kind] = [found for word, found in _KIND_OF_STEP.items() if word in words]
        if words == {"unembed"}:
            kind = "other"
        elif named:
            kind = named[0]
    if number is not None:
        depth = depth_of(number, total_layers)
    else:
        lower = plain.lower()
        late = _UNEMBED.search(lower) is not None or (place is not None and place.steps[0].name == "unembed")
        depth = (
            "late" if late else "early" if "embed" in lower or kind == "embed" else "late" if "head" in lower else "mid"
        )
    return WeightInfo(kind, depth, number, tower, part or kind, place)


def _place(name: str, atlas: Atlas | None) -> Path | None:
    if atlas is None or not atlas.towers:
        return None
    try:
        place = atlas.locate(name)
    except NnspliceError:
        return None  # a weight of another model: its name has to do
    return None if place.native else place


def kind_of(name: str) -> Kind:
    """The kind of a weight by its name alone.

    >>> from nnsplice.adapters.profile import kind_of
    >>> kind_of("gpt_neox.layers.3.attention.dense.weight"), kind_of("embed_out.weight"), kind_of("model.layers.0.fc1")
    ('attn', 'other', 'mlp')
    """
    lower = unwrapped(name).lower()
    if _UNEMBED.search(lower):
        return "other"
    rules = _RULES if _NORM.search(lower) else (*_RULES, *_RULES_BUT_NORMS)
    found: list[Kind] = [kind for kind, parts in rules if any(part in lower for part in parts)]
    return found[0] if found else "other"


def depth_of(index: int, total: int) -> Depth:
    """The third of the model that a layer lies in.

    From six layers on a third is a whole number of layers, and the last one has what is left over; in smaller models a
    layer lies where its middle does, and a single layer is late.

    >>> from nnsplice.adapters.profile import depth_of
    >>> [depth_of(i, 5) for i in range(5)]
    ['early', 'early', 'mid', 'late', 'late']
    """
    if total <= 1:
        return "late"
    if total < 6:
        middle = (index + 0.5) / total
        return "early" if middle < 1 / 3 else "mid" if middle < 2 / 3 else "late"
    third = total // 3
    return "early" if index < third else "mid" if index < 2 * third else "late"


@dataclass(frozen=True, slots=True)
class WeightEnergy:
    """The energy of the change of one weight.

    Attributes:
        name: the name of the weight.
        path: its address; empty if the model is not known.
        tower: `encoder` or `decoder` in a model with two towers, else empty.
        layer: the layer; None outside the layers.
        part: the part of the layer.
        kind: the kind.
        depth: the depth.
        rank: the rank of the factors.
        energy: the sum of the squared singular values of the change.
    """

    name: str
    path: str
    tower: str
    layer: int | None
    part: str
    kind: Kind
    depth: Depth
    rank: int
    energy: float

    @property
    def row(self) -> str:
        """The layer as a text, with its tower where there are two; `embed` and `unembed` for what lies outside."""
        if self.layer is None:
            return {"early": "embed", "late": "unembed"}.get(self.depth, "other")
        return f"{self.tower} {self.layer}" if self.tower else str(self.layer)


class AdapterProfile(dict[str, float]):
    """The share of each domain, as a dictionary, with the energies behind it: `frame`, `grid`, `plot`.

    >>> from copy import deepcopy
    >>> tuned = deepcopy(ns.models.unwrap(model))
    >>> with torch.no_grad():
    ...     _ = tuned.transformer.h[1].mlp.c_fc.weight[3].add_(0.5)
    ...     _ = tuned.transformer.h[2].attn.c_proj.weight[:, 0].add_(0.25)
    >>> adapter = ns.adapters.ExpertAdapter.from_model_delta(model, tuned, rank=1)
    >>> profile = ns.adapters.profile(adapter, atlas=ns.Atlas.of(model))
    >>> {layer: round(energy, 2) for layer, energy in profile.layers().items()}
    {'1': 16.0, '2': 1.0}
    >>> profile.frame()[["path", "kind", "depth", "rank", "share"]].round(2)
                   path  kind depth  rank  share
    0  layers[1].mlp.up   mlp   mid     1   0.94
    1  layers[2].attn.o  attn  late     1   0.06
    """

    def __init__(self, scores: Mapping[str, float], energies: Iterable[WeightEnergy]) -> None:
        super().__init__(scores)
        self.energies: tuple[WeightEnergy, ...] = tuple(sorted(energies, key=_layer_order))

    def __repr__(self) -> str:
        shares = f", {dict(self)}" if self else ""
        lines = [f"AdapterProfile: {counted(len(self.energies), 'weight')}, energy {self.total:.4g}{shares}"]
        lines += [f"  {'layer ' * row[-1:].isdigit()}{row}  {energy:.4g}" for row, energy in self.layers().items()]
        return printable("\n".join(lines))

    @property
    def total(self) -> float:
        """The energy of the whole adapter."""
        return sum(one.energy for one in self.energies)

    def layers(self) -> dict[str, float]:
        """The energy of each layer, with `embed` and `unembed` for the rest."""
        found: dict[str, float] = {}
        for one in self.energies:
            found[one.row] = found.get(one.row, 0.0) + one.energy
        return found

    def frame(self) -> pd.DataFrame:
        """A pandas table with a row for each weight, and its share of the total energy."""
        import pandas as pd

        table = pd.DataFrame([asdict(one) for one in self.energies])
        table["layer"] = table["layer"].astype("Int64")
        table["share"] = table["energy"] / self.total if self.total else 0.0
        return table

    def grid(self) -> tuple[list[str], list[str], np.ndarray]:
        """The energy of each part of each layer, with the names of layers and parts; NaN without factors.

        >>> up, q = "model.layers.1.mlp.up_proj.weight", "model.layers.2.self_attn.q_proj.weight"
        >>> pair = ns.adapters.LoRAMatrices(lora_A=torch.ones(1, 4), lora_B=torch.ones(4, 1))
        >>> ns.adapters.profile(ns.adapters.ExpertAdapter({up: pair, q: pair}), total_layers=4).grid()
        (['1', '2'], ['attn', 'mlp'], array([[nan, 16.],
               [16., nan]]))
        """
        rows = list(self.layers())
        parts = list(dict.fromkeys(one.part for one in sorted(self.energies, key=_part_order)))
        values = np.full((len(rows), len(parts)), np.nan)
        for one in self.energies:
            at = rows.index(one.row), parts.index(one.part)
            values[at] = np.nansum([values[at], one.energy])
        return rows, parts, values

    def plot(self, *, ax: plots.Axes | None = None) -> plots.Axes:
        """Draw the energy of each part of each layer as a heatmap.

        Args:
            ax: axes to draw on; a new figure if left out.

        Returns:
            The axes; the figure is `axes.figure`.
        """
        rows, parts, values = self.grid()
        ax = plots.heatmap(
            values,
            rows=rows,
            columns=parts,
            row_label="layer",
            column_label="part",
            value_label="energy of the change",
            title="What the adapter changed",
            ax=ax,
        )
        ax.images[0].set_clim(vmin=0.0)  # nearly equal energies have nearly equal colours
        return ax


def _layer_order(one: WeightEnergy) -> tuple:
    outside = {"early": 0, "mid": 2, "late": 2}[one.depth]
    return (1 if one.layer is not None else outside, one.tower != "encoder", one.layer or 0)


_PARTS = (
    "embed",
    "attn",
    "attn.q",
    "attn.k",
    "attn.v",
    "attn.o",
    "mlp",
    "mlp.gate",
    "mlp.up",
    "mlp.down",
    "mlp.router",
)


def _part_order(one: WeightEnergy) -> tuple:
    return (_PARTS.index(one.part) if one.part in _PARTS else len(_PARTS), one.part)


def profile(
    adapter: ExpertAdapter,
    table: DomainTable | None = None,
    *,
    total_layers: int | None = None,
    atlas: Atlas | None = None,
) -> AdapterProfile:
    """The energy (squared norm) of an adapter's update by weight, layer and part, and its shares by domain.

    >>> from copy import deepcopy
    >>> tuned = deepcopy(ns.models.unwrap(model))
    >>> with torch.no_grad():
    ...     _ = tuned.transformer.h[1].mlp.c_fc.weight[3].add_(0.5)
    ...     _ = tuned.transformer.h[2].attn.c_proj.weight[:, 0].add_(0.25)
    >>> adapter = ns.adapters.ExpertAdapter.from_model_delta(model, tuned, rank=1)
    >>> table = ns.adapters.DomainTable(("facts", "style"), {("mlp", "mid"): (1.0, 0.0), ("attn", "late"): (0.0, 1.0)})
    >>> shares = ns.adapters.profile(adapter, table, atlas=ns.Atlas.of(model))
    >>> {domain: round(share, 2) for domain, share in shares.items()}
    {'facts': 0.94, 'style': 0.06}

    Args:
        adapter: the factors.
        table: the weight of each part and depth for each domain; without one there are energies and no shares.
        total_layers: the number of layers of the model; from `atlas`, or the adapter's highest layer, if left out.
        atlas: `ns.Atlas.of(model)`, which locates names exactly.

    Returns:
        The shares by domain, with the energies behind them.

    Raises:
        BadType: something other than an adapter.
        BadArgument: an energy that is not a number.
    """
    if not isinstance(adapter, ExpertAdapter):
        raise BadType(
            f"{named(adapter)} is no adapter",
            expected="an ExpertAdapter",
            write="ns.adapters.profile(ns.adapters.ExpertAdapter.from_peft(folder))",
        )
    if total_layers is None:
        numbers = [layer.number for name in adapter.layers if (layer := layer_of(name))]
        total_layers = atlas.tower().n_layers if atlas is not None and atlas.towers else max(numbers, default=0) + 1
    energies: list[WeightEnergy] = []
    names = () if table is None else table.names
    sums = [0.0] * len(names)
    for name, pair in adapter.layers.items():
        energy = float(pair.energy)
        if not energy < float("inf"):
            raise BadArgument(
                f"the energy of {name} is {energy}",
                expected="the factors of a run that did not diverge; these hold NaN",
            )
        at = describe(name, total_layers, atlas)
        path = "" if at.address is None else str(at.address)
        energies.append(
            WeightEnergy(name, path, at.tower or "", at.layer, at.part, at.kind, at.depth, pair.rank, energy)
        )
        if table is not None:
            sums = [s + w * energy for s, w in zip(sums, table.of(at.kind, at.depth), strict=True)]
    if table is None:
        return AdapterProfile({}, energies)
    total = sum(sums)
    nothing = sum(one.energy for one in energies) < LEAST_ENERGY or total <= 0.0
    scores = {name: table.empty if nothing else s / total for name, s in zip(names, sums, strict=True)}
    return AdapterProfile(scores, energies)
