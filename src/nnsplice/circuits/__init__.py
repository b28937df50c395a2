"""Circuits: nodes and edges that do a task, and the share of the metric that they keep.

circuit       the value: made of scores, of addresses, of files; its algebra; its run
members       nodes and edges, checked and in order
origin        which model a circuit is of
addresses     who adds to the stream and who reads it, by one spelling
shape         the graph that a model can have, as plain data
scores        what a result says of edges and nodes
files         JSON files of our own, and graphs of EAP-IG
networks      graphs of networkx
drawing       where the parts of a circuit are drawn
page          a circuit as a page that stands by itself
wiring        where senders and receivers stand in a model
recording     unedited runs: what every sender gives
ablations     what everything outside a circuit gives
constants     trained constants, as a value with a file
training      how they are trained
optimal       for a circuit of one's own
parts         senders that are some tokens of one, or an expert
masks         which edges of a circuit can matter
columns       parts of a projection
running       the run of circuits, in which each receiver reads a stream of its own
together      what two sites do beyond what each does
sweeping      many circuits as one result
curves        how much of the metric circuits keep, as a curve over their sizes
removals      whether a circuit has all that matters and nothing that does not
search        acdc: edges taken out for as long as the metric stays
measuring     many circuits over many prompts, in batches
units         faithfulness in units of prompts
"""

from nnsplice.circuits.circuit import Circuit
from nnsplice.circuits.constants import OptimalAblation
from nnsplice.circuits.curves import Faithfulness, faithfulness
from nnsplice.circuits.optimal import optimal_ablation
from nnsplice.circuits.removals import Completeness, Minimality, completeness, minimality
from nnsplice.circuits.search import acdc
from nnsplice.circuits.sweeping import sweep_circuits
from nnsplice.circuits.together import interactions

__all__ = [
    "Circuit",
    "Completeness",
    "Faithfulness",
    "Minimality",
    "OptimalAblation",
    "acdc",
    "completeness",
    "faithfulness",
    "interactions",
    "minimality",
    "optimal_ablation",
    "sweep_circuits",
]
