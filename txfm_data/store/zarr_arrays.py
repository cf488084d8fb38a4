"""Ranges of one-dimensional Zarr arrays: read with every check, each chunk decoded once; appended in whole files."""

from pathlib import Path
from typing import Any

import numpy as np

from txfm_data.store import files
from txfm_data.store.zarr_layout import damaged

_TRIES = 5
"""How often a part is read while appends take the store's place."""


def read_part(array: Any, part: tuple[slice, ...]) -> np.ndarray:
    """One rectangle of an array, refused if a file that it needs is missing, cut or changed.

    Zarr itself takes a missing file, and an empty one, for fill values. A part that was read while an append took the store's
    place is read again: between the two folders, files seem to be missing.

    Raises
    ------
    ValueError
        Names the array.
    """
    folder = str(array.store.root)
    for _ in range(_TRIES - 1):
        before = files.stamp(folder)
        try:
            values = _read_once(array, folder, part)
        except ValueError:
            if not files.replaced(folder, before):
                raise
        else:
            if not files.replaced(folder, before):
                return values
    return _read_once(array, folder, part)


def _read_once(array: Any, folder: str, part: tuple[slice, ...]) -> np.ndarray:
    size = array.shards or array.chunks
    ranges = [range(s.start // n, -(-s.stop // n)) for s, n in zip(part, size, strict=True)]
    for at in np.ndindex(*map(len, ranges)):
        key = array.metadata.encode_chunk_key(tuple(r[i] for r, i in zip(ranges, at, strict=True)))
        name = f"{array.path}/{key}"
        try:
            length = (Path(folder) / name).stat().st_size
        except OSError as error:
            raise damaged(folder, name, "the file is missing") from error
        if not length:
            raise damaged(folder, name, "the file is empty")
    try:
        values: np.ndarray = array[part]
    except (ValueError, RuntimeError, IndexError, TypeError, KeyError, OSError, MemoryError) as error:
        where = " x ".join(f"{s.start} to {s.stop}" for s in part)
        raise damaged(folder, array.path, f"elements {where} cannot be read ({error})") from error
    if values.shape != tuple(s.stop - s.start for s in part):
        raise damaged(folder, array.path, f"a part of shape {values.shape} came back")
    return values


class Reader:
    """Ranges of an array, which should ascend: what is decoded stays until a later range begins beyond it.

    ahead : elements to read at once at the least.
    stop : end of what will be asked for; nothing beyond its chunk is decoded.
    """

    def __init__(self, array: Any, *, ahead: int = 0, stop: int | None = None) -> None:
        self._array = array
        self._chunk = int(array.chunks[0])
        self._ahead = ahead
        self._limit = min(array.shape[0], self._up(array.shape[0] if stop is None else stop))
        self._first = self._last = 0
        self._held = np.empty(0, array.dtype)

    def _up(self, at: int) -> int:
        return -(-at // self._chunk) * self._chunk

    def read(self, start: int, stop: int) -> np.ndarray:
        """Elements [start, stop), a view of what is held."""
        if stop > start and not self._first <= start <= stop <= self._last:
            low = start - start % self._chunk
            high = max(self._up(stop), min(low + self._ahead, self._limit))
            high = min(self._up(high), self._array.shape[0])
            if self._first <= low < self._last:
                kept, begin = self._held[low - self._first :], self._last
            else:
                kept, begin = self._held[:0], low
            fresh = read_part(self._array, (slice(begin, high),))
            self._held = np.concatenate([kept, fresh]) if len(kept) else fresh
            self._first, self._last = low, high
        return self._held[max(0, start - self._first) : max(0, stop - self._first)] if stop > start else self._held[:0]


class Appender:
    """Adds values at the end of an array, encoding each file once.

    A last file that was not full is read (checked) and written again, so nothing damaged is sealed anew.
    """

    def __init__(self, array: Any) -> None:
        # A setting of the handle, not of the array: without it a chunk of zeros would have no file.
        self._array = array.with_config({"write_empty_chunks": True})
        self._block = int((array.shards or array.chunks)[0])
        end = array.shape[0]
        self._at = end - end % self._block
        tail = read_part(array, (slice(self._at, end),)) if end > self._at else np.empty(0, array.dtype)
        self._held = [tail]
        self._n_held, self._n_old = len(tail), len(tail)

    def add(self, values: np.ndarray) -> None:
        """Take values of the array's dtype; whole files are written when they are full."""
        while len(values):
            part = values[: self._block - self._n_held]
            values = values[len(part) :]
            # What waits must not be a view of a buffer that the caller fills again.
            self._held.append(part.astype(self._array.dtype))
            self._n_held += len(part)
            if self._n_held == self._block:
                self._flush()

    def finish(self) -> None:
        """Write the rest."""
        if self._n_held > self._n_old:
            self._flush()

    def _flush(self) -> None:
        stop = self._at + self._n_held
        self._array.resize((stop,))
        self._array[self._at : stop] = np.concatenate(self._held)
        self._at, self._n_held, self._n_old = stop, 0, 0
        self._held = []
