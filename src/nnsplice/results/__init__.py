"""Results: what a sweep returns.

table           the measured values as plain arrays: Cell, Run, Table
result          SweepResult: everything below as methods of one value
kinds           which kind of site is meant
measures        changes and shares of the way back, pooled over prompts
uncertainty     intervals, tests and stability of averages over prompts
labelled        grid with named axes, rows, the best cells
roles           tokens by what they are in their prompts
estimates       what estimates are made of, and how far off those were that were checked
figure          which plane of a grid a figure shows
page            a page that stands by itself; page.html is how it looks
display         what a notebook shows
files           a result on disk, and the digest that is its identity
pairs           of two sites each: a square figure, and both names in a table
zarr_files      the same as a Zarr store, a chunk for each prompt
parquet         its rows as a Parquet file
several         one of several metrics, and all of them side by side
merging         shards, and parts with prompts of their own, put together
parts           what was asked of some of the prompts
journal         what is appended while a sweep runs, so that it can go on after a stop
"""

from nnsplice.results.estimates import Miss, Verification
from nnsplice.results.files import plain
from nnsplice.results.journal import Journal
from nnsplice.results.parts import PART, taken
from nnsplice.results.result import StoredResult, SweepResult
from nnsplice.results.table import AXES, SETS, Cell, Run, Table

__all__ = [
    "AXES",
    "PART",
    "SETS",
    "Cell",
    "Journal",
    "Miss",
    "Run",
    "StoredResult",
    "SweepResult",
    "Table",
    "Verification",
    "plain",
    "taken",
]
