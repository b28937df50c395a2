"""The command line: `nnsplice paths MODEL`, `nnsplice check MODEL`, `nnsplice trace` and `nnsplice adapter DIR`.

adapter     the command that shows what an adapter changed
commands    the commands, and what their errors look like
listing     the places of a model as rows
native      its module tree as rows
settings    what a sweep is asked for, from a file and from options
table       rows as aligned text
tracing     the command that sweeps
"""

from nnsplice.cli import adapter as adapter
from nnsplice.cli import tracing as tracing
from nnsplice.cli.commands import app as app
