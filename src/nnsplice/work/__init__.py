"""Work in units for any number of processes, without knowledge of models and metrics.

run_folder    the folder of a run: units, claims, failures; nothing in it is unpickled
claims        files that assign a unit to one worker
worker        runs units until none is left
driving       starts workers, restarts dead ones, shows progress
engines       the values of `ns.run(..., on=...)`
local         processes on this machine
folder        no workers: units are run by `nnsplice work`
slurm, ray    tasks of a cluster; each is the only file that imports its library
status        status and result of a run
importing     functions by name: `module:function`
"""

from nnsplice.work.engines import Engine, engine_of
from nnsplice.work.importing import imported, named
from nnsplice.work.run_folder import Arrays, RunFolder, UnitTask, write_json
from nnsplice.work.status import Status, merged, status_of
from nnsplice.work.worker import Worker

__all__ = [
    "Arrays",
    "Engine",
    "RunFolder",
    "Status",
    "UnitTask",
    "Worker",
    "engine_of",
    "imported",
    "merged",
    "named",
    "status_of",
    "write_json",
]
