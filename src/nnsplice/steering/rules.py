"""Rules: the direction, operator, site, tokens and condition of steering, as plain values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from nnsplice import closures, engine
from nnsplice.activations import SavedActivation, derived, features
from nnsplice.activations.access import site_of
from nnsplice.activations.writing import Coefficient
from nnsplice.atlas import DERIVED, Site, host
from nnsplice.atlas.attached import Features
from nnsplice.errors import BadArgument, BadType, RefusedPlace, ShapeError, UnknownPath, named
from nnsplice.paths import Path, parse_path
from nnsplice.steering.operators import OPERATORS, Operator, rotation
from nnsplice.steering.sites import LEAVE_OUT, NOT_ZERO, vectors_of
from nnsplice.steering.where import Where
from nnsplice.warn import warn_caller

#: One number for all rows, or one for each row.
Coefficients = float | tuple[float, ...]


@dataclass(frozen=True, eq=False)
class Condition:
    """A condition that is evaluated once per prompt, and decides for all tokens generated from it.

    Made by `similar`.
    """

    path: Path
    direction: Tensor = field(repr=False)
    above: float | None
    below: float | None

    def __str__(self) -> str:
        named = (("above", self.above), ("below", self.below))
        bounds = [f"{name}={value:g}" for name, value in named if value is not None]
        return f"similar(direction, {str(self.path)!r}, {', '.join(bounds)})"

    def holds(self, states: Tensor) -> Tensor:
        """Whether the condition holds for each state of `[row, width]`: `[row]`."""
        if states.shape[-1] != self.direction.shape[-1]:
            raise ShapeError(
                f"the condition's direction is {self.direction.shape[-1]} wide, the site {states.shape[-1]}",
                path=self.path,
            )
        cosine = torch.nn.functional.cosine_similarity(states.float(), self.direction.to(states.device).float(), dim=-1)
        answer = torch.ones_like(cosine, dtype=torch.bool)
        if self.above is not None:
            answer = answer & (cosine > self.above)
        return answer if self.below is None else answer & (cosine < self.below)


def similar(
    direction: SavedActivation | Tensor, path: str | Path, *, above: float | None = None, below: float | None = None
) -> Condition:
    """A condition for `steer(..., when=)`: steer the rows whose state has a given cosine similarity with a direction.

    The state is read once, in the prompt, and decides for all tokens generated from it.

    >>> toy = ns.load("toy")
    >>> reviews = [review for review in ns.models.toy_prompts().reviews if review.mood == "good"][:20]
    >>> good, bad = [review.text for review in reviews], [review.opposite for review in reviews]
    >>> vector = ns.steering.fit_from_prompts(toy, good, bad, "layers[3].output[-1]")
    >>> is_bad = ns.steering.similar(vector, "layers[3].output[-1]", below=0)
    >>> ns.steering.steer(toy, vector, when=is_bad).show(["The hotel was awful, the", "The hotel was lovely, the"])
    layers[3].output  add 1, where all, when similar(direction, 'layers[3].output[-1]', below=0)
      [<|endoftext|>] [The] [hotel] [was] [awful] [,] [the]   (7 of 7 tokens, by 0.45 to 1.52 of the norm)
      <|endoftext|> The hotel was lovely , the   (0 of 7 tokens, none of the prompt)

    Args:
        direction: a tensor `[width]`, or a capture or steering vector that holds the site.
        path: the site and position of the state; `[-1]` if no position is given.
        above: the cosine has to be above this.
        below: the cosine has to be below this.

    Returns:
        The condition.

    Raises:
        BadArgument: no bound, a bound outside -1 to 1, several positions, or a direction of zeros.
        ShapeError: several directions.
        UnknownPath: the capture does not hold the site.
    """
    place = parse_path(path)
    place = place.at(-1) if place.position is None else place
    if above is None and below is None:
        raise BadArgument("a condition without a bound always holds", expected="above= or below=, a cosine")
    for name, bound in (("above", above), ("below", below)):
        if bound is not None and not -1 <= bound <= 1:
            raise BadArgument(f"{name}={bound}", expected="a cosine, from -1 to 1")
    if not isinstance(place.position, int):
        raise BadArgument(
            "a condition is read at one token", path=place, expected="one position", write=str(place.at(-1))
        )
    if isinstance(direction, SavedActivation):
        direction = _direction_at(direction, place)
    if not isinstance(direction, Tensor):
        raise BadType(f"a direction of type {type(direction).__name__}", expected="a tensor [width], or a capture")
    direction = direction.detach().flatten(0, -2) if direction.dim() > 1 else direction.detach()[None]
    if direction.shape[0] != 1:
        raise ShapeError(f"{direction.shape[0]} directions", expected="one", write="direction.mean()")
    if not bool(direction.norm() > 0):
        raise BadArgument("a zero vector is similar to nothing", expected=NOT_ZERO)
    return Condition(place, direction.clone(), above, below)


def _direction_at(saved: SavedActivation, place: Path) -> Tensor:
    """The entry of a capture at a site: at this position, or its only entry there."""
    if place in saved:
        return saved[place]
    try:
        (key,) = saved.subset(place.place).keys()
    except (ValueError, UnknownPath):
        raise UnknownPath(
            "the direction holds nothing of this site", path=place, expected=f"one of {', '.join(saved.keys()[:5])}"
        ) from None
    return saved[key]


@dataclass(frozen=True, eq=False)
class OfFeature:
    """An operator on states that applies another one to a feature of an SAE, and keeps the SAE's error."""

    sae: Features
    site: Site
    operator: Operator

    def __call__(self, h: Tensor, v: Tensor, c: float | Tensor) -> Tensor:
        """The states with the feature changed."""
        old = features.part(self.sae, self.site, h)
        return features.changed(self.sae, self.site, h, self.operator(old, v, c))


