"""`CausalModel`: variables of a task with their mechanisms, and counterfactuals."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from nnsplice.errors import BadArgument, circumstances

#: The values of variables by name.
VariableValues = Mapping[str, Any]


@dataclass(frozen=True)
class Counterfactual:
    """A base and a source input, with the expected result of an interchange.

    >>> double = ns.tasks.CausalModel({"x": range(3), "y": None}, {"y": ("x",)}, {"y": lambda x: 2 * x})
    >>> one = double.counterfactuals("x", 1)[0]
    >>> one.expected == double.run(one.source)
    True

    Attributes:
        base: the inputs of the base run.
        source: the inputs of the source run.
        expected: the values of all variables in the base run, with the chosen one from the source run.
    """

    base: VariableValues
    source: VariableValues
    expected: VariableValues


@dataclass(frozen=True)
class CausalModel:
    """A causal model of a task, as the hypothesis of interchange interventions.

    >>> sums = ns.tasks.CausalModel(
    ...     variables={"a": range(3), "b": range(3), "c": range(3), "ab": None, "sum": None},
    ...     parents={"ab": ("a", "b"), "sum": ("ab", "c")},
    ...     mechanisms={"ab": lambda a, b: a + b, "sum": lambda ab, c: ab + c},
    ... )
    >>> sums.run({"a": 1, "b": 2, "c": 0})["sum"]
    3
    >>> sums.run({"a": 1, "b": 2, "c": 0}, {"ab": 0})["sum"]
    0
    >>> one = sums.counterfactuals("ab", 1)[0]
    >>> one.expected["sum"] == one.source["a"] + one.source["b"] + one.base["c"]
    True

    Attributes:
        variables: the values of each variable; None for one that has parents.
        parents: the parents of each variable.
        mechanisms: a function of the parents' values, in their order, for each variable that has parents.
    """

    variables: Mapping[str, Sequence[Any] | None]
    parents: Mapping[str, tuple[str, ...]]
    mechanisms: Mapping[str, Callable[..., Any]]

    def __post_init__(self) -> None:
        """Check the names, and that there are no cycles."""
        with circumstances("ns.tasks.CausalModel"):
            for name in self.variables:
                if (name in self.parents) != (name in self.mechanisms):
                    has = "parents and no mechanism" if name in self.parents else "a mechanism and no parents"
                    raise BadArgument(f"{name!r} has {has}", expected="both, or neither for an input")
                if name not in self.parents and not self.variables[name]:
                    raise BadArgument(f"{name!r} follows from nothing and has no values", expected="its values")
            for name in (*self.parents, *self.mechanisms):
                if name not in self.variables:
                    raise BadArgument(f"{name!r} is no variable", expected=", ".join(self.variables))
            for name, parents in self.parents.items():
                for parent in parents:
                    if parent not in self.variables:
                        raise BadArgument(f"{name!r} follows from {parent!r}, which is no variable")
            if len(self._order()) < len(self.variables):
                cycle = [name for name in self.variables if name not in self._order()]
                raise BadArgument(f"{', '.join(cycle)} follow from each other", expected="no circle")

    @property
    def inputs(self) -> tuple[str, ...]:
        """The variables without parents."""
        return tuple(name for name in self.variables if name not in self.parents)

    @property
    def outputs(self) -> tuple[str, ...]:
        """The variables without children."""
        used = {parent for parents in self.parents.values() for parent in parents}
        return tuple(name for name in self.variables if name in self.parents and name not in used)

    def _order(self) -> tuple[str, ...]:
        found = list(self.inputs)
        left = [name for name in self.variables if name in self.parents]
        while ready := [name for name in left if all(parent in found for parent in self.parents[name])]:
            found += ready
            left = [name for name in left if name not in ready]
        return tuple(found)

    def run(self, inputs: VariableValues, fixed: VariableValues | None = None) -> dict[str, Any]:
        """Compute the value of every variable.

        Args:
            inputs: a value for each input.
            fixed: interventions: variables that are set instead of computed.

        Returns:
            The values by variable.

        Raises:
            BadArgument: a missing input, or a name that is no variable.
        """
        fixed = fixed or {}
        unknown = [name for name in (*inputs, *fixed) if name not in self.variables]
        if unknown:
            raise BadArgument(f"{unknown[0]!r} is no variable", expected=", ".join(self.variables))
        missing = [name for name in self.inputs if name not in inputs and name not in fixed]
        if missing:
            raise BadArgument(f"no value for {missing[0]!r}", expected=f"values for {', '.join(self.inputs)}")
        found: dict[str, Any] = {}
        for name in self._order():
            if name in fixed:
                found[name] = fixed[name]
            elif name in self.parents:
                found[name] = self.mechanisms[name](*(found[parent] for parent in self.parents[name]))
            else:
                found[name] = inputs[name]
        return {name: found[name] for name in self.variables}

    def interchange(
        self, base: VariableValues, source: VariableValues, variable: str | Sequence[str]
    ) -> dict[str, Any]:
        """Run the base inputs with some variables set to their values in the source run.

        Args:
            base: the inputs of the base run.
            source: the inputs of the source run.
            variable: the variable to exchange, or several.

        Returns:
            The values by variable.

        Raises:
            BadArgument: a name that is no variable.
        """
        names = (variable,) if isinstance(variable, str) else tuple(variable)
        unknown = [name for name in names if name not in self.variables]
        if unknown:
            raise BadArgument(f"{unknown[0]!r} is no variable", expected=", ".join(self.variables))
        values = self.run(source)
        return self.run(base, {name: values[name] for name in names})

    def counterfactuals(
        self, variable: str | Sequence[str], n: int = 100, seed: int = 0, *, changed: bool = True
    ) -> list[Counterfactual]:
        """Draw random pairs of inputs, with the result of exchanging a variable.

        Args:
            variable: the variable to exchange, or several.
            n: the number of pairs; a pair may be drawn twice.
            seed: the seed of the pairs.
            changed: only pairs in which the exchange changes an output.

        Returns:
            The pairs.

        Raises:
            BadArgument: exchanging the variable hardly ever changes an output.
        """
        rng = random.Random(seed)
        found: list[Counterfactual] = []
        for _ in range(100 * n + 100):
            if len(found) == n:
                return found
            base, source = ({name: rng.choice(list(self.variables[name] or ())) for name in self.inputs} for _ in "bs")
            expected = self.interchange(base, source, variable)
            plain = self.run(base)
            if not changed or any(expected[name] != plain[name] for name in self.outputs):
                found.append(Counterfactual(base, source, expected))
        if len(found) == n:
            return found
        raise BadArgument(
            f"exchanging {variable!r} hardly ever changes {', '.join(self.outputs)}: {len(found)} pairs were found",
            expected="a variable that an output depends on",
            write="changed=False",
        )

    def all_inputs(self) -> list[dict[str, Any]]:
        """Every combination of inputs."""
        domains = [list(self.variables[name] or ()) for name in self.inputs]
        return [dict(zip(self.inputs, values, strict=True)) for values in product(*domains)]
