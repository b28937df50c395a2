"""A row of the table of mistakes, and the patterns that rows share."""

from __future__ import annotations

import re
from dataclasses import dataclass

from nnsplice.errors import PathError


@dataclass(frozen=True, slots=True)
class Mistake:
    """One common mistake: its pattern, its message, and the correction.

    >>> from nnsplice.paths.mistake import Mistake
    >>> row = Mistake(r"(?P<place>.*)(?P<at>;)", "a path ends without a semicolon", "{place}", ("embed;",))
    >>> row.match("embed;")["place"]
    'embed'
    """

    #: Matches a whole wrong text, in upper or lower case. The caret is put at the group `at`.
    pattern: str
    #: The message; may contain groups of the pattern, such as `{at}`.
    message: str
    #: The correction, from groups of the pattern, alternatives separated by ` or `; None if there is no obvious one.
    write: str | None
    #: Examples with this mistake only.
    samples: tuple[str, ...]
    kind: type[PathError] = PathError
    flags: re.RegexFlag = re.IGNORECASE | re.DOTALL

    def match(self, text: str) -> re.Match[str] | None:
        """The match of a text with this mistake; None otherwise."""
        # Compiled by `re` at the first mistake, and cached; compiling all rows at import would slow down every import.
        return re.fullmatch(self.pattern, text, self.flags)


#: Brackets without brackets inside.
BRACKET = r"\[[^\[\]]*\]"
#: A layer in either spelling.
LAYER = rf"(?P<layer>(?:(?:encoder|decoder)\.)?(?:layers{BRACKET}|l[0-9]+))"
#: What may follow a name: a value, a position, both or nothing.
TAIL = r"(?P<after>(?:[.\[].*)?)"
#: A position or nothing.
POSITION = r"(?P<after>(?:\[.*)?)"
#: Roles that take an index.
COUNTED = "layers|heads|groups|experts|neurons"
