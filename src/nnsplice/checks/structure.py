"""Check that parts are recognised, their order is known, and every site fires."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from nnsplice import engine
from nnsplice.activations import capture
from nnsplice.atlas import Tower, text_config
from nnsplice.checks.finding import CheckedValue, Finding, Subject, attempt, kinds
from nnsplice.checks.outline import place_of, stream_width
from nnsplice.errors import RefusedPlace

#: For each number of the atlas, the names of the same number in a config; the first name that exists counts.
CONFIG: dict[str, tuple[str, ...]] = {
    "layers": ("{tower}_layers", "num_{tower}_layers", "num_hidden_layers"),
    "heads": ("{tower}_attention_heads", "num_attention_heads"),
    "groups": ("num_key_value_heads",),
    "wide": ("hidden_size", "d_model"),
}


def parts(subject: Subject) -> Iterator[Finding]:
    """Towers, layers and heads are recognised, and agree with the model's config."""
    yield from _check_class(subject)
    subject.atlas.tower()  # raises where nothing was recognised
    for tower, _ in subject.towers():
        yield from _recognised(subject, tower)


def _check_class(subject: Subject) -> Iterator[Finding]:
    """A checkpoint loaded into another class may have new weights, or miss some."""
    import transformers

    from_config = getattr(getattr(subject.root, "config", None), "architectures", None) or ()
    # Class names of older versions of transformers are ignored.
    classes = [name for name in from_config if hasattr(transformers, name)]
    found = type(subject.root).__name__
    if classes and found not in classes and hasattr(transformers, found):
        yield Finding("parts", f"read as {found}", "FAILED", detail=f"the checkpoint is a {' or '.join(classes)}")


def _recognised(subject: Subject, tower: Tower) -> Iterator[Finding]:
    unclear = [b.index for b in tower.blocks if b.o is not None and b.layout is None and b.mixed is None]
    if unclear:
        what = f"{tower.name}: heads of layers {', '.join(map(str, unclear))}"
        yield Finding("parts", what, "FAILED", detail="their number is unknown, or does not fit the projections")
    found = {
        "layers": {tower.n_layers},
        "heads": {block.n_heads for block in tower.blocks if block.layout},
        "groups": {block.n_kv for block in tower.blocks if block.layout},
        "wide": {stream_width(subject.atlas, tower)},
    }
    texts = [f"{'/'.join(map(str, sorted(filter(None, numbers)))) or 'no'} {what}" for what, numbers in found.items()]
    # Layers may differ, and then the config may be right for some of them only.
    from_config = {what: _config_number(subject, tower, CONFIG[what]) for what in found}
    wrong = [
        f"{number} {what}" for what, number in from_config.items() if number is not None and number not in found[what]
    ]
    detail = f"the config says {', '.join(wrong)}" if wrong else ""
    yield Finding("parts", f"{tower.name}: {', '.join(texts)}", "FAILED" if wrong else "ok", detail=detail)


def _config_number(subject: Subject, tower: Tower, names: tuple[str, ...]) -> int | None:
    config: Any = text_config(subject.root)
    if config is None:
        return None
    found = (getattr(config, name.format(tower=tower.name), None) for name in names)
    return next((number for number in found if isinstance(number, int)), None)


def order(subject: Subject) -> Iterator[Finding]:
    """The order of the modules is recorded, and layers run one after the other in it."""
    for tower, layers in subject.towers():
        what = f"{tower.name}: layer after layer"
        yield attempt("order", what, lambda t=tower, ls=layers, w=what: _order(subject, t, ls, w))


def _order(subject: Subject, tower: Tower, layers: tuple[int, ...], what: str) -> Finding:
    stream = [place_of(tower.name, (), value, layer) for layer in layers for value in ("input", "output")]
    known = engine.map_of(subject.model)
    ranks = [known.rank(path) for text in stream for path in subject.atlas.expand(text)]
    if ranks != sorted(ranks):
        return Finding("order", what, "FAILED", detail="they do not run one after the other")
    return Finding("order", what, "ok")


def sites(subject: Subject) -> Iterator[Finding]:
    """Every site fires, and is as wide as the outline says."""
    for kind in kinds(subject):
        yield attempt("sites", str(kind.path), lambda kind=kind: _fires(subject, kind))


def _fires(subject: Subject, kind: CheckedValue) -> Finding:
    require_eager(subject, kind)
    wanted = engine.expand(subject.model, kind.path)
    saved = capture(subject.model, subject.inputs, kind.path.at(-1))
    if len(saved) != len(wanted):
        return Finding("sites", str(kind.path), "FAILED", detail=f"{len(wanted)} sites, and {len(saved)} values")
    widths = {tensor.shape[-1] for _, tensor in saved.items()}
    if kind.value.width is not None and widths != {kind.value.width}:
        found = ", ".join(map(str, sorted(widths)))
        return Finding("sites", str(kind.path), "FAILED", detail=f"width {found}, not {kind.value.width}")
    return Finding("sites", str(kind.path), "ok")


def require_eager(subject: Subject, kind: CheckedValue) -> None:
    """Raise for a pattern if the model's attention returns none."""
    used = engine.attention_of(subject.model)
    if kind.value.name == "pattern" and used not in (None, "eager"):
        raise RefusedPlace(f"{used} attention makes no probabilities; load the model with eager attention")
