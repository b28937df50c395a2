"""`python -m nnsplice` is the command `nnsplice`."""

from nnsplice.cli import app

app(prog_name="nnsplice")
