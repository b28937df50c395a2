"""Circuits: nodes and edges that do a task, and the share of the metric that they keep.

circuit       the value: made of scores, of addresses, of files; its algebra; its run
algebra       unions, intersections and differences: what is kept of scores and origin
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
optimal_ablation  constants trained for one circuit
sender_parts  senders that are some tokens of one, an expert or a feature
masks         which edges of a circuit can matter
columns       parts of a projection
streams       the stream that each receiver reads, as a sum of what senders give
running       the run of circuits: blocks whose receivers read these streams
interactions  what two sites do beyond what each does
sweeping      many circuits as one result
faithfulness  how much of the metric circuits keep, as a curve over their sizes
curves        what that gives: Faithfulness, a value with a file
completeness  whether a circuit has all that matters and nothing that does not (minimality)
acdc          edges removed for as long as the metric stays
measuring     many circuits over many prompts, in batches
units         faithfulness in units of prompts
"""

from nnsplice.circuits.acdc import acdc
from nnsplice.circuits.circuit import Circuit
from nnsplice.circuits.completeness import Completeness, Minimality, completeness, minimality
from nnsplice.circuits.constants import OptimalAblation
from nnsplice.circuits.curves import Faithfulness
from nnsplice.circuits.faithfulness import faithfulness
from nnsplice.circuits.interactions import interactions
from nnsplice.circuits.optimal_ablation import optimal_ablation
from nnsplice.circuits.sweeping import sweep_circuits

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
