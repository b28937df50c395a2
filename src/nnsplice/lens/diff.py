"""`diff_lens`: mean activation differences between two models on unrelated text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nnsplice import engine
from nnsplice.activations import SavedActivation
from nnsplice.activations.capture import capture
from nnsplice.activations.prompts import PromptsLike
from nnsplice.errors import BadArgument, RefusedPlace, ShortRow, circumstances
from nnsplice.lens.logit import is_stream
from nnsplice.lens.runs import decoder_of, last_of, lens_run, prompts_of, texts_of
from nnsplice.lens.tail import Tail
from nnsplice.paths import Path, Paths, parse_path
from nnsplice.steering import SteeringVector
from nnsplice.sweeps import other_model
from nnsplice.sweeps.operations import operation_of
from nnsplice.sweeps.running import check_mode
from nnsplice.sweeps.targets import Target, TargetPart, cell_of, number_of

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, eq=False, repr=False)
class DiffLens:
    """The mean difference of the tuned and the base model's states, at each site and each of the first tokens.

    >>> saved = ns.SavedActivation.from_pairs(("layers[1].output[0]", torch.ones(1, 16)))
    >>> ns.lens.DiffLens(saved, torch.tensor([[7]]), torch.tensor([[0.5]]), {7: "a"}).tokens()["token"].tolist()
    ['a']

    Attributes:
        differences: the mean differences, in one row; a key for each site and token position.
        ids: `[key, k]`, the top tokens of each difference through the tuned model's norm and head.
        shares: `[key, k]`, their probabilities.
        texts: the text of each token id.
    """

    differences: SavedActivation
    ids: Tensor
    shares: Tensor
    texts: dict[int, str]

    def tokens(self) -> pd.DataFrame:
        """The top tokens of each difference: a row for each, with its rank and probability."""
        import pandas as pd

        rows = [
            (number_of(key.place, "layer"), key.position, rank, self.texts[int(one)], float(share), str(key))
            for key, ids, shares in zip(map(parse_path, self.differences), self.ids, self.shares, strict=True)
            for rank, (one, share) in enumerate(zip(ids, shares, strict=True))
        ]
        return pd.DataFrame(rows, columns=["layer", "position", "rank", "token", "probability", "path"])

    def vector(self, place: str | Path) -> SteeringVector:
        """The mean difference of one site over its tokens, as a steering vector.

        Args:
            place: one of the sites that were read, without a position.

        Returns:
            The vector.

        Raises:
            UnknownPath: a site that was not read.
            BadArgument: several sites.
        """
        chosen = self.differences.subset(place)
        places = {str(parse_path(key).place) for key in chosen}
        if len(places) > 1:
            raise BadArgument(
                f"{place} names {len(places)} sites, and a vector is of one",
                expected=f"one of {', '.join(sorted(places))}",
                write=f"[read.vector(site) for site in {sorted(places)}]",
            )
        mean = torch.stack([value.reshape(1, -1) for _, value in chosen.items()]).mean(0)
        key = parse_path(next(iter(chosen))).place
        return SteeringVector.of(SavedActivation.from_pairs((str(key.at(-1)), mean)), method="activation difference")

    def __repr__(self) -> str:
        return f"DiffLens: {len(self.differences)} differences, {self.ids.shape[1]} tokens of each"


def diff_lens(
    base: Any,
    tuned: Any,
    prompts: PromptsLike,
    sites: Paths = "layers[:].output",
    *,
    first: int = 5,
    k: int = 10,
) -> DiffLens:
    """Read the mean difference between two models' states on unrelated text, and steer with it.

    A narrow fine-tuning often shifts the states of the first tokens of any text in the same direction. The tuned
    model's norm and head show the tokens that this direction stands for.

    >>> import copy
    >>> tuned = ns.load(copy.deepcopy(ns.models.unwrap(model)), tokenizer=model.tokenizer)
    >>> with torch.no_grad():
    ...     _ = ns.models.unwrap(tuned).transformer.h[1].mlp.c_proj.bias.add_(1.0)
    >>> read = ns.diff_lens(model, tuned, ["w3 w4 w5", "w6 w7 w8"], "layers[1:].output", first=2, k=3)
    >>> read, read.tokens().shape
    (DiffLens: 4 differences, 3 tokens of each, (12, 6))
    >>> read.vector("layers[1].output")
    SteeringVector: 1 site, width 16, method activation difference, unit as given
      layers[1].output

    Args:
        base: the model before tuning.
        tuned: the tuned model, of the same shape and tokenizer.
        prompts: texts unrelated to the fine-tuning.
        sites: sites of the stream, without positions.
        first: how many of each prompt's first tokens.
        k: how many top tokens of each difference are kept.

    Returns:
        The mean differences over the prompts, at each site and each of the first tokens, and their top tokens.

    Raises:
        BadArgument: models in train mode, with edits of nnsight, of different tokens, or the same model twice; `first`
            below 1.
        RefusedPlace: a site that is not the residual stream or has a position, or a model without a decoder and a head.
        ShapeError: a site that has different widths in the two models.
        ShortRow: a prompt has fewer than `first` tokens.
    """
    base, tuned = engine.as_model(base), engine.as_model(tuned)
    with circumstances("ns.diff_lens"):
        for model in (base, tuned):
            engine.refuse_edits(model)
            check_mode(model)
        given = prompts_of(base, prompts)
        other_model.check(base, tuned, given, operation_of("patch"), pair=False, corrupts=False)
        if other_model.identical(base, tuned):
            raise BadArgument("the two models are the same, so nothing differs", expected="a model and its tuning")
        if first < 1:
            raise BadArgument(f"first={first}", expected="at least 1")
        if min(given.lengths("decoder")) < first:
            raise ShortRow(f"first={first}, and the shortest prompt has {min(given.lengths('decoder'))} tokens")
        tower = decoder_of(tuned)
        places = [path for pattern in engine.listed(sites) for path in engine.expand(base, pattern)]
        for place in places:
            if place.position is not None or not is_stream(place, decoder_of(base)):
                raise RefusedPlace(
                    "a lens reads the stream, at the first tokens", path=place, expected="layers[i].output"
                )
        targets = tuple(Target(cell_of(place), (TargetPart(cell_of(place), (place,), None),)) for place in places)
        other_model.check_places(base, tuned, given, targets)
        of_tuned = other_model.counterparts(tuned, targets)
        tail = Tail.of(tuned, lens_run(tuned, given, given.batches(tuned)[0], [last_of(tower)]))
    pairs: list[tuple[str, Tensor]] = []
    before = capture(base, given, [place.at(n) for place in places for n in range(first)])
    after = capture(tuned, given, [of_tuned[place].at(n) for place in places for n in range(first)])
    for place in places:
        for number in range(first):
            change = after.get(of_tuned[place].at(number)) - before.get(place.at(number)).to(tuned.device or "cpu")
            pairs.append((str(place.at(number)), change.reshape(len(given), -1).double().mean(0, keepdim=True)))
    states = torch.cat([value for _, value in pairs]).to(after.get(of_tuned[places[0]].at(0)))
    tops = [logits.double().softmax(-1).topk(min(k, logits.shape[-1])) for _, logits in tail.each(states)]
    ids, shares = (torch.cat([getattr(top, part) for top in tops]).cpu() for part in ("indices", "values"))
    return DiffLens(SavedActivation.from_pairs(*pairs), ids, shares, texts_of(tuned, ids.unique().tolist()))
