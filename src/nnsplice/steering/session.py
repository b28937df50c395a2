"""Rules at work in a model: what happens at every pass while a steering block is open."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from nnsplice import engine, wire
from nnsplice.activations.access import site_of
from nnsplice.atlas import Site, peel
from nnsplice.errors import BadArgument, NeverFired, ShapeError, named
from nnsplice.paths import Path
from nnsplice.steering.rules import Condition, Rule
from nnsplice.steering.where import Chosen, spread


class Decision:
    """The answers to one condition, one for each prompt batch that ran."""

    def __init__(self, condition: Condition) -> None:
        self.condition = condition
        self.answers: weakref.WeakKeyDictionary[engine.Sequence, Tensor] = weakref.WeakKeyDictionary()

    def read(self, states: Tensor, call: engine.Call) -> None:
        """Decide for the rows of a pass, if its prompt's token is in it and nobody has decided yet."""
        if call.sequence in self.answers or call.cached >= call.prompt_columns:
            return
        position = self.condition.path.position
        assert isinstance(position, int)
        wanted = position if position >= 0 else call.prompt_lengths[:, None] + position
        here = (call.positions == wanted).expand(call.rows, -1)
        if not bool(here.any(-1).all()):  # a long prompt that comes in parts
            return
        found = states[torch.arange(call.rows, device=states.device), here.long().argmax(-1).to(states.device)]
        self.answers[call.sequence] = self.condition.holds(found)

    def of(self, call: engine.Call) -> Tensor:
        """`[row]`: what was decided at the prompt."""
        answer = self.answers.get(call.sequence)
        if answer is None:
            raise BadArgument(
                f"{self.condition.path} was not met before it was needed: the prompt is shorter, comes in several "
                "parts, or ran before this steering block",
                expected="a position that every prompt has, and the whole prompt in one pass",
            )
        return spread(answer, call, "a condition's answer")


class Work:
    """One rule at work: its tensors on the device where they are needed, and whether it ever fired."""

    def __init__(self, rule: Rule, decision: Decision | None) -> None:
        self.rule: Rule = rule
        self.decision: Decision | None = decision
        self.fired: bool | Tensor = False
        #: The states before and after, with their pass, where somebody wants to see them.
        self.seen: list[tuple[Tensor, Tensor, engine.Call]] | None = None
        self._lock = threading.Lock()
        self._tensors: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Any]] = {}
        self._steps: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def __call__(self, states: Tensor, call: engine.Call) -> Tensor:
        """`[row, token, width]` as the rule leaves it."""
        rule = self.rule
        if rule.vector.shape[-1] != (1 if rule.of_feature else states.shape[-1]):
            raise ShapeError(
                f"the vector is {rule.vector.shape[-1]} wide, the place {states.shape[-1]}", path=rule.path.place
            )
        chosen = self._chosen(call)
        if chosen is False:
            return states
        with self._lock:  # threads may run inside one block
            self.fired = True if chosen is True else _any(self.fired, chosen)
        if rule.rows is not None:
            return self._some_rows(states, chosen)
        new = self._changed(states, call)
        return new if chosen is True else torch.where(chosen.to(states.device)[..., None], new, states)

    def _chosen(self, call: engine.Call) -> Chosen:
        chosen = self.rule.where.chosen(call)
        if chosen is False or self.decision is None:
            return chosen
        answer = self.decision.of(call)
        self.fired = True  # it was asked, and its answer may be no
        whole = torch.ones(1, call.new, dtype=torch.bool, device=answer.device) if chosen is True else chosen
        return whole.to(answer.device) & answer[:, None]

    def _changed(self, states: Tensor, call: engine.Call) -> Tensor:
        rule = self.rule
        if rule.name == "add":
            return states + spread(self._step(states), call, "the coefficient")
        vector, coefficient = self._ready(states)
        if isinstance(coefficient, Tensor):
            coefficient = spread(coefficient, call, "the coefficient")
        return _checked(rule, rule.operator(_wide(states), vector, coefficient), states)

    def _some_rows(self, states: Tensor, chosen: Chosen) -> Tensor:
        """A sweep's rule: other rows belong to other cells."""
        rule = self.rule
        rows = torch.tensor(rule.rows, device=states.device)
        part = states[rows]
        if rule.name == "add":
            new = part + self._step(states)
        else:
            new = _checked(rule, rule.operator(_wide(part), *self._ready(states)), part)
        if isinstance(chosen, Tensor):
            own = chosen.to(states.device)
            own = own if own.shape[0] == 1 else own[rows]
            new = torch.where(own[..., None], new, part)
        return states.index_copy(0, rows, new)

    def _step(self, states: Tensor) -> Tensor:
        """What an add adds, `[given row or 1, 1, width]`: made once, in full precision, and rounded once."""
        key = (states.device, states.dtype)
        if key not in self._steps:
            vector = self.rule.vector.to(torch.promote_types(self.rule.vector.dtype, torch.float32))
            coefficient = torch.tensor(self.rule.coefficient, dtype=vector.dtype, device=vector.device)
            self._steps[key] = (coefficient.reshape(-1, 1, 1) * vector).to(states)
        return self._steps[key]

    def _ready(self, states: Tensor) -> tuple[Tensor, Any]:
        """The vector `[1, 1, width]` and the coefficients, where the states are, in the precision of `_wide`."""
        key = (states.device, states.dtype)
        if key not in self._tensors:
            wide = torch.promote_types(states.dtype, torch.float32)
            vector = self.rule.vector.to(states.device, wide)[None, None]
            coefficient = self.rule.coefficient
            if isinstance(coefficient, tuple):
                coefficient = torch.tensor(coefficient, device=states.device, dtype=wide)[:, None, None]
            self._tensors[key] = (vector, coefficient)
        return self._tensors[key]


