"""`ns.steering.generate`: continuations of prompts."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from nnsplice import engine
from nnsplice.activations import SavedActivation
from nnsplice.activations.encoding import encode
from nnsplice.activations.prompts import Prompts, PromptsLike
from nnsplice.activations.writing import Coefficient
from nnsplice.atlas import unwrap
from nnsplice.errors import BadArgument, ShapeError, circumstances
from nnsplice.steering.block import steer
from nnsplice.steering.operators import Operator
from nnsplice.steering.padding import padded, padding_of
from nnsplice.steering.rules import Condition
from nnsplice.steering.where import Where


def generate(
    model: Any,
    prompts: PromptsLike,
    vector: SavedActivation | None = None,
    coefficient: Coefficient = 1.0,
    *,
    operator: str | Operator = "add",
    where: str | Where = "all",
    when: Condition | None = None,
    plane: SavedActivation | None = None,
    **generate_kwargs: Any,
) -> list[str]:
    """Generate continuations of prompts, steered or not, and return them without the prompts.

    Each continuation is the same as for its prompt alone, whatever the batch. Inside a `steer` block the block's
    steering applies.

    >>> toy = ns.load("toy")
    >>> fact, pair = ns.models.toy_prompts().facts[0], ns.models.toy_prompts().ioi[0]
    >>> prompts = [fact.clean, pair.clean]   # the city of a tower; who was given a drink
    >>> ns.steering.generate(toy, prompts, max_new_tokens=1)
    ['Athens', 'Mary']

    Args:
        model: a model from `ns.load`, with a tokenizer.
        prompts: a text, a list of texts, token ids or chat messages.
        vector: a direction for each site to steer; None steers nothing here.
        coefficient: a number, or one for each prompt.
        operator: as for `ns.steering.steer`.
        where: as for `ns.steering.steer`.
        when: as for `ns.steering.steer`.
        plane: as for `ns.steering.steer`.
        **generate_kwargs: arguments of transformers' `generate`: `max_new_tokens=40`, `do_sample=True`, `num_beams=3`,
            ...

    Returns:
        The generated texts, one for each prompt.

    Raises:
        BadArgument: a model without a tokenizer, an argument of steering without a vector, or more tokens than
            the model has positions.
    """
    model = engine.as_model(model)
    with circumstances("ns.steering.generate"):
        if vector is None:
            idle = [n for n, given, default in (
                ("coefficient", coefficient, 1.0), ("operator", operator, "add"), ("where", where, "all"),
                ("when", when, None), ("plane", plane, None),
            ) if given is not default and given != default]  # fmt: skip
            if idle:
                raise BadArgument(f"{', '.join(idle)} without a vector would have no effect", expected="a vector")
        engine.refuse_edits(model)
        given = encode(model, prompts)
        if given.values is not None:
            raise BadArgument("prompts to generate from are tokens, and these are values")
        tokenizer = engine.tokenizer_of(model)
        if tokenizer is None:
            raise BadArgument("without a tokenizer there are no texts", write="ns.load(module, tokenizer=tokenizer)")
    block = nullcontext() if vector is None else steer(
        model, vector, coefficient, operator=operator, where=where, when=when, plane=plane
    )  # fmt: skip
    with block:
        new = continued(model, given, generate_kwargs)
    return tokenizer.batch_decode(new, skip_special_tokens=True)


def continued(model: engine.Model, given: Prompts, kwargs: dict[str, Any]) -> Tensor:
    """The new tokens of each prompt, `[row, token]`, as the Hugging Face module itself generates them."""
    root: Any = unwrap(model)
    two_towers = engine.is_encoder_decoder(model)
    ids, mask = padded(given.ids, padding_of(model), left=not two_towers)
    kwargs = {"pad_token_id": padding_of(model), **kwargs}
    begin = kwargs.get("decoder_input_ids", _decoder_begin(model, given) if two_towers else None)
    if begin is not None:
        kwargs["decoder_input_ids"] = begin
    try:
        with torch.no_grad():
            out = root.generate(input_ids=ids.to(model.device), attention_mask=mask.to(model.device), **kwargs)
    except IndexError as error:
        raise (_past_the_context(root, ids.shape[1], kwargs) or error) from None
    out = out if isinstance(out, Tensor) else out.sequences
    return out[:, _begun(begin, out) if two_towers else ids.shape[1] :]


def _past_the_context(root: Any, length: int, kwargs: dict[str, Any]) -> BadArgument | None:
    """The error of a text that grew past the model's table of positions; None where it did not."""
    limit, new = getattr(root.config, "max_position_embeddings", None), kwargs.get("max_new_tokens", 0)
    if not isinstance(limit, int) or length + new <= limit:
        return None
    return BadArgument(
        f"{length} tokens of the longest prompt and {new} new ones are more than the {limit} positions of this model",
        expected="a shorter prompt, or fewer new tokens",
        write=f"max_new_tokens={limit - length}" if length < limit else None,
    )


def _decoder_begin(model: engine.Model, given: Prompts) -> Tensor | None:
    """The tokens that the decoder goes on from; None where it begins by itself.

    Raises:
        ShapeError: prompts whose decoders have different numbers of tokens.
    """
    rows = given.decoder_ids
    if rows is None or all(row == (engine.decoder_start(model),) for row in rows):
        return None
    if len({len(row) for row in rows}) > 1:
        raise ShapeError(
            f"the decoder's tokens of these prompts are {', '.join(str(len(row)) for row in rows)} in number, and one "
            "generation goes on from as many in every row",
            expected="decoder_input_ids of one length, or a generation for each prompt",
        )
    return torch.tensor(rows, device=model.device)


def _begun(begin: Tensor | None, out: Tensor) -> int:
    """How many tokens the decoder had; `generate` puts its start before those that begin otherwise."""
    if begin is None:
        return 1
    return begin.shape[1] + (not torch.equal(out[:, : begin.shape[1]].to(begin.device), begin))
