"""Whether a shard corpus still holds what the manifest says: every sha256, every block, every count in its panel."""

from typing import Any

import numpy as np

from shards.manifest import SPLITS, Corpus, check_file
from shards.reader import BlockReader
from txfm_data.progress import Progress, ignore


def verify(corpus: Corpus, *, progress: Progress = ignore) -> dict[str, Any]:
    """Read a whole corpus (opening it has checked the manifest, the vocabulary and the panels).

    Returns
    -------
    dict
        n_genes, n_train, n_val, shards, blocks, fingerprint.

    Raises
    ------
    FileNotFoundError, ValueError
        Names the first file or block that is not as recorded.
    """
    n_total = sum(corpus.n_samples(split) for split in SPLITS)
    seen: list[np.ndarray] = []
    done = 0
    for split in SPLITS:
        for shard in corpus.shards(split):
            check_file(corpus.path / shard.name, shard.bytes, shard.sha256)
        reader = BlockReader(corpus, split)
        for number, (name, entry) in enumerate(corpus.blocks(split)):
            block = reader.read(number)
            block.samples.check(len(corpus.vocabulary), f"{corpus.path / name}: block at byte {entry.offset}")
            panel_of_count = np.repeat(block.panel_id, np.diff(block.samples.indptr))
            for panel in np.unique(block.panel_id):
                if not np.isin(block.samples.gene_ids[panel_of_count == panel], corpus.panels.genes(int(panel))).all():
                    raise ValueError(
                        f"{corpus.path / name}: block at byte {entry.offset} has counts outside panel {panel}; build it again"
                    )
            seen.append(block.sample_id)
            done += len(block)
            progress(done, n_total)
    n_distinct = len(np.unique(np.concatenate(seen))) if seen else 0
    if n_distinct != n_total:
        raise ValueError(
            f"{corpus.path}: {n_total} samples, but only {n_distinct} distinct ones; build the shards again"
        )
    return {
        "path": str(corpus.path), "kind": "shards", "n_genes": len(corpus.vocabulary), "n_train": corpus.n_samples("train"),
        "n_val": corpus.n_samples("val"), "shards": sum(len(corpus.shards(s)) for s in SPLITS),
        "blocks": sum(len(corpus.blocks(s)) for s in SPLITS), "fingerprint": corpus.fingerprint,
    }  # fmt: skip
