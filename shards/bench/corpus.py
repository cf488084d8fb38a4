"""A droplet corpus of any size, simulated straight into shards in bounded memory, for benchmarks. All of it is invented.

A pool of samples is simulated once, and each block draws from it without replacement; so a million samples cost little
more than encoding them, and a block compresses as one of samples that are all different.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from shards import manifest as mf
from shards.codec import Block, BlockSchema, encode
from shards.order import SHUFFLE, block_sizes
from shards.packing import Packed, pack, take
from shards.tar import TarShard, file_entry
from txfm_data.kernels import normalize
from txfm_data.panels import make_panels, write_panels
from txfm_data.progress import Progress, ignore
from txfm_data.ragged import Ragged, concatenate
from txfm_data.random_order import permutation
from txfm_data.vocabulary import GeneStatistics, Vocabulary, write_vocabulary

TARGET_SUM = 1e5
_CELL_TYPES = 20
_MEDIAN_NONZERO = 2_200 / 20_000
_PART = 256


@dataclass(frozen=True, kw_only=True)
class DropletConfig:
    """What is simulated, and how it is laid out in shards."""

    samples: int = 100_000
    genes: int = 20_000
    pool: int = 4_096  # samples that are simulated; the others repeat them. A small corpus makes do with fewer.
    datasets: int = 5  # each measured all genes
    batches: int = 40  # in all datasets
    block_rows: int = 1_024
    lanes: int = 16
    mix_blocks: int = 2
    shard_bytes: int = 256 * 1024**2  # about what a shard holds
    seed: int = 0

    @property
    def pool_samples(self) -> int:
        """Samples of the pool: never fewer than a block holds."""
        return min(self.pool, self.samples, max(self.block_rows, self.samples // 16))

    def __post_init__(self) -> None:
        least = max(self.batches, self.lanes)
        if self.samples < least:
            raise ValueError(f"a simulated corpus needs at least {least} samples, got {self.samples}")
        if not 100 <= self.genes <= 65_535:
            raise ValueError(f"a simulated corpus has 100 to 65,535 genes, got {self.genes}")
        if self.pool < self.block_rows or self.datasets < 1 or self.batches % self.datasets:
            raise ValueError(
                f"the pool must hold a block and batches be a multiple of datasets, got a pool of {self.pool}, blocks of "
                f"{self.block_rows}, {self.batches} batches and {self.datasets} datasets"
            )


def write_corpus(folder: str | Path, config: DropletConfig, *, progress: Progress = ignore) -> Path:
    """Simulate a corpus without validation samples into a new folder. The same configuration gives the same bytes."""
    folder = Path(folder)
    folder.mkdir(parents=True)
    pool = simulate_pool(config.pool_samples, config.genes, config.seed)
    vocabulary = Vocabulary(
        tuple(f"ENSG{i:011d}" for i in range(config.genes)), tuple(f"G{i}" for i in range(config.genes))
    )
    _write_tables(folder, pool, vocabulary, config)
    schema = BlockSchema(config.genes, config.datasets, config.datasets, vocabulary.fingerprint)
    shards = _write_shards(folder, _blocks(pool, config), schema, config, progress)
    batch = np.arange(config.samples) * config.batches // config.samples
    in_batch = np.bincount(batch, minlength=config.batches).reshape(config.datasets, -1)
    manifest = mf.Manifest(
        target_sum=TARGET_SUM, seed=config.seed, lanes=config.lanes, mix_blocks=config.mix_blocks, block_rows=config.block_rows,
        n_genes=config.genes, vocabulary_sha256=vocabulary.fingerprint, filter={"min_cells": 0, "min_cell_fraction": 0.0},
        selection=None, obs_columns={}, has_fractions=False,
        files={name: file_entry(folder / name) for name in (mf.VOCABULARY, mf.PANELS)},
        splits={"train": shards, "val": ()},
        datasets=tuple(
            mf.DatasetEntry(
                f"simulated{d}", d, "single-cell", int(row.sum()), 0, "none", (), "0" * 64, 1.0,
                {_batch_name(d * len(row) + i): int(n) for i, n in enumerate(row)},
            )
            for d, row in enumerate(in_batch)
        ),
    )  # fmt: skip
    (folder / mf.MANIFEST).write_text(manifest.to_json(), encoding="ascii")
    return folder


def simulate_pool(n_samples: int, n_genes: int, seed: int) -> Ragged:
    """Samples as of a droplet experiment, without correlation of genes beyond their cell type.

    Genes are expressed by Zipf's law, a tenth or so of them in each sample (log-normally many, 2,380 of 20,000 on average);
    69 % of the counts are 1, 94 % at most 5, few are in the thousands.
    """
    rng = np.random.default_rng([seed, 1])
    rates = _rates(n_genes, rng)
    scale = _MEDIAN_NONZERO * n_genes
    wanted = np.clip(rng.lognormal(np.log(scale), 0.4, n_samples), scale / 11, scale * 4)
    cell_type = rng.choice(_CELL_TYPES, n_samples, p=rng.dirichlet(np.full(_CELL_TYPES, 2.0)))
    # How many genes are seen is a function of depth, which grows with it: look it up backwards.
    depths = np.geomspace(scale / 50, scale * 200, 120)
    depth = np.empty(n_samples)
    for t in range(_CELL_TYPES):
        seen = np.array([-np.expm1(-d * rates[t]).sum() for d in depths])
        depth[cell_type == t] = np.interp(wanted[cell_type == t], seen, depths)
    parts = []
    for start in range(0, n_samples, _PART):
        part = slice(start, start + _PART)
        counts = rng.poisson(depth[part, None] * rates[cell_type[part]])
        rows, genes = np.nonzero(counts)
        indptr = np.searchsorted(rows, np.arange(len(counts) + 1))
        parts.append(Ragged(indptr, genes.astype(np.uint16), counts[rows, genes].astype(np.uint32)))
    return concatenate(parts)


def _rates(n_genes: int, rng: np.random.Generator) -> np.ndarray:
    """Share of each gene in the counts of each cell type, (_CELL_TYPES, n_genes)."""
    base = (np.arange(n_genes) + 30.0 * n_genes / 20_000) ** -1.05
    base[int(0.85 * n_genes) :] *= 0.05  # genes that are almost never seen
    rates: np.ndarray = rng.permutation(base) * rng.lognormal(0, 0.8, (_CELL_TYPES, n_genes))
    rates /= rates.sum(axis=1, keepdims=True)
    return rates


def _batch_name(number: int) -> str:
    return f"b{number:02d}"


def _write_tables(folder: Path, pool: Ragged, vocabulary: Vocabulary, config: DropletConfig) -> None:
    """Write vocabulary and panels; statistics are those of the pool."""
    library_size = np.maximum(np.add.reduceat(np.append(pool.counts, 0), pool.indptr[:-1]).astype(float), 1)
    normalized = np.empty(pool.nnz, np.float32)
    normalize(pool.indptr, pool.counts, library_size, TARGET_SUM, normalized)
    n, n_genes = len(pool), len(vocabulary)
    share = np.bincount(pool.gene_ids, minlength=n_genes) / n
    mean = np.bincount(pool.gene_ids, normalized, n_genes) / n
    mean_log1p = np.bincount(pool.gene_ids, np.log1p(normalized, dtype=np.float64), n_genes) / n
    n_nonzero = np.round(share * config.samples).astype(np.int64)
    statistics = GeneStatistics(np.full(n_genes, config.samples), n_nonzero, mean_log1p)
    write_vocabulary(folder / mf.VOCABULARY, vocabulary, statistics)
    genes = np.arange(n_genes, dtype=np.uint16)
    write_panels(folder / mf.PANELS, make_panels([genes] * config.datasets, [mean] * config.datasets))


def _blocks(pool: Ragged, config: DropletConfig) -> Iterator[Block]:
    packed: Packed = pack(pool)
    sums = np.add.reduceat(np.append(pool.counts, 0), pool.indptr[:-1]).astype(float)
    names = pa.array([_batch_name(i) for i in range(config.batches)])
    order = permutation(config.samples, seed=config.seed, epoch=0, item=SHUFFLE)
    rng = np.random.default_rng([config.seed, 2])
    start = 0
    for size in block_sizes(config.samples, config.block_rows, config.lanes).tolist():
        rows = rng.choice(len(pool), size, replace=False)
        sample_id = order[start : start + size]
        batch = sample_id * config.batches // config.samples
        dataset = (batch // (config.batches // config.datasets)).astype(np.int32)
        obs = pa.record_batch({"batch": pa.DictionaryArray.from_arrays(pa.array(batch, pa.int32()), names)})
        yield Block(sample_id, dataset, dataset, np.maximum(sums[rows], 1), take(packed, rows), obs)
        start += size


def _write_shards(
    folder: Path, blocks: Iterator[Block], schema: BlockSchema, config: DropletConfig, progress: Progress
) -> tuple[mf.ShardEntry, ...]:
    shards: list[mf.ShardEntry] = []
    block, done = next(blocks, None), 0
    while block is not None:
        name, n_bytes = mf.file_name("train", len(shards)), 0
        with TarShard(folder / name) as shard:
            while block is not None and (n_bytes == 0 or n_bytes < config.shard_bytes):
                payload = encode(block, schema)
                n_bytes += len(payload)
                shard.add(payload, len(block), len(np.unique(block.dataset)), len(block.obs["batch"].unique()))
                done += len(block)
                progress(done, config.samples)
                block = next(blocks, None)
            shards.append(shard.close(name))
    return tuple(shards)
