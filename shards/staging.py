"""The folder in which a corpus is built: one build at a time, and a build that was killed goes on where it stopped."""

import errno
import fcntl
import hashlib
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from shards.spill import read_json, write_json
from shards.tar import sync

_log = logging.getLogger(__name__)
_PLAN, _LOCK = "plan.json", "lock"


@dataclass(frozen=True)
class Stage:
    """A folder of one build.

    spills, shards, done : folders of what pass 1 and pass 2 write, and of what says which shards are finished.
    is_resumed : whether an earlier run of the same build left pieces.
    """

    folder: Path
    key: str
    is_resumed: bool

    def _part(self, name: str) -> Path:
        # Named by the build: a worker that outlives a killed one for a moment cannot write among the pieces of another
        return self.folder / f"{name}-{self.key[:16]}"

    @property
    def spills(self) -> Path:
        """Where pass 1 writes."""
        return self._part("spills")

    @property
    def shards(self) -> Path:
        """The corpus to be."""
        return self._part("shards")

    @property
    def done(self) -> Path:
        """What is finished of it."""
        return self._part("done")

    @property
    def texts(self) -> Path:
        """The texts that codes of labels stand for."""
        return self.folder / "texts.arrow"


def make_stage(folder: Path, key: str, *, is_resumed: bool = False) -> Stage:
    """The folders of a build within a folder that nobody else uses."""
    stage = Stage(folder, key, is_resumed)
    for part in (stage.spills, stage.shards, stage.done):
        part.mkdir(exist_ok=True)
    return stage


def stage_folder(out: Path) -> Path:
    """The folder beside a corpus in which it is built."""
    return out.with_name(f".{out.name}.building")


def scratch_folder(address: str, scratch: Path) -> Path:
    """The folder within `scratch` in which the corpus for an address is built."""
    name = address.rstrip("/").rpartition("/")[2]
    return scratch / f".{name}.{hashlib.sha256(address.encode()).hexdigest()[:8]}.building"


@contextmanager
def staging(folder: Path, key: str, what: str) -> Iterator[Stage]:
    """A stage for one build; gone at the end, unless the build was stopped in a way that a second run can mend.

    key : of the build.  what : it makes, for messages.

    Raises
    ------
    ValueError
        If another process is building there.
    OSError
        If the folder cannot be written to, or its disk is full; what is finished stays then, as after a kill.
    """
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder, what):
        stage = _begin(folder, key, what, is_new=is_new)
        try:
            yield stage
        except (ValueError, TypeError):
            _remove(folder)
            raise
        except BaseException as error:
            _log.warning("%s: stopped; the same command goes on from what is in %s", what, folder)
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise OSError(
                    f"{what}: the disk of {folder} is full; free some space and run the command again, it goes on where it stopped"
                ) from error
            raise
        _remove(folder)


@contextmanager
def _locked(folder: Path, what: str) -> Iterator[None]:
    """One build at a time. The system frees the lock when a process dies."""
    name = folder / _LOCK
    with ExitStack() as stack:
        try:
            handle = stack.enter_context(open(name, "w"))
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_own = os.stat(name).st_ino == os.fstat(handle.fileno()).st_ino
        except (BlockingIOError, FileNotFoundError):
            is_own = False  # taken, or its last holder has just removed it
        if not is_own:
            raise ValueError(
                f"{what}: another process is building it in {folder}; wait until it has ended, then run again"
            )
        yield


def _begin(folder: Path, key: str, what: str, *, is_new: bool) -> Stage:
    plan = read_json(folder / _PLAN)
    is_resumed = plan is not None and plan.get("key") == key
    if not is_resumed:
        if not is_new:
            _log.warning("%s: removing what another, unfinished build left in %s", what, folder)
        for path in folder.iterdir():
            if path.name != _LOCK:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    stage = make_stage(folder, key, is_resumed=is_resumed)
    for part in (stage.spills, stage.shards, stage.done):
        for left in part.glob("*.part"):
            left.unlink(missing_ok=True)
    if not is_resumed:
        write_json(folder / _PLAN, {"key": key, "what": what})
        sync(folder)
    return stage


def _remove(folder: Path) -> None:
    """Remove a stage, the lock last: who comes next finds a whole stage or none."""
    for path in sorted(folder.iterdir(), key=lambda path: path.name == _LOCK):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    with suppress(OSError):  # the next build is there already
        folder.rmdir()
