"""Whether a shard corpus still holds what the manifest says: every byte, every block, every count in its panel, every sum.

Shards are walked from their first byte to their last, so nothing can lie between, behind or beside their blocks.
Memory does not grow with the corpus: ids of samples are sorted in a temporary file.
"""

import hashlib
import io
import tarfile
import tempfile
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numba import njit
from webdataset.tariterators import tar_file_iterator

from shards.blocks import member_name, open_member
from shards.codec import Block
from shards.describe import samples_by_dataset
from shards.manifest import SPLITS, BlockEntry, Corpus, ShardEntry
from txfm_data.progress import Progress, ignore

_BYTES_PER_NONZERO = 6  # as they come to training: a uint16 gene id and a uint32 count
_PIECE = 1_000_000
_REMEDY = "build the shards again"


def verify(corpus: Corpus, *, progress: Progress = ignore) -> dict[str, Any]:
    """Read a whole corpus (opening it has checked the manifest and the tables). Blocks that a cache holds are not used.

    Returns
    -------
    dict
        path, kind, n_genes, n_train, n_val, shards, blocks, bytes, nnz, bytes_per_sample, compression (6 bytes a
        non-zero count against the bytes of the shards), fingerprint, and datasets: name, n_train, n_val of each.

    Raises
    ------
    FileNotFoundError, OSError
        If a shard cannot be read.
    ValueError
        Names the first file or block that is not as recorded.
    """
    n_total = sum(corpus.n_samples(split) for split in SPLITS)
    checks = _Checks(corpus)
    nnz = n_bytes = done = 0
    with tempfile.TemporaryDirectory(prefix="txfm-verify-") as folder:
        sample_ids = np.memmap(Path(folder) / "sample-ids", np.int64, "w+", shape=(n_total,))
        for split in SPLITS:
            first = done
            for shard in corpus.shards(split):
                n_bytes += shard.bytes
                for block, where in _walk(corpus, shard):
                    checks.block(block, split, where, done - first)
                    sample_ids[done : done + len(block)] = block.sample_id
                    nnz += block.packed.nnz
                    done += len(block)
                    progress(done, n_total)
        _check_distinct(sample_ids, corpus.files.where(""))
        del sample_ids  # before its folder goes
    checks.sums()
    return {
        "path": corpus.address, "kind": "shards", "n_genes": len(corpus.vocabulary), "n_train": corpus.n_samples("train"),
        "n_val": corpus.n_samples("val"), "shards": sum(len(corpus.shards(s)) for s in SPLITS),
        "blocks": sum(len(corpus.blocks(s)) for s in SPLITS), "bytes": n_bytes, "nnz": nnz, "bytes_per_sample": n_bytes / n_total,
        "compression": nnz * _BYTES_PER_NONZERO / n_bytes, "fingerprint": corpus.fingerprint,
        "datasets": samples_by_dataset(corpus),
    }  # fmt: skip


def _walk(corpus: Corpus, shard: ShardEntry) -> Iterator[tuple[Block, str]]:
    """Blocks of one shard in order, each with its name; then what lies behind them, and the sha256 of the whole."""
    files, name = corpus.files.origin, shard.name
    digest = hashlib.sha256()
    end = 0
    for position, entry in enumerate(shard.blocks):
        member = files.read(name, entry.offset, entry.padded)
        digest.update(member)
        where = f"{files.where(name)}: block at byte {entry.offset}"
        block = open_member(member, position, entry, where, corpus.schema)
        _check_webdataset(member, position, entry, where)
        yield block, where
        end = entry.offset + entry.padded
    tail = files.read(name, end, shard.bytes - end)
    if any(tail):
        raise ValueError(
            f"{files.where(name)}: bytes behind the last block, from byte {end}, are not empty: a member that the manifest does "
            f"not name, or damage; copy the shard again or {_REMEDY}"
        )
    digest.update(tail)
    if digest.hexdigest() != shard.sha256:
        raise ValueError(
            f"{files.where(name)}: sha256 is {digest.hexdigest()}, the manifest says {shard.sha256}; copy the shard again or "
            f"{_REMEDY}"
        )


def _check_webdataset(member: bytes, position: int, entry: BlockEntry, where: str) -> None:
    """Refuse a member that WebDataset, by which others read the shards, takes for something else than we do."""
    try:
        found = [(sample["fname"], zlib.crc32(sample["data"])) for sample in tar_file_iterator(io.BytesIO(member))]
    except tarfile.TarError as error:
        raise ValueError(f"{where}: WebDataset cannot read it ({error}); {_REMEDY}") from error
    if found != [(member_name(position), entry.crc32)]:
        raise ValueError(f"{where}: WebDataset reads {[name for name, _ in found]} there, not the block; {_REMEDY}")