class Session:
    """Rules in a model, from `start` to `stop`.

    They belong to the thread that starts them, and to what it hands its context to (as `asyncio.to_thread` does).
    """

    def __init__(self, model: engine.Model, rules: Sequence[Rule]) -> None:
        self.model: engine.Model = model
        self.rules: Sequence[Rule] = rules
        decisions: dict[int, Decision] = {}
        for rule in rules:
            if rule.when is not None:
                decisions.setdefault(id(rule.when), Decision(rule.when))
        self.works: list[Work] = [Work(rule, None if rule.when is None else decisions[id(rule.when)]) for rule in rules]
        self._places: dict[tuple[str, str, str], list[tuple[Path, Any]]] = {}
        for decision in decisions.values():  # asked before anything is changed at the same place
            self._add(decision.condition.path, decision.read)
        for work in self.works:
            self._add(work.rule.path, work)
        self.passes: int = 0
        self.is_open: bool = False

    def _add(self, path: Path, what: Any) -> None:
        site = site_of(path)
        self._places.setdefault((site.module, site.end, site.tower), []).append((path, what))

    def start(self) -> None:
        """Stand in the way of the model's values."""
        root = peel(self.model)
        self.home: engine.Home = engine.home()
        self.watch: engine.Watch = engine.watch(self.model)
        self.watch.before_pass.append(self._begun)
        self._standing: list[engine.Interception] = []
        try:
            for (module, end, tower), members in self._places.items():
                change = _Change(self, tower, module, members)
                self._standing.append(engine.Interception(root.get_submodule(module), end, change))
        except BaseException:
            self.stop()
            raise
        self.is_open = True
        _inside.set(_inside.get() | {self})

    def stop(self) -> None:
        """Leave the model as it was."""
        self.is_open = False
        _inside.set(_inside.get() - {self})
        for one in self._standing:
            one.remove()
        self.watch.before_pass.remove(self._begun)
        engine.unwatch(self.watch)

    def is_here(self) -> bool:
        """Whether what runs now runs inside this block."""
        return self in _inside.get() or self.home == engine.home()

    def steers(self) -> bool:
        """Whether the pass that runs now is this block's.

        Raises:
            BadArgument: it is another thread's, which has no block of its own.
        """
        if engine.is_aside():
            return False
        if self.is_here():
            return True
        if any(other.is_open and other.watch is self.watch for other in _inside.get()):
            return False
        raise BadArgument(
            "this thread runs a model that a steering block of another thread steers, so whether it is to be steered "
            "is unknown",
            expected="a steering block in each thread, or asyncio.to_thread(...), which takes the block along",
            write="threading.Thread(target=contextvars.copy_context().run, args=(f,))   # f runs inside the block",
        )

    def _begun(self) -> None:
        self.passes += self.is_here() and not engine.is_aside()
        for one in self._standing:
            one.attach()

    def __enter__(self) -> Session:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def check_fired(self) -> None:
        """Raise for a rule that never met a token."""
        for work in self.works:
            if bool(work.fired):
                continue
            if not self.passes:
                raise NeverFired(
                    "nothing ran in this steering block, so nothing was steered",
                    expected="model.generate, model.trace or a call of the model inside the block",
                )
            raise NeverFired(
                f"no token of {self.passes} pass{'es' * (self.passes != 1)} was steered by this rule",
                path=work.rule,
                expected=_EXPECTED.get(work.rule.where.kind, "a run that reaches the place"),
            )


