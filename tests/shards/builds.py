"""What the tests of shard building share: stores whose every number is known, and all that a corpus says of its samples."""

from pathlib import Path
from typing import Any

import numpy as np

from shards import codec, shuffle
from shards.blocks import BlockReader
from shards.manifest import SPLITS, Corpus
from tests.txfm_data import stores
from txfm_data.store.opening import open_store

NAMES = ("first", "second", "third")


def make_store(folder: Path, backend: str, **options: Any) -> Path:
    """A store of the three datasets of `tests.txfm_data.stores`: empty samples, huge counts, labels that some lack."""
    paths = stores.write_datasets(folder)
    for name in NAMES:
        stores.append(paths[name], folder / "store", name, backend=backend, **options)
    return folder / "store"


def small_pieces(monkeypatch) -> None:
    """Tasks of a few samples and shards of a few blocks, so that there are several of each."""
    monkeypatch.setattr(shuffle, "_SMALLEST_TASK", 1_000)
    monkeypatch.setattr(shuffle, "_LARGEST_TASK", 1_000)
    monkeypatch.setattr(shuffle, "_SAMPLE_BYTES", 50_000)


def rows_of(folder: Path) -> dict[int, dict[str, Any]]:
    """All that a corpus says of each sample, by its id; counts as {gene id: count}."""
    corpus, found = Corpus(folder), {}
    genes = corpus.vocabulary.gene_ids
    for split in SPLITS:
        reader = BlockReader(corpus, split)
        for block in map(reader.read, range(len(reader))):
            samples, obs = block.samples(), block.obs.to_pylist()
            for row, sample_id in enumerate(block.sample_id.tolist()):
                part = slice(samples.indptr[row], samples.indptr[row + 1])
                assert sample_id not in found
                found[sample_id] = {
                    "split": split, "dataset": corpus.manifest.datasets[block.dataset[row]].name,
                    "panel": int(block.panel_id[row]), "library_size": float(block.library_size[row]), "obs": obs[row],
                    "counts": {genes[g]: c for g, c in zip(samples.gene_ids[part], samples.counts[part].tolist(), strict=True)},
                }  # fmt: skip
    return found


def blocks_of(folder: Path, split: str) -> list[codec.Block]:
    """Blocks of one split in order of storage."""
    reader = BlockReader(Corpus(folder), split)
    return [reader.read(number) for number in range(len(reader))]


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file of a corpus."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def expected_rows(store: Path) -> dict[int, dict[str, Any]]:
    """What the h5ad files behind `make_store` say of each sample of the store: dataset, counts by gene, batch."""
    found, row = {}, 0
    for name in NAMES:
        adata = stores.dataset(name)
        dense, ids = adata.X.toarray(), list(adata.var_names)
        for at in range(adata.n_obs):
            there = np.flatnonzero(dense[at])
            found[row] = {
                "dataset": name, "batch": adata.obs["batch"].iloc[at],
                "counts": {ids[g]: dense[at, g] for g in there},
                "library_size": adata.obs["library"].iloc[at] if name == "first" else dense[at].sum(),
            }  # fmt: skip
            row += 1
    assert row == open_store(store).n_obs
    return found