@dataclass(frozen=True, eq=False)
class Rule:
    """The steering of one site.

    Attributes:
        path: the site.
        vector: the direction `[width]`.
        coefficient: a number, or one for each row.
        name: the name of the operator.
        operator: the function of states, direction and coefficient.
        where: the tokens.
        when: the condition.
        feature: the steered feature of an SAE that is attached to the site; None for the site itself.
        rows: the rows of the batch that the rule is for, in a sweep that runs many cells in one pass; None for all.
    """

    path: Path
    vector: Tensor = field(repr=False)
    coefficient: Coefficients
    name: str
    operator: Operator = field(repr=False)
    where: Where
    when: Condition | None = None
    feature: Path | None = None
    rows: tuple[int, ...] | None = None

    @property
    def site(self) -> Site:
        """The site in the model."""
        return site_of(self.path)

    @property
    def address(self) -> str:
        """The steered site, or feature."""
        return str((self.feature or self.path).place)

    @property
    def requested(self) -> Operator:
        """The operator that was given, which acts on states or on the feature."""
        return self.operator.operator if isinstance(self.operator, OfFeature) else self.operator

    @property
    def adds(self) -> bool:
        """Whether it adds the vector to the states, as `operator="add"` does."""
        return self.operator is OPERATORS["add"]

    def __str__(self) -> str:
        c = self.coefficient
        numbers = f"[{', '.join(f'{one:g}' for one in c)}]" if isinstance(c, tuple) else f"{c:g}"
        condition = "" if self.when is None else f", when {self.when}"
        return f"{self.path.place}  {self.name} {numbers}, where {self.where}{condition}"


def rules_of(
    model: engine.Model,
    vector: SavedActivation,
    coefficient: Coefficient,
    operator: str | Operator,
    where: Where,
    when: Condition | None,
    plane: SavedActivation | None,
) -> tuple[Rule, ...]:
    """A rule for each site of a vector, in the order of the forward pass.

    Raises:
        OutOfRange: the vector is of a layer that the model does not have.
        RefusedPlace: the site is derived from several values.
        BadArgument: an unknown operator, a vector of zeros, or an option without effect.
        BadType: something other than a vector or a condition.
        ShapeError: a vector of several rows.
    """
    if not isinstance(vector, SavedActivation):
        raise BadType(
            f"{named(vector)} is no vector",
            expected="what ns.steering.fit returns, or a capture of one row",
            write="ns.steering.SteeringVector.from_tensor(tensor, layer=3)" if isinstance(vector, Tensor) else None,
        )
    vector._check_saes(model)
    if vector.rows != 1:
        raise ShapeError(
            f"a capture of {vector.rows} rows is no one direction",
            expected="one row; rows may have coefficients of their own",
            write="saved.mean()",
        )
    if when is not None and not isinstance(when, Condition):
        raise BadType(f"when is {named(when)}", expected="ns.steering.similar(direction, path, above=0.2)")
    name, function = _operator(operator)
    if plane is not None and name != "rotate":
        raise BadArgument(f"{name} turns nothing, so plane= would have no effect", write='operator="rotate"')
    condition = None if when is None else _expanded(model, when)
    known = engine.map_of(model)
    rules: list[Rule] = []
    for key, direction in vectors_of(vector):
        (path,) = known.atlas.expand(key.place)
        site = site_of(path)
        if site.kind in ("pattern", "expert", "ungated", "error", "transcoded"):
            kinds = {"transcoded": "feature of a transcoder", "ungated": "slice before its gate"}
            kind = kinds.get(site.kind, site.kind)
            raise RefusedPlace(
                f"a {kind} is derived from several values, so there is no one state to steer",
                path=path,
                expected="the residual stream, what a branch adds to it, a head or a neuron",
                write="layers[i].output",
            )
        _refuse_cross_keys(path)
        if not bool(direction.norm() > 0):
            raise BadArgument(
                "a zero vector, so steering with it would do nothing", path=key, expected=NOT_ZERO, write=LEAVE_OUT
            )
        if plane is not None:
            function = rotation(_plane_direction(plane, key, direction))
        if condition is not None:
            _check_order(known, condition, path, where)
        place, own = path, function
        if site.kind == "feature":
            place, own = host(path), OfFeature(features.sae_of(model, path), site, function)
        feature = path if site.kind == "feature" else None
        label = name if feature is None else f"{name} {path.sae}"
        factors = coefficients(coefficient)
        rules.append(Rule(place, direction.detach(), factors, label, own, where, condition, feature))
    derived.refuse_routers(model, [rule.path for rule in rules])
    closures.require(model, [rule.path for rule in rules] + ([] if condition is None else [condition.path]))
    closures.warn_of_joint_norms(model, (rule.path for rule in rules))
    steered, _ = engine.name_of(model)
    if vector.model not in (None, steered):
        warn_caller(f"this vector comes from {vector.model}; its directions may mean nothing to {steered}")
    return tuple(sorted(rules, key=lambda rule: known.rank(rule.path)))


