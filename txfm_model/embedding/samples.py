"""Counted samples over a model's vocabulary, in parts: what embedding and imputing read, whatever they come from."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Part:
    """Some samples of an input, over the vocabulary of the model.

    start : position of the first among the input's samples; the others follow it.
    row_id : (n,) int64. What the draw of genes is keyed by: row of the file or of the store.
    indptr : (n + 1,) int64.  token_ids : (nnz,) int64, unique within a sample.  counts : (nnz,) numbers.
    library_size : (n,) float64. Counts of the whole library, over genes of the vocabulary and others; 0 where there are none.
    panel_id : (n,) int64.
    """

    start: int
    row_id: np.ndarray
    indptr: np.ndarray
    token_ids: np.ndarray
    counts: np.ndarray
    library_size: np.ndarray
    panel_id: np.ndarray

    def __len__(self) -> int:
        return len(self.row_id)


@dataclass(frozen=True, kw_only=True)
class Panel:
    """Genes that a dataset measured, as far as the model knows them.

    name : of the dataset.  measured : ascending token ids, int64.  shown : those that the encoder may be shown.
    n_genes : genes of the dataset, known to the model or not.  n_obs : samples, where known beforehand.
    """

    name: str
    measured: np.ndarray
    shown: np.ndarray
    n_genes: int
    n_obs: int


class SampleInput(Protocol):
    """Where samples come from, open for reading.

    Attributes
    ----------
    where : path or address as messages name it.  kind : "h5ad", "zarr", "store" or "shards".
    n_obs : samples.  panels : numbered as `Part.panel_id`.
    n_parts : how many parts `read` gives; it depends on the input alone.
    about : plain values that describe the input, for provenance.
    """

    where: str
    kind: str
    n_obs: int
    panels: tuple[Panel, ...]
    n_parts: int
    about: dict[str, Any]

    def rows_of(self, number: int) -> int:
        """Samples of part `number`."""
        ...

    def read(self, number: int) -> Part:
        """Part `number`; parts follow each other in the order of the samples."""
        ...

    def name_of(self, position: int) -> str:
        """What messages call a sample."""
        ...

    def obs(self) -> Callable[[], Iterator[tuple[np.ndarray, Any]]]:
        """Labels of all samples, as `txfm_data.anndata_out.ObsParts`."""
        ...

    def close(self) -> None:
        """Release files."""
        ...


def check_panels(where: str, panels: tuple[Panel, ...], n_vocabulary: int) -> None:
    """Refuse an input of which the model knows no gene.

    Raises
    ------
    ValueError
        Names the dataset.
    """
    for panel in panels:
        if len(panel.shown) == 0:
            raise ValueError(
                f"{where}: none of the {panel.n_genes} genes that {panel.name} measured is among the {n_vocabulary} of the model "
                "(or none is left to show); check that ids are Ensembl gene ids of the same species"
            )


def part_of_rows(rows: Any, tokens: np.ndarray, library_size: np.ndarray, start: int) -> Part:
    """Rows of a CSR matrix as a part of one panel; columns of token -1 are left out.

    rows : scipy CSR with unique columns in a row.  tokens : (n_vars,).  library_size : (n,) float64.
    """
    known = tokens[rows.indices]
    kept = known >= 0
    before = np.concatenate([[0], np.cumsum(kept)])
    n = rows.shape[0]
    return Part(
        start=start, row_id=np.arange(start, start + n), indptr=before[rows.indptr].astype(np.int64),
        token_ids=known[kept].astype(np.int64), counts=rows.data[kept], library_size=np.asarray(library_size, np.float64),
        panel_id=np.zeros(n, np.int64),
    )  # fmt: skip
