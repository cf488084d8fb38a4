"""Blocks of an append to a Zarr store: one raw file each, written in any order and from any process."""

import os
import re
import secrets
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from txfm_data.ragged import Ragged
from txfm_data.store.zarr_layout import blocks_folder

_NAME = re.compile(r"(\d{15})-(\d{9})\.npy")


@dataclass(frozen=True, kw_only=True)
class ZarrSink:
    """Takes rows [start, stop) of the store in `folder`, in blocks. Can be sent to another process.

    n_vars : genes of the vocabulary.  dtype : name of the values' dtype.
    """

    folder: str
    start: int
    stop: int
    n_vars: int
    dtype: str

    def write(self, first_row: int, samples: Ragged) -> None:
        """Write samples as rows from `first_row` (of the store); gene ids are tokens of the store, ascending.

        Raises
        ------
        ValueError
            If the rows are not among those expected, were written before, or are not ragged samples.
        TypeError
            If the values are not whole and the store's are.
        """
        n = len(samples)
        where = f"{self.folder}: rows {first_row} to {first_row + n}"
        if not self.start <= first_row <= first_row + n <= self.stop:
            raise ValueError(f"{where}: outside rows {self.start} to {self.stop} of this append")
        samples.check(self.n_vars, where)
        values = samples.counts
        if self.dtype == "uint32":
            if values.dtype.kind not in "iu":
                raise TypeError(f"{where}: values of {values.dtype}, but the store holds whole counts (uint32)")
            if len(values) and not 0 <= int(values.min()) <= int(values.max()) < 2**32:
                raise ValueError(f"{where}: a count of {values.max()}, the store holds at most {2**32 - 1} (uint32)")
        if not n:
            return
        name = f"{first_row:015d}-{n:09d}.npy"
        target = blocks_folder(self.folder, self.start) / name
        if target.exists():
            raise ValueError(f"{where}: written twice; give each block to one process")
        staging = target.with_name(f".{name}.{secrets.token_hex(4)}")
        with open(staging, "wb") as handle:
            for array in (
                samples.indptr.astype(np.int64),
                samples.gene_ids.astype(np.uint16),
                values.astype(self.dtype),
            ):
                np.save(handle, array, allow_pickle=False)
        os.replace(staging, target)

    def blocks(self, start: int, stop: int) -> Iterator[Ragged]:
        """All blocks in row order.

        Raises
        ------
        ValueError
            If they do not hold each row of [start, stop) once. Nothing has been yielded then.
        """
        found = sorted(
            (int(match[1]), int(match[2]), path)
            for path in blocks_folder(self.folder, self.start).iterdir()
            if (match := _NAME.fullmatch(path.name))
        )
        at = start
        for first, n, _ in found:
            if first != at:
                what = "were not written" if first > at else "were written twice"
                raise ValueError(f"{self.folder}: rows {min(at, first)} to {max(at, first)} {what}; ingest it again")
            at += n
        if at != stop:
            raise ValueError(f"{self.folder}: rows {at} to {stop} were not written; ingest it again")
        for _, n, path in found:
            with open(path, "rb") as handle:
                indptr, genes, counts = (np.load(handle, allow_pickle=False) for _ in range(3))
            if len(indptr) != n + 1:
                raise ValueError(f"{path}: {len(indptr) - 1} rows, expected {n}; the block is damaged, ingest it again")
            yield Ragged(indptr, genes, counts)
