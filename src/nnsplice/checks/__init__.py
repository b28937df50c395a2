"""Checks: the sites of a model, and tests that nnsplice's promises hold on it.

outline     the sites of a model as plain data, without running it
finding     the result of a check, the model under check, and summaries
structure   the parts are recognised, and every site fires
replay      writing a run's own values changes nothing, and other values something
streams     heads add up to the attention's output; patches are causal; padding has no effect
run         all checks, in order
"""

from nnsplice.checks.finding import Finding as Finding
from nnsplice.checks.finding import Subject as Subject
from nnsplice.checks.finding import subject_of as subject_of
from nnsplice.checks.finding import summary as summary
from nnsplice.checks.outline import LayerGroup as LayerGroup
from nnsplice.checks.outline import Outline as Outline
from nnsplice.checks.outline import OutlinePart as OutlinePart
from nnsplice.checks.outline import OutlineValue as OutlineValue
from nnsplice.checks.outline import narrow as narrow
from nnsplice.checks.outline import outline as outline
from nnsplice.checks.run import CHECKS as CHECKS
from nnsplice.checks.run import run_checks as run_checks

#: The public names; the other imports are for the commands.
__all__ = ["Finding", "outline", "run_checks", "summary"]


def __dir__() -> list[str]:  # what <TAB> shows
    return __all__
