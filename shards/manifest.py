"""The manifest of a shard corpus: what it holds, in which files, with which checksums (docs/format_shards.md)."""

import hashlib
import json
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from shards.order import Layout
from txfm_data.panels import Panels, read_panels
from txfm_data.vocabulary import GeneStatistics, Vocabulary, read_vocabulary

FORMAT = "txfm-shards"
VERSION = 1
SPLITS = ("train", "val")
MANIFEST, VOCABULARY, PANELS = "manifest.json", "vocabulary.parquet", "panels.arrow"


@dataclass(frozen=True)
class BlockEntry:
    """One block: where its tar member begins in the shard, bytes of its payload, their CRC-32, and its samples."""

    offset: int
    bytes: int
    crc32: int
    samples: int


@dataclass(frozen=True)
class ShardEntry:
    """One tar file."""

    name: str
    bytes: int
    sha256: str
    samples: int
    blocks: tuple[BlockEntry, ...]


@dataclass(frozen=True)
class DatasetEntry:
    """One dataset: its panel, and how its samples were split.

    held_out : "batches", "samples" (the dataset is a single batch, so samples were drawn) or "none".
    val_batches : the experimental batches in the val split.
    """

    name: str
    panel_id: int
    modality: str
    n_train: int
    n_val: int
    held_out: str
    val_batches: tuple[str, ...]
    content_sha256: str


@dataclass(frozen=True)
class FileEntry:
    """Size and sha256 of a file that is not a shard."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """All that `manifest.json` says."""

    format: str
    version: int
    values: str
    target_sum: float
    seed: int
    lanes: int
    mix_blocks: int
    block_rows: int
    n_genes: int
    vocabulary_sha256: str
    filter: dict[str, float]
    datasets: tuple[DatasetEntry, ...]
    files: dict[str, FileEntry]
    splits: dict[str, tuple[ShardEntry, ...]]

    def to_json(self) -> str:
        """Text of the manifest; the same corpus gives the same text."""
        return json.dumps(asdict(self), indent=1) + "\n"


def _parse(tree: dict[str, Any]) -> Manifest:
    shards = {
        split: tuple(ShardEntry(**{**s, "blocks": tuple(BlockEntry(**b) for b in s["blocks"])}) for s in entries)
        for split, entries in tree["splits"].items()
    }
    datasets = tuple(DatasetEntry(**{**d, "val_batches": tuple(d["val_batches"])}) for d in tree["datasets"])
    files = {name: FileEntry(**entry) for name, entry in tree["files"].items()}
    return Manifest(**{**tree, "splits": shards, "datasets": datasets, "files": files})


class Corpus:
    """An opened shard corpus.

    Attributes
    ----------
    path, manifest, vocabulary, statistics, panels : what the folder holds.
    fingerprint : sha256 of the manifest, which holds the sha256 of everything else.

    Raises
    ------
    FileNotFoundError
        If there is no manifest: the folder is no shard corpus, or its building never ended.
    ValueError
        If a file is not what the manifest says.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        file = self.path / MANIFEST
        if not file.is_file():
            raise FileNotFoundError(
                f"{path}: no {MANIFEST} there, so no finished shard corpus; build one with txfm shard"
            )
        data = file.read_bytes()
        try:
            tree = json.loads(data)
            if not isinstance(tree, dict) or tree.get("format") != FORMAT:
                raise ValueError(f"{file}: not a manifest of {FORMAT}")
            if tree.get("version") != VERSION:
                raise ValueError(
                    f"{file}: format version {tree.get('version')}, this release reads {VERSION}; upgrade txfm"
                )
            self.manifest = _parse(tree)
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{file}: damaged or not a manifest ({error}); build the shards again") from error
        self.fingerprint = hashlib.sha256(data).hexdigest()
        for name, entry in self.manifest.files.items():
            check_file(self.path / name, entry.bytes, entry.sha256)
        self.vocabulary: Vocabulary
        self.statistics: GeneStatistics
        self.vocabulary, self.statistics = read_vocabulary(self.path / VOCABULARY)
        if self.vocabulary.fingerprint != self.manifest.vocabulary_sha256:
            raise ValueError(
                f"{self.path}: {VOCABULARY} has fingerprint {self.vocabulary.fingerprint}, the manifest says "
                f"{self.manifest.vocabulary_sha256}; it belongs to another corpus"
            )
        self.panels: Panels = read_panels(self.path / PANELS, len(self.vocabulary))

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
        return self.manifest.splits.get(split, ())

    def n_samples(self, split: str) -> int:
        """Samples of one split."""
        return sum(shard.samples for shard in self.shards(split))

    def blocks(self, split: str) -> list[tuple[str, BlockEntry]]:
        """Blocks of one split in order of storage, each with the name of its shard."""
        return [(shard.name, block) for shard in self.shards(split) for block in shard.blocks]

    @cached_property
    def layout(self) -> Layout:
        """How the train split lies in blocks and lanes."""
        sizes = np.array([block.samples for _, block in self.blocks("train")], np.int64)
        return Layout(sizes, self.manifest.lanes, self.manifest.mix_blocks)


def check_file(path: Path, n_bytes: int, sha256: str) -> None:
    """Refuse a file whose size or sha256 is not as recorded."""
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: missing, though the manifest names it; copy the whole folder, or build it again"
        )
    found = path.stat().st_size
    if found != n_bytes:
        raise ValueError(
            f"{path}: {found} bytes, the manifest says {n_bytes}; the file is cut or replaced, build it again"
        )
    with open(path, "rb") as handle:
        digest = hashlib.file_digest(handle, "sha256").hexdigest()
    if digest != sha256:
        raise ValueError(f"{path}: sha256 is {digest}, the manifest says {sha256}; the file is damaged, build it again")


def open_corpus(path: str | Path) -> Corpus:
    """Open a shard corpus for reading."""
    return Corpus(path)
