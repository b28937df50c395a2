"""Prompts, metrics and functions as plain data, and back. Nothing is unpickled."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from nnsplice import engine
from nnsplice.activations.prompts import Prompts
from nnsplice.atlas import unwrap
from nnsplice.digests import function_digest
from nnsplice.errors import BadArgument
from nnsplice.metrics import Bound, Metric, Several, rules
from nnsplice.work import imported, named


def plain_prompts(prompts: Prompts) -> dict[str, Any]:
    """Prompts as plain data.

    Raises:
        BadArgument: they have images or audio.
    """
    if prompts.sounds is not None:
        raise BadArgument(
            f"prompts of {prompts.sounds[0].name} are not written to a file",
            expected="a run in this process",
        )
    if prompts.images is not None:
        raise BadArgument(
            "a plan's files hold tokens, and these prompts have images",
            expected="a run in this process, or prompts of text",
        )
    spans = None if prompts.spans is None else {name: [list(b) for b in rows] for name, rows in prompts.spans.items()}
    decoder = None if prompts.decoder_ids is None else [list(row) for row in prompts.decoder_ids]
    texts = None if prompts.texts is None else list(prompts.texts)
    return {"ids": [list(row) for row in prompts.ids], "texts": texts, "decoder": decoder, "spans": spans}


def prompts_of(data: Mapping[str, Any], model: engine.Model) -> Prompts:
    """Prompts from plain data, for this model."""

    def rows(each: Any) -> Any:
        return None if each is None else tuple(tuple(row) for row in each)

    spans = None if data["spans"] is None else {name: rows(each) for name, each in data["spans"].items()}
    texts = None if data["texts"] is None else tuple(data["texts"])
    return Prompts(
        rows(data["ids"]), texts, rows(data["decoder"]), None, spans, engine.signature_of(type(unwrap(model)))
    )


# --- functions --------------------------------------------------------------------------------------------------------


def plain_function(function: Any, what: str) -> dict[str, str]:
    """A function as its `module:name` and the digest of its source.

    Raises:
        BadArgument: other processes cannot import it.
    """
    return {"function": named(function, f"the {what}"), "source": function_digest(function)}


def function_of(data: Mapping[str, str], what: str) -> Any:
    """The function that `plain_function` described.

    Raises:
        BadArgument: its source differs here, so results would differ.
    """
    found = imported(data["function"])
    if "source" in data and function_digest(found) != data["source"]:
        raise changed(what)
    return found


def changed(what: str) -> BadArgument:
    """The error for a function whose source differs here."""
    return BadArgument(
        f"the {what} is another function here than where the sweep was planned",
        expected="one file for all, which does not change while the sweep runs",
    )


def plain_metric(metric: Bound | Several) -> dict[str, Any]:
    """A metric with its answers as plain data.

    Raises:
        BadArgument: its function cannot be imported by other processes.
    """
    if isinstance(metric, Several):
        return {"several": [[name, plain_metric(bound)] for name, bound in metric.parts]}
    own, rule = metric.metric, metric.metric.rule
    known = getattr(rule, "__module__", "") == rules.__name__
    return {
        "name": own.name, "rule": rule.__name__ if known else plain_function(rule, "metric"), "position": own.position,
        "compares": own.compares, "local": own.local,
        "ids": json.loads(json.dumps(metric.identity["ids"])),
    }  # fmt: skip


def metric_of(data: Mapping[str, Any]) -> Bound | Several:
    """A metric from plain data.

    Raises:
        BadArgument: the source of its function differs here.
    """
    if "several" in data:
        each = [(name, metric_of(one)) for name, one in data["several"]]
        return Several(tuple((name, bound) for name, bound in each if isinstance(bound, Bound)))
    rule = data["rule"]
    rule = getattr(rules, rule) if isinstance(rule, str) else function_of(rule, "metric")
    ids = {
        name: tuple(tuple(one) if isinstance(one, list) else one for one in each) for name, each in data["ids"].items()
    }
    answers = {name: list(each) for name, each in ids.items()}
    metric = Metric(data["name"], rule, answers, data["position"], compares=data["compares"], local=data["local"])
    return Bound(metric, ids)
