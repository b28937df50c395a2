"""`patchscope`: states patched into another prompt, and the text that the model generates from there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from nnsplice import engine
from nnsplice.activations.access import site_of
from nnsplice.activations.capture import capture
from nnsplice.activations.encoding import encode
from nnsplice.activations.prompts import Prompts, PromptsLike, SpanTexts
from nnsplice.atlas import Site, unwrap
from nnsplice.attribution.gradients import batches
from nnsplice.errors import BadArgument, RefusedPlace, ShortRow, circumstances
from nnsplice.lens.logit import check_state, exists
from nnsplice.lens.runs import decoder_of
from nnsplice.paths import Path, Slice
from nnsplice.progress import bar
from nnsplice.results import Cell, Table
from nnsplice.results.kinds import kind_named
from nnsplice.results.labelled import array
from nnsplice.steering.generate import continued
from nnsplice.sweeps.expansion import targets_of
from nnsplice.sweeps.running import check_mode
from nnsplice.sweeps.sets import Sites
from nnsplice.sweeps.targets import own_tokens

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr


@dataclass(frozen=True, eq=False, repr=False)
class Patchscope:
    """A text for each prompt and cell.

    >>> scope = ns.lens.patchscope(model, "w3 w4", "layers[:].output[-1]", "w8 w8", max_new_tokens=1)
    >>> scope.frame().columns.tolist(), len(scope.frame())
    (['prompt', 'layer', 'position', 'text', 'path'], 3)

    Attributes:
        cells: the sites and positions that states were taken from.
        texts: `[prompt, cell]`, the generated texts; None where a prompt has no such cell.
        tokens: the texts of each source prompt's tokens.
        unpatched: the text generated from the target prompt without a patch.
    """

    cells: tuple[Cell, ...]
    texts: np.ndarray
    tokens: tuple[tuple[str, ...], ...]
    unpatched: str

    def grid(self, component: str | Path | None = None) -> xr.DataArray:
        """The texts with named axes (`prompt`, `layer`, `position`), empty where there is no cell.

        Args:
            component: the kind of site, if there are several.

        Returns:
            An `xarray.DataArray` of texts.

        Raises:
            BadArgument: several kinds of site, and none is named.
            UnknownPath: a kind that was not read.
        """
        there = np.array([[text is not None for text in row] for row in self.texts])
        ends = np.zeros(len(self.texts))
        table = Table(self.cells, np.zeros(there.shape), there, there, ends, ends, self.tokens)
        numbers = np.broadcast_to(np.arange(len(self.cells), dtype=float), there.shape)
        kind = kind_named(self.cells, component)
        at = array(table, np.where(there, numbers, np.nan), kind, "text")
        found = np.full(at.shape, "", dtype=object)
        for index in np.ndindex(at.shape):
            if not np.isnan(number := float(at.values[index])):
                found[index] = self.texts[index[0], int(number)]
        return at.copy(data=found)

    def frame(self) -> pd.DataFrame:
        """A row for each prompt and cell."""
        import pandas as pd

        rows = [
            (prompt, cell.layer, cell.position, text, cell.path)
            for prompt, row in enumerate(self.texts)
            for cell, text in zip(self.cells, row, strict=True)
            if text is not None
        ]
        return pd.DataFrame(rows, columns=["prompt", "layer", "position", "text", "path"])

    def __repr__(self) -> str:
        return f"Patchscope: {len(self.frame())} texts; by itself the target goes on with {self.unpatched!r}"


def patchscope(
    model: Any,
    source_prompts: PromptsLike,
    sites: Sites,
    target_prompt: str | Sequence[int],
    position: int = -1,
    target: str | Path | None = None,
    *,
    max_new_tokens: int = 5,
    spans: SpanTexts | None = None,
    max_tokens: int | None = None,
    progress: bool = True,
) -> Patchscope:
    """Patch states of the source prompts into a target prompt, one at a time, and generate greedily from there.

    >>> scope = ns.lens.patchscope(model, ["w3 w4 w5", "w6 w7"], "layers[:].output[-1]", "w8 w8 w8", max_new_tokens=2)
    >>> scope.grid().sizes
    Frozen({'prompt': 2, 'layer': 3, 'position': 1})

    Args:
        model: a model from `ns.load`, in eval mode.
        source_prompts: the prompts that states are taken from.
        sites: sites of the stream, `layers[i].output`, `.input` or `embed`; without positions, every position is a
            cell of its own.
        target_prompt: the prompt that they are written into, such as `"cat -> cat; 135 -> 135; hello -> hello; ?"`.
        position: the token of the target prompt whose state is replaced.
        target: the site where they are written, `"layers[0].output"`; the site they were taken from if left out.
        max_new_tokens: how many tokens are generated, at most.
        spans: token spans of the source prompts by name, as for `ns.capture`.
        max_tokens: how many tokens run at once.
        progress: show a bar.

    Returns:
        The generated text of every prompt and cell, and that of the target prompt without a patch.

    Raises:
        BadArgument: a model without a tokenizer, in train mode or with edits of nnsight, or several target prompts.
        RefusedPlace: a site that is not a state of the stream, or a target that is not the input or output of a layer.
        ShortRow: the target prompt has no such position.
    """
    model = engine.as_model(model)
    with circumstances("ns.lens.patchscope"):
        engine.refuse_edits(model)
        check_mode(model)
        given, into = encode(model, source_prompts, spans), encode(model, target_prompt)
        if given.values is not None or len(into) != 1:
            raise BadArgument("states are taken from prompts of tokens, and written into one", expected="texts")
        length = into.lengths("decoder")[0]
        if not -length <= position < length:
            raise ShortRow(f"the target prompt has {length} tokens, and no position [{position}]")
        tokenizer = engine.tokenizer_of(model)
        if tokenizer is None:
            raise BadArgument("without a tokenizer there are no texts", write="ns.load(module, tokenizer=tokenizer)")
        tower = decoder_of(model)
        targets = targets_of(model, sites, given, 1, False)
        for one in targets:
            check_state(one, tower)
        places = list(dict.fromkeys(one.places[0] for one in targets))
        written = {place: _target_site(model, place if target is None else target) for place in places}
        arguments = {"max_new_tokens": max_new_tokens, "do_sample": False}
        unpatched = tokenizer.batch_decode(continued(model, into, arguments), skip_special_tokens=True)[0]
    texts = np.full((len(given), len(targets)), None, dtype=object)
    at_once = engine.tokens_at_once(model, max_tokens)
    with bar("patchscope", len(given), "prompt", progress) as shown:
        for rows in batches(model, given, range(len(given)), at_once):
            saved = capture(model, given.take(rows), [place.at(Slice()) for place in places])
            for place in places:
                jobs: list[tuple[int, int]] = []
                states: list[Tensor] = []
                for number, one in enumerate(targets):
                    for at, row in enumerate(rows):
                        if one.places[0] == place and exists(one, given, row):
                            size = given.lengths("decoder")[row]
                            token = own_tokens(one.parts[0].position, given, row, size)[0]
                            jobs.append((row, number))
                            states.append(saved.get(place.at(Slice()))[at, token])
                step = max(at_once // (length + max_new_tokens), 1)
                for start in range(0, len(jobs), step):
                    some = jobs[start : start + step]
                    new = _generated(
                        model, into, written[place], position % length, states[start : start + step], arguments
                    )
                    for (row, number), text in zip(
                        some, tokenizer.batch_decode(new, skip_special_tokens=True), strict=True
                    ):
                        texts[row, number] = text
            shown.update(len(rows))
    names = engine.token_texts(model, given.ids)
    return Patchscope(tuple(one.cell for one in targets), texts, names, unpatched)


def _target_site(model: engine.Model, place: str | Path) -> Site:
    """The site that states are written to.

    Raises:
        RefusedPlace: it is not the input or output of a layer.
    """
    found = engine.expand(model, place)
    ends = {
        site_of(path): None
        for text in ("layers[:].output", "layers[:].input", "embed.output")
        for path in engine.expand(model, text)
    }
    if len(found) != 1 or found[0].position is not None or site_of(found[0]) not in ends:
        raise RefusedPlace(
            "states are written where the stream enters or leaves a layer",
            path=place,
            expected="one site: layers[i].output, layers[i].input or embed, without a position",
        )
    return site_of(found[0])


def _generated(
    model: engine.Model, into: Prompts, site: Site, position: int, states: Sequence[Tensor], arguments: dict[str, Any]
) -> Tensor:
    """The new tokens of the target prompt, a row for each state."""
    length, many = into.lengths("decoder")[0], into.take([0] * len(states))
    visits: list[None] = []

    def put(value: Tensor) -> Tensor:
        """Replace the token's state, in every pass that runs the whole prompt."""
        visits.append(None)
        if len(visits) > 1 and value.shape[1] <= length:
            return value  # a decoding step, with the prompt in the key/value cache
        first = (
            value.shape[1] - length if len(visits) == 1 else 0
        )  # tokens that some families put before the prompt's own
        made = value.clone()
        made[:, first + position] = torch.stack(list(states)).to(made)
        return made

    with engine.locked(model), engine.changing(unwrap(model), site, put):
        return continued(model, many, arguments)
