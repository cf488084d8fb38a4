"""The manifest of a shard corpus, believed only once it is checked, and the corpus that it opens (docs/format_shards.md).

It may come from anywhere, so nothing of it is used before its type, its range and its sums are checked. An opened
corpus has all its files, each of the size that the manifest says, and none besides.
"""

import hashlib
import re
from dataclasses import fields
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from shards import fields as take
from shards.codec import MAX_BLOCK_BYTES, MAX_BLOCK_SAMPLES, OBS_TYPES, BlockSchema
from shards.entries import (
    FORMAT,
    HELD_OUT,
    MANIFEST,
    MAX_MANIFEST_BYTES,
    PANELS,
    SPLITS,
    TAR_BLOCK,
    TRAIN_SAMPLES,
    VERSION,
    VOCABULARY,
    BlockEntry,
    DatasetEntry,
    FileEntry,
    Manifest,
    ShardEntry,
    file_name,
)  # fmt: skip
from shards.files import CacheConfig, Files, open_files
from shards.order import Layout
from shards.tables import Tables, read_tables
from txfm_data.vocabulary import MAX_GENES

__all__ = [
    "FORMAT", "HELD_OUT", "MANIFEST", "MAX_MANIFEST_BYTES", "PANELS", "SPLITS", "TRAIN_SAMPLES", "VERSION", "VOCABULARY",
    "BlockEntry", "Corpus", "DatasetEntry", "FileEntry", "Manifest", "ShardEntry", "file_name", "open_corpus",
    "parse_manifest",
]  # fmt: skip

_MAX_SAMPLES = 2**59  # ids of samples are below the streams of the order
_MAX_BYTES = 2**62
_MAX_TABLE_BYTES = {VOCABULARY: 2**28, PANELS: 2**34, TRAIN_SAMPLES: 2**40}
_TAR_TAIL = 2 * TAR_BLOCK, 2 * TAR_BLOCK + 10_240  # two empty headers, then up to a whole record of them
_CHECKSUM = re.compile(rb'"checksum": "([0-9a-f]{64})"')
_SHARD_NAME = re.compile(rf"({'|'.join(SPLITS)})-\d+\.tar")


def parse_manifest(data: bytes, where: str) -> Manifest:
    """Read a manifest, with every type, range and sum checked.

    Raises
    ------
    ValueError
        Names `where` and the first thing that is wrong.
    """
    try:
        if len(data) > MAX_MANIFEST_BYTES:
            raise ValueError(f"{len(data)} bytes, at most {MAX_MANIFEST_BYTES} are read")
        tree = take.parse_json(data)
    except ValueError as error:
        raise ValueError(
            f"{where}: damaged or not a manifest ({error}); copy the corpus again or build it anew"
        ) from error
    if type(tree) is not dict or tree.get("format") != FORMAT:
        raise ValueError(f"{where}: not a manifest of {FORMAT}; name the folder of a shard corpus")
    if tree.get("version") != VERSION or type(tree["version"]) is not int:
        raise ValueError(
            f"{where}: format version {take.shown(tree.get('version'))}, this release reads {VERSION}; build the shards again with "
            "txfm shard, or use the release that wrote them"
        )
    try:
        checksum = _checksum(data, tree)
        return _manifest(tree, checksum)
    except ValueError as error:
        raise ValueError(f"{where}: damaged manifest: {error}; copy the corpus again or build it anew") from error


def _checksum(data: bytes, tree: dict[str, Any]) -> str:
    """The checksum that the document names, if it is its own."""
    places = list(_CHECKSUM.finditer(data))
    if len(places) != 1 or tree.get("checksum") != places[0][1].decode():
        raise ValueError("its checksum does not stand in it once as 64 digits")
    start, stop = places[0].span(1)
    digest = hashlib.sha256(data[:start])
    digest.update(b"0" * 64)
    digest.update(memoryview(data)[stop:])
    if digest.hexdigest() != tree["checksum"]:
        raise ValueError(
            f"its checksum is {digest.hexdigest()}, it says {tree['checksum']}: it was changed after it was written"
        )
    return digest.hexdigest()


