"""Check that branches add up, patches change later tokens only, and padding has no effect."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from nnsplice import engine
from nnsplice.activations import SavedActivation, capture, patched_logits, save_activations
from nnsplice.checks.finding import DECODER_TOKENS, TOKENS, Finding, Subject, attempt, gap
from nnsplice.checks.outline import place_of
from nnsplice.closures import CROSS, PROMISES, Closure, PromiseKind, measure
from nnsplice.errors import RefusedPlace
from nnsplice.paths import Path, Slice

# -- promises of sites ------------------------------------------------------------------------------------------------


def heads(subject: Subject) -> Iterator[Finding]:
    """`heads[:].output` through the output projection is the attention's output, and each slice is one head's."""
    for tower, layers in subject.towers():
        for layer in layers:
            if tower.blocks[layer].o is None:
                what = str(place_of(tower.name, ("heads",), "output", layer, Slice()))
                yield Finding("heads", what, "skipped", detail="a layer without attention")
    yield from _promises(subject, "heads", ("heads",))


def promises(subject: Subject) -> Iterator[Finding]:
    """The promises of all other sites hold; captures and patches are refused by the same measurements."""
    yield from _promises(subject, "promises", tuple(kind for kind in PROMISES if kind != "heads"))


def _promises(subject: Subject, check: str, kinds: tuple[PromiseKind, ...]) -> Iterator[Finding]:
    worst: dict[tuple[str, str, int], Closure] = {}
    for closure in measure(subject.model, kinds):
        place = (closure.kind, closure.tower, closure.layer)
        if place not in worst or closure.holds < worst[place].holds:
            worst[place] = closure
    for closure in worst.values():
        # Cross-attention is part of the decoder's layers.
        crosses = closure.tower == CROSS
        if closure.layer in subject.layers["decoder" if crosses else closure.tower]:
            of = "encoder." if closure.tower == "encoder" else ""
            name = PROMISES[closure.kind][0]
            inside = ".cross" if crosses and not name.startswith(".cross") else ""
            what = f"{of}layers[{closure.layer}]{inside}"
            what += name if name[0] == "." else f": {name}"
            fine = closure.holds
            yield Finding(check, what, "ok" if fine else "FAILED", closure.gap, "" if fine else closure.found)


def layouts(subject: Subject) -> Iterator[Finding]:
    """Gradients find the columns of each head's q, k and v, and its parameters."""
    for layer in sorted({layer for _, layers in subject.towers() for layer in layers}):
        for check in subject.atlas.verify(layers=[layer]):
            what = f"{check.role} of {place_of(check.tower, (), 'output', check.layer).steps[0]}"
            what = f"{what} ({check.tower})" if len(subject.atlas.towers) > 1 else what
            yield Finding("layouts", what, "ok" if check.ok else "FAILED", detail=check.detail)


# -- a patch at one token ----------------------------------------------------------------------------------------------


def causal(subject: Subject) -> Iterator[Finding]:
    """A patch at one token changes nothing at the tokens before it, and something at it and after it."""
    if not subject.causal:
        yield Finding("causal", "a patch at one token", "skipped", detail="every token of this model reads all others")
        return
    tower = subject.atlas.tower()
    yield attempt("causal", "embed.output", lambda: _patched(subject, place_of(tower.name, ("embed",), "output", None)))
    for layer in subject.layers[tower.name]:
        path = place_of(tower.name, (), "output", layer)
        last = layer == tower.n_layers - 1
        yield attempt("causal", str(path), lambda path=path, last=last: _patched(subject, path, last))


def _patched(subject: Subject, path: Path, last: bool = False) -> Finding:
    """Write another prompt's value at one token.

    Args:
        last: whether no layer follows, so that later tokens must not change either.
    """
    at = (DECODER_TOKENS if engine.is_encoder_decoder(subject.model) else TOKENS) // 2
    saved = capture(subject.model, subject.inputs, path.at(at))
    logits, clean = patched_logits(subject.model, subject.inputs, saved.slice[1, 0], progress=False), subject.logits
    before, here, after = (gap(logits[:, span], clean[:, span]) for span in (slice(at), [at], slice(at + 1, None)))
    wrong = [
        (not before <= subject.tolerance, f"tokens before token {at} change"),
        (here == 0, f"token {at} itself does not change"),
        (after == 0 and not last, f"no token after token {at} changes"),
        (not after <= subject.tolerance and last, f"tokens after token {at} change, and no layer follows"),
    ]
    texts = [text for fault, text in wrong if fault]
    return Finding("causal", str(path), "FAILED" if texts else "ok", before, "; ".join(texts))


# -- padding -----------------------------------------------------------------------------------------------------------


def padding(subject: Subject) -> Iterator[Finding]:
    """A short prompt has the same values in a padded batch as by itself."""
    yield attempt("padding", "on the right", lambda: _padded_right(subject))
    yield attempt("padding", "by the tokenizer", lambda: _padded_by_tokenizer(subject))


def _padded_right(subject: Subject) -> Finding:
    short = TOKENS // 2
    together, by_itself = ({name: ids.clone() for name, ids in subject.inputs.items()} for _ in range(2))
    together["attention_mask"][1, short:] = 0
    together["input_ids"][1, short:] = _pad_token(subject)
    by_itself = {name: ids[1:] if name.startswith("decoder") else ids[1:, :short] for name, ids in by_itself.items()}
    return _compared(subject, "on the right", together, by_itself)


def _padded_by_tokenizer(subject: Subject) -> Finding:
    tokenizer: Any = engine.tokenizer_of(subject.model)
    if not subject.causal or engine.is_encoder_decoder(subject.model):
        raise RefusedPlace("texts are given to models that continue them")
    if getattr(tokenizer, "pad_token", None) is None:
        raise RefusedPlace("this model has no tokenizer that pads")
    rows = subject.inputs["input_ids"]
    texts = [tokenizer.decode(rows[0]), tokenizer.decode(rows[1, : TOKENS // 2])]
    lengths = [len(ids) for ids in tokenizer(texts)["input_ids"]]
    if lengths[0] <= lengths[1]:
        raise RefusedPlace("its tokenizer makes prompts of one length out of these random tokens: another --seed")
    return _compared(subject, f"by the tokenizer, on the {tokenizer.padding_side}", texts, texts[1])


def _pad_token(subject: Subject) -> int:
    token = getattr(engine.tokenizer_of(subject.model), "pad_token_id", None)
    return token if isinstance(token, int) else 0


def _compared(subject: Subject, what: str, together: Any, by_itself: Any) -> Finding:
    """Compare the second row of a padded batch with the same prompt by itself, at its first and last token."""
    paths = [
        place_of(tower.name, (), value, layers).at(position)
        for tower, layers in subject.towers()
        for value in ("input", "output")
        for position in (0, -1)
    ]
    found: list[SavedActivation] = []
    with torch.no_grad():
        engine.run(subject.model, together, lambda: found.append(save_activations(subject.model, paths)))
    padded = found[0].slice[1]
    expected = capture(subject.model, by_itself, paths)
    number = max(gap(padded[key], expected[key]) for key in expected)
    fine = number <= subject.tolerance
    return Finding("padding", what, "ok" if fine else "FAILED", number, "" if fine else "the values differ")
