"""The session of a steering block: applies its rules to every forward pass in the block."""

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
from nnsplice.atlas import Site, unwrap
from nnsplice.errors import BadArgument, NeverFired, ShapeError, named
from nnsplice.paths import Path
from nnsplice.steering.rules import Condition, Rule
from nnsplice.steering.where import Chosen, per_row


class ConditionState:
    """The decisions of one condition: `[row]` for each batch of prompts, also for the tokens generated from it."""

    def __init__(self, condition: Condition) -> None:
        self.condition = condition
        self.decisions: weakref.WeakKeyDictionary[engine.Generation, Tensor] = weakref.WeakKeyDictionary()

    def read(self, states: Tensor, call: engine.ForwardCall) -> None:
        """Evaluate the condition on states `[row, token, width]`, in the pass that has the condition's token."""
        if call.generation in self.decisions or call.cached >= call.prompt_columns:
            return
        position = self.condition.path.position
        assert isinstance(position, int)
        wanted = position if position >= 0 else call.prompt_lengths[:, None] + position
        here = (call.positions == wanted).expand(call.rows, -1)
        if not bool(here.any(-1).all()):  # a long prompt that is run in parts
            return
        found = states[torch.arange(call.rows, device=states.device), here.long().argmax(-1).to(states.device)]
        self.decisions[call.generation] = self.condition.holds(found)

    def of(self, call: engine.ForwardCall) -> Tensor:
        """The decisions for the rows of a pass: `[row]`."""
        answer = self.decisions.get(call.generation)
        if answer is None:
            raise BadArgument(
                f"{self.condition.path} was not met before it was needed: the prompt is shorter, comes in several "
                "parts, or ran before this steering block",
                expected="a position that every prompt has, and the whole prompt in one pass",
            )
        return per_row(answer, call, "a condition's answer")


class ActiveRule:
    """A rule in a session, with its tensors on each device, and whether it has steered a token."""

    def __init__(self, rule: Rule, decisions: ConditionState | None) -> None:
        self.rule: Rule = rule
        self.decisions: ConditionState | None = decisions
        self.fired: bool | Tensor = False
        #: If recording: the states before and after the rule, with their pass.
        self.recorded: list[tuple[Tensor, Tensor, engine.ForwardCall]] | None = None
        self._lock = threading.Lock()
        self._tensors: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Any]] = {}
        self._steps: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def __call__(self, states: Tensor, call: engine.ForwardCall) -> Tensor:
        """The states `[row, token, width]` after the rule."""
        rule = self.rule
        if rule.vector.shape[-1] != (1 if rule.feature is not None else states.shape[-1]):
            raise ShapeError(
                f"the vector is {rule.vector.shape[-1]} wide, the site {states.shape[-1]}", path=rule.path.place
            )
        chosen = self._chosen(call)
        if chosen is False:
            return states
        with self._lock:  # threads may run inside one block
            self.fired = True if chosen is True else _any_fired(self.fired, chosen)
        if rule.rows is not None:
            return self._changed_rows(states, chosen)
        new = self._changed(states, call)
        return new if chosen is True else torch.where(chosen.to(states.device)[..., None], new, states)

    def _chosen(self, call: engine.ForwardCall) -> Chosen:
        chosen = self.rule.where.chosen(call)
        if chosen is False or self.decisions is None:
            return chosen
        answer = self.decisions.of(call)
        self.fired = True  # also if the condition holds for no row
        whole = torch.ones(1, call.new, dtype=torch.bool, device=answer.device) if chosen is True else chosen
        return whole.to(answer.device) & answer[:, None]

    def _changed(self, states: Tensor, call: engine.ForwardCall) -> Tensor:
        rule = self.rule
        if rule.adds:
            return states + per_row(self._step(states), call, "the coefficient")
        vector, coefficient = self._operands(states)
        if isinstance(coefficient, Tensor):
            coefficient = per_row(coefficient, call, "the coefficient")
        return _checked(rule, rule.operator(_at_least_float32(states), vector, coefficient), states)

    def _changed_rows(self, states: Tensor, chosen: Chosen) -> Tensor:
        """The states after a rule of a sweep, which is for some rows; the other rows belong to other cells."""
        rule = self.rule
        rows = torch.tensor(rule.rows, device=states.device)
        part = states[rows]
        if rule.adds:
            new = part + self._step(states)
        else:
            new = _checked(rule, rule.operator(_at_least_float32(part), *self._operands(states)), part)
        if isinstance(chosen, Tensor):
            own = chosen.to(states.device)
            own = own if own.shape[0] == 1 else own[rows]
            new = torch.where(own[..., None], new, part)
        return states.index_copy(0, rows, new)

    def _step(self, states: Tensor) -> Tensor:
        """The addend of `operator="add"`, `[prompt or 1, 1, width]`: computed in float32 or better, and cast once."""
        key = (states.device, states.dtype)
        if key not in self._steps:
            vector = self.rule.vector.to(torch.promote_types(self.rule.vector.dtype, torch.float32))
            coefficient = torch.tensor(self.rule.coefficient, dtype=vector.dtype, device=vector.device)
            self._steps[key] = (coefficient.reshape(-1, 1, 1) * vector).to(states)
        return self._steps[key]

    def _operands(self, states: Tensor) -> tuple[Tensor, Any]:
        """The vector `[1, 1, width]` and the coefficients, on the device of the states, in float32 or better."""
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
    """The rules of a steering block, in effect from `start` to `stop`.

    They apply to the thread that starts them, and to threads with a copy of its context (such as `asyncio.to_thread`).
    """

    def __init__(self, model: engine.Model, rules: Sequence[Rule]) -> None:
        self.model: engine.Model = model
        self.rules: Sequence[Rule] = rules
        decisions_of: dict[int, ConditionState] = {}
        for rule in rules:
            if rule.when is not None:
                decisions_of.setdefault(id(rule.when), ConditionState(rule.when))
        self.active_rules: list[ActiveRule] = [
            ActiveRule(rule, None if rule.when is None else decisions_of[id(rule.when)]) for rule in rules
        ]
        self._members: dict[tuple[str, str, str], list[tuple[Path, Any]]] = {}
        for decisions in decisions_of.values():  # conditions are evaluated before the rules of the same site
            self._add(decisions.condition.path, decisions.read)
        for active in self.active_rules:
            self._add(active.rule.path, active)
        self.passes: int = 0
        self.is_open: bool = False

    def _add(self, path: Path, what: Any) -> None:
        site = site_of(path)
        self._members.setdefault((site.module, site.end, site.tower), []).append((path, what))

    def start(self) -> None:
        """Register the hooks."""
        root = unwrap(self.model)
        self.home: engine.ThreadAndTask = engine.current_task()
        self.watch: engine.CallWatcher = engine.watch_calls(self.model)
        self.watch.before_pass.append(self._on_pass)
        self._interceptions: list[engine.Interception] = []
        try:
            for (module, end, tower), members in self._members.items():
                change = _Hook(self, tower, module, members)
                self._interceptions.append(engine.Interception(root.get_submodule(module), end, change))
        except BaseException:
            self.stop()
            raise
        self.is_open = True
        _inside.set(_inside.get() | {self})

    def stop(self) -> None:
        """Remove the hooks."""
        self.is_open = False
        _inside.set(_inside.get() - {self})
        for one in self._interceptions:
            one.remove()
        self.watch.before_pass.remove(self._on_pass)
        engine.unwatch_calls(self.watch)

    def is_here(self) -> bool:
        """Whether the current run is inside this block."""
        return self in _inside.get() or self.home == engine.current_task()

    def steers(self) -> bool:
        """Whether the current pass is steered by this block.

        Raises:
            BadArgument: it runs in another thread that has no steering block.
        """
        if engine.is_probing():
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

    def _on_pass(self) -> None:
        self.passes += self.is_here() and not engine.is_probing()
        for one in self._interceptions:
            one.attach()

    def __enter__(self) -> Session:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def check_fired(self) -> None:
        """Raise for a rule that steered no token."""
        for active in self.active_rules:
            if bool(active.fired):
                continue
            if not self.passes:
                raise NeverFired(
                    "nothing ran in this steering block, so nothing was steered",
                    expected="model.generate, model.trace or a call of the model inside the block",
                )
            raise NeverFired(
                f"no token of {self.passes} pass{'es' * (self.passes != 1)} was steered by this rule",
                path=active.rule,
                expected=_EXPECTED.get(active.rule.where.kind, "a run that reaches the site"),
            )


