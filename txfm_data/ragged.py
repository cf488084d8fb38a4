"""Ragged samples: what a store scan yields and a shard block holds."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Ragged:
    """Non-zero counts of consecutive samples, as CSR.

    indptr : (n + 1,) int64. Start of each sample in the other two arrays; begins at 0.
    gene_ids : (nnz,) uint16. Token ids, strictly ascending within a sample.
    counts : (nnz,) uint32, or float64 where values need not be whole. Raw counts, all above zero.
    """

    indptr: np.ndarray
    gene_ids: np.ndarray
    counts: np.ndarray

    def __len__(self) -> int:
        return len(self.indptr) - 1

    @property
    def nnz(self) -> int:
        """Number of non-zero counts."""
        return len(self.gene_ids)

    def check(self, n_genes: int, where: str) -> None:
        """Refuse arrays that are not ragged samples over a vocabulary of `n_genes`.

        Raises
        ------
        ValueError
            Names `where`, what was expected and what was found.
        """
        if len(self.indptr) == 0 or self.indptr[0] != 0 or (np.diff(self.indptr) < 0).any():
            raise ValueError(f"{where}: indptr must start at 0 and never fall; the data is damaged")
        if self.indptr[-1] != len(self.gene_ids) or len(self.gene_ids) != len(self.counts):
            raise ValueError(
                f"{where}: indptr ends at {self.indptr[-1]}, but there are {len(self.gene_ids)} gene ids and "
                f"{len(self.counts)} counts; the data is truncated"
            )
        if not len(self.gene_ids):
            return
        if int(self.gene_ids.max()) >= n_genes:
            raise ValueError(f"{where}: gene id {self.gene_ids.max()} is outside the vocabulary of {n_genes} genes")
        rising = np.diff(self.gene_ids.astype(np.int32)) > 0
        starts = self.indptr[1:-1]
        starts = starts[(starts > 0) & (starts < len(self.gene_ids))]
        rising[starts - 1] = True
        if not rising.all():
            raise ValueError(f"{where}: gene ids of a sample are not strictly ascending; the data is damaged")
        if not self.counts.min() > 0 or not np.isfinite(self.counts.max()):
            raise ValueError(f"{where}: a zero, negative or non-finite value is stored as a count; the data is damaged")


def concatenate(parts: list[Ragged]) -> Ragged:
    """Join ragged samples end to end."""
    lengths = np.concatenate([np.zeros(1, np.int64), *[np.diff(part.indptr) for part in parts]])
    if not parts:
        return Ragged(lengths, np.empty(0, np.uint16), np.empty(0, np.uint32))
    return Ragged(
        np.cumsum(lengths),
        np.concatenate([part.gene_ids for part in parts]),
        np.concatenate([part.counts for part in parts]),
    )
