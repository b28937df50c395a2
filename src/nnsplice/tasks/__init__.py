"""Tasks: pairs of prompts with answers, spans and variables, made for the user's own tokenizer.

task            Record, Task: prompts, answers and spans for a sweep; filter and accuracy
causal_model    CausalModel: a hypothesis about a task, for interchange interventions
templates       records from templates, with words of one token
ioi, greater_than, docstring, pronouns, facts, sentiment, mcqa, arithmetic, induction     one task each
"""

from nnsplice.tasks.arithmetic import arithmetic
from nnsplice.tasks.causal_model import CausalModel, Counterfactual
from nnsplice.tasks.docstring import docstring
from nnsplice.tasks.facts import facts
from nnsplice.tasks.greater_than import greater_than
from nnsplice.tasks.induction import induction
from nnsplice.tasks.ioi import ioi
from nnsplice.tasks.mcqa import mcqa
from nnsplice.tasks.pronouns import gendered_pronoun
from nnsplice.tasks.sentiment import sentiment
from nnsplice.tasks.task import Record, Task

__all__ = [
    "CausalModel",
    "Counterfactual",
    "Record",
    "Task",
    "arithmetic",
    "docstring",
    "facts",
    "gendered_pronoun",
    "greater_than",
    "induction",
    "ioi",
    "mcqa",
    "sentiment",
]


def __dir__() -> list[str]:  # what <TAB> shows
    return __all__
