"""Imports of anyio that must come before nnsight.

nnsight gives every object a `.save` attribute. anyio's attribute tables, if they are made later, treat it as an untyped
attribute of theirs and fail, and with them httpx with asyncio, servers and notebooks. So nnsight imports anyio first,
but newer versions of anyio make the tables on first use.
"""

from __future__ import annotations

from contextlib import suppress
from importlib import import_module

_TABLES = {
    "anyio.abc": "SocketAttribute",
    "anyio.streams.file": "FileStreamAttribute",
    "anyio.streams.tls": "TLSAttribute",
}

for _module, _table in _TABLES.items():
    # anyio may not be installed; and if nnsight was imported before, it is too late.
    with suppress(ImportError, TypeError):
        getattr(import_module(_module), _table, None)
