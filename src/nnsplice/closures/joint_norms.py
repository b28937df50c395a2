"""The warning for writes to a query or key before a norm over all heads (joint QK norm)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from nnsplice.atlas import Atlas, Site, native_text, unwrap
from nnsplice.paths import Path
from nnsplice.warn import warn_caller

#: Value -> its name in the singular and plural, and the part that has it.
_NAMES = {"q": ("query", "queries", "head"), "k": ("key", "keys", "group")}


def warn_of_joint_norms(model: Any, paths: Iterable[Path]) -> None:
    """Warn of expanded paths that will be written, if a norm over all heads makes the write change other heads too.

    The write itself is exact: it is the model's own norm that spreads it.
    """
    atlas = Atlas.of(unwrap(model))
    for path in paths:
        if path.native or path.value not in _NAMES or path.steps[-1].name not in ("heads", "groups"):
            continue
        layer = path.steps[0].index
        assert isinstance(path.site, Site) and isinstance(layer, int)
        block = atlas.towers[path.site.tower].blocks[layer]
        norm = next((module for module, role in block.joint_norms if role == path.value), None)
        if norm is not None:
            one, several, owner = _NAMES[path.value]
            warn_caller(
                f"{path.place} stands before a norm over the {several} of all {owner}s of a token, so another {one} "
                f"there moves the other {owner}s too\n"
                f"  behind the norm: model.{native_text(norm)}.output, of all {owner}s together"
            )
            return
