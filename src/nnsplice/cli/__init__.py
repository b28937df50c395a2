"""The command line: `nnsplice paths`, `check`, `trace`, `work`, `merge`, `status`, `lens`, `circuit`, `steer`,
`mask`, `adapter`, `convert` and `fetch`.

adapter     the command that shows what an adapter changed
checkpoints the command that converts
circuits    the commands that find, run and show a circuit
commands    the commands about models, and what errors look like
estimating  estimates of the command that sweeps
fetching    the command that installs a pretrained model
files       prompts from a file, folders to write in
loading     the model of a command
lenses      the commands that read states, and split logits
listing     the sites of a model as rows
native      its module tree as rows
options     options that several commands have
settings    the settings of a sweep, from a file and from options
steering    the commands that fit, sweep and use a steering vector
table       the output: tables, texts, warnings
tracing     the command that sweeps
weights     the command that shows which weights belong to a site
wording     messages of Python functions, in the words of a shell
working     the commands that run, merge and look at the units of a run folder
"""

from nnsplice.cli import adapter as adapter
from nnsplice.cli import checkpoints as checkpoints
from nnsplice.cli import circuits as circuits
from nnsplice.cli import fetching as fetching
from nnsplice.cli import lenses as lenses
from nnsplice.cli import steering as steering
from nnsplice.cli import tracing as tracing
from nnsplice.cli import weights as weights
from nnsplice.cli import working as working
from nnsplice.cli.commands import app as app
