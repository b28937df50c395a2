"""Runs that cannot do what is asked of them, or did not."""

from __future__ import annotations

from nnsplice.errors.base import NnspliceError


class LateUpdate(NnspliceError, RuntimeError):
    """The running trace is already past the site.

    >>> saved = ns.capture(model, "w3 w4", "layers[0].output[-1]")
    >>> with model.trace("w5 w6"):
    ...     _ = model.transformer.h[2].output.save()
    ...     saved.apply(model)
    Traceback (most recent call last):
    nnsplice.errors.LateUpdate: ...
    """


class NeverFired(NnspliceError, RuntimeError):
    """The forward pass does not reach the site, or a steering rule met no token.

    >>> vector = ns.steering.SteeringVector.of(ns.capture(model, "w3 w4", "layers[1].output[-1]"))
    >>> with ns.steering.steer(model, vector, where=ns.steering.from_token(9)):
    ...     _ = ns.models.unwrap(model)(torch.tensor([[3, 4]]))
    Traceback (most recent call last):
    nnsplice.errors.NeverFired: no token of 1 pass was steered by this rule
        layers[1].output  add 1, where from_token(9)
      expected: a run that is so long, or from_token with a smaller number
      in: ns.steering.steer
    """


class OutsideTrace(NnspliceError, RuntimeError):
    """The call works only inside a running trace, or only outside one.

    >>> ns.save_activations(model, "layers[1].output[-1]")
    Traceback (most recent call last):
    nnsplice.errors.OutsideTrace: ns.save_activations works inside a trace of this model
      write: with model.trace(prompt): ...   (with several invokes: inside `with tracer.invoke(prompt):`)
    """


class NeedsProbe(NnspliceError, RuntimeError):
    """The model has to be run once to learn the order of its modules, and needs an input for that.

    >>> import nnsight
    >>> ns.expand(nnsight.NNsight(torch.nn.Sequential(torch.nn.Linear(2, 2))), "model[0].output")
    Traceback (most recent call last):
    nnsplice.errors.NeedsProbe: the order of Sequential is learned from one short run, and its inputs are not known
      expected: an input to run it with, once: of a call that has prompts, or as probe=
      write: ns.expand(model, paths, probe=example_input)
    """


class RefusedExecutor(NnspliceError, NotImplementedError):
    """The executor given by name does not reproduce the exact numbers of this sweep.

    >>> toy, metric = ns.load("toy"), ns.logit_diff("Mary", "John")
    >>> hook = ns.models.unwrap(toy).transformer.ln_f.register_forward_hook(lambda _m, _a, out: out + out.flip(1))
    >>> ns.sweep(toy, "Mary gave", "John gave", "layers[:].output[:]", metric, executor="packed", progress=False)
    Traceback (most recent call last):
    nnsplice.errors.RefusedExecutor: packed rows do not give this job's numbers: it is no causal decoder
      expected: executor="auto", which takes the fastest that does, and says in result.run.note why
    >>> hook.remove()
    """


class TeamError(NnspliceError, RuntimeError):
    """Another process of a distributed call failed."""
