"""The engine without workers: the run folder is left to `nnsplice work`."""

from __future__ import annotations

from dataclasses import dataclass

from nnsplice.work.run_folder import RunFolder


@dataclass(frozen=True)
class Folder:
    """`on="folder"`: for srun, torchrun, and several machines on one file system."""

    def run(self, folder: RunFolder, progress: bool) -> None:
        """Share the files; no unit runs here."""
        folder.share()
