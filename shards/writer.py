"""Store to shards: read the selected counts, shuffle all samples, write blocks into tar files, manifest last.

The shuffle is held in memory for now, and a corpus that does not fit the memory budget is refused before anything
is read. Everything is written to a folder beside the target and renamed when it is whole.
"""

import os
import secrets
import shutil
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from shards import manifest as mf
from shards.codec import Block
from shards.order import SHUFFLE, block_sizes, permutation
from shards.packing import take_samples
from shards.select import Selection, ShardConfig, hold_out, select
from shards.tar import SplitWriter, file_entry, sync, write_synced
from txfm_data import kernels
from txfm_data.panels import Panels, make_panels, write_panels
from txfm_data.progress import Progress, ignore
from txfm_data.ragged import Ragged, concatenate
from txfm_data.vocabulary import GeneStatistics, write_vocabulary

if TYPE_CHECKING:
    from txfm_data.store.protocol import Store

_BYTES_PER_NNZ = 14  # uint16 + uint32 held twice while parts are joined, and the pieces of one scan
_BYTES_PER_SAMPLE = 200


@dataclass(frozen=True)
class _Samples:
    """All selected samples, in the order of the store."""

    sample_id: np.ndarray
    dataset: np.ndarray
    batch: np.ndarray
    library_size: np.ndarray
    is_val: np.ndarray
    ragged: Ragged


