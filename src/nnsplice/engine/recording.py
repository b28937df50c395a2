"""The order in which a model runs its modules, recorded in one short forward pass."""

from __future__ import annotations

import copy
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from nnsplice.atlas import Order, fingerprint, text_config, unwrap
from nnsplice.engine.model_lock import locked
from nnsplice.engine.signatures import fitted_inputs, signature_of
from nnsplice.engine.threads import probing
from nnsplice.engine.tracing import Model
from nnsplice.errors import NeedsProbe, NnspliceError

_orders: weakref.WeakKeyDictionary[nn.Module, tuple[int, Order]] = weakref.WeakKeyDictionary()
#: Inputs given for models whose inputs are unknown.
_probes: weakref.WeakKeyDictionary[nn.Module, Any] = weakref.WeakKeyDictionary()


def order_of(model: object, probe: Any = None) -> Order:
    """The order in which the model reaches its modules, recorded once and kept until the structure changes.

    Args:
        probe: an input for models whose inputs are not known: a tensor, a tuple of arguments or a dict of keywords.
    """
    root = unwrap(model)
    now = fingerprint(root)
    known = _orders.get(root)
    if known is not None and known[0] == now:
        return known[1]
    if probe is not None:
        _probes[root] = probe
    order = Order.of(_recorded(model, root, probe))
    _orders[root] = (now, order)
    return order


def offer_probe(model: object, inputs: Callable[[], Any], *, always: bool = False) -> None:
    """Offer a run's inputs as the probe of a model whose inputs are unknown.

    Args:
        inputs: makes them; only called if they are needed.
        always: these are no tokens, so the model cannot run with made-up tokens.
    """
    root = unwrap(model)
    if root not in _probes and (always or not _knows_vocabulary(root)):
        _probes[root] = inputs()


def _knows_vocabulary(root: nn.Module) -> bool:
    return isinstance(getattr(text_config(root), "vocab_size", None), int)


def _recorded(model: object, root: nn.Module, probe: Any) -> list[tuple[str, str]]:
    runnable, args, kwargs = example_of(model, 2)
    try:
        return record(runnable, args, kwargs)
    except Exception as error:
        offered = probe is None and _probes.pop(root, None) is not None
        if probe is not None or isinstance(error, NnspliceError):
            raise
        raise NeedsProbe(
            f"the order of {type(root).__name__} is learned from one short run, and a run from "
            f"{'the first of these prompts' if offered else 'tokens alone'} failed: "
            f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}",
            expected="an input to run it with, once",
            write="ns.expand(model, paths, probe=example_input)",
        ) from error


def example_of(model: object, length: int) -> tuple[object, tuple[Any, ...], dict[str, Any]]:
    """The model to probe, and the arguments of its call: itself, or a small twin if its weights are not loaded.

    Args:
        length: the length of the prompt; a given probe is used as it is.
    """
    root = unwrap(model)
    # A model whose weights accelerate offloads runs as it is.
    elsewhere = any(parameter.is_meta for parameter in root.parameters())
    if elsewhere and not any(hasattr(module, "_hf_hook") for module in root.modules()):
        twin = _twin(root)
        return twin, *_probe(twin, _probes.get(root), length)
    return model, *_probe(root, _probes.get(root), length)


def _eagerly() -> AbstractContextManager[Any]:
    """Run compiled modules uncompiled, as each change of hooks would compile them again."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled, and the import takes seconds
        return nullcontext()
    return torch.compiler.set_stance("force_eager")


@contextmanager
def undisturbed(model: object) -> Iterator[Any]:
    """The callable for a forward pass without side effects: in evaluation mode, without gradients; flags and random
    states are restored at the end of the block."""
    root = unwrap(model)
    training = [module for module in root.modules() if module.training]
    devices = [parameter.device for parameter in root.parameters() if parameter.is_cuda][:1]
    try:
        for module in training:
            module.training = False
        with locked(root), probing(), torch.no_grad(), torch.random.fork_rng(devices=devices), _eagerly():
            # Called through the envoy, so that a running trace does not count this pass.
            yield model if isinstance(model, Model) else root
    finally:
        for module in training:
            module.training = True


def record(model: object, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The module ends that one forward pass reaches, in order; the model is not changed."""
    root = unwrap(model)
    names = {id(module): name for name, module in root.named_modules()}
    sequence: list[tuple[str, str]] = []
    here = threading.get_ident()  # the hooks are global, and other threads may run this model meanwhile

    def before(module: nn.Module, args: Any) -> None:
        if id(module) in names and threading.get_ident() == here:
            sequence.append((names[id(module)], "input"))

    def after(module: nn.Module, args: Any, output: Any) -> None:
        if id(module) in names and threading.get_ident() == here:
            sequence.append((names[id(module)], "output"))

    registry = nn.modules.module
    hooks = [registry.register_module_forward_pre_hook(before), registry.register_module_forward_hook(after)]
    try:
        with undisturbed(model) as call, warnings.catch_warnings():
            # A compiled wrapper is not in `names`, so it does no harm that the hooks run for it.
            warnings.filterwarnings("ignore", message="Using `torch.compile")
            call(*args, **kwargs)
    finally:
        for hook in hooks:
            hook.remove()
    return sequence


