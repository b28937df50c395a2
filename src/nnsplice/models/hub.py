"""Whether the Hugging Face hub can be reached."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

#: Seconds between two attempts, for a connection that fails once.
PAUSE = 1.0
#: The errors of huggingface_hub's HTTP client that mean that there is no connection.
_NO_CONNECTION = ("ConnectError", "ConnectTimeout")


def check_reachable(name: str, file: str, options: Mapping[str, Any]) -> None:
    """Raise if a file is not cached, and the hub that would have it cannot be reached.

    Without this check huggingface_hub repeats its request for half a minute before it says so.

    Args:
        name: the name on the hub.
        file: a file that the download begins with.
        options: those of the download: `revision`, `cache_dir`, `local_files_only`, ...

    Raises:
        ConnectionError: two attempts failed. Any other answer is left to the download itself.
    """
    from huggingface_hub import constants, try_to_load_from_cache
    from huggingface_hub.utils import get_session

    if constants.HF_HUB_OFFLINE or options.get("local_files_only"):
        return
    file = "/".join(filter(None, (options.get("subfolder"), file)))
    try:
        cached = try_to_load_from_cache(name, file, options.get("cache_dir"), options.get("revision"))
    except ValueError:  # no name that a hub can have, which the download says better
        return
    if cached is not None:
        return
    url = f"{constants.ENDPOINT}/{name}/resolve/main/{file}"
    for attempt in range(2):
        try:
            get_session().head(url, timeout=constants.HF_HUB_ETAG_TIMEOUT, follow_redirects=False)
            return
        except Exception as error:
            if type(error).__name__ not in _NO_CONNECTION:
                return
            if attempt:
                raise ConnectionError(f"cannot connect to {constants.ENDPOINT}: {error}") from error
            time.sleep(PAUSE)
