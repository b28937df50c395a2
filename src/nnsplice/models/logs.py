"""The output of transformers while it loads: bars, warnings, errors."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from logging import CRITICAL

#: The last line of a traceback.
_CAUSE = re.compile(r"^\w*(?:Error|Exception): .+", re.MULTILINE)


def first_line(error: BaseException) -> str:
    """The first line of an error; if transformers lists several attempts, the error of the first."""
    text = str(error).strip()
    if "See the original errors" in text and (causes := _CAUSE.findall(text)):
        return causes[0]
    return text.partition("\n")[0]


@contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' list of all models that its pipeline supports; others work too."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity(CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(level)


@contextmanager
def no_bar() -> Iterator[None]:
    """Hide transformers' progress bar over the weights of small models."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
