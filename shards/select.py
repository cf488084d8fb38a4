"""What goes into a shard corpus: datasets and the genes each keeps. Reads no counts."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from shards.codec import MAX_BLOCK_SAMPLES
from txfm_data.vocabulary import Vocabulary

if TYPE_CHECKING:  # a machine that only trains has no tiledbsoma
    from txfm_data.selection import Selection
    from txfm_data.store.ledger import DatasetRecord
    from txfm_data.store.protocol import Store

VAL_BATCHES = 0.1
"""Share of the batches that is held out where nobody says otherwise."""


@dataclass(frozen=True, kw_only=True)
class ShardConfig:
    """How a store becomes shards.

    datasets : names; all of the store if empty.
    min_cells, min_cell_fraction : a dataset keeps a gene that is above zero in at least so many of its samples.
    selection : folder of a selection (docs/format_selection.md), which chooses datasets, samples and genes instead.
    val_batches : share of each dataset's experimental batches to hold out; by default `VAL_BATCHES`, or what the
        selection says.
    weights : by name, share of a dataset's train samples that an epoch serves, above 0 and at most 1, which is the default.
    obs_columns : columns of obs that blocks carry besides the batch.
    target_sum : counts that libraries are scaled to, for the statistics of genes.
    block_rows, lanes, mix_blocks : docs/format_shards.md, "Order".  shard_bytes : about what a shard holds.
    """

    datasets: tuple[str, ...] = ()
    min_cells: int = 0
    min_cell_fraction: float = 0.0
    selection: str | None = None
    val_batches: float | None = None
    weights: Mapping[str, float] = field(default_factory=dict)
    obs_columns: tuple[str, ...] = ()
    seed: int = 0
    target_sum: float = 1e5
    block_rows: int = 1_024
    lanes: int = 16
    mix_blocks: int = 2
    shard_bytes: int = 256 * 1024**2

    def __post_init__(self) -> None:
        share = 0.0 if self.val_batches is None else self.val_batches
        checks = (
            (self.min_cells >= 0, f"min_cells must not be negative, got {self.min_cells}"),
            (
                0 <= self.min_cell_fraction <= 1,
                f"min_cell_fraction must lie between 0 and 1, got {self.min_cell_fraction}",
            ),
            (0 <= share < 1, f"val_batches is a share of the batches, at least 0 and below 1, got {share}"),
            (0 <= self.seed < 2**63, f"seed must not be negative, nor need more than 63 bits, got {self.seed}"),
            (0 < self.target_sum < np.inf, f"target_sum must be a positive number, got {self.target_sum}"),
            (
                1 <= self.lanes <= 65_536 and 1 <= self.mix_blocks <= 65_536,
                f"lanes and mix_blocks must lie between 1 and 65,536, got {self.lanes} and {self.mix_blocks}",
            ),
            (
                2 <= self.block_rows <= MAX_BLOCK_SAMPLES,
                f"block_rows must lie between 2 and {MAX_BLOCK_SAMPLES} samples, got {self.block_rows}",
            ),
            (self.shard_bytes >= 1024**2, f"shard_bytes must be at least 1 MiB, got {self.shard_bytes}"),
            (
                self.selection is None or not (self.datasets or self.min_cells or self.min_cell_fraction),
                "a selection chooses datasets and genes already; leave out --datasets, --min-cells and --min-cell-fraction, or "
                "make another selection",
            ),
        )
        for holds, message in checks:
            if not holds:
                raise ValueError(message)
        for name, weight in self.weights.items():
            if not 0 < weight <= 1:
                raise ValueError(
                    f"weight of dataset {name!r} is {weight}; it is the share of its samples that an epoch serves, above 0 and at "
                    "most 1: to serve a dataset more often than others, lower the weights of the others"
                )
        for column in self.obs_columns:
            if self.obs_columns.count(column) > 1:
                raise ValueError(f"obs column {column!r} is named twice")


@dataclass(frozen=True)
class Chosen:
    """Datasets and genes of a corpus.

    records : datasets, in order.  vocabulary : genes that at least one of them keeps, in the store's order.
    store_tokens : (G,) int64, token of each in the store.
    panels : per dataset, ascending token ids of the new vocabulary, uint16.
    kept : per dataset, share of its non-zero values that its genes keep.
    selection : that chose the samples; None takes all of them.
    """

    records: "tuple[DatasetRecord, ...]"
    vocabulary: Vocabulary
    store_tokens: np.ndarray
    panels: tuple[np.ndarray, ...]
    kept: tuple[float, ...]
    selection: "Selection | None"

    def tokens(self, number: int, n_store: int) -> np.ndarray:
        """New token id of each of the store's `n_store` genes for one dataset, -1 where it goes: (n_store,) int32."""
        token = np.full(n_store, -1, np.int32)
        token[self.store_tokens[self.panels[number]]] = self.panels[number]
        return token


def select(store: "Store", config: ShardConfig) -> Chosen:
    """Choose datasets and genes.

    Raises
    ------
    ValueError
        If a dataset does not exist, or keeps no gene; if the store holds no counts, or the selection is not of this store.
    FileNotFoundError
        If there is no such selection.
    """
    if not store.datasets:
        raise ValueError(f"{store.path}: the store holds no dataset; ingest one first")
    if store.values != "counts":
        raise ValueError(
            f"{store.path}: holds {store.values} values, and training needs raw counts; ingest the counts into another store"
        )
    selection: Selection | None = None
    if config.selection is not None:
        from txfm_data.selection import read_selection

        selection = read_selection(config.selection, store)
        if selection.is_val is not None and config.val_batches is not None:
            raise ValueError(
                f"{config.selection}: the selection says which samples are held out; leave out --val-batches"
            )
        records, genes = selection.records, selection.genes
    else:
        records = tuple(store.dataset(name) for name in config.datasets) or store.datasets
        if len({record.name for record in records}) != len(records):
            raise ValueError(f"datasets are named twice: {[record.name for record in records]}")
        genes = tuple(_expressed(store, record, config) for record in records)
    unknown = sorted(config.weights.keys() - {record.name for record in records})
    if unknown:
        raise ValueError(
            f"--weight names dataset {unknown[0]!r}, which is not taken; taken are {[r.name for r in records]}"
        )
    store_tokens = np.unique(np.concatenate(genes))
    ids, symbols = store.vocabulary.gene_ids, store.vocabulary.symbols
    vocabulary = Vocabulary(tuple(ids[t] for t in store_tokens), tuple(symbols[t] for t in store_tokens))
    panels = tuple(np.searchsorted(store_tokens, panel).astype(np.uint16) for panel in genes)
    kept = tuple(
        float(store.gene_nnz(record)[panel].sum()) / max(1, record.nnz)
        for record, panel in zip(records, genes, strict=True)
    )
    return Chosen(records, vocabulary, store_tokens, panels, kept, selection)


def _expressed(store: "Store", record: "DatasetRecord", config: ShardConfig) -> np.ndarray:
    """Genes of a dataset that are above zero in enough of its samples: ascending tokens of the store."""
    expressed, panel = store.gene_nnz(record), store.panel(record)
    least = max(config.min_cells, int(np.ceil(config.min_cell_fraction * record.n_obs)))
    genes: np.ndarray = panel[expressed[panel] >= least]
    if not len(genes):
        raise ValueError(
            f"{store.path}: no gene of dataset {record.name!r} is above zero in {least} of its {record.n_obs} samples; "
            "lower --min-cells or --min-cell-fraction, or leave the dataset out with --datasets"
        )
    return genes