_FIXED = {"format", "version", "values"}


def _manifest(tree: dict[str, Any], checksum: str) -> Manifest:
    take.mapping(tree, "the manifest", _FIXED | {f.name for f in fields(Manifest)})
    take.one_of(tree["values"], "values", ("counts",))
    rule = take.mapping(tree["filter"], "filter", ("min_cells", "min_cell_fraction"))
    columns = take.mapping(tree["obs_columns"], "obs_columns")
    if "batch" in columns:
        raise ValueError("obs_columns names batch, which every block has")
    splits = take.mapping(tree["splits"], "splits", SPLITS)
    found = Manifest(
        target_sum=take.number(tree["target_sum"], "target_sum", 0, 1e12, above=True),
        seed=take.integer(tree["seed"], "seed", 0, 2**64 - 1),
        lanes=take.integer(tree["lanes"], "lanes", 1, 2**28),
        mix_blocks=take.integer(tree["mix_blocks"], "mix_blocks", 1, 2**20),
        block_rows=take.integer(tree["block_rows"], "block_rows", 1, MAX_BLOCK_SAMPLES),
        n_genes=take.integer(tree["n_genes"], "n_genes", 1, MAX_GENES),
        vocabulary_sha256=take.sha256(tree["vocabulary_sha256"], "vocabulary_sha256"),
        filter={
            "min_cells": take.integer(rule["min_cells"], "min_cells", 0, _MAX_SAMPLES),
            "min_cell_fraction": take.number(rule["min_cell_fraction"], "min_cell_fraction", 0, 1),
        },
        selection=None if tree["selection"] is None else take.sha256(tree["selection"], "selection"),
        obs_columns={key: take.one_of(kind, f"obs_columns: {key}", OBS_TYPES) for key, kind in columns.items()},
        has_fractions=take.boolean(tree["has_fractions"], "has_fractions"),
        datasets=tuple(_dataset(d, f"dataset {i}") for i, d in enumerate(take.sequence(tree["datasets"], "datasets"))),
        files=_files(tree["files"]),
        splits={split: tuple(_shards(splits[split], split)) for split in SPLITS},
        checksum=checksum,
    )
    _check_sums(found)
    return found


def _files(value: Any) -> dict[str, FileEntry]:
    entries = {}
    for name, entry in take.mapping(value, "files").items():
        take.one_of(name, "a name in files", _MAX_TABLE_BYTES)
        entry = take.mapping(entry, f"files: {name}", ("bytes", "sha256"))
        size = take.integer(entry["bytes"], f"files: {name}: bytes", 1, _MAX_TABLE_BYTES[name])
        entries[name] = FileEntry(size, take.sha256(entry["sha256"], f"files: {name}: sha256"))
    return entries


