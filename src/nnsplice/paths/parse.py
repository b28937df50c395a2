"""Text -> Path.

    parse_path      text or Path in, Path out
    reads           whether a text is a path

The grammar is in grammar.lark, the messages for common mistakes in mistakes.py, the hook names of TransformerLens in
hooks.py. Here the parse tree becomes a Path, and errors that mistakes.py does not cover get a message.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from difflib import get_close_matches
from functools import cache, lru_cache
from typing import TYPE_CHECKING, cast

from nnsplice.errors import BadType, PathError, named
from nnsplice.paths import hooks, mistakes
from nnsplice.paths.path import ATTRIBUTE_PREFIX, ESCAPES, Dictionary, Index, Path, Position, Slice, Span, Step

if TYPE_CHECKING:
    from lark import Lark, Token, Tree, UnexpectedInput

    Node = Tree[Token]

#: The size of the cache: a sweep may have some ten thousand sites, and a Path with its text takes about a kilobyte.
_CACHE_SIZE = 32_768


def parse_path(text: str | Path) -> Path:
    """Parse a path; a Path is returned as it is.

    >>> from nnsplice import parse_path
    >>> parse_path("model.transformer.h[2].output[10]").position
    10
    >>> str(parse_path("L5 H3 [-1]"))
    'layers[5].heads[3].output[-1]'
    >>> str(parse_path("blocks.5.hook_resid_pre"))
    'layers[5].input'

    Args:
        text: an address: native (`"model.transformer.h[2].output[10]"`), portable (`"layers[5].heads[3].output[-1]"`),
            a short form (`"L5 H3"`), or a hook name of TransformerLens.

    Returns:
        The path; `str()` of it is the canonical text.

    Raises:
        PathError: the text is no path; the message shows the column and a corrected text.
        BadType: neither a text nor a Path.
    """
    if isinstance(text, str):
        return _parse(text)
    if isinstance(text, Path):  # pyright: ignore[reportUnnecessaryIsInstance] - callers without a type checker
        return text
    raise BadType(
        f"a path is a text or a Path, and this is {named(text)}",
        expected='"layers[5].output[-1]" or parse_path("layers[5].output[-1]")',
    )


def reads(text: str) -> bool:
    """Whether a text is a path.

    >>> from nnsplice.paths import reads
    >>> reads("layers[5].heads[3]"), reads("layers[5].head[3]")
    (True, False)
    """
    try:
        _path_of(_tree(text.strip()))
    except (PathError, _lark_error()):
        return False
    return True


@lru_cache(maxsize=_CACHE_SIZE)
def _parse(text: str) -> Path:
    stripped = text.strip()
    if not stripped:
        raise PathError("an empty text is no path", expected="a site of a model", write="layers[5].output[-1]")
    try:
        tree = _tree(stripped)
    except _lark_error() as error:
        known = mistakes.diagnose(stripped, reads)
        raise (known or _unexpected(stripped, error)) from None
    return _path_of(tree)


@cache
def _parser() -> Lark:
    # Built at the first path instead of at import, as it is slow.
    from lark import Lark

    # lark leaves its options untyped.
    return Lark.open(  # pyright: ignore[reportUnknownMemberType]
        "grammar.lark", rel_to=__file__, parser="lalr", maybe_placeholders=True
    )


def _tree(text: str) -> Node:
    return _parser().parse(text)  # pyright: ignore[reportUnknownMemberType] - lark takes bytes too


@cache
def _lark_error() -> type[UnexpectedInput]:
    from lark import UnexpectedInput

    return UnexpectedInput


# ------------------------------------------------------------------------------------------------ tree -> Path

#: The roles of short forms, by their rule in the grammar.
_SHORT = {"short": "layers", "heads_short": "heads", "groups_short": "groups"}


def _path_of(tree: Node) -> Path:
    """The Path of a parse tree, whose children are steps, value, item and position in one flat list."""
    if tree.data == "hook":
        return _hook(tree)
    native = tree.data == "native"
    if tree.data == "full":
        return Path((Step("full"),))
    steps: list[Step] = []
    tower = value = item = position = key = sae = None
    for child in tree.children:
        if isinstance(child, str):
            # A terminal: MODEL, TOWER or a value.
            if child.type == "TOWER":
                tower = child.lower()
            elif child.type != "MODEL":
                value = child.lower()
        elif child.data == "sae":
            sae = _sae(child)
        elif child.data == "item":
            item = _number(_first_child(child))
        elif child.data == "position":
            position = _position(child)
        elif child.data == "edge":
            *query, seen = cast("list[Node]", child.children)
            position, key = _bracketed(query), _position(seen)
        elif child.data in ("heads", "groups") and steps[-1].name == "cross":
            # `cross.heads[i]` is one step, as `heads[i]` is.
            steps[-1] = replace(_step(child, native), name=f"cross.{child.data}")
        elif child.data != "open":
            steps.append(_step(child, native))
    if position is not None and value is None:
        value = "output"
    return Path(tuple(steps), native, tower, value, item, position, key, sae)


def _sae(node: Node) -> Dictionary:
    _, name, part = node.children
    features = None if isinstance(part, str) else _index(_first_child(cast("Node", part.children[1])))
    return Dictionary(_unquoted(str(name)), features)


def _hook(tree: Node) -> Path:
    name, *position = tree.children
    path = _parse(hooks.portable(str(name)))
    return replace(path, position=_position(cast("Node", position[0]))) if position else path


def _step(node: Node, native: bool) -> Step:
    name, *index = node.children
    if node.data in _SHORT:
        return Step(_SHORT[node.data], int(cast("Token", index[0])))
    text = str(name).removeprefix(ATTRIBUTE_PREFIX) if cast("Token", name).type == "ESCAPED" else str(name)
    return Step(text if native else text.lower(), _index(_first_child(cast("Node", index[0]))) if index else None)


def _first_child(node: Node) -> Node:
    return cast("Node", node.children[0])


def _number(node: Node) -> int:
    return int(cast("Token", node.children[0]))


def _index(node: Node) -> Index:
    if node.data == "one":
        return _number(node)
    inner = _first_child(node)
    numbers = [None if n is None else int(n) for n in cast("list[Token | None]", inner.children)]
    if inner.data == "slice":
        return Slice(*numbers)
    return tuple(cast("list[int]", numbers))


def _position(node: Node) -> Position:
    return _bracketed(cast("list[Node]", node.children))


def _bracketed(nodes: list[Node]) -> Position:
    first, *token = nodes
    if first.data != "span":
        return _index(first)
    return Span(_unquoted(str(first.children[0])), _number(token[0]) if token else None)


def _unquoted(text: str) -> str:
    return re.sub(r"\\(.)", lambda found: ESCAPES.get(found[1], found[1]), text[1:-1])


# ----------------------------------------------------------------------------------------- errors of the grammar

#: The terminals of the grammar as words for a message.
_WORDS: dict[str, tuple[str, ...]] = {
    "STREAM": ("output", "input"),
    "VALUE": ("output", "input"),
    "WEIGHT": ("weight", "bias"),
    "PARAMETER": ("weight", "bias"),
    "TOWER": ("encoder", "decoder"),
    "QKVO": ("q", "k", "v", "o"),
    "QKV": ("q", "k", "v"),
    "KV": ("k", "v"),
    "INT": ("a number",),
    "COUNT": ("a number",),
    "STRIDE": ("a step other than 0",),
    "STRING": ("a span's name in quotes",),
    "NAME": ("the name of an attribute",),
    "DOT": ("a dot and a name",),
    "LSQB": ("a bracket",),
    "RSQB": ("the closing bracket",),
    "COMMA": ("a comma",),
    "COLON": ("a colon",),
    "SHORT_LAYER": ("l5",),
    "SHORT_HEAD": ("h3",),
    "SHORT_GROUP": ("g0",),
    "HOOK": ("a hook's name",),
    "$END": ("the end of the path",),
    # Forms of NAME, which is listed already. A terminal that is not in this table is a literal name.
    "ESCAPED": (),
    "INPUTS": (),
}


def _unexpected(text: str, error: UnexpectedInput) -> PathError:
    """The error for a text that no row of the table of mistakes matches."""
    expected = cast("Iterable[str]", getattr(error, "accepts", None) or getattr(error, "allowed", None) or ())
    words = [word for terminal in sorted(expected) for word in _WORDS.get(terminal, (terminal.lower(),))]
    at = error.pos_in_stream
    if at is None or at >= len(text) or getattr(getattr(error, "token", None), "type", "") == "$END":
        return PathError("the path ends too early", path=text, column=len(text), expected=_any_of(words))
    found = re.compile(r"\w+|.", re.DOTALL).match(text, at)
    word = found[0] if found else text[at]
    names = [name for name in words if re.fullmatch(r"[a-z]\w*", name)]
    if not (re.match(r"[^\W\d]", word) and names):
        return PathError(f"{word} cannot stand here", path=text, column=at, expected=_any_of(words))
    near = get_close_matches(word.lower(), names, n=1)
    repaired = text[:at] + near[0] + text[at + len(word) :] if near else None
    return PathError(
        f"{word} is not known here",
        path=text,
        column=at,
        expected=_any_of(words),
        write=repaired if repaired and reads(repaired) else None,
    )


def _any_of(words: list[str]) -> str:
    words = list(dict.fromkeys(words))
    return " or ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
