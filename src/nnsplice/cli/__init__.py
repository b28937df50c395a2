"""The command line: `nnsplice paths`, `nnsplice check`, `nnsplice trace`, `nnsplice adapter` and `nnsplice mask`.
"""The command line: `nnsplice paths`, `nnsplice check`, `nnsplice trace`, `nnsplice adapter` and `nnsplice steer`.
"""The command line: `nnsplice paths MODEL`, `nnsplice check MODEL`, `nnsplice trace`, `nnsplice adapter DIR`, `nnsplice convert`.

adapter     the command that shows what an adapter changed
checkpoints the command that converts
commands    the commands, and what their errors look like
listing     the places of a model as rows
native      its module tree as rows
settings    what a sweep is asked for, from a file and from options
table       rows as aligned text
tracing     the command that sweeps
weights     the command that shows which weights belong to a place
steering    the commands that fit, sweep and use a steering vector
estimating  the same with estimates
"""

from nnsplice.cli import adapter as adapter
from nnsplice.cli import steering as steering
from nnsplice.cli import checkpoints as checkpoints
from nnsplice.cli import tracing as tracing
from nnsplice.cli import weights as weights
from nnsplice.cli.commands import app as app
