"""The only file that uses nnsight: wrap, run, wait for a value, write a value.

What of nnsight is private is found by `private` and used here alone; `tests/engine/test_tracing.py` fails when nnsight
changes it: a
worker's `Mediator` (which visit of a site it waits for, which rows are its own), the names of submodules that nnsight
moves, the body that a module's controller calls and whose `forward` stands before it, and how it tells
`with loss.backward():` from a plain call.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from dis import opmap, opname
from functools import lru_cache, wraps
from types import FrameType
from typing import Any, TypeVar, cast

import nnsight
import torch
from torch import Tensor, nn

from nnsplice.atlas import Site, unwrap
from nnsplice.engine import private
from nnsplice.engine.devices import staying
from nnsplice.engine.private import STATE, Controller
from nnsplice.engine.private import Mediator as Mediator
from nnsplice.engine.turns import turn
from nnsplice.errors import BadArgument, OutsideTrace
from nnsplice.wire import Stop, logits_of, read_all, write_all

Model = nnsight.Envoy
T = TypeVar("T")


def wrap(name_or_module: str | nn.Module, tokenizer: Any, **kwargs: Any) -> Model:
    """nnsight's own wrapper of a Hugging Face model; one that is named is loaded at once."""
    from nnsight.modeling.transformers import TransformersModel

    if isinstance(name_or_module, str):
        kwargs.setdefault("dispatch", True)
    with staying(name_or_module, kwargs) as device:
        try:
            model = TransformersModel(name_or_module, tokenizer=tokenizer, **kwargs, **device)
        except ImportError as error:
            if "tensor_parallel" not in str(error):
                raise
            raise BadArgument(
                f"nnsight {nnsight.__version__} cannot wrap a model of transformers' tp_plan: {error}",
                expected="a model that torch spreads over the processes",
                write="torch.distributed.tensor.parallel.parallelize_module(block, mesh, plan), or fully_shard(block)",
            ) from error
    if kwargs.get("peft") is not None:
        # The layers of an adapter come in train mode, into a model that is not.
        model._module.eval()
    return model


def wrap_bare(module: nn.Module, **kwargs: Any) -> Model:
    """nnsight's wrapper of a module without a tokenizer."""
    return nnsight.NNsight(module, **kwargs)


def keep(value: T) -> T:
    """Let a value outlive the trace that it is made in; outside a trace it lives anyway."""
    try:
        return nnsight.save(value)
    except ValueError:
        return value


def worker(model: Model, what: str) -> Mediator:
    """The worker that runs the trace's block now.

    Raises:
        OutsideTrace: there is none.
    """
    try:
        mediator = Mediator.current(what)
    except ValueError:
        mediator = None
    if mediator is None or mediator.interleaver is not model.interleaver:
        raise OutsideTrace(
            f"{what} works inside a trace of this model",
            write="with model.trace(prompt): ...   (with several invokes: inside `with tracer.invoke(prompt):`)",
        )
    return mediator


def is_inside(model: Model) -> bool:
    """Whether this is the block of a trace of the model."""
    try:
        worker(model, "this")
    except OutsideTrace:
        return False
    return True


@dataclass(frozen=True, slots=True)
class Place:
    """One end of one module of a model under trace: what a single access serves."""

    envoy: Any
    #: The attributes that lead to it from the model.
    names: tuple[str, ...]
    end: str
    #: nnsight's name of it.
    key: str
    occurrence: int

    def is_past(self, mediator: Mediator) -> bool:
        """Whether the run has gone by; nnsight itself would say so after the whole pass."""
        return mediator.occurrence(self.key) > (self.occurrence or mediator.wanted(self.key))

    def read(self, mediator: Mediator) -> Any:
        """The value, as the model holds it: not a copy."""
        with _visit(mediator, self.occurrence):
            return self.envoy.inputs if self.end == "input" else self.envoy.output

    def write(self, mediator: Mediator, value: Any) -> None:
        """Let the model go on with another value."""
        with _visit(mediator, self.occurrence):
            setattr(self.envoy, "inputs" if self.end == "input" else "output", value)


