"""Checks: the sites of a model, and tests that nnsplice's promises hold on it.

outline     the sites of a model as plain data, read without running it
finding     what a check found, the model it looks at, and the sum of many findings
structure   are the parts recognised, does every site fire
replay      does a run stay what it is when its own pieces are written into it, and only then
streams     do heads make what attention adds; do patches stay causal; does padding stay outside
run         all of them, in order
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

#: What users need of it; the rest is for the commands that show it.
__all__ = ["Finding", "outline", "run_checks", "summary"]


def __dir__() -> list[str]:  # what <TAB> shows
    return __all__
