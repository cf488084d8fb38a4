"""What a shard corpus holds and how well it is mixed, from its manifest and tables alone: no block is read."""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from shards.manifest import SPLITS, Corpus


def describe(corpus: Corpus) -> dict[str, Any]:
    """Say what a corpus holds.

    Returns
    -------
    dict
        kind, path, fingerprint, lanes, vocabulary, n_genes, target_sum, seed, n_train, n_val, shards, blocks, bytes,
        bytes_per_sample, filter, selection, obs_columns, has_fractions;
        datasets : what the manifest says of each, with the genes of its panel, but for its batches only their number;
        splits : shards, blocks, samples, bytes of each, and samples of its smallest and largest block;
        mixing : see `mixing`;
        order : mix_blocks, world_sizes that share the lanes, global_batch_multiple, largest_global_batch, and
        samples_per_epoch as expected by the weights.
    """
    manifest = corpus.manifest
    splits = {split: _split(corpus, split) for split in SPLITS}
    n_samples, n_bytes = (sum(split[key] for split in splits.values()) for key in ("samples", "bytes"))
    datasets = [
        {
            "name": d.name, "modality": d.modality, "panel_id": d.panel_id, "n_genes": len(corpus.panels.genes(d.panel_id)),
            "n_train": d.n_train, "n_val": d.n_val, "weight": d.weight, "held_out": d.held_out, "val_batches": list(d.val_batches),
            "n_train_batches": len(d.batches), "content_sha256": d.content_sha256,
        }
        for d in manifest.datasets
    ]  # fmt: skip
    return {
        "kind": "shards", "path": corpus.address, "fingerprint": corpus.fingerprint, "lanes": corpus.lanes,
        "vocabulary": corpus.vocabulary.fingerprint,
        "n_genes": len(corpus.vocabulary), "target_sum": corpus.target_sum, "seed": manifest.seed,
        "n_train": corpus.n_samples("train"), "n_val": corpus.n_samples("val"),
        "shards": sum(split["shards"] for split in splits.values()), "blocks": sum(split["blocks"] for split in splits.values()),
        "bytes": n_bytes, "bytes_per_sample": n_bytes / n_samples, "filter": dict(manifest.filter),
        "selection": manifest.selection, "obs_columns": dict(manifest.obs_columns), "has_fractions": manifest.has_fractions,
        "datasets": datasets, "splits": splits, "mixing": mixing(corpus), "order": _order(corpus),
    }  # fmt: skip


def _split(corpus: Corpus, split: str) -> dict[str, Any]:
    sizes = [block.samples for _, block in corpus.blocks(split)]
    shards = corpus.shards(split)
    return {
        "shards": len(shards), "blocks": len(sizes), "samples": sum(sizes), "bytes": sum(shard.bytes for shard in shards),
        "smallest_block": min(sizes, default=0), "largest_block": max(sizes, default=0),
    }  # fmt: skip


def samples_by_dataset(corpus: Corpus) -> list[dict[str, Any]]:
    """Name, n_train and n_val of each dataset."""
    return [{"name": d.name, "n_train": d.n_train, "n_val": d.n_val} for d in corpus.manifest.datasets]


def _order(corpus: Corpus) -> dict[str, Any]:
    lanes = corpus.lanes
    smallest = int(corpus.layout.block_samples.min()) * corpus.layout.blocks_per_lane
    expected = sum(d.weight * d.n_train for d in corpus.manifest.datasets)
    return {
        "mix_blocks": corpus.manifest.mix_blocks, "world_sizes": [n for n in range(1, lanes + 1) if lanes % n == 0],
        "global_batch_multiple": lanes, "largest_global_batch": None if corpus.is_weighted else lanes * smallest,
        "samples_per_epoch": expected,
    }  # fmt: skip


def mixing(corpus: Corpus) -> dict[str, dict[str, float]]:
    """How many datasets and batches the blocks of the train split hold.

    Returns
    -------
    dict
        Of ``datasets`` and ``batches`` (a batch belongs to one dataset): ``there`` are so many, blocks hold ``mean`` and
        at least ``minimum`` of them; ``expected`` is the mean if the samples of each block are drawn from all at random.
    """
    blocks = [block for _, block in corpus.blocks("train")]
    parts = {
        "datasets": ([d.n_train for d in corpus.manifest.datasets if d.n_train], [block.datasets for block in blocks]),
        "batches": (
            [n for d in corpus.manifest.datasets for n in d.batches.values()],
            [block.batches for block in blocks],
        ),
    }
    sizes = Counter(block.samples for block in blocks)
    return {
        name: {
            "there": len(groups), "mean": float(np.mean(found)), "minimum": min(found),
            "expected": sum(n * expected_distinct(groups, size) for size, n in sizes.items()) / len(blocks),
        }
        for name, (groups, found) in parts.items()
    }  # fmt: skip


def expected_distinct(groups: Sequence[int], n: int) -> float:
    """Distinct groups to expect among `n` samples drawn without replacement from groups of these sizes.

    That is the sum of 1 - C(N - n_k, n) / C(N, n) over groups k, N samples in all.
    """
    total = sum(groups)

    def log_ways(size: int) -> float:  # of choosing n, without n!, which cancels
        return math.lgamma(size + 1) - math.lgamma(size - n + 1)

    ways = log_ways(total)
    distinct = Counter(groups)  # equal sizes are computed once
    return sum(
        times * (1.0 if total - size < n else -math.expm1(log_ways(total - size) - ways))
        for size, times in distinct.items()
    )