class _visit:
    """Wait for a later call of a module that runs several times in one pass; for most modules it does nothing."""

    __slots__ = ("before", "mediator", "occurrence")

    def __init__(self, mediator: Mediator, occurrence: int) -> None:
        self.mediator, self.occurrence = mediator, occurrence

    def __enter__(self) -> None:
        self.before = self.mediator.iteration
        if self.occurrence:
            self.mediator.iteration = self.occurrence

    def __exit__(self, *error: object) -> None:
        if self.occurrence:
            self.mediator.iteration = self.before


def place(model: Model, site: Site) -> Place:
    """Where the site's value is served in this model."""
    envoy = model
    # Sites go by the bare model, which may lie inside a wrapper such as PEFT's.
    root, module = unwrap(model), model._module
    home = next(name for name, inner in module.named_modules() if inner is root)
    names = tuple(_attribute(name) for name in f"{home}.{site.module}".split(".") if name)
    for name in names:
        envoy = getattr(envoy, name)
    return Place(envoy, names, site.end, f"{envoy.path}.{site.end}", site.occurrence)


def callable_of(model: object, module: str) -> Any:
    """What to call for a module by itself, so that a trace that is running now stands aside and counts none of it."""
    return place(model, Site(module)).envoy if isinstance(model, Model) else unwrap(model).get_submodule(module)


@lru_cache(maxsize=4096)
def _attribute(name: str) -> str:
    # A submodule named like a value that nnsight serves (BERT's `output`) stands under another attribute.
    return f"{Model.OVERLOAD_PREFIX}{name}" if inspect.isdatadescriptor(getattr(Model, name, None)) else name


#: What a call was given: its `(args, kwargs)`.
Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def call_of(model: Any) -> Arguments:
    """The arguments of the model's own call; nnsight serves them as a run's first value, before anything else."""
    return model.inputs


def first_input(value: Arguments) -> Any:
    """The first argument of a call, as nnsight's `.input` names it."""
    args, kwargs = value
    return args[0] if args else next(iter(kwargs.values()))


def with_first_input(value: Arguments, new: Any) -> Arguments:
    """The call with another first argument."""
    args, kwargs = value
    return ((new, *args[1:]), kwargs) if args else (args, {**kwargs, next(iter(kwargs)): new})


class Body:
    """What a module computes, as nnsight's controller calls it: a function of the module and the call's arguments."""

    def __init__(self, module: nn.Module) -> None:
        state = module.__dict__.get(STATE)
        if state is None:
            raise BadArgument(
                f"this {type(module).__name__} is not part of the wrapped model", expected="a module nnsight has seen"
            )
        self.state = state

    @property
    def function(self) -> Callable[..., Any]:
        """The body."""
        return self.state.body

    @function.setter
    def function(self, body: Callable[..., Any]) -> None:
        self.state.body = body


def is_passed_by(module: nn.Module) -> bool:
    """Whether a module's `forward` was replaced after nnsight had wrapped it, so that nnsight stands behind that."""
    forward = module.__dict__.get("forward")
    return STATE in module.__dict__ and not isinstance(forward, Controller) and not private.framework_forward(module)


def own_body(module: nn.Module) -> Any:
    """What a module runs in the place of its class's `forward`; None where that is what runs."""
    forward, state = module.__dict__.get("forward"), module.__dict__.get(STATE)
    if forward is not None and not isinstance(forward, Controller) and not private.framework_forward(module):
        return forward
    return None if state is None or state.body is type(module).forward else state.body


@dataclass(frozen=True, slots=True)
class Scope:
    """Which rows of the whole batch an invoke's block sees."""

    start: int
    size: int
    total: int


