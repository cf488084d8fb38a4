"""Buffers that are used again: a fresh large array costs a page fault for each 4 KiB, more than filling it does.

Nobody gives a buffer back. It is free when nobody refers to it any more, and CPython knows that: arrays are views of a
base that the pool keeps, a view of any depth refers to the base, `torch.from_numpy` refers to the array, and so on.
So a batch may be kept as long as one likes; its memory is used again only when the last tensor of it is gone.
"""

import math
import sys
import threading
from collections.abc import Sequence
from typing import Protocol

import numpy as np

_KEPT = 64  # bases that a pool knows at most
_SMALL = 1 << 16  # bytes
_SPARE = 2  # a base serves arrays down to this part of it


class Buffers(Protocol):
    """Where the arrays of a batch come from."""

    def take(self, shape: int | Sequence[int], dtype: np.typing.DTypeLike) -> np.ndarray:
        """Array of that shape, whatever is in it; the caller's as long as something refers to it."""


class BufferPool:
    """Arrays over a few large buffers that are used again and again. Safe to use from several threads.

    It needs the reference counts of CPython with its global lock: a count that says "nobody but me" cannot rise by itself,
    since new references to a base come from views that exist, or from here.
    """

    def __init__(self) -> None:
        self._bases: list[np.ndarray] = []
        self._lock = threading.Lock()
        # What a count is when only the pool refers to a base depends on the interpreter: ask it, by the same code.
        self._bases.append(np.empty(1, np.uint8))
        self._idle_count = self._count(0)
        self._bases.clear()

    def _count(self, position: int) -> int:
        return sys.getrefcount(self._bases[position])

    def take(self, shape: int | Sequence[int], dtype: np.typing.DTypeLike) -> np.ndarray:
        """Array of that shape, whatever is in it; the caller's as long as something refers to it."""
        kind = np.dtype(dtype)
        sizes = (shape,) if isinstance(shape, int) else tuple(shape)
        n_bytes = math.prod(sizes) * kind.itemsize
        if n_bytes < _SMALL:
            return np.empty(sizes, kind)  # the allocator has memory of this size at hand
        with self._lock:
            base = self._base(n_bytes)
            return base[:n_bytes].view(kind).reshape(sizes)

    def _base(self, n_bytes: int) -> np.ndarray:
        """Smallest idle base that holds `n_bytes` and is not far larger, or a new one."""
        fits, outgrown = -1, -1
        for position in range(len(self._bases)):  # not over the bases: the loop itself would refer to them
            if self._count(position) != self._idle_count:
                continue
            size = len(self._bases[position])
            if n_bytes <= size <= _SPARE * n_bytes and (fits < 0 or size < len(self._bases[fits])):
                fits = position
            elif n_bytes <= _SPARE * size < _SPARE * n_bytes:
                outgrown = position
        if fits >= 0:
            return self._bases[fits]
        if outgrown >= 0 or len(self._bases) >= _KEPT:
            # One that batches have outgrown makes room. Or a consumer keeps many batches, and their memory with them:
            # the pool forgets about the oldest.
            del self._bases[max(outgrown, 0)]
        # Batches differ in size by a few percent: with some room the next one finds a place here as well.
        base = np.empty(n_bytes + n_bytes // 8, np.uint8)
        self._bases.append(base)
        return base
