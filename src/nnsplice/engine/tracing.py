"""The only file that uses nnsight: wrap, run, wait for a value, write a value.

Its private names come from `nnsight_private` and are used here only; `tests/engine/test_tracing.py` fails when nnsight
changes them: a worker's `Mediator` (the call of a module that it waits for, its rows), the names of submodules that
nnsight moves, the body that a module's controller calls, and how `with loss.backward():` differs from a plain call.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from dis import opmap, opname
from functools import lru_cache, wraps
from importlib.util import find_spec
from types import FrameType
from typing import Any, TypeVar, cast

import nnsight
import torch
from torch import Tensor, nn

from nnsplice.atlas import Site, unwrap
from nnsplice.engine import nnsight_private
from nnsplice.engine.devices import staying
from nnsplice.engine.model_lock import locked
from nnsplice.engine.nnsight_private import STATE, Controller
from nnsplice.engine.nnsight_private import Mediator as Mediator
from nnsplice.errors import BadArgument, MissingPackage, OutsideTrace
from nnsplice.wire import Stop, logits_of, read_all, write_all

Model = nnsight.Envoy
T = TypeVar("T")


def wrap(name_or_module: str | nn.Module, tokenizer: Any, **kwargs: Any) -> Model:
    """nnsight's wrapper of a Hugging Face model; a model given by name is loaded at once."""
    from nnsight.modeling.transformers import TransformersModel

    if isinstance(name_or_module, str):
        kwargs.setdefault("dispatch", True)
    if kwargs.get("peft") is not None and find_spec("peft") is None:
        raise MissingPackage(
            "an adapter is loaded by peft, which is not installed", write='pip install "nnsplice[peft]"'
        )
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
        # The layers of a new adapter are in train mode.
        model._module.eval()
    return model


def wrap_bare(module: nn.Module, **kwargs: Any) -> Model:
    """nnsight's wrapper of a module without a tokenizer."""
    return nnsight.NNsight(module, **kwargs)


def keep(value: T) -> T:
    """Let a value outlive its trace; no effect outside a trace."""
    try:
        return nnsight.save(value)
    except ValueError:
        return value


def worker(model: Model, what: str) -> Mediator:
    """The worker that runs the current block of a trace.

    Raises:
        OutsideTrace: no trace of this model runs.
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
    """Whether a block of a trace of this model runs."""
    try:
        worker(model, "this")
    except OutsideTrace:
        return False
    return True


@dataclass(frozen=True, slots=True)
class TracedEnd:
    """The input or output of one module in a trace."""

    envoy: Any
    #: The attributes from the model to the module.
    names: tuple[str, ...]
    end: str
    #: Its name in nnsight.
    key: str
    occurrence: int

    def is_past(self, mediator: Mediator) -> bool:
        """Whether the run has passed it; nnsight raises only after the whole pass."""
        return mediator.occurrence(self.key) > (self.occurrence or mediator.wanted(self.key))

    def read(self, mediator: Mediator) -> Any:
        """The model's own value, not a copy."""
        with _visit(mediator, self.occurrence):
            return self.envoy.inputs if self.end == "input" else self.envoy.output

    def write(self, mediator: Mediator, value: Any) -> None:
        """Replace the value."""
        with _visit(mediator, self.occurrence):
            setattr(self.envoy, "inputs" if self.end == "input" else "output", value)


class _visit:
    """Wait for a later call of a module that runs several times in one pass."""

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


def traced_end(model: Model, site: Site) -> TracedEnd:
    """The end of a module that holds a site's value."""
    envoy = model
    # Sites have names of the bare model, which may be inside a wrapper such as PEFT's.
    root, module = unwrap(model), model._module
    home = next(name for name, inner in module.named_modules() if inner is root)
    names = tuple(_attribute(name) for name in f"{home}.{site.module}".split(".") if name)
    for name in names:
        envoy = getattr(envoy, name)
    return TracedEnd(envoy, names, site.end, f"{envoy.path}.{site.end}", site.occurrence)


def callable_of(model: object, module: str) -> Any:
    """The callable of a single module; a running trace does not count its calls."""
    return traced_end(model, Site(module)).envoy if isinstance(model, Model) else unwrap(model).get_submodule(module)


@lru_cache(maxsize=4096)
def _attribute(name: str) -> str:
    # nnsight renames submodules with the name of one of its own attributes (BERT's `output`).
    return f"{Model.OVERLOAD_PREFIX}{name}" if inspect.isdatadescriptor(getattr(Model, name, None)) else name


