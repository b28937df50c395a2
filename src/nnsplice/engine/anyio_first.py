"""Imports of anyio that must come before nnsight.

nnsight gives every object a `.save`. anyio's tables of attributes, made after that, take it for one of theirs without a
type, and nothing of anyio runs any more (httpx with asyncio, servers, notebooks). nnsight imports anyio first for this
reason, but newer versions of anyio make the tables when they are asked for.
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
    # It need not be installed; and where somebody imported nnsight by itself first, it is too late.
    with suppress(ImportError, TypeError):
        getattr(import_module(_module), _table, None)
