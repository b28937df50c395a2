"""Values from another model's run of the same prompts.

Both models must have the same tokens for the same texts, and the same sites with the same widths.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nnsplice import closures, engine
from nnsplice.activations import features
from nnsplice.activations.access import site_of
from nnsplice.activations.capture import capture
from nnsplice.activations.encoding import encode
from nnsplice.activations.prompts import Prompts
from nnsplice.atlas import Atlas, unwrap
from nnsplice.errors import BadArgument, ShapeError, circumstances
from nnsplice.paths import Path, parse_path
from nnsplice.sweeps.operations import Operation
from nnsplice.sweeps.plan import Plan
from nnsplice.sweeps.targets import Target


def check(
    model: engine.Model, other: engine.Model, prompts: Prompts, operation: Operation, *, pair: bool, corrupts: bool
) -> None:
    """Raise if values of another model cannot be patched: other tokens, other prompts, or another operation.

    Args:
        pair: whether there are corrupted prompts.
        corrupts: whether there is a corruption.

    Raises:
        BadArgument: the reason.
    """
    if pair or corrupts or operation.name != "patch":
        raise BadArgument(
            "values of another model are patched into a run of the same prompts",
            expected='operation="patch", and nothing else that differs',
            write="ns.sweep(model, prompts, None, sites, metric, source=other)",
        )
    if prompts.images is not None:
        raise BadArgument("values of another model are for prompts of text, and these hold images")
    if prompts.sounds is not None:
        raise BadArgument(f"values of another model are for prompts of text, and these are {prompts.sounds[0].name}")
    engine.refuse_changed_logits(other)
    if engine.in_training(other):
        raise BadArgument("the source is in train mode, so dropout would make every run another one")
    with circumstances("the source"):
        engine.check_tokens(other, prompts.ids)
        if prompts.texts is not None and engine.tokenizer_of(other) is not None:
            there = encode(other, list(prompts.texts))
            row = next((n for n, (a, b) in enumerate(zip(prompts.ids, there.ids, strict=True)) if a != b), None)
            if row is not None:
                raise BadArgument(
                    f"the tokenizers of the two models make other tokens of prompt {row}: {list(prompts.ids[row])} and "
                    f"{list(there.ids[row])}",
                    expected="models with one tokenizer",
                )
    sizes = [_vocabulary(one) for one in (model, other)]
    if sizes[0] != sizes[1]:
        raise BadArgument(
            f"the models have {sizes[0]} and {sizes[1]} tokens, so their logits do not correspond",
            expected="models of one vocabulary",
        )


def _vocabulary(model: engine.Model) -> int | None:
    unembed = Atlas.of(model).tower().unembed
    weight = None if unembed is None else getattr(unwrap(model).get_submodule(unembed), "weight", None)
    return None if weight is None else int(weight.shape[0])


def counterparts(other: engine.Model, targets: Sequence[Target]) -> dict[Path, Path]:
    """The sites of targets, each with the same site of the other model."""
    found: dict[Path, Path] = {}
    for place in dict.fromkeys(place.place for target in targets for place in target.places):
        with circumstances("the source"):
            (there,) = engine.expand(other, parse_path(str(place)))
        found[place] = there
    return found


def check_places(model: engine.Model, other: engine.Model, prompts: Prompts, targets: Sequence[Target]) -> None:
    """Raise for a site that the other model does not have, or has in another width.

    Raises:
        ShapeError: the widths differ.
        BadArgument: a pattern, or features of another SAE.
    """
    pairs = counterparts(other, targets)
    closures.require(other, pairs.values(), written=True)
    if any(site_of(place).kind == "pattern" for place in pairs):
        raise BadArgument("a pattern is no value that another model's run could be given", expected="other sites")
    for here, there in pairs.items():
        if here.sae is not None and features.sae_of(model, here).identity != features.sae_of(other, there).identity:
            raise BadArgument(
                f"the source has another SAE {here.sae.name!r}, whose features are others",
                path=here,
                expected="one SAE, attached to both models",
            )
    first = prompts.take([0])
    widths: list[Mapping[Path, int]] = []
    for one, places in ((model, pairs), (other, pairs.values())):
        saved = capture(one, first, [place.at(0) for place in places])
        widths.append({place: saved.get(place.at(0)).shape[-1] for place in places})
    for here, there in pairs.items():
        a, b = widths[0][here], widths[1][there]
        if a != b:
            raise ShapeError(
                f"the site is {a} wide in the model and {b} in the source", path=here, expected="models of one width"
            )


def check_saes(plan: Plan, other: engine.Model) -> None:
    """Raise if the source has other SAEs than the plan was made with.

    Raises:
        BadArgument: an SAE of the same name is another one.
        UnknownPath: an SAE is not attached.
    """
    with circumstances("the source"):
        features.check_identities(other, plan.asked.get("saes", {}), "the plan")


def identical(model: engine.Model, other: engine.Model) -> bool:
    """Whether two models have the same weights and config, and no hooks, so that no value can differ."""
    if model is other:
        return True
    configs = [_config(one) for one in (model, other)]
    same = configs[0] is not None and configs[0] == configs[1] and type(unwrap(model)) is type(unwrap(other))
    hooked = any(m._forward_hooks or m._forward_pre_hooks for one in (model, other) for m in unwrap(one).modules())
    return same and not hooked and engine.weights_digest(model) == engine.weights_digest(other)


def _config(model: engine.Model) -> dict[str, Any] | None:
    config = getattr(unwrap(model), "config", None)
    if not hasattr(config, "to_dict"):
        return None
    values: dict[str, Any] = config.to_dict()  # type: ignore[union-attr]
    return {name: value for name, value in values.items() if name not in ("_name_or_path", "transformers_version")}


def check_given(plan: Plan, source: Any, write: str) -> None:
    """Raise for a missing source, or one that the plan does not use.

    Args:
        write: the call with a source.
    """
    if plan.foreign and source is None:
        raise BadArgument("the plan takes its values from another model", expected="that model", write=write)
    if source is not None and not plan.foreign:
        raise BadArgument(
            "the plan takes its values from the model itself, so a source would do nothing", expected="no source"
        )


def source_of(plan: Plan, source: Any) -> engine.Model | None:
    """The other model of a plan, checked.

    Raises:
        BadArgument: it is missing, or has other weights than the one that the plan was made with.
    """
    check_given(plan, source, "ns.run(plan, model, source=)")
    if source is None:
        return None
    other = engine.as_model(source)
    asked = plan.asked.get("source")
    if not isinstance(asked, Mapping) or asked.get("weights") != engine.weights_digest(other):
        raise BadArgument(
            "the source has other weights than the one that the plan was made with", expected="the same model"
        )
    check_saes(plan, other)
    return other
