"""What the manifest of a shard corpus records, and its text (docs/format_shards.md)."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, NamedTuple

FORMAT = "txfm-shards"
VERSION = 2
SPLITS = ("train", "val")
MANIFEST, VOCABULARY, PANELS, TRAIN_SAMPLES = (
    "manifest.json", "vocabulary.parquet", "panels.arrow", "train-samples.arrow",
)  # fmt: skip
HELD_OUT = ("batches", "samples", "selection", "none")
"""How samples for validation were chosen."""

TAR_BLOCK = 512
"""Bytes of a tar header; payloads are padded to a multiple."""
MAX_MANIFEST_BYTES = 64 * 1024**2
"""More is not read: it takes about 50 bytes a block, so this is a thousand million samples."""


class BlockEntry(NamedTuple):
    """One block.

    offset : byte of the shard at which its tar header begins.  bytes, crc32 : of its payload.  samples : it holds.
    datasets, batches : distinct ones among them; a batch is a pair of dataset and name.
    """

    offset: int
    bytes: int
    crc32: int
    samples: int
    datasets: int
    batches: int

    @property
    def padded(self) -> int:
        """Bytes that header and payload take in the tar."""
        return TAR_BLOCK + -(-self.bytes // TAR_BLOCK) * TAR_BLOCK


@dataclass(frozen=True)
class ShardEntry:
    """One tar file; its blocks lie end to end from byte 0."""

    name: str
    bytes: int
    sha256: str
    samples: int
    blocks: tuple[BlockEntry, ...]


@dataclass(frozen=True)
class DatasetEntry:
    """One dataset: its panel, and how its samples were split.

    held_out : one of `HELD_OUT`; "samples" where a dataset is a single batch, so samples were drawn.
    val_batches : the experimental batches in the val split, where whole ones were held out.
    weight : share of its train samples that each epoch serves, above 0 to 1.
    batches : train samples of each experimental batch.
    """

    name: str
    panel_id: int
    modality: str
    n_train: int
    n_val: int
    held_out: str
    val_batches: tuple[str, ...]
    content_sha256: str
    weight: float
    batches: Mapping[str, int]


@dataclass(frozen=True)
class FileEntry:
    """Size and sha256 of a file that is not a shard."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """All that `manifest.json` says, besides its format, its version and that values are counts.

    checksum : of the file it was read from; `to_json` computes it anew.
    """

    target_sum: float
    seed: int
    lanes: int
    mix_blocks: int
    block_rows: int
    n_genes: int
    vocabulary_sha256: str
    filter: Mapping[str, float]
    selection: str | None
    obs_columns: Mapping[str, str]
    has_fractions: bool
    datasets: tuple[DatasetEntry, ...]
    files: Mapping[str, FileEntry]
    splits: Mapping[str, tuple[ShardEntry, ...]]
    checksum: str = "0" * 64

    def to_json(self) -> str:
        """Text of the manifest with its checksum; the same corpus gives the same text.

        Raises
        ------
        ValueError
            If it would be larger than readers accept.
        """
        plain = {
            f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("checksum", "splits", "datasets")
        }
        plain["files"] = {name: asdict(entry) for name, entry in self.files.items()}
        lines = [
            f" {_dump(key)}: {_dump(value)}"
            for key, value in {
                "checksum": "0" * 64, "format": FORMAT, "version": VERSION, "values": "counts", **plain,
            }.items()
        ]  # fmt: skip
        lines.append(f' "datasets": {_rows([asdict(entry) for entry in self.datasets])}')
        shards = [f"  {_dump(split)}: {_rows([vars(s) for s in entries], 3)}" for split, entries in self.splits.items()]
        lines.append(' "splits": {\n' + ",\n".join(shards) + "\n }")
        document = "{\n" + ",\n".join(lines) + "\n}\n"
        if len(document) > MAX_MANIFEST_BYTES:
            raise ValueError(
                f"the manifest would take {len(document)} bytes, at most {MAX_MANIFEST_BYTES} are read; use larger blocks"
            )
        digest = hashlib.sha256(document.encode("ascii")).hexdigest()
        return document.replace("0" * 64, digest, 1)


def _dump(value: Any) -> str:
    return json.dumps(value, allow_nan=False)


def _rows(entries: list[dict[str, Any]], indent: int = 2) -> str:
    """A list with an entry a line."""
    space = " " * indent
    return "[\n" + ",\n".join(space + _dump(entry) for entry in entries) + f"\n{space[1:]}]" if entries else "[]"


def file_name(split: str, number: int) -> str:
    """Name of a shard: ``train-000012.tar``."""
    return f"{split}-{number:06d}.tar"