def _dataset(value: Any, what: str) -> DatasetEntry:
    entry = take.mapping(value, what, [f.name for f in fields(DatasetEntry)])
    what = f"{what} ({take.shown(entry['name'])})"
    held_out = take.one_of(entry["held_out"], f"{what}: held_out", HELD_OUT)
    val_batches = tuple(
        take.text(name, f"{what}: val_batches") for name in take.sequence(entry["val_batches"], f"{what}: val_batches")
    )
    batches = take.mapping(entry["batches"], f"{what}: batches")
    n_train = take.integer(entry["n_train"], f"{what}: n_train", 0, _MAX_SAMPLES)
    n_val = take.integer(entry["n_val"], f"{what}: n_val", 0, _MAX_SAMPLES)
    total = sum(take.integer(n, f"{what}: batches", 1, _MAX_SAMPLES) for n in batches.values())
    if total != n_train:
        raise ValueError(f"{what}: its batches have {total} train samples, n_train is {n_train}")
    if len(set(val_batches)) != len(val_batches):
        raise ValueError(f"{what}: val_batches names a batch twice")
    if held_out == "batches" and (both := batches.keys() & set(val_batches)):
        raise ValueError(
            f"{what}: batches {take.shown(sorted(both))} are in both splits, though whole ones were held out"
        )
    if held_out == "none" and (n_val or val_batches):
        raise ValueError(f"{what}: nothing was held out, yet {n_val} samples and {len(val_batches)} batches were")
    return DatasetEntry(
        take.text(entry["name"], f"{what}: name"), take.integer(entry["panel_id"], f"{what}: panel_id", 0, 2**31 - 1),
        take.text(entry["modality"], f"{what}: modality"), n_train, n_val, held_out, val_batches,
        take.text(entry["content_sha256"], f"{what}: content_sha256"),
        take.number(entry["weight"], f"{what}: weight", 0, 1, above=True), batches,
    )  # fmt: skip


def _shards(value: Any, split: str) -> list[ShardEntry]:
    shards = []
    for i, entry in enumerate(take.sequence(value, f"splits: {split}")):
        name = file_name(split, i)
        entry = take.mapping(entry, name, [f.name for f in fields(ShardEntry)])
        take.one_of(entry["name"], f"the name of shard {i} of {split}", (name,))
        n_bytes = take.integer(entry["bytes"], f"{name}: bytes", 1, _MAX_BYTES)
        samples = take.integer(entry["samples"], f"{name}: samples", 1, _MAX_SAMPLES)
        blocks = _blocks(entry["blocks"], name, n_bytes)
        if (total := sum(block.samples for block in blocks)) != samples:
            raise ValueError(f"{name}: {samples} samples, its blocks hold {total}")
        shards.append(ShardEntry(name, n_bytes, take.sha256(entry["sha256"], f"{name}: sha256"), samples, blocks))
    return shards


