"""The address language: text <-> Path. This room knows text only, no model.

grammar.lark    what a path is
path.py         Path, the frozen value that a text becomes, and its parts
parse.py        parse_path: text -> Path
hooks.py        TransformerLens' hook names, as a table
mistakes.py     common mistakes and what to write instead, as a table; the rows for portable paths are in
                mistakes_portable.py, what a row holds in mistake.py
"""

from nnsplice.paths.parse import parse_path, reads
from nnsplice.paths.path import (
    ACTIVATION_VALUES,
    WEIGHT_VALUES,
    Dictionary,
    Index,
    Path,
    Paths,
    Position,
    Slice,
    Span,
    Step,
    index_text,
    position_rank,
)

__all__ = [
    "ACTIVATION_VALUES",
    "WEIGHT_VALUES",
    "Dictionary",
    "Index",
    "Path",
    "Paths",
    "Position",
    "Slice",
    "Span",
    "Step",
    "index_text",
    "parse_path",
    "position_rank",
    "reads",
]
