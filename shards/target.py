"""Where a corpus goes when it is whole: a folder of this machine, or an object store, the manifest last."""

import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from shards.entries import MANIFEST, PANELS, SPLITS, TRAIN_SAMPLES, VOCABULARY
from shards.staging import Stage, make_stage, scratch_folder, stage_folder, staging
from shards.tar import sync
from txfm_data import address as addresses
from txfm_data.retry import with_retries

_NOTHING = "nothing there"
_OURS = re.compile(
    rf"({'|'.join(SPLITS)})-\d{{6,}}\.tar|{'|'.join(map(re.escape, (VOCABULARY, PANELS, TRAIN_SAMPLES)))}"
)
"""Names of what an upload that was stopped leaves: all of a corpus but its manifest."""


class Target:
    """One place for one corpus.

    out : a folder that must not exist yet, or be empty; or an address on object storage that holds no corpus.
    scratch : folder in which it is built; by default beside `out`, or for object storage a temporary one.

    Attributes
    ----------
    name : the place, for messages.  folder : in which it is built.

    Raises
    ------
    FileExistsError
        If something is there.
    """

    def __init__(self, out: str | Path, scratch: str | Path | None) -> None:
        self._address = str(out)
        self._is_remote = addresses.is_remote(out)
        self._is_temporary = self._is_remote and scratch is None
        self.name = addresses.redact(self._address)
        if self._is_remote:
            place = Path(tempfile.gettempdir()) if scratch is None else addresses.local_path(scratch)
            self.folder = scratch_folder(self._address, place)
        else:
            self._path = addresses.local_path(out)
            if not self._path.name:
                raise ValueError(f"{out}: not the name of a folder that could be made")
            self.folder = (
                stage_folder(self._path)
                if scratch is None
                else scratch_folder(str(self._path), addresses.local_path(scratch))
            )
        self._check_free()

    def _check_free(self) -> None:
        if not self._is_remote:
            if self._path.exists() and (not self._path.is_dir() or any(self._path.iterdir())):
                raise FileExistsError(
                    f"{self._path}: exists and is not an empty folder; name another --out, or remove it first"
                )
            return
        try:
            found = list(addresses.list_files(self._address))
        except FileNotFoundError as error:
            if _NOTHING in str(error):
                return
            raise  # not even the bucket is there
        if MANIFEST in found or not all(_OURS.fullmatch(name) for name in found):
            raise FileExistsError(
                f"{self.name}: holds something already ({found[0]}); name another --out, or remove it first"
            )

    @contextmanager
    def stage(self, key: str) -> Iterator[Stage]:
        """The folder in which the corpus of this key is built, for as long as the block lasts."""
        if not self._is_temporary:
            with staging(self.folder, key, self.name) as stage:
                yield stage
            return
        with tempfile.TemporaryDirectory(prefix="txfm-shard-") as folder:
            yield make_stage(Path(folder), key)

    def publish(self, folder: Path) -> None:
        """Let a finished corpus take its place, whole or not at all."""
        self._check_free()
        if self._is_remote:
            _upload(folder, self._address)
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        if folder.stat().st_dev != self._path.parent.stat().st_dev:
            folder = _copied(folder, self._path)
        if self._path.exists():
            self._path.rmdir()
        os.rename(folder, self._path)
        sync(self._path.parent)


def _copied(folder: Path, beside: Path) -> Path:
    """A copy, on disk, beside where it is to go."""
    copy = beside.with_name(f".{beside.name}.{secrets.token_hex(4)}.tmp")
    try:
        shutil.copytree(folder, copy)
        for path in (*copy.iterdir(), copy):
            sync(path)
    except BaseException:
        shutil.rmtree(copy, ignore_errors=True)
        raise
    return copy


def _upload(folder: Path, address: str) -> None:
    """Upload a corpus, its manifest last; what a stopped upload of another corpus left goes first."""
    names = sorted(path.name for path in folder.iterdir())
    try:
        left = set(addresses.list_files(address))
    except FileNotFoundError:
        left = set()
    if left - set(names):
        addresses.remove_tree(address)
    for name in sorted(names, key=lambda name: name == MANIFEST):
        place = addresses.join(address, name)
        with_retries(
            partial(addresses.upload, folder / name, place),
            what=f"uploading {addresses.redact(place)}",
            remedy="check the network and the rights, and run the command again",
        )