def _blocks(value: Any, name: str, n_bytes: int) -> tuple[BlockEntry, ...]:
    """Blocks of one shard; checked as one table, since a corpus may have a million."""
    rows = take.sequence(value, f"{name}: blocks")
    width = len(BlockEntry._fields)
    if not rows or any(type(row) is not list or len(row) != width for row in rows):
        raise ValueError(f"{name}: blocks must be lists of {width} integers each, at least one")
    if set(map(type, chain.from_iterable(rows))) != {int}:
        raise ValueError(f"{name}: a number of its blocks is no integer")
    try:
        table = np.array(rows, np.int64)
    except OverflowError as error:
        raise ValueError(f"{name}: a number of its blocks has more than 64 bits") from error
    offset, size, crc, samples, datasets, batches = table.T
    ends = np.cumsum(TAR_BLOCK + -(-np.clip(size, 0, MAX_BLOCK_BYTES) // TAR_BLOCK) * TAR_BLOCK)
    for holds, text in (
        ((size >= 1) & (size <= MAX_BLOCK_BYTES), f"has a payload of other than 1 to {MAX_BLOCK_BYTES} bytes"),
        (offset == np.concatenate([[0], ends[:-1]]), "does not begin where the one before ends"),
        ((crc >= 0) & (crc < 2**32), "has a CRC-32 of other than 32 bits"),
        ((samples >= 1) & (samples <= MAX_BLOCK_SAMPLES), f"has other than 1 to {MAX_BLOCK_SAMPLES} samples"),
        (
            (datasets >= 1) & (datasets <= batches) & (batches <= samples),
            "counts more datasets than batches or samples",
        ),
    ):
        if not holds.all():
            bad = int(np.flatnonzero(~holds)[0])
            raise ValueError(f"{name}: block {bad} {text}: {BlockEntry._make(rows[bad])}")
    tail = n_bytes - int(ends[-1])
    if not _TAR_TAIL[0] <= tail < _TAR_TAIL[1] or tail % TAR_BLOCK:
        raise ValueError(
            f"{name}: {n_bytes} bytes, but its blocks end at byte {ends[-1]}; a tar has 1,024 to 11,263 after that"
        )
    return tuple(map(BlockEntry._make, rows))


def _check_sums(manifest: Manifest) -> None:
    """Refuse numbers that do not agree with each other."""
    datasets = manifest.datasets
    if not datasets or len({d.name for d in datasets}) != len(datasets):
        raise ValueError(f"{len(datasets)} datasets; at least one is needed, and no name twice")
    for split in SPLITS:
        expected = sum(d.n_train if split == "train" else d.n_val for d in datasets)
        found = sum(shard.samples for shard in manifest.splits[split])
        if expected != found:
            raise ValueError(f"its datasets have {expected} {split} samples, its shards {found}")
        blocks = [block for shard in manifest.splits[split] for block in shard.blocks]
        sizes = [block.samples for block in blocks]
        if sizes and (max(sizes) - min(sizes) > 1 or max(sizes) > manifest.block_rows):
            raise ValueError(
                f"blocks of {split} hold {min(sizes)} to {max(sizes)} samples; expected equal ones to within one, at most "
                f"{manifest.block_rows}"
            )
        if any(block.datasets > len(datasets) for block in blocks):
            raise ValueError(f"a block of {split} counts more than the {len(datasets)} datasets there are")
    n_blocks = sum(len(shard.blocks) for shard in manifest.splits["train"])
    if n_blocks == 0 or n_blocks % manifest.lanes:
        raise ValueError(
            f"{n_blocks} blocks of train for {manifest.lanes} lanes; expected a multiple, at least one each"
        )
    expected_files = {VOCABULARY, PANELS} | ({TRAIN_SAMPLES} if any(d.weight < 1 for d in datasets) else set())
    if manifest.files.keys() != expected_files:
        raise ValueError(f"files names {sorted(manifest.files)}, expected {sorted(expected_files)}")


class Corpus:
    """An opened shard corpus.

    address : a folder, or the address of one at an object store.
    cache : where blocks of a remote corpus are kept on this machine; a local one needs none.

    Attributes
    ----------
    manifest, vocabulary, statistics, panels : what the folder holds.
    files : where its bytes come from.
    fingerprint : checksum of the manifest, which holds the sha256 of everything else.

    Raises
    ------
    FileNotFoundError
        If there is no manifest (no shard corpus, or its building never ended), or a file that it names is missing.
    ValueError
        If a file is not what the manifest says, or there is a shard that it does not name.
    """

    def __init__(self, address: str | Path, cache: CacheConfig | None = None) -> None:
        self.files: Files = open_files(address, cache)
        self.address, self._cache = self.files.address, cache
        where = self.files.where(MANIFEST)
        try:
            data = self.files.fetch(MANIFEST, MAX_MANIFEST_BYTES)
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"{where}: no such file, so no finished shard corpus; build one with txfm shard"
            ) from error
        self.manifest = parse_manifest(data, where)
        self.fingerprint = self.manifest.checksum
        self._check_files()
        self._tables: Tables = read_tables(self.files, self.manifest)
        self.vocabulary, self.statistics = self._tables.vocabulary, self._tables.statistics
        self.panels = self._tables.panels
        for entry in self.manifest.datasets:
            if entry.panel_id >= len(self.panels):
                raise ValueError(
                    f"{where}: dataset {entry.name!r} has panel {entry.panel_id} of {len(self.panels)}; {PANELS} belongs to "
                    "another corpus, copy the corpus again or build it anew"
                )

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (self.address, self._cache, self.fingerprint)

    def _check_files(self) -> None:
        """Refuse a folder that lacks a file, has one of another size, or a shard too many."""
        expected = {name: entry.bytes for name, entry in self.manifest.files.items()}
        expected |= {shard.name: shard.bytes for split in SPLITS for shard in self.shards(split)}
        found = self.files.sizes(expected)
        missing = [name for name in expected if name not in found]
        if missing:
            raise FileNotFoundError(
                f"{self.files.where(missing[0])}: missing, though the manifest names it ({len(missing)} of {len(expected)} files "
                "are); copy the whole folder, or build it again"
            )
        for name, n_bytes in expected.items():
            if found[name] != n_bytes:
                raise ValueError(
                    f"{self.files.where(name)}: {found[name]} bytes, the manifest says {n_bytes}; the file is cut, replaced or of "
                    "another corpus, copy it again or build the shards anew"
                )
        extra = sorted(name for name in found if name not in expected and _SHARD_NAME.fullmatch(name))
        if extra:
            raise ValueError(
                f"{self.files.where(extra[0])}: a shard that the manifest does not name ({len(extra)} such); two corpora are "
                "mixed in this folder, copy one of them again"
            )

    @property
    def path(self) -> Path:
        """The folder of a local corpus."""
        return self.files.path

    @property
    def target_sum(self) -> float:
        """Counts that each library is scaled to before the logarithm."""
        return self.manifest.target_sum

    @property
    def lanes(self) -> int:
        """Lanes of the train split: the world size must divide them, they the global batch."""
        return self.manifest.lanes

    def shards(self, split: str) -> tuple[ShardEntry, ...]:
        """Shards of one split."""
        if split not in SPLITS:
            raise ValueError(f"split {split!r} does not exist; use one of {list(SPLITS)}")
        return self.manifest.splits[split]

    def n_samples(self, split: str) -> int:
        """Samples of one split."""
        return sum(shard.samples for shard in self.shards(split))

    def blocks(self, split: str) -> list[tuple[str, BlockEntry]]:
        """Blocks of one split in order of storage, each with the name of its shard."""
        return [(shard.name, block) for shard in self.shards(split) for block in shard.blocks]

    @cached_property
    def layout(self) -> Layout:
        """How the train split lies in blocks and lanes, before any weights."""
        sizes = np.array([block.samples for _, block in self.blocks("train")], np.int64)
        mix_blocks = self.manifest.mix_blocks
        return Layout(sizes, self.manifest.lanes, mix_blocks, mix_blocks * int(sizes.max()))

    @cached_property
    def schema(self) -> BlockSchema:
        """What each block must be."""
        m = self.manifest
        return BlockSchema(
            n_genes=m.n_genes, n_panels=len(self.panels), n_datasets=len(m.datasets), vocabulary_sha256=m.vocabulary_sha256,
            has_fractions=m.has_fractions, obs_columns=dict(m.obs_columns),
        )  # fmt: skip

    @cached_property
    def weights(self) -> np.ndarray:
        """Share of the train samples of each dataset that an epoch serves, (n_datasets,) float64."""
        return np.array([entry.weight for entry in self.manifest.datasets])

    @property
    def is_weighted(self) -> bool:
        """Whether epochs leave out samples of some datasets."""
        return bool((self.weights < 1).any())

    def train_samples(self) -> tuple[np.ndarray, np.ndarray]:
        """Id (int64) and dataset (int32) of every train sample in order of storage, mapped from the file.

        Raises
        ------
        ValueError
            If no dataset has a weight below 1: the corpus has no such table then.
        """
        return self._tables.train_samples()


def _reopen(address: str, cache: CacheConfig | None, fingerprint: str) -> Corpus:
    corpus = Corpus(address, cache)
    if corpus.fingerprint != fingerprint:
        raise ValueError(
            f"{corpus.files.where(MANIFEST)}: the corpus was replaced while it was open: fingerprint {corpus.fingerprint}, it was "
            f"{fingerprint}; start again"
        )
    return corpus


def open_corpus(address: str | Path, cache: CacheConfig | None = None) -> Corpus:
    """Open a shard corpus for reading."""
    return Corpus(address, cache)