#: The blocks that this thread, or this task of an event loop, is inside of.
_inside: ContextVar[frozenset[Session]] = ContextVar("nnsplice_steering", default=frozenset())

_EXPECTED = {
    "generated": "a generation of two tokens or more: the first one is predicted by the prompt's last token",
    "from": "a run that is so long, or from_token with a smaller number",
    "span": "a run with these tokens",
    "mask": "a run with these tokens",
}


class _Change:
    """What happens to the value at one end of one module."""

    def __init__(self, session: Session, tower: str, module: str, members: Sequence[tuple[Path, Any]]) -> None:
        self.session, self.tower, self.module = session, tower, module
        self.members = [(site_of(path), what) for path, what in members]

    def __call__(self, value: Any) -> Any:
        if not self.session.steers():
            return value
        call = self.session.watch.current(self.tower)
        if call is None:
            raise BadArgument(
                f"{self.module} was called by itself, outside a run of the model, so its tokens are unknown",
                expected="calls of the whole model inside a steering block",
            )
        visit = call.visit(self)
        for site, what in self.members:
            if site.occurrence == visit:
                value = _met(site, value, what, call)
        return value


def _met(site: Site, value: Any, what: Any, call: engine.Call) -> Any:
    """One rule or condition at a value."""
    inner = engine.first_input(value) if site.end == "input" else value
    held = wire.unpack(inner, site.item)
    states = held if held.dim() == 3 else wire.as_rows(held, call.rows, site.columns is not None)
    if states.shape[1] != call.new:
        raise BadArgument(
            f"{site.module} holds {states.shape[1]} tokens in a pass that was given {call.new}, so which they are is "
            "unknown",
            expected="a model that computes every token that it is given",
            write="use_cache=False",
        )
    start, stop = site.columns or (0, states.shape[-1])
    whole = site.columns is None
    part = states if whole else states[..., start:stop]
    if isinstance(what, Work):
        new = what(part, call)
        if what.seen is not None:
            what.seen.append((part, new, call))
        if new is part:
            return value
    else:
        what(part, call)
        return value
    if not whole:
        new = torch.cat([states[..., :start], new, states[..., stop:]], dim=-1)
    new = wire.as_held(new, held)
    if site.kind == "stream":
        # The stream itself, which the skip path carries on beside the module that reads it.
        held.copy_(new)
        return value
    packed = wire.repack(inner, site.item, new)
    return engine.with_first_input(value, packed) if site.end == "input" else packed


def _any(fired: bool | Tensor, chosen: Tensor) -> bool | Tensor:
    # Kept on the device: asking for it at every token would make a GPU wait.
    return fired if fired is True else chosen.any() if fired is False else fired | chosen.any()


def _wide(states: Tensor) -> Tensor:
    """States no less precise than single: an angle or a norm in half precision would be a rough one."""
    return states.to(torch.promote_types(states.dtype, torch.float32))


def _checked(rule: Rule, new: Any, states: Tensor) -> Tensor:
    if not isinstance(new, Tensor) or new.shape != states.shape:
        found = f"shape {list(new.shape)}" if isinstance(new, Tensor) else f"{named(new)}"
        raise ShapeError(
            f"the operator {rule.name} made {found} of states {list(states.shape)}",
            expected="f(h, v, c) -> h: the new states, not what is added to them, in the same shape",
        )
    return new.to(states.dtype)