class _Checks:
    """What must hold of the blocks of a corpus beyond what reading them checks."""

    def __init__(self, corpus: Corpus) -> None:
        self._corpus, self._datasets = corpus, corpus.manifest.datasets
        self._panel_of = np.array([entry.panel_id for entry in self._datasets])
        n_genes = len(corpus.vocabulary)
        measured = np.zeros(n_genes, bool)
        self._measured = np.empty((len(corpus.panels), -(-n_genes // 8)), np.uint8)
        for panel in range(len(corpus.panels)):
            measured[:] = False
            measured[corpus.panels.genes(panel)] = True
            self._measured[panel] = np.packbits(measured, bitorder="little")
        self._entries = {split: iter(corpus.blocks(split)) for split in SPLITS}
        self._samples: dict[str, Counter[int]] = {split: Counter() for split in SPLITS}
        self._batches: dict[str, Counter[tuple[int, str | None]]] = {split: Counter() for split in SPLITS}
        self._table = corpus.train_samples() if corpus.is_weighted else None

    def block(self, block: Block, split: str, where: str, first: int) -> None:
        """Check one block; `first` is the number of its first sample in the split."""
        foreign = self._panel_of[block.dataset] != block.panel_id
        if foreign.any():
            row = int(np.flatnonzero(foreign)[0])
            raise ValueError(
                f"{where}: sample {block.sample_id[row]} has panel {block.panel_id[row]}, its dataset "
                f"{self._datasets[block.dataset[row]].name!r} panel {self._panel_of[block.dataset[row]]}; {_REMEDY}"
            )
        samples = block.samples()
        outside = _first_outside(samples.indptr, samples.gene_ids, block.panel_id, self._measured)
        if outside >= 0:
            raise ValueError(
                f"{where}: sample {block.sample_id[outside]} has counts of genes outside panel {block.panel_id[outside]}; {_REMEDY}"
            )
        labels = block.obs["batch"]
        pairs = Counter(zip(block.dataset.tolist(), labels.to_pylist(), strict=True))
        self._batches[split].update(pairs)
        self._samples[split].update(block.dataset.tolist())
        _, entry = next(self._entries[split])
        found = len({dataset for dataset, _ in pairs}), len(pairs)
        if found != (entry.datasets, entry.batches):
            raise ValueError(
                f"{where}: samples of {found[0]} datasets and {found[1]} batches, the manifest says {entry.datasets} and "
                f"{entry.batches}; {_REMEDY}"
            )
        if split == "train" and self._table is not None:
            part = slice(first, first + len(block))
            sample_id, dataset = self._table
            if not (np.array_equal(sample_id[part], block.sample_id) and np.array_equal(dataset[part], block.dataset)):
                raise ValueError(
                    f"{where}: other samples than train-samples.arrow says from its row {first} on; {_REMEDY}"
                )

    def sums(self) -> None:
        """Check what the manifest says of datasets, once all blocks were seen."""
        where = self._corpus.files.where("manifest.json")
        for number, entry in enumerate(self._datasets):
            found = tuple(self._samples[split][number] for split in SPLITS)
            if found != (entry.n_train, entry.n_val):
                raise ValueError(
                    f"{where}: dataset {entry.name!r} has {found[0]} train and {found[1]} val samples in the shards, the manifest "
                    f"says {entry.n_train} and {entry.n_val}; {_REMEDY}"
                )
            train, val = ({name: n for (d, name), n in self._batches[s].items() if d == number} for s in SPLITS)
            if train != entry.batches:
                raise ValueError(
                    f"{where}: batches of dataset {entry.name!r} have other samples in the shards; {_REMEDY}"
                )
            if entry.held_out == "batches" and val.keys() != set(entry.val_batches):
                raise ValueError(
                    f"{where}: dataset {entry.name!r} has {len(val)} batches in the val shards, not the {len(entry.val_batches)} "
                    f"that the manifest names; {_REMEDY}"
                )


@njit(nogil=True, cache=True)
def _first_outside(indptr, gene_ids, panel_id, measured):  # type: ignore[no-untyped-def]
    """Return the first sample with a count of a gene outside its panel, -1 if there is none.

    measured : (n_panels, ceil(G / 8)) uint8. Bit g of a row, from the lowest: whether the panel holds gene g.
    """
    for b in range(indptr.shape[0] - 1):
        genes, bits = gene_ids[indptr[b] : indptr[b + 1]], measured[panel_id[b]]
        for i in range(genes.shape[0]):
            if not (bits[genes[i] >> 3] >> (genes[i] & 7)) & 1:
                return b
    return -1


def _check_distinct(sample_ids: np.ndarray, where: str) -> None:
    """Refuse a sample that is there twice; sorts the ids in place."""
    sample_ids.sort()
    for start in range(0, len(sample_ids), _PIECE):
        part = sample_ids[start : start + _PIECE + 1]
        twice = np.flatnonzero(part[1:] == part[:-1])
        if len(twice):
            raise ValueError(f"{where}: sample {part[twice[0]]} is there more than once; {_REMEDY}")
