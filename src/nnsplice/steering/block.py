"""`steer`: rules as a value that can be shown, added, and applied to a model in a `with` block."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from nnsplice import engine
from nnsplice.activations import SavedActivation
from nnsplice.activations.prompts import PromptsLike
from nnsplice.activations.writing import Coefficient
from nnsplice.atlas import unwrap
from nnsplice.errors import BadArgument, circumstances
from nnsplice.steering.operators import Operator
from nnsplice.steering.rules import Condition, Rule, rules_of
from nnsplice.steering.session import Session
from nnsplice.steering.steered_tokens import Shown, shown
from nnsplice.steering.where import Where, read


@dataclass(frozen=True, eq=False, repr=False)
class Steering:
    """Steering of a model, active in a `with` block.

    In the block `model.generate`, `model.trace` and calls of the wrapped Hugging Face module are steered; afterwards
    the model is unchanged, also after an exception. A block applies to the thread that opened it, and to
    `asyncio.to_thread` calls from it; a thread without a block of its own cannot run the model meanwhile. `a + b` does
    both, `a` first at a common site.

    >>> toy = ns.load("toy")
    >>> reviews = [review for review in ns.models.toy_prompts().reviews if review.mood == "good"][:20]
    >>> good, bad = [review.text for review in reviews], [review.opposite for review in reviews]
    >>> vector = ns.steering.fit_from_prompts(toy, good, bad, "layers[2:4].output[-1]")
    >>> both = ns.steering.steer(toy, vector.at(2), 0.25) + ns.steering.steer(toy, vector.at(3), 0.1, where="generated")
    >>> both
    Steering:
      layers[2].output  add 0.25, where all
      layers[3].output  add 0.1, where generated
    >>> with both:
    ...     print(*ns.steering.generate(toy, "I thought the film was", max_new_tokens=7))
    lovely , the acting was lovely and

    Attributes:
        model: the model.
        rules: the change at each site.
    """

    model: engine.Model
    rules: tuple[Rule, ...]
    _open: list[Session] = field(default_factory=list)

    def __add__(self, other: Steering) -> Steering:
        if not isinstance(other, Steering):
            return NotImplemented
        if unwrap(other.model) is not unwrap(self.model):
            raise BadArgument("two models cannot be steered as one", expected="two steerings of the same model")
        return Steering(self.model, self.rules + other.rules)

    def __enter__(self) -> Steering:
        session = Session(self.model, self.rules)
        session.start()
        self._open.append(session)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        own = [session for session in self._open if session.is_here()]  # another thread may be inside the same value
        session = (own or self._open)[-1]
        self._open.remove(session)
        session.stop()
        if error is None:
            with circumstances("ns.steering.steer"):
                session.check_fired()

    def show(self, model: Any, prompt: PromptsLike | None = None) -> Shown:
        """Run prompts once, and show which tokens are steered and by how much.

        >>> toy = ns.load("toy")
        >>> vector = ns.steering.SteeringVector.of(ns.capture(toy, "I adored it", "layers[1].output[-1]"))
        >>> ns.steering.steer(toy, vector, where=ns.steering.span(1, 3)).show("I thought the film was")
        layers[1].output  add 1, where span(1, 3)
          <|endoftext|> [I] [thought] the film was   (2 of 6 tokens, by 0.71 to 1.01 of the norm)

        Args:
            model: the model, or the prompts if there is no second argument.
            prompt: a text, or a list of texts.
        """
        return shown(self.model, self.rules, prompt if prompt is not None else model)

    def __repr__(self) -> str:
        return "\n".join(["Steering:", *(f"  {rule}" for rule in self.rules)])


def steer(
    model: Any,
    vector: SavedActivation,
    coefficient: Coefficient = 1.0,
    *,
    operator: str | Operator = "add",
    where: str | Where = "all",
    when: Condition | None = None,
    plane: SavedActivation | None = None,
) -> Steering:
    """Steer a model in a `with` block.

    >>> toy = ns.load("toy")
    >>> reviews = [review for review in ns.models.toy_prompts().reviews if review.mood == "good"][:20]
    >>> good, bad = [review.text for review in reviews], [review.opposite for review in reviews]
    >>> vector = ns.steering.fit_from_prompts(toy, good, bad, "layers[3].output[-1]")
    >>> with ns.steering.steer(toy, vector, 0.5) as steering:
    ...     print(*ns.steering.generate(toy, "I thought the film was", max_new_tokens=7))
    lovely , the acting was lovely and
    >>> print(*ns.steering.generate(toy, "I thought the film was", max_new_tokens=7))
    terrible , the story was boring and
    >>> steering
    Steering:
      layers[3].output  add 0.5, where all

    Args:
        model: a model from `ns.load`.
        vector: a direction for each site to steer; `vector.at(3)` is that of one layer.
        coefficient: a number, or one for each row of the runs in the block.
        operator: `"add"`, `"project_out"`, `"clamp"`, `"scale"`, `"rotate"`, or a function `f(h, v, c) -> h` of state,
            direction and coefficient.
        where: the tokens to steer: `"all"`, `"prompt"`, `"generated"`, `ns.steering.from_token(p)`, `span(...)` or
            `mask(...)`.
        when: a condition for each row: `ns.steering.similar(direction, path, above=0.2)`.
        plane: the second direction of `"rotate"`, which rotates states in the plane of both.

    Returns:
        The steering, to be used in `with`; `.show(prompts)` prints the tokens that it changes.

    Raises:
        BadType: something other than a vector, a number or a condition.
        BadArgument: an operator that does not exist, a direction of zeros, or a condition that is read too late.
        ShapeError: a capture of several rows, or a direction of another width than the site.
        OutOfRange: the model has no such layer.
        NeverFired: at the end of the block, when a rule met no token.
    """
    model = engine.as_model(model)
    with circumstances("ns.steering.steer"):
        root = unwrap(model)
        # Offloaded weights are loaded by accelerate's hooks; a model that was not dispatched has none.
        if any(p.is_meta for p in root.parameters()) and not any(hasattr(m, "_hf_hook") for m in root.modules()):
            raise BadArgument("the weights of this model are not here, so nothing can run", write="model.dispatch()")
        return Steering(model, rules_of(model, vector, coefficient, operator, read(where), when, plane))
