"""The engines of `ns.run(plan, load, on=...)`.

"local:8"                  so many processes on this machine; "local" is one for each GPU, or for each core
"folder"                   a run folder is written, and left to `nnsplice work DIR` on any machine that sees it
ns.on.slurm(...)           the tasks of a Slurm array, with preemption and requeue; extra `slurm`
ns.on.ray(...)             the tasks of a Ray cluster; extra `ray`
"""

from nnsplice.work.engines import ray, slurm

__all__ = ["ray", "slurm"]
