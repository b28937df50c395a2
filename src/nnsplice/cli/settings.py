"""The settings of `nnsplice trace`, from a file and from the command line."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nnsplice.errors import BadArgument, BadType, FileError, UnknownPath, closest

#: A metric's name -> the tokens that it asks about.
METRICS: dict[str, tuple[str, ...]] = {
    "logit_diff": ("answer", "wrong"),
    "probability": ("answer",),
    "log_probability": ("answer",),
    "sequence_log_probability": ("answer",),
    "rank": ("answer",),
    "accuracy": ("answer",),
    "kl_divergence": (),
    "js_divergence": (),
}
#: Option -> its allowed names.
CHOICES: dict[str, tuple[str, ...]] = {
    "operation": ("patch", "zero", "noise", "mean", "resample", "add"),
    "metric": tuple(METRICS),
    "align": ("position", "end"),
    "executor": ("auto", "packed", "batched", "reference"),
    "method": ("exact", "atp", "atp*", "ig", "eap", "eap-ig", "relp", "ifr", "auto"),
}
WORDS = ("model", "device", "dtype", "out", "reference", "on", *CHOICES)
LISTS = ("clean", "corrupted", "sites", "answer", "wrong", "receivers")
#: Between the members of a set of sites, as a result names it.
JOINED = " + "
#: Option -> the least that makes sense.
NUMBERS: dict[str, int | None] = {"window": 1, "max-tokens": 1, "seed": None, "verify": 0, "steps": 1}
NAMES = (*WORDS, *LISTS, *NUMBERS)


def read(path: Path) -> dict[str, Any]:
    """The settings in a TOML file, whose keys are the names of the options.

    Raises:
        FileError: no such file, or no TOML.
        UnknownPath: a key that is no option.
        BadType: a value of another type.
    """
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not text"
        raise FileError(f"{path} cannot be read: {reason}", expected="a TOML file with the options as keys") from error
    except tomllib.TOMLDecodeError as error:
        raise FileError(f"{path} is no TOML: {error}", expected='lines such as  model = "toy"') from error
    settings: dict[str, Any] = {}
    for key, value in found.items():
        name = key.replace("_", "-")
        if name not in NAMES:
            raise UnknownPath(f"{path} has a key that is no option of trace", path=key, expected=closest(name, NAMES))
        settings[name] = _typed(key, name, value)
    return settings


def _typed(key: str, name: str, value: Any) -> Any:
    if name in NUMBERS:
        fits, expected = isinstance(value, int) and not isinstance(value, bool), "a whole number"
    elif name in WORDS:
        fits, expected = isinstance(value, str), "a text"
    elif name in ("answer", "wrong"):
        every = value if isinstance(value, list) else [value]
        fits = bool(every) and all(isinstance(one, str | int) and not isinstance(one, bool) for one in every)
        expected = "a token's text or id, or a list with one for each prompt"
    else:
        every = value if isinstance(value, list) else [value]
        fits, expected = bool(every) and all(isinstance(one, str) for one in every), "a text, or a list of texts"
    if not fits:
        raise BadType(f"{key} = {value!r}", expected=expected)
    return value


def sets(sites: str | Sequence[str]) -> list[Any]:
    """Sites as a sweep takes them: several that are joined by a plus sign are one set, changed together."""
    each = [sites] if isinstance(sites, str) else sites
    return [one.split(JOINED) if JOINED in one else one for one in each]


def single(answer: Any) -> Any:
    """One of a list of one: a token, say, that is meant for all prompts."""
    return answer[0] if isinstance(answer, list) and len(answer) == 1 else answer


def check(settings: Mapping[str, Any]) -> None:
    """Refuse a name that is none of a few, and a number that is too small."""
    for name, value in settings.items():
        if name in CHOICES and value not in CHOICES[name]:
            raise BadArgument(f"there is no {name} {value!r}", expected=", ".join(CHOICES[name]))
        least = NUMBERS.get(name)
        if least is not None and value < least:
            raise BadArgument(f"{name} is {value}", expected=f"at least {least}")
