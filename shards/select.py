"""What goes into a shard corpus: datasets, the genes each keeps, and which samples are held out. Reads no counts."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from shards.order import permutation
from txfm_data.vocabulary import Vocabulary

if TYPE_CHECKING:  # a machine that only trains has no tiledbsoma
    from txfm_data.store.ledger import DatasetRecord
    from txfm_data.store.protocol import Store

_SPLIT_BATCHES, _SPLIT_SAMPLES = 2**60 + 2**40, 2**60 + 2**41


@dataclass(frozen=True, kw_only=True)
class ShardConfig:
    """How a store becomes shards.

    datasets : names; all of the store if empty.
    min_cells, min_cell_fraction : a dataset keeps a gene that is above zero in at least so many of its samples.
    val_batches : share of each dataset's experimental batches to hold out.
    target_sum : counts that libraries are scaled to, for the statistics of genes.
    block_rows, lanes, mix_blocks : docs/format_shards.md, "Order".  shard_bytes, memory_budget : bytes.
    """

    datasets: tuple[str, ...] = ()
    min_cells: int = 0
    min_cell_fraction: float = 0.0
    val_batches: float = 0.1
    seed: int = 0
    target_sum: float = 1e5
    block_rows: int = 1_024
    lanes: int = 16
    mix_blocks: int = 2
    shard_bytes: int = 256 * 1024**2
    memory_budget: int = 4 * 1024**3

    def __post_init__(self) -> None:
        checks = (
            (self.min_cells >= 0, f"min_cells must not be negative, got {self.min_cells}"),
            (
                0 <= self.min_cell_fraction <= 1,
                f"min_cell_fraction must lie between 0 and 1, got {self.min_cell_fraction}",
            ),
            (
                0 <= self.val_batches < 1,
                f"val_batches is a share of the batches, at least 0 and below 1, got {self.val_batches}",
            ),
            (self.seed >= 0, f"seed must not be negative, got {self.seed}"),
            (self.target_sum > 0, f"target_sum must be positive, got {self.target_sum}"),
            (min(self.lanes, self.mix_blocks) >= 1, "lanes and mix_blocks must be at least 1"),
            (self.block_rows >= 2, f"block_rows must be at least 2 samples, got {self.block_rows}"),
            (self.shard_bytes >= 1024**2, f"shard_bytes must be at least 1 MiB, got {self.shard_bytes}"),
            (
                self.memory_budget >= 1024**2,
                f"memory_budget must be at least 1 MiB, got {self.memory_budget}",
            ),
        )
        for holds, message in checks:
            if not holds:
                raise ValueError(message)


@dataclass(frozen=True)
class Selection:
    """The plan of a shard corpus.

    records : datasets, in order.  vocabulary : genes that at least one of them keeps, in the store's order.
    store_tokens : (G,) int64, token of each in the store.
    panels : per dataset, ascending token ids of the new vocabulary, uint16.
    nnz : non-zero counts that will be kept, over all datasets.
    """

    records: "tuple[DatasetRecord, ...]"
    vocabulary: Vocabulary
    store_tokens: np.ndarray
    panels: tuple[np.ndarray, ...]
    nnz: int


def select(store: "Store", config: ShardConfig) -> Selection:
    """Choose datasets and genes.

    Raises
    ------
    ValueError
        If a dataset does not exist, or keeps no gene.
    """
    records = tuple(store.dataset(name) for name in config.datasets) or store.datasets
    if not records:
        raise ValueError(f"{store.path}: the store holds no dataset; ingest one first")
    if store.values != "counts":
        raise ValueError(
            f"{store.path}: holds {store.values} values, and training needs raw counts; ingest the counts into another store"
        )
    if len({record.name for record in records}) != len(records):
        raise ValueError(f"datasets are named twice: {[record.name for record in records]}")
    kept, nnz = [], 0
    for record in records:
        expressed = store.gene_nnz(record)
        panel = store.panel(record)
        least = max(config.min_cells, int(np.ceil(config.min_cell_fraction * record.n_obs)))
        genes = panel[expressed[panel] >= least]
        if not len(genes):
            raise ValueError(
                f"{store.path}: no gene of dataset {record.name!r} is above zero in {least} of its {record.n_obs} samples; "
                "lower --min-cells or --min-cell-fraction, or leave the dataset out with --datasets"
            )
        kept.append(genes)
        nnz += int(expressed[genes].sum())
    store_tokens = np.unique(np.concatenate(kept))
    ids, symbols = store.vocabulary.gene_ids, store.vocabulary.symbols
    vocabulary = Vocabulary(tuple(ids[t] for t in store_tokens), tuple(symbols[t] for t in store_tokens))
    panels = tuple(np.searchsorted(store_tokens, genes).astype(np.uint16) for genes in kept)
    return Selection(records, vocabulary, store_tokens, panels, nnz)


def hold_out(
    batch: Sequence[str], n_samples: int, *, share: float, seed: int
) -> tuple[np.ndarray, str, tuple[str, ...]]:
    """Which samples of one dataset are validation: whole experimental batches, at least one and never all.

    batch : label of each sample.
    A dataset of a single batch has samples drawn instead, and says so.

    Returns
    -------
    (n,) bool, "batches" | "samples" | "none", and the names of the batches held out.
    """
    is_val = np.zeros(n_samples, bool)
    if share == 0 or n_samples < 2:
        return is_val, "none", ()
    labels = np.asarray(batch, dtype=object)
    names = sorted(set(labels))
    if len(names) == 1:
        n = min(max(1, round(share * n_samples)), n_samples - 1)
        is_val[permutation(n_samples, seed=seed, epoch=0, item=_SPLIT_SAMPLES)[:n]] = True
        return is_val, "samples", ()
    n = min(max(1, round(share * len(names))), len(names) - 1)
    chosen = sorted(names[i] for i in permutation(len(names), seed=seed, epoch=0, item=_SPLIT_BATCHES)[:n])
    is_val = np.isin(labels, np.array(chosen, dtype=object))
    return is_val, "batches", tuple(chosen)