def _operator(operator: str | Operator) -> tuple[str, Operator]:
    if callable(operator):
        name = getattr(operator, "__name__", "function")
        # A user's function may have the name of an operator.
        return f"{name}()" if name in OPERATORS else name, operator
    if operator not in OPERATORS:
        raise BadArgument(
            f"there is no operator {operator!r}", expected=f"{', '.join(OPERATORS)}, or a function f(h, v, c) -> h"
        )
    return operator, OPERATORS[operator]


def coefficients(value: Any) -> Coefficients:
    """A coefficient as one number, or as one for each row.

    Raises:
        BadType: neither a number nor a sequence of numbers.
    """
    if isinstance(value, Tensor):
        if value.dim() > 1:
            raise ShapeError(f"a coefficient of shape {list(value.shape)}", expected="a number, or one for each row")
        value = value.tolist()
    if isinstance(value, int | float) and not isinstance(value, bool):
        numbers = [float(value)]
    elif isinstance(value, Sequence) and not isinstance(value, str) and value:
        numbers = [float(one) for one in value]
    else:
        raise BadType(f"a coefficient {value!r}", expected="a number, or one for each row")
    if not all(-float("inf") < number < float("inf") for number in numbers):
        raise BadArgument(f"a coefficient {value!r}", expected="finite numbers")
    return numbers[0] if isinstance(value, int | float) else tuple(numbers)


def _plane_direction(plane: SavedActivation, key: Path, direction: Tensor) -> Tensor:
    second = _direction_at(plane, key)[0].detach()
    if second.shape != direction.shape:
        raise ShapeError(f"the plane's second direction is {second.shape[-1]} wide, the first {direction.shape[-1]}")
    cosine = torch.nn.functional.cosine_similarity(second.double(), direction.double(), dim=-1).abs()
    if not bool(cosine < 1 - 1e-9):
        raise BadArgument("two vectors on one line span no plane", path=key, expected="another direction as plane=")
    return second


def _expanded(model: engine.Model, when: Condition) -> Condition:
    found = engine.expand(model, when.path)
    if len(found) != 1:
        raise BadArgument(f"a condition reads one site, and this is {len(found)}", path=when.path)
    if site_of(found[0]).kind in DERIVED:
        raise RefusedPlace("a condition reads a state, and this is derived from several values", path=when.path)
    _refuse_cross_keys(found[0])
    return Condition(found[0], when.direction, when.above, when.below)


def _refuse_cross_keys(path: Path) -> None:
    """Raise for keys and values of cross-attention: encoder tokens in passes of the decoder."""
    if site_of(path).tower == "encoder" and not path.native and path.tower != "encoder":
        raise RefusedPlace(
            "keys and values of cross-attention are of the encoder's tokens and run in the decoder, which computes "
            "them once for all that it generates",
            path=path,
            expected="a site of one tower",
            write=f"encoder.final_norm.output, or layers[{path.steps[0].index}].cross.output",
        )


def _check_order(known: engine.ModelMap, condition: Condition, path: Path, where: Where) -> None:
    """Raise if the condition is evaluated after the rule needs it."""
    after = known.rank(condition.path)[0] > known.rank(path)[0]
    if after and where.kind != "generated":
        raise BadArgument(
            f"the condition is read at {condition.path.place}, after {path.place} has already run",
            expected="a condition at the same site or before it",
            write='where="generated", which is decided when the prompt has run',
        )