def scope_of(mediator: Mediator) -> Scope | None:
    """The rows of this block where several invokes share one forward pass, else None: then it sees all of them."""
    batcher = None if mediator.interleaver is None else mediator.interleaver.batcher
    if batcher is None or not batcher.batching or mediator.batch_group is None:
        return None
    start, size = mediator.batch_group
    return Scope(start, size, batcher.total)


def run(model: Model, inputs: Mapping[str, Any] | Tensor, body: Callable[[], None], *, last: bool = False) -> None:
    """One forward pass with `body` as the trace's block.

    Args:
        last: the body is done with its last request when it returns, so the rest of the pass need not run.
    """
    args, kwargs = ((), dict(inputs)) if isinstance(inputs, Mapping) else ((inputs,), {})
    tracer: Any
    with turn(model):  # noqa: SIM117  # nnsight reads a trace's block from its own `with`
        with model.trace(*args, **kwargs) as tracer:
            body()
            if last:
                tracer.stop()


# --- backward ---


@wraps(torch.Tensor.backward)
def _backward(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
    """`Tensor.backward` as nnsight has it, except that `with block: loss.backward()` on one line computes gradients.

    nnsight asks whether a `with` stands in the line of the call, takes the call for the opening of a block, and returns
    without a gradient. What is asked here is what the caller does with the result.
    """
    plain = private.original_backward
    if not _enters(sys._getframe(1)):
        return plain(tensor, *args, **kwargs)
    tracer = private.BackwardTracer(tensor, plain, *args, **kwargs)
    try:
        tracer.capture()
    except private.WithBlockNotFoundError:
        return plain(tensor, *args, **kwargs)
    return tracer


cast("Any", torch.Tensor).backward = _backward


def _enters(frame: FrameType) -> bool:
    """Whether the call that this frame waits for is what a `with` enters: the next thing that its code does."""
    code, at = frame.f_code.co_code, frame.f_lasti + 2
    while code[at] == opmap["CACHE"]:
        at += 2
    # Python 3.14 copies the result and looks `__exit__` up; before, one instruction does it all.
    return opname[code[at]] in ("BEFORE_WITH", "BEFORE_ASYNC_WITH") or (
        opname[code[at]] == "COPY" and opname[code[at + 2]] == "LOAD_SPECIAL"
    )


# --- remote runs ---

#: What nnsight's pickler finds on an object of ours in the block of a remote trace. It takes the text for the name of
#: an object that the server holds, and the server, which holds none of that name, answers with the text.
ONLY_LOCAL = (
    "nnsplice does not run inside a remote trace: the server does not have it. "
    "Write ns.capture(model, prompts, paths, remote=True) to read, "
    "ns.patched_logits(model, prompts, saved, remote=True) to write."
)


def only_local(thing: T) -> T:
    """Mark a function or object that must not be sent to a server."""
    cast("Any", thing)._persistent_id = ONLY_LOCAL
    return thing


only_local(sys.modules["nnsplice"])  # the package, which a trace names as `ns.capture`


def read_remote(model: Model, inputs: Any, recipe: Sequence[Stop], remote: bool | str) -> dict[str, Tensor]:
    """A remote run that reads the recipe's parts; only plain data is named by the traced block."""
    nnsight.register("nnsplice.wire")
    found: dict[str, Tensor] = {}
    tracer: Any
    with model.trace(**inputs, remote=remote) as tracer:
        found = nnsight.save(read_all(model, recipe))
        tracer.stop()
    return found


def write_remote(
    model: Model, inputs: Any, recipe: Sequence[Stop], tensors: Mapping[str, Tensor], add: bool, remote: bool | str
) -> Tensor:
    """A remote run with tensors put into the recipe's parts: its logits."""
    nnsight.register("nnsplice.wire")
    logits = torch.empty(0)
    with model.trace(**inputs, remote=remote):
        write_all(model, recipe, tensors, add)
        logits = nnsight.save(logits_of(model).detach().cpu())
    return logits  # noqa: RET504  # assigned inside the block, which runs elsewhere