def _probe(root: nn.Module, probe: Any, length: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if probe is not None:
        if isinstance(probe, Mapping):
            return (), dict(probe)
        return (probe if isinstance(probe, tuple) else (probe,)), {}
    if not _knows_vocabulary(root):
        raise NeedsProbe(
            f"the order of {type(root).__name__} is learned from one short run, and its inputs are not known",
            expected="an input to run it with, once: of a call that has prompts, or as probe=",
            write="ns.expand(model, paths, probe=example_input)",
        )
    vocabulary = text_config(root).vocab_size
    device = next((p.device for p in root.parameters() if not p.is_meta), torch.device("cpu"))
    # Different tokens: equal ones would hide a misplaced value, and a softmax over them has no gradient.
    ids = torch.tensor([[(3 + n) % vocabulary for n in range(length)]], device=device)
    inputs = {"input_ids": ids}
    if getattr(getattr(root, "config", None), "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = ids
    takes = signature_of(type(root))
    needed = [name for name in takes.required if name not in inputs]
    if takes.names and "input_ids" not in takes.names:
        if takes.first is None or takes.first in inputs or len(needed) > 1 or hasattr(root, "main_input_name"):
            raise _needs(root, [getattr(root, "main_input_name", None) or str(takes.first), *list(inputs)[1:]])
        return (), fitted_inputs(takes, inputs)  # a user's module with another name for its tokens
    if needed:
        raise _needs(root, ["input_ids", *needed])
    return (), {name: value for name, value in inputs.items() if takes.takes(name)}


def _needs(root: nn.Module, names: list[str]) -> NeedsProbe:
    given = ", ".join(f'"{name}": ...' for name in dict.fromkeys(names))
    return NeedsProbe(
        f"the order of {type(root).__name__} is learned from one short run, and it does not run from tokens alone",
        expected=f"an input to run it with, once: {', '.join(dict.fromkeys(names))}",
        write=f"ns.expand(model, paths, probe={{{given}}})",
    )


#: The widths in a config, made small in a twin, which keeps all modules and their order.
_WIDTHS = {
    "vocab_size": 16, "intermediate_size": 16, "ffn_dim": 16, "n_inner": 16, "d_ff": 16, "moe_intermediate_size": 16,
    "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "shared_expert_intermediate_size": 16, "head_dim": 8, "d_kv": 8,
    "rotary_dim": 4,
}  # fmt: skip


#: The numbers of heads in a config, and the stream widths that follow from it.
_HEADS = ("num_attention_heads", "encoder_attention_heads", "num_heads")
_STREAMS = ("hidden_size", "n_embd", "d_model", "word_embed_proj_dim", "embed_dim")


def _twin(root: nn.Module) -> nn.Module:
    """A small model of the same class and depth with weights, for a model whose weights are not loaded."""
    try:
        config: Any = copy.deepcopy(root.config)
        _shrink(config)
        return type(root)(config).eval()
    except Exception as error:
        raise NeedsProbe(
            f"the weights of {type(root).__name__} are not here, and no small twin of it could be built: {error}",
            expected="a model whose weights are loaded",
            write="model.dispatch()",
        ) from None


def _shrink(config: Any, *, root: bool = True) -> None:
    """Make a config's widths small, and those of the configs inside it."""
    held = config.to_dict()
    inner = [value for value in vars(config).values() if hasattr(value, "to_dict") and hasattr(value, "model_type")]
    for part in inner:
        _shrink(part, root=False)
    heads = next((n for key in _HEADS if isinstance(n := getattr(config, key, None), int)), None)
    if heads is None and root and not inner:
        raise ValueError("its config does not say how many heads it has")
    widths = dict(_WIDTHS) if heads is None else _WIDTHS | dict.fromkeys(_STREAMS, 8 * heads)
    # A config has aliases of its settings; only its own names are set.
    for name, width in widths.items():
        if isinstance(held.get(name), int):
            setattr(config, name, width)
    for name in ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"):
        if isinstance(held.get(name), int):
            setattr(config, name, 1)
