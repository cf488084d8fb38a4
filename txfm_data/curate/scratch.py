"""Where a curation keeps what it needs meanwhile: a hidden folder that one process holds, and that the next one finds again."""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_LOCK = "lock"


@contextmanager
def scratch_folder(out: Path, parent: Path) -> Iterator[Path]:
    """Give an empty folder below `parent` for the selection `out`, and remove it at the end.

    What a killed process left there is removed first. Folders above that had to be made and stay empty are removed too.

    Raises
    ------
    ValueError
        If another living process works on the same selection.
    OSError
        If the folder cannot be made.
    """
    made = [folder for folder in (parent, *parent.parents) if not folder.exists()]
    folder = parent / f".{out.name}.curate"
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with open(folder / _LOCK, "a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                is_own = os.stat(folder / _LOCK).st_ino == os.fstat(lock.fileno()).st_ino
            except (BlockingIOError, FileNotFoundError):
                is_own = False
            if not is_own:
                raise ValueError(
                    f"{out}: another process is curating into it (it holds {folder}); wait until it has ended"
                )
            for left in folder.iterdir():
                if left.name != _LOCK:
                    shutil.rmtree(left) if left.is_dir() else left.unlink()
            work = folder / "work"
            work.mkdir()
            try:
                yield work
            finally:
                shutil.rmtree(folder, ignore_errors=True)
    finally:
        for empty in made:
            with suppress(OSError):  # it holds the selection, or was never made
                empty.rmdir()
