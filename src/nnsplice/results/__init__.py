"""Results: what a sweep returns.

table           the measured values as plain arrays: Cell, Run, Table
result          SweepResult, the public class; the work is in the modules below
stored          StoredResult: a result in a store, read when it is used
kinds           the kinds of site in a result
measures        change and effect, pooled over prompts
uncertainty     intervals, tests and stability of averages over prompts
labelled        arrays with named axes, rows, the best cells
roles           token roles: means over the positions with the same role
estimates       edges of estimates, and their verification
figure          the plane of a grid that a figure shows
page            a self-contained HTML page; page.html is its template
display         text and HTML representations
files           files on disk, and the digest of a result
array_files     files of a record and arrays, of results of other rooms
pairs           results about pairs of sites: a square figure, both names in a table
zarr_files      Zarr stores, with a chunk for each prompt
parquet         Parquet files of the rows
several         results of several metrics
merging         merging of shards and of parts with some prompts
parts           the identity of a part with some of the prompts
journal         the journal of a running sweep, for resuming
"""

from nnsplice.results.estimates import Miss, Verification
from nnsplice.results.files import plain
from nnsplice.results.journal import Journal
from nnsplice.results.parts import PART, taken
from nnsplice.results.result import SweepResult
from nnsplice.results.stored import StoredResult
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
