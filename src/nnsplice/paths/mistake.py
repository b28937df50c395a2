"""One row of the table of mistakes, and the patterns that rows share."""

from __future__ import annotations

import re
from dataclasses import dataclass

from nnsplice.errors import PathError


@dataclass(frozen=True, slots=True)
class Mistake:
    """One common mistake: how it looks, what is wrong, and what to write instead.

    >>> from nnsplice.paths.mistake import Mistake
    >>> row = Mistake(r"(?P<place>.*)(?P<at>;)", "a path ends without a semicolon", "{place}", ("embed;",))
    >>> row.match("embed;")["place"]
    'embed'
    """

    #: Matches the whole of a wrong text, in any case. A group `at` sites the caret.
    pattern: str
    #: What is wrong; may name groups of the pattern, as `{at}`.
    message: str
    #: What to write instead, from groups of the pattern; several with ` or ` between them; None where nobody can tell.
    write: str | None
    #: Texts in which this is the only mistake.
    samples: tuple[str, ...]
    kind: type[PathError] = PathError
    flags: re.RegexFlag = re.IGNORECASE | re.DOTALL

    def match(self, text: str) -> re.Match[str] | None:
        """The match, where a text holds this mistake."""
        # `re` compiles at the first mistake and remembers; compiling all rows at import would cost every user.
        return re.fullmatch(self.pattern, text, self.flags)


#: A bracket without brackets inside.
BRACKET = r"\[[^\[\]]*\]"
#: A layer in either spelling.
LAYER = rf"(?P<layer>(?:(?:encoder|decoder)\.)?(?:layers{BRACKET}|l[0-9]+))"
#: What may follow a name: a value, a position, both or nothing.
TAIL = r"(?P<after>(?:[.\[].*)?)"
#: A position or nothing.
POSITION = r"(?P<after>(?:\[.*)?)"
#: The roles that need an index.
COUNTED = "layers|heads|groups|experts|neurons"
