"""Tiny shard corpora made by hand from the format page, without the code that builds shards from a store.

Counts tell their sample: a sample's value at a gene is 1 + (sample id + gene) % 300, so some need escapes.
"""

import hashlib
import json
import re
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import webdataset

from shards import manifest as mf
from shards.codec import Block, BlockSchema, encode
from shards.packing import pack
from txfm_data.panels import make_panels, write_panels
from txfm_data.ragged import Ragged, concatenate
from txfm_data.vocabulary import GeneStatistics, Vocabulary, write_vocabulary

N_GENES = 400


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to make: datasets of `batches` batches with `batch_rows` samples each, the last one held out."""

    datasets: int = 2
    batches: int = 4
    batch_rows: int = 14
    block_rows: int = 8
    blocks_per_shard: int = 4
    lanes: int = 4
    weights: tuple[float, ...] = ()
    seed: int = 0


def panel_of(dataset: int) -> np.ndarray:
    """Every gene for dataset 0, every second one for 1, and so on."""
    return np.arange(0, N_GENES, dataset + 1)


def sample_of(sample_id: int, dataset: int) -> Ragged:
    """The counts of one sample; one in five has none."""
    genes = panel_of(dataset)
    genes = genes[(genes + sample_id) % 7 == 0] if sample_id % 5 else genes[:0]
    counts = 1 + (sample_id + genes) % 300
    return Ragged(np.array([0, len(genes)]), genes.astype(np.uint16), counts.astype(np.uint32))


def make_corpus(folder: Path, plan: Plan | None = None) -> Path:
    """Write a corpus to a new folder."""
    plan = plan or Plan()
    folder.mkdir(parents=True)
    vocabulary = Vocabulary(tuple(f"ENSG{i:011d}" for i in range(N_GENES)), tuple(f"G{i}" for i in range(N_GENES)))
    weights = plan.weights or (1.0,) * plan.datasets
    per_dataset = plan.batches * plan.batch_rows
    ids = np.arange(plan.datasets * per_dataset)
    dataset, batch = ids // per_dataset, ids % per_dataset // plan.batch_rows
    is_val = batch == plan.batches - 1
    schema = BlockSchema(N_GENES, plan.datasets, plan.datasets, vocabulary.fingerprint)
    splits, train = {}, ids[:0]
    for split in mf.SPLITS:
        rows = np.random.default_rng(plan.seed).permutation(ids[is_val == (split == "val")])
        train = rows if split == "train" else train
        lanes = plan.lanes if split == "train" else 1
        pieces = np.array_split(rows, lanes * -(-len(rows) // (lanes * plan.block_rows)))
        blocks = [make_block(rows, dataset[rows], batch[rows]) for rows in pieces]
        splits[split] = write_shards(folder, split, blocks, schema, plan.blocks_per_shard)
    measured = sum(
        np.isin(np.arange(N_GENES), panel_of(d)) * int((~is_val & (dataset == d)).sum()) for d in range(plan.datasets)
    )
    write_vocabulary(folder / mf.VOCABULARY, vocabulary, GeneStatistics(measured, measured // 2, np.full(N_GENES, 0.5)))
    panels = [panel_of(d).astype(np.uint16) for d in range(plan.datasets)]
    write_panels(folder / mf.PANELS, make_panels(panels, [np.full(len(p), 2, np.float32) for p in panels]))
    names = [mf.VOCABULARY, mf.PANELS]
    if min(weights) < 1:
        table = pa.table({"sample_id": pa.array(train, pa.int64()), "dataset": pa.array(dataset[train], pa.int32())})
        with pa.OSFile(str(folder / mf.TRAIN_SAMPLES), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
        names.append(mf.TRAIN_SAMPLES)
    manifest = mf.Manifest(
        target_sum=1e5, seed=plan.seed, lanes=plan.lanes, mix_blocks=2, block_rows=plan.block_rows, n_genes=N_GENES,
        vocabulary_sha256=vocabulary.fingerprint, filter={"min_cells": 0, "min_cell_fraction": 0.0}, selection=None, obs_columns={},
        has_fractions=False, files={name: file_entry(folder / name) for name in names}, splits=splits,
        datasets=tuple(
            mf.DatasetEntry(
                f"d{d}", d, "single-cell", per_dataset - plan.batch_rows, plan.batch_rows, "batches", (f"b{plan.batches - 1}",),
                "0" * 64, weights[d], {f"b{b}": plan.batch_rows for b in range(plan.batches - 1)},
            )
            for d in range(plan.datasets)
        ),
    )  # fmt: skip
    (folder / mf.MANIFEST).write_text(manifest.to_json())
    return folder


def make_block(sample_id: np.ndarray, dataset: np.ndarray, batch: np.ndarray) -> Block:
    """A block of these samples."""
    samples = concatenate([sample_of(int(i), int(d)) for i, d in zip(sample_id, dataset, strict=True)])
    obs = pa.record_batch({"batch": pa.array([f"b{b}" for b in batch]).dictionary_encode()})
    library = 1.0 + sample_id
    return Block(sample_id, dataset.astype(np.int32), dataset.astype(np.int32), library, pack(samples), obs)


def write_shards(
    folder: Path, split: str, blocks: list[Block], schema: BlockSchema, per_shard: int
) -> tuple[mf.ShardEntry, ...]:
    """Write blocks into shards, so many each."""
    return tuple(
        write_shard(folder / mf.file_name(split, number), blocks[first : first + per_shard], schema)
        for number, first in enumerate(range(0, len(blocks), per_shard))
    )


def write_shard(path: Path, blocks: list[Block], schema: BlockSchema) -> mf.ShardEntry:
    """Write one shard."""
    payloads = [encode(block, schema) for block in blocks]
    write_tar(path, payloads)
    entries, offset = [], 0
    for block, payload in zip(blocks, payloads, strict=True):
        labels = zip(block.dataset.tolist(), block.obs["batch"].to_pylist(), strict=True)
        numbers = len(payload), zlib.crc32(payload), len(block), len(set(block.dataset.tolist())), len(set(labels))
        entries.append(mf.BlockEntry(offset, *numbers))
        offset += entries[-1].padded
    file = file_entry(path)
    return mf.ShardEntry(path.name, file.bytes, file.sha256, sum(map(len, blocks)), tuple(entries))


def write_tar(path: Path, payloads: list[bytes]) -> None:
    """Write payloads as webdataset does."""
    with webdataset.TarWriter(str(path), encoder=False, user="txfm", group="txfm", mtime=0) as tar:
        for number, payload in enumerate(payloads):
            tar.write({"__key__": f"{number:06d}", "arrow": payload})


def file_entry(path: Path) -> mf.FileEntry:
    """Size and sha256 of a file."""
    data = path.read_bytes()
    return mf.FileEntry(len(data), hashlib.sha256(data).hexdigest())


def reseal(folder: Path, **changes: Any) -> None:
    """Write the manifest anew after changes: of its attributes, and of the files that lie there now.

    What a forger would do: every sha256, CRC-32 and size is right for what is there, whatever that is.
    """
    old = json.loads((folder / mf.MANIFEST).read_text())
    manifest = replace(mf.parse_manifest((folder / mf.MANIFEST).read_bytes(), "before"), **changes)
    splits = {
        split: tuple(replace(s, **vars(file_entry(folder / s.name))) for s in shards)
        for split, shards in manifest.splits.items()
    }
    files = {name: file_entry(folder / name) for name in old["files"]}
    (folder / mf.MANIFEST).write_text(replace(manifest, splits=splits, files=files).to_json())


def sealed(tree: dict[str, Any]) -> bytes:
    """Any JSON document with the checksum that it should have, as far as one can be put in."""
    if not isinstance(tree.get("checksum"), str):
        return json.dumps(tree).encode()
    data = json.dumps({**tree, "checksum": "0" * 64}).encode()
    digest = hashlib.sha256(data).hexdigest().encode()
    return re.sub(rb'("checksum": ")0{64}', rb"\g<1>" + digest, data, count=1)
