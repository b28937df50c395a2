"""The address language: text <-> Path, without a model.

grammar.lark            the grammar of paths
path.py                 Path, the frozen value of a text, and its parts
parse.py                parse_path: text -> Path
hooks.py                the hook names of TransformerLens, as a table
mistake.py              one row of the table of common mistakes
mistakes.py             the table: the mistakes with their messages and corrections
mistakes_portable.py    its rows for portable paths
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