#: The `(args, kwargs)` of a call.
Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def call_of(model: Any) -> Arguments:
    """The arguments of the model's own call, the first value of a run in nnsight."""
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
    """The function that nnsight's controller calls for a module, with the module and the call's arguments."""

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
    """Whether a module's `forward` was replaced after nnsight had wrapped it, so that it calls nnsight's, or not."""
    forward = module.__dict__.get("forward")
    return (
        STATE in module.__dict__
        and not isinstance(forward, Controller)
        and not nnsight_private.framework_forward(module)
    )


def own_body(module: nn.Module) -> Any:
    """The function that a module runs instead of its class's `forward`; None if it runs that."""
    forward, state = module.__dict__.get("forward"), module.__dict__.get(STATE)
    if forward is not None and not isinstance(forward, Controller) and not nnsight_private.framework_forward(module):
        return forward
    return None if state is None or state.body is type(module).forward else state.body


@dataclass(frozen=True, slots=True)
class Scope:
    """The rows of the whole batch that belong to an invoke's block."""

    start: int
    size: int
    total: int


def scope_of(mediator: Mediator) -> Scope | None:
    """The rows of this block if several invokes share the forward pass; else None."""
    batcher = None if mediator.interleaver is None else mediator.interleaver.batcher
    if batcher is None or not batcher.batching or mediator.batch_group is None:
        return None
    start, size = mediator.batch_group
    return Scope(start, size, batcher.total)


def run(model: Model, inputs: Mapping[str, Any] | Tensor, body: Callable[[], None], *, last: bool = False) -> None:
    """One forward pass with `body` as the trace's block.

    Args:
        last: stop the pass when the body returns.
    """
    args, kwargs = ((), dict(inputs)) if isinstance(inputs, Mapping) else ((inputs,), {})
    tracer: Any
    with locked(model):  # noqa: SIM117  # nnsight reads a trace's block from its own `with`
        with model.trace(*args, **kwargs) as tracer:
            body()
            if last:
                tracer.stop()


# --- backward ---


@wraps(torch.Tensor.backward)
def _backward(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
    """nnsight's `Tensor.backward`, except that `with block: loss.backward()` on one line computes gradients.

    nnsight takes every call on a line with `with` for the opening of a block, and computes no gradient. Here the
    caller's next instruction decides.
    """
    plain = nnsight_private.original_backward
    if not _enters(sys._getframe(1)):
        return plain(tensor, *args, **kwargs)
    tracer = nnsight_private.BackwardTracer(tensor, plain, *args, **kwargs)
    try:
        tracer.capture()
    except nnsight_private.WithBlockNotFoundError:
        return plain(tensor, *args, **kwargs)
    return tracer


cast("Any", torch.Tensor).backward = _backward


def _enters(frame: FrameType) -> bool:
    """Whether the frame enters the result of its current call as a context: its next instruction."""
    code, at = frame.f_code.co_code, frame.f_lasti + 2
    while code[at] == opmap["CACHE"]:
        at += 2
    # Python 3.14 copies the result and looks `__exit__` up; before, one instruction does it all.
    return opname[code[at]] in ("BEFORE_WITH", "BEFORE_ASYNC_WITH") or (
        opname[code[at]] == "COPY" and opname[code[at + 2]] == "LOAD_SPECIAL"
    )


# --- remote runs ---

#: The persistent id of our objects for nnsight's pickler. The server knows no object of this id, and returns the text
#: as its error.
ONLY_LOCAL = (
    "nnsplice does not run inside a remote trace: the server does not have it. "
    "Write ns.capture(model, prompts, paths, remote=True) to read, "
    "ns.patched_logits(model, prompts, saved, remote=True) to write."
)


def only_local(thing: T) -> T:
    """Mark a function or object that cannot be sent to a server."""
    cast("Any", thing)._persistent_id = ONLY_LOCAL
    return thing


only_local(sys.modules["nnsplice"])  # the package, which a trace names as `ns.capture`


def read_remote(model: Model, inputs: Any, recipe: Sequence[Stop], remote: bool | str) -> dict[str, Tensor]:
    """A remote run that reads the parts of a recipe; the traced block names plain data only."""
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
    """The logits of a remote run with tensors written into the parts of a recipe."""
    nnsight.register("nnsplice.wire")
    logits = torch.empty(0)
    with model.trace(**inputs, remote=remote):
        write_all(model, recipe, tensors, add)
        logits = nnsight.save(logits_of(model).detach().cpu())
    return logits  # noqa: RET504  # assigned inside the block, which runs elsewhere
