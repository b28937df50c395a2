"""What a head's query or key shares with others: a norm over all heads behind the projection."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from nnsplice.atlas import Atlas, Site, native_text, unwrap
from nnsplice.paths import Path
from nnsplice.warn import warn_caller

#: Value -> what it is called, one and several, and whose it is.
_NAMES = {"q": ("query", "queries", "head"), "k": ("key", "keys", "group")}


def warn_of_joint_norms(model: Any, paths: Iterable[Path]) -> None:
    """Warn of expanded paths that will be written, and move other heads through a norm over all of them.

    Nothing is wrong with such a write: the model's own norm carries it on.
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