#: The open sessions of this thread, or of this task of an event loop.
_inside: ContextVar[frozenset[Session]] = ContextVar("nnsplice_steering", default=frozenset())

_EXPECTED = {
    "generated": "a generation of two tokens or more: the first one is predicted by the prompt's last token",
    "from": "a run that is so long, or from_token with a smaller number",
    "span": "a run with these tokens",
    "mask": "a run with these tokens",
}


class _Hook:
    """The hook of the rules and conditions at the input or output of one module."""

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
                value = _apply_at(site, value, what, call)
        return value


def _apply_at(site: Site, value: Any, what: Any, call: engine.ForwardCall) -> Any:
    """The value of a module after one rule or condition."""
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
    if isinstance(what, ActiveRule):
        new = what(part, call)
        if what.recorded is not None:
            what.recorded.append((part, new, call))
        if new is part:
            return value
    else:
        what(part, call)
        return value
    if not whole:
        new = torch.cat([states[..., :start], new, states[..., stop:]], dim=-1)
    new = wire.as_held(new, held)
    if site.kind == "stream":
        # In place: the skip connection uses the same tensor.
        held.copy_(new)
        return value
    packed = wire.repack(inner, site.item, new)
    return engine.with_first_input(value, packed) if site.end == "input" else packed


def _any_fired(fired: bool | Tensor, chosen: Tensor) -> bool | Tensor:
    # Kept on the device, as reading it at every token would synchronise the GPU.
    return fired if fired is True else chosen.any() if fired is False else fired | chosen.any()


def _at_least_float32(states: Tensor) -> Tensor:
    """States in float32 or better, as angles and norms in half precision are imprecise."""
    return states.to(torch.promote_types(states.dtype, torch.float32))


def _checked(rule: Rule, new: Any, states: Tensor) -> Tensor:
    if not isinstance(new, Tensor) or new.shape != states.shape:
        found = f"shape {list(new.shape)}" if isinstance(new, Tensor) else f"{named(new)}"
        raise ShapeError(
            f"the operator {rule.name} made {found} of states {list(states.shape)}",
            expected="f(h, v, c) -> h: the new states, not what is added to them, in the same shape",
        )
    return new.to(states.dtype)
