"""What of nnsight is private and used here: these fail when nnsight changes it."""

from __future__ import annotations

import inspect
import io
import subprocess
import sys

import pytest
import torch
from nnsight.intervention.interleaver import Mediator

import nnsplice as ns
from nnsplice import engine
from nnsplice.engine import tracing
from nnsplice.errors import OutsideTrace
from zoo import build, tokenizer, wrap


def test_a_worker_knows_its_visits_its_iteration_and_its_rows() -> None:
    model = wrap("gpt2")
    seen = {}
    with torch.no_grad():
        with model.trace() as tracer:
            with tracer.invoke(["w3 w4", "w5 w6"]):
                mediator = Mediator.current("test")
                before = mediator.occurrence("model.transformer.h.0.output")
                model.transformer.h[1].output.save()
                seen["first"] = (before, mediator.occurrence("model.transformer.h.0.output"), mediator.iteration)
                scope = engine.scope_of(mediator)
                assert scope is not None
                seen["scope"] = (scope.start, scope.size, scope.total)
            with tracer.invoke("w7 w8"):
                model.output.save()
    assert seen["first"] == (0, 1, 0)
    assert seen["scope"] == (0, 2, 3)


def test_a_lone_invoke_sees_the_whole_batch() -> None:
    model = wrap("gpt2")
    seen = []
    with torch.no_grad(), model.trace(["w3 w4", "w5 w6"]):
        seen.append(engine.scope_of(engine.worker(model, "test")))
        model.output.save()
    assert seen == [None]


def test_the_batcher_tells_the_rows_and_inputs_of_a_run() -> None:
    from nnsight.intervention.batching import Batcher

    parameters = inspect.signature(Batcher.__init__).parameters
    assert "envoy" in parameters
    batcher = Batcher(wrap("gpt2"))
    batcher.add("w3 w4")
    assert (batcher.total, batcher.batching, len(batcher.invokes)) == (1, False, 1)


def test_modules_named_like_a_value_of_nnsight_are_reached() -> None:
    model = wrap("bert")
    (path,) = ns.expand(model, "model.bert.encoder.layer[0].attention.output.dense.output[1]")
    place = engine.traced_end(model, path.site)
    assert place.names[-2:] == ("E_output", "dense")
    assert place.key == "model.bert.encoder.layer.0.attention.output.dense.output"


def test_an_object_can_be_kept_from_crossing_the_wire() -> None:
    from nnsight.intervention.serialization import CustomCloudPickler

    class Thing:
        pass

    pickler = CustomCloudPickler(io.BytesIO())
    assert pickler.persistent_id(engine.only_local(Thing())) == engine.ONLY_LOCAL
    assert pickler.persistent_id(ns.save_activations) == engine.ONLY_LOCAL
    assert pickler.persistent_id(ns) == engine.ONLY_LOCAL


def test_a_model_of_another_trace_is_not_this_one() -> None:
    model, other = wrap("gpt2"), wrap("llama")
    with pytest.raises(OutsideTrace, match="inside a trace of this model"):
        with model.trace("w3 w4"):
            ns.save_activations(other, "layers[0].output[-1]")


def test_a_modules_body_can_be_exchanged_and_every_call_goes_through_it() -> None:
    """What steering stands on: nnsight's controller calls `body(module, ...)`, inside a trace and outside."""
    from nnsplice.engine.tracing import Body

    model = wrap("gpt2")
    module = model._module.transformer.h[1]
    body, ids = Body(module), torch.tensor([[3, 4]])
    original, plain = body.function, model._module(ids).logits

    def doubled(of: torch.nn.Module, *args: object, **kwargs: object) -> torch.Tensor:
        assert of is module
        return 2 * original(of, *args, **kwargs)

    body.function = doubled
    try:
        with torch.no_grad():
            called = model._module(ids).logits
            with model.trace(ids):
                seen = model.transformer.h[1].output.save()
                traced = model.output.logits.save()
    finally:
        body.function = original
    assert torch.equal(called, traced) and not torch.allclose(called, plain)
    with torch.no_grad(), model.trace(ids):
        once = model.transformer.h[1].output.save()
    assert torch.equal(seen, 2 * once)
    with pytest.raises(ValueError, match="not part of the wrapped model"):
        Body(torch.nn.Linear(2, 2))


