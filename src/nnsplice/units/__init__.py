"""Plans in units: a question as plain data whose parts run in any process, with bit-identical results.

plan       UnitPlan: a question and its units; Kind: how one kind of question is run and joined
plain      prompts and metrics as plain data, and back
loading    how other processes load a model; the check of its weights
running    runs all units here, or in a run folder with other processes
capturing  ns.capture in units
"""

from nnsplice.units.loading import LOAD, LOAD_SOURCE, load_of, loaded, write_load
from nnsplice.units.plain import (
    changed,
    function_of,
    metric_of,
    plain_function,
    plain_metric,
    plain_prompts,
    prompts_of,
)
from nnsplice.units.plan import (
    MAX_TOKENS,
    SIZE,
    Agree,
    Kind,
    Models,
    Outcomes,
    Planned,
    UnitPlan,
    bytes_of,
    lists_of,
    packed_text,
    prompts_in,
    read_from,
    rows_of,
    text_in,
)
from nnsplice.units.running import finish, folder_for, run

__all__ = [
    "LOAD",
    "LOAD_SOURCE",
    "MAX_TOKENS",
    "SIZE",
    "Agree",
    "Kind",
    "Models",
    "Outcomes",
    "Planned",
    "UnitPlan",
    "bytes_of",
    "changed",
    "finish",
    "folder_for",
    "function_of",
    "lists_of",
    "load_of",
    "loaded",
    "metric_of",
    "packed_text",
    "plain_function",
    "plain_metric",
    "plain_prompts",
    "prompts_in",
    "prompts_of",
    "read_from",
    "rows_of",
    "run",
    "text_in",
    "write_load",
]