def build_shards(
    store: "Store", out: str | Path, config: ShardConfig, *, progress: Progress = ignore
) -> dict[str, Any]:
    """Write a shard corpus from a store.

    out : a folder that must not exist yet, or be empty.

    Returns
    -------
    dict
        out, n_genes, n_train, n_val, shards, blocks, bytes, bytes_per_sample, lanes, fingerprint, datasets.

    Raises
    ------
    ValueError
        If the selection is empty, would not fit the memory budget, or leaves nothing to train on.
    FileExistsError
        If `out` holds something.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out}: exists and is not an empty folder; name another --out, or remove it first")
    selection = select(store, config)
    n_samples = sum(record.n_obs for record in selection.records)
    need = selection.nnz * _BYTES_PER_NNZ + n_samples * _BYTES_PER_SAMPLE
    if need > config.memory_budget:
        raise ValueError(
            f"shuffling {n_samples} samples with {selection.nnz} counts takes about {need / 1e9:.2f} GB, the memory budget is "
            f"{config.memory_budget / 1e9:.2f} GB; raise --memory-budget, keep fewer genes, or shard fewer datasets"
        )
    samples, entries = _read(store, selection, config, lambda done, total: progress(done, 2 * total))
    n_train = int((~samples.is_val).sum())
    if n_train == 0:
        raise ValueError("every sample is held out for validation; lower --val-batches")
    out.parent.mkdir(parents=True, exist_ok=True)
    staging = out.with_name(f".{out.name}.{secrets.token_hex(4)}.tmp")
    staging.mkdir()
    try:
        files = _write_tables(staging, samples, selection, config)
        lanes = _fitting_lanes(config.lanes, n_train)
        splits = _write_splits(staging, samples, config, lanes, lambda n: progress(n_samples + n, 2 * n_samples))
        manifest = mf.Manifest(
            format=mf.FORMAT, version=mf.VERSION, values="counts", target_sum=config.target_sum, seed=config.seed, lanes=lanes,
            mix_blocks=config.mix_blocks, block_rows=config.block_rows, n_genes=len(selection.vocabulary),
            vocabulary_sha256=selection.vocabulary.fingerprint,
            filter={"min_cells": config.min_cells, "min_cell_fraction": config.min_cell_fraction},
            datasets=tuple(entries), files=files, splits=splits,
        )  # fmt: skip
        write_synced(staging / mf.MANIFEST, manifest.to_json().encode())
        sync(staging)
        if out.exists():
            out.rmdir()
        os.rename(staging, out)
        sync(out.parent)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return _result(out)


def _write_tables(
    folder: Path, samples: _Samples, selection: Selection, config: ShardConfig
) -> dict[str, mf.FileEntry]:
    """Write the vocabulary and the panels, with their statistics over the train samples."""
    statistics, panels = _statistics(samples, selection, config.target_sum)
    write_vocabulary(folder / mf.VOCABULARY, selection.vocabulary, statistics)
    write_panels(folder / mf.PANELS, panels)
    for name in (mf.VOCABULARY, mf.PANELS):
        sync(folder / name)
    return {name: file_entry(folder / name) for name in (mf.VOCABULARY, mf.PANELS)}


def _write_splits(
    folder: Path, samples: _Samples, config: ShardConfig, lanes: int, written: Callable[[int], None]
) -> dict[str, tuple[mf.ShardEntry, ...]]:
    """Write all samples of each split, shuffled; `written` is told how many so far."""
    splits, done = {}, 0
    for number, split in enumerate(mf.SPLITS):
        rows = np.flatnonzero(samples.is_val == (split == "val"))
        rows = rows[permutation(len(rows), seed=config.seed, epoch=0, item=SHUFFLE + number)]
        writer = SplitWriter(folder, split, config.shard_bytes)
        # The val split is served in stored order: lanes mean nothing there.
        sizes = block_sizes(len(rows), config.block_rows, lanes if split == "train" else 1) if len(rows) else rows
        for first, size in zip(np.cumsum(sizes) - sizes, sizes, strict=True):
            writer.add(_block(samples, rows[first : first + size]))
            done += int(size)
            written(done)
        splits[split] = writer.close()
    return splits


def _result(out: Path) -> dict[str, Any]:
    corpus = mf.Corpus(out)
    shards = [shard for split in mf.SPLITS for shard in corpus.shards(split)]
    n_bytes, n = sum(s.bytes for s in shards), sum(s.samples for s in shards)
    return {
        "out": str(out), "n_genes": len(corpus.vocabulary), "n_train": corpus.n_samples("train"), "n_val": corpus.n_samples("val"),
        "shards": len(shards), "blocks": sum(len(s.blocks) for s in shards), "bytes": n_bytes, "bytes_per_sample": n_bytes / n,
        "lanes": corpus.lanes, "fingerprint": corpus.fingerprint,
        "datasets": [
            {"name": d.name, "n_genes": len(corpus.panels.genes(d.panel_id)), "n_train": d.n_train, "n_val": d.n_val,
             "held_out": d.held_out, "val_batches": list(d.val_batches)}
            for d in corpus.manifest.datasets
        ],
    }  # fmt: skip


def _fitting_lanes(wanted: int, n_train: int) -> int:
    """Lanes as asked, or the largest power of two that as many train samples can fill."""
    return wanted if n_train >= wanted else 2 ** (n_train.bit_length() - 1)


def _read(
    store: "Store", selection: Selection, config: ShardConfig, progress: Progress
) -> tuple[_Samples, list[mf.DatasetEntry]]:
    """Counts of the selected datasets over the new vocabulary, and how each dataset is split."""
    n_samples = sum(record.n_obs for record in selection.records)
    obs = store.obs(["batch", "raw_sum"])
    joinid, library = obs["soma_joinid"].to_numpy(), obs["raw_sum"].to_numpy()
    batches = np.array(obs["batch"].to_pylist(), dtype=object)
    parts: list[Ragged] = []
    columns: dict[str, list[np.ndarray]] = defaultdict(list)
    entries, done = [], 0
    for number, record in enumerate(selection.records):
        rows = slice(*np.searchsorted(joinid, [record.obs_start, record.obs_stop]))
        is_val, held_out, names = hold_out(
            batches[rows].tolist(), record.n_obs, share=config.val_batches, seed=config.seed
        )
        n_val = int(is_val.sum())
        for key, values in (
            ("sample_id", joinid[rows]), ("dataset", np.full(record.n_obs, number, np.int32)), ("batch", batches[rows]),
            ("library_size", library[rows]), ("is_val", is_val),
        ):  # fmt: skip
            columns[key].append(values)
        n_train, source = record.n_obs - n_val, record.content_sha256
        entries.append(mf.DatasetEntry(record.name, number, record.modality, n_train, n_val, held_out, names, source))
        token = np.full(len(store.vocabulary), -1, np.int64)
        token[selection.store_tokens[selection.panels[number]]] = selection.panels[number]
        for _, part in store.scan(record.obs_start, record.obs_stop):
            parts.append(_restrict(part, token, f"{store.path}: dataset {record.name!r}"))
            done += len(part)
            progress(done, n_samples)
    joined = {name: np.concatenate(values) for name, values in columns.items()}
    return _Samples(**joined, ragged=concatenate(parts)), entries


def _restrict(part: Ragged, token: np.ndarray, where: str) -> Ragged:
    """The same samples over the kept genes; `token` is the new id of each old one, -1 where it goes."""
    gene = token[part.gene_ids]
    keep = gene >= 0
    before = np.concatenate([[0], np.cumsum(keep)])
    counts = part.counts[keep].astype(np.uint32)
    if not np.array_equal(counts, part.counts[keep]):
        raise ValueError(
            f"{where} holds expected counts that are not whole, which blocks of shards do not hold yet; leave the dataset out "
            "with --datasets"
        )
    return Ragged(before[part.indptr], gene[keep].astype(np.uint16), counts)


def _statistics(samples: _Samples, selection: Selection, target_sum: float) -> tuple[GeneStatistics, Panels]:
    """Statistics of genes, and mean normalised counts per panel, over the train samples."""
    n_genes = len(selection.vocabulary)
    measured, nonzero, log_sum = np.zeros(n_genes, np.int64), np.zeros(n_genes, np.int64), np.zeros(n_genes)
    means = []
    ragged = samples.ragged
    for number, panel in enumerate(selection.panels):
        total = np.zeros(n_genes)
        rows = np.flatnonzero((samples.dataset == number) & ~samples.is_val)
        for part in np.array_split(rows, max(1, len(rows) // 4_096)):
            taken = take_samples(ragged, part)
            normalized = np.empty(taken.nnz, np.float32)
            kernels.normalize(taken.indptr, taken.counts, samples.library_size[part], target_sum, normalized)
            total += np.bincount(taken.gene_ids, normalized, n_genes)
            log_sum += np.bincount(taken.gene_ids, np.log1p(normalized, dtype=np.float64), n_genes)
            nonzero += np.bincount(taken.gene_ids, minlength=n_genes)
        measured[panel] += len(rows)
        means.append(total[panel] / max(1, len(rows)))
    return GeneStatistics(measured, nonzero, log_sum / np.maximum(measured, 1)), make_panels(selection.panels, means)


def _block(samples: _Samples, rows: np.ndarray) -> Block:
    dataset = samples.dataset[rows]
    return Block(
        samples.sample_id[rows],
        dataset,
        dataset,
        samples.batch[rows],
        samples.library_size[rows],
        take_samples(samples.ragged, rows),
    )
