"""Work in units for any number of processes; independent of models and metrics.

run_folder    a run as a folder: units, claims, what failed and why; nothing in it is unpickled
claims        who is at which unit
worker        takes units until none is left
driving       starts workers, starts those anew that die, shows how far they are
engines       where a run may take place: what `ns.run(..., on=...)` takes
local         processes on this machine
folder        no workers: the folder is left to `nnsplice work`
slurm, ray    tasks of a cluster, each file the only one that imports its library
status        how a run stands, and what it found
"""

from nnsplice.work.engines import Engine, engine_of
from nnsplice.work.run_folder import Arrays, RunFolder, Task, imported, named, write_json
from nnsplice.work.status import Status, merged, status_of
from nnsplice.work.worker import Worker

__all__ = [
    "Arrays",
    "Engine",
    "RunFolder",
    "Status",
    "Task",
    "Worker",
    "engine_of",
    "imported",
    "merged",
    "named",
    "status_of",
    "write_json",
]