def test_a_forward_that_was_replaced_is_told_from_nnsights_own() -> None:
    from nnsplice.engine.tracing import is_passed_by, own_body

    module = build("gpt2")
    module.lm_head.forward = lambda states: 2 * states  # before, so that it is the body
    model = ns.load(module, tokenizer())
    assert own_body(module.lm_head) is not None and own_body(module.transformer.h[0]) is None
    assert not any(map(is_passed_by, model._module.modules()))
    module.transformer.h[0].forward = lambda *_: None
    assert [n for n, m in model._module.named_modules() if is_passed_by(m)] == ["transformer.h.0"]
    assert own_body(module.transformer.h[0]) is module.transformer.h[0].forward


# --- backward, which nnsight replaces for everybody -------------------------------------------------------------------


def test_a_backward_in_the_line_of_a_with_computes_gradients() -> None:
    from contextlib import nullcontext

    weight = torch.ones(2, requires_grad=True)
    loss = (weight * 3).sum()
    # fmt: off
    with nullcontext(): loss.backward(retain_graph=True)  # noqa: E701
    assert weight.grad is not None and weight.grad.tolist() == [3, 3]
    with nullcontext(), nullcontext(): loss.backward(retain_graph=True); loss.backward()  # noqa: E701, E702
    # fmt: on
    assert weight.grad.tolist() == [9, 9]


def test_a_backward_in_the_line_of_our_own_blocks_computes_gradients() -> None:
    model = wrap("gpt2")
    root = model._module
    vector = ns.steering.SteeringVector.of(ns.capture(model, "w3 w4 w5", "layers[1].output[-1]"))
    ids = torch.tensor([[3, 4, 5]])
    # fmt: off
    with ns.steering.steer(model, vector): root(ids, labels=ids).loss.backward()  # noqa: E701
    steered = root.transformer.wte.weight.grad.clone()
    root.zero_grad()
    with ns.steering.steer(model, vector):
        root(ids, labels=ids).loss.backward()
    assert torch.equal(root.transformer.wte.weight.grad, steered) and steered.abs().max() > 0
    root.zero_grad()
    with ns.weights.freeze_except(root, "l1h2") as trained: root(ids, labels=ids).loss.backward()  # noqa: E701
    # fmt: on
    assert any(parameter.grad is not None and parameter.grad.abs().max() > 0 for parameter in trained)


def test_a_backward_that_opens_a_block_is_nnsights_own() -> None:
    model = wrap("gpt2")
    with model.trace("w3 w4 w5"):
        states = model.transformer.h[1].output
        loss = model.output.logits.sum()
        with loss.backward():
            inside = states.grad.save()
    ids = model.tokenizer("w3 w4 w5", return_tensors="pt")["input_ids"]
    held = []
    handle = model._module.transformer.h[1].register_forward_hook(
        lambda _m, _a, out: held.append(out if isinstance(out, torch.Tensor) else out[0]) or held[0].retain_grad()
    )
    loss = model._module(ids).logits.sum()
    loss.backward()
    handle.remove()
    assert torch.allclose(inside, held[0].grad) and inside.abs().max() > 0


def test_anyio_runs_after_nnsplice_is_imported() -> None:
    """nnsight gives every object a `.save`, which classes of anyio that are made later take for their own."""
    pytest.importorskip("anyio")
    program = """
import nnsplice as ns
ns.load
import anyio
import anyio.streams.file, anyio.streams.tls, anyio.abc
async def asked():
    await anyio.sleep(0)
    return 3
assert anyio.run(asked) == 3
assert anyio.abc.SocketAttribute and anyio.streams.file.FileStreamAttribute
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_private_name_that_moved_is_told_with_the_version(monkeypatch: pytest.MonkeyPatch) -> None:
    from nnsplice.engine import nnsight_private

    for name in nnsight_private.PLACES:
        nnsight_private.find(name)
    modules = ("nnsight.intervention.gone", "nnsight.intervention.source")
    monkeypatch.setitem(nnsight_private.PLACES, "Controller", modules)
    assert nnsight_private.find("Controller") is nnsight_private.Controller  # the next entry is tried
    monkeypatch.setitem(nnsight_private.PLACES, "Mediator", ("nnsight.intervention.gone",))
    with pytest.raises(ns.errors.MissingPackage, match=r"nnsight \d.* has no Mediator in nnsight.intervention.gone"):
        nnsight_private.find("Mediator")
    monkeypatch.setitem(nnsight_private.USED, "Controller", ("no_such_thing",))
    with pytest.raises(ImportError, match=r"Controller.no_such_thing"):
        nnsight_private.find("Controller")


def test_an_adapter_without_peft_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing, "find_spec", lambda name: None)
    with pytest.raises(ns.errors.MissingPackage, match=r'pip install "nnsplice\[peft\]"'):
        ns.load("toy", peft="anywhere")
