"""Rules on quality: genes seen in enough samples, samples with enough genes (paper, B.1).

Counts are read only where what the store has counted already, non-zeros of each gene and of each sample, does not decide.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
from numba import njit

from txfm_data.curate.blocks import RowBlock, blocks_of, cost_of, opened, scan_block, version_of
from txfm_data.curate.labels import read_controls, read_nnz
from txfm_data.curate.recipe import CellsByGenes, GenesByCells
from txfm_data.curate.state import Context, Details, State
from txfm_data.parallel import Pool
from txfm_data.progress import Progress
from txfm_data.store.ledger import DatasetRecord

_TOKENS = 2**16
"""A gene id is a uint16, so that a table of so many entries can be indexed by any."""


@njit(nogil=True, cache=True)
def count_by_gene(indptr, gene_ids, at, out):  # type: ignore[no-untyped-def]
    """Add to each gene the number of chosen samples that have it.

    indptr : (n + 1,) int64.  gene_ids : (nnz,) uint16.  at : (k,) int64, places of the samples.
    out : (65,536,) int64, added to.
    """
    for i in at:
        for j in range(indptr[i], indptr[i + 1]):
            out[gene_ids[j]] += 1


@njit(nogil=True, cache=True)
def count_by_sample(indptr, gene_ids, at, is_counted, out):  # type: ignore[no-untyped-def]
    """Count the genes of each chosen sample that are among some genes.

    indptr, gene_ids, at : as in `count_by_gene`.  is_counted : (65,536,) bool.  out : (k,) int64.
    """
    for k in range(at.shape[0]):
        n = 0
        for j in range(indptr[at[k]], indptr[at[k] + 1]):
            n += is_counted[gene_ids[j]]
        out[k] = n


@dataclass(frozen=True)
class GeneCounts:
    """Work on one block: in how many of its wanted samples each gene is above zero.

    path, version : of the store (`version_of`).  n_genes : of its vocabulary.
    """

    path: str
    version: str
    n_genes: int

    def __call__(self, block: RowBlock) -> tuple[int, np.ndarray]:
        """Number of the block, and (n_genes,) int64.

        Raises
        ------
        ValueError
            If the block holds genes beyond the vocabulary.
        """
        out = np.zeros(_TOKENS, np.int64)
        for _, at, samples in scan_block(opened(self.path, self.version), block, genes_only=True):
            count_by_gene(samples.indptr, samples.gene_ids, at, out)
        if out[self.n_genes :].any():
            raise ValueError(
                f"{self.path}: rows {block.rows[0]} to {block.rows[-1]} hold gene {int(np.flatnonzero(out)[-1])}, but the "
                f"vocabulary has {self.n_genes} genes; the store is damaged, restore it from a copy"
            )
        return block.number, out[: self.n_genes].copy()


@dataclass(frozen=True)
class SampleCounts:
    """Work on one block: how many of some genes are above zero in each of its wanted samples.

    path, version : of the store (`version_of`).  is_counted : (65,536,) bool, by token.
    """

    path: str
    version: str
    is_counted: np.ndarray

    def __call__(self, block: RowBlock) -> tuple[int, np.ndarray]:
        """Number of the block, and one int64 for each of its rows."""
        out, done = np.empty(len(block.rows), np.int64), 0
        for ids, at, samples in scan_block(opened(self.path, self.version), block, genes_only=True):
            count_by_sample(samples.indptr, samples.gene_ids, at, self.is_counted, out[done : done + len(ids)])
            done += len(ids)
        return block.number, out


def apply_genes_by_cells(
    rule: GenesByCells, state: State, records: tuple[DatasetRecord, ...], context: Context
) -> Details:
    """Keep, in the panel of each dataset, the genes above zero in enough of its samples that are left.

    Reads no counts while all samples of a dataset are left; else the rows that are left, or those that are gone, whichever
    are fewer to read.

    Returns
    -------
    dict
        For each dataset: min_cells, the number that was asked of a gene; rows_read; warning, if no gene is left.
    """
    details: Details = {}
    for record in records:
        n_samples, panel = state.n_samples(record), state.panels[record.name]
        # As the decimal number that was written: 0.28 of 25 cells is 7, though 0.28 * 25 is a little more as a float.
        least = max(rule.min_cells, math.ceil(Fraction(str(rule.min_fraction)) * n_samples))
        n_cells, n_read = _cells_by_gene(state, record, context, f"{rule.name} {record.name}")
        state.panels[record.name] = panel[n_cells[panel] >= least]
        details[record.name] = {"min_cells": least, "rows_read": n_read}
        if len(panel) and not len(state.panels[record.name]):
            details[record.name]["warning"] = (
                f"keeps no gene: none of {len(panel):,} is above zero in {least:,} of the {n_samples:,} samples left; "
                "lower min_cells, or leave the dataset out"
            )
    return details


def _cells_by_gene(state: State, record: DatasetRecord, context: Context, label: str) -> tuple[np.ndarray, int]:
    """In how many of the rows that are left each gene is above zero, (G,) int64, and how many rows were read for it."""
    total = state.store.gene_nnz(record)
    gone = np.flatnonzero(~state.alive[record.obs_start : record.obs_stop])
    if not len(gone):
        return total, 0
    gone += record.obs_start
    rows = state.rows(record)
    here, there = blocks_of(record, rows), blocks_of(record, gone)
    is_less = (sum(map(cost_of, there)), len(gone)) < (sum(map(cost_of, here)), len(rows))
    blocks = there if is_less else here
    counted = np.zeros_like(total)
    work = GeneCounts(state.store.path, version_of(state.store), len(total))
    for _, found in _run(context.pool, work, blocks, context.progress(label)):
        counted += found
    return (total - counted, len(gone)) if is_less else (counted, len(rows))


def apply_cells_by_genes(
    rule: CellsByGenes, state: State, records: tuple[DatasetRecord, ...], context: Context
) -> Details:
    """Keep the samples with enough genes above zero, and not too many, among those left in the panel of their dataset.

    Reads no counts while the genes that left the panel had none; else the rows for which it matters which genes left.

    Returns
    -------
    dict
        For each dataset: rows_read; with `keep_controls` also controls_kept, those kept in spite of the rule.

    Raises
    ------
    ValueError
        If obs does not say of a sample how many genes it has.
    """
    details: Details = {}
    nnz = read_nnz(state.store)
    controls = read_controls(state.store) if rule.keep_controls else None
    for record in records:
        part = slice(record.obs_start, record.obs_stop)
        is_kept, n_read = _enough_genes(rule, state, record, nnz[part], context)
        details[record.name] = {"rows_read": n_read}
        if controls is not None:
            saved = state.alive[part] & controls[part] & ~is_kept
            details[record.name]["controls_kept"] = int(np.count_nonzero(saved))
            is_kept |= controls[part]
        state.alive[part] &= is_kept
    return details


def _enough_genes(
    rule: CellsByGenes, state: State, record: DatasetRecord, nnz: np.ndarray, context: Context
) -> tuple[np.ndarray, int]:
    """Which samples of the dataset pass the rule, as far as they are left, and how many rows were read for it.

    nnz : (record.n_obs,) int32.  Held are masks, 8 bytes for each row to read, and none for the others.
    """
    store, panel = state.store, state.panels[record.name]
    alive = state.alive[record.obs_start : record.obs_stop]
    missing = alive & (nnz < 0)
    if missing.any():
        raise ValueError(
            f"{store.path}: obs has no nnz for sample {record.obs_start + int(np.argmax(missing))}; the store is damaged, "
            "restore it from a copy"
        )
    lost = store.gene_nnz(record)
    lost[panel] = 0
    # A sample has lost at most one count above zero for each such gene, and all samples together as many as there were.
    n_lost, least, most = min(int(np.count_nonzero(lost)), int(lost.sum())), rule.min_genes, rule.max_genes
    # Of its nnz genes a sample has from nnz - n_lost to nnz left, and never less than none nor more than the panel has.
    is_kept = nnz >= (least + n_lost if least else 0)
    is_open = alive & (nnz >= (least if least <= len(panel) else _TOKENS + 1))
    if most is not None:
        is_kept &= nnz <= (most if most < len(panel) else _TOKENS)
        is_open &= nnz <= most + n_lost
    is_open &= ~is_kept
    asked = np.flatnonzero(is_open)
    if not len(asked):
        return is_kept, 0
    asked += record.obs_start
    is_counted = np.zeros(_TOKENS, bool)
    is_counted[panel] = True
    blocks = blocks_of(record, asked)
    work, rows = SampleCounts(store.path, version_of(store), is_counted), {block.number: block.rows for block in blocks}
    for number, n_genes in _run(context.pool, work, blocks, context.progress(f"{rule.name} {record.name}")):
        is_enough = (n_genes >= least) & (n_genes <= (_TOKENS if most is None else most))
        is_kept[rows[number] - record.obs_start] = is_enough
    return is_kept, len(asked)


def _run(pool: Pool, work: Any, blocks: Sequence[RowBlock], progress: Progress) -> Iterator[tuple[int, np.ndarray]]:
    """Results of blocks as they come, telling of the rows that are done; nothing is started for no blocks."""
    if not blocks:
        return
    sizes = {block.number: len(block.rows) for block in blocks}
    done, total = 0, sum(sizes.values())
    for number, result in pool.run(work, blocks):
        done += sizes[number]
        progress(done, total)
        yield number, result
