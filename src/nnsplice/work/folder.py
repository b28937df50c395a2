"""The engine without workers: units are run by `nnsplice work`."""

from __future__ import annotations

from dataclasses import dataclass

from nnsplice.work.run_folder import RunFolder


@dataclass(frozen=True)
class Folder:
    """`on="folder"`: workers are started by the user, with srun or on several machines with one file system."""

    def run(self, folder: RunFolder, progress: bool) -> None:
        """Upload the files of the run, if it is in an object store."""
        folder.share()
