"""Panels: which genes each dataset measured. A gene outside a sample's panel is unknown, never zero."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa


@dataclass(frozen=True)
class Panels:
    """Panels of a corpus, one after the other.

    indptr : (N + 1,) int64. Start of each panel in the other two arrays.
    gene_ids : (sum P,) uint16. Token ids, ascending within a panel.
    mean_normalized : (sum P,) float32. Mean of L c / library size over the train samples of the panel: the best
        constant prediction of a gene under the Poisson loss. 0 where the panel has no train sample.
    """

    indptr: np.ndarray
    gene_ids: np.ndarray
    mean_normalized: np.ndarray

    def __len__(self) -> int:
        return len(self.indptr) - 1

    def genes(self, panel_id: int) -> np.ndarray:
        """Token ids of one panel, ascending, (P,) uint16."""
        return self.gene_ids[self.indptr[panel_id] : self.indptr[panel_id + 1]]

    def mean(self, panel_id: int) -> np.ndarray:
        """Mean normalised count of each gene of one panel, (P,) float32."""
        return self.mean_normalized[self.indptr[panel_id] : self.indptr[panel_id + 1]]

    @property
    def largest(self) -> int:
        """Number of genes of the largest panel."""
        return int(np.diff(self.indptr).max(initial=0))


def make_panels(genes: Sequence[np.ndarray], means: Sequence[np.ndarray]) -> Panels:
    """Join per-dataset panels (ascending token ids) and their means into one table."""
    indptr = np.concatenate([[0], np.cumsum([len(g) for g in genes])]).astype(np.int64)
    if not genes:
        return Panels(indptr, np.empty(0, np.uint16), np.empty(0, np.float32))
    return Panels(indptr, np.concatenate(genes).astype(np.uint16), np.concatenate(means).astype(np.float32))


def write_panels(path: str | Path, panels: Panels) -> None:
    """Write panels as an Arrow IPC file: panel_id, gene_ids, mean_normalized."""
    lists = {
        "panel_id": pa.array(np.arange(len(panels), dtype=np.int32)),
        "gene_ids": pa.LargeListArray.from_arrays(panels.indptr, pa.array(panels.gene_ids)),
        "mean_normalized": pa.LargeListArray.from_arrays(panels.indptr, pa.array(panels.mean_normalized)),
    }
    table = pa.table(lists)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)


def read_panels(path: str | Path, n_genes: int) -> Panels:
    """Read what `write_panels` wrote; `n_genes` is the size of the vocabulary that the ids point into.

    Raises
    ------
    ValueError
        If a panel is not a strictly ascending subset of the vocabulary.
    """
    with pa.OSFile(str(path), "rb") as source:
        table = pa.ipc.open_file(source).read_all().combine_chunks()
    if len(table) == 0:
        return make_panels([], [])
    lists = table["gene_ids"].chunk(0)
    indptr = lists.offsets.to_numpy().astype(np.int64)
    gene_ids = lists.values.to_numpy().astype(np.uint16)
    panels = Panels(indptr, gene_ids, table["mean_normalized"].chunk(0).values.to_numpy().astype(np.float32))
    for panel_id in range(len(panels)):
        genes = panels.genes(panel_id).astype(np.int64)
        if len(genes) and (genes[-1] >= n_genes or (np.diff(genes) <= 0).any()):
            raise ValueError(f"{path}: panel {panel_id} is not an ascending subset of the {n_genes} genes; rebuild it")
    return panels
