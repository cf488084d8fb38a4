"""What `verify` finds that reading a block alone cannot, what it says of a sound corpus, and what `info` tells."""

import itertools
import json
import math
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards import manifest as mf
from shards.blocks import BlockReader
from shards.codec import Block, BlockSchema
from shards.describe import describe, expected_distinct
from shards.manifest import Corpus, parse_manifest
from shards.order import batches_in_epoch
from shards.packing import pack
from shards.verify import verify
from tests.shards.corpus_maker import Plan, make_corpus, reseal, sample_of, write_shards
from tools import info
from tools import verify as verify_verb
from txfm_data.ragged import Ragged


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("verify") / "good", Plan(weights=(1.0, 0.5)))


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Path:
    return shutil.copytree(good, tmp_path / "corpus")


def test_a_sound_corpus(good: Path) -> None:
    told: list[tuple[int, int]] = []
    result = verify(Corpus(good), progress=lambda done, total: told.append((done, total)))
    nnz = sum(sample_of(i, i // 56).nnz for i in range(112))
    n_bytes = sum(path.stat().st_size for path in good.glob("*.tar"))
    assert result == {
        "path": str(good), "kind": "shards", "n_genes": 400, "n_train": 84, "n_val": 28, "shards": 4, "blocks": 16,
        "bytes": n_bytes, "nnz": nnz, "bytes_per_sample": n_bytes / 112, "compression": 6 * nnz / n_bytes,
        "fingerprint": Corpus(good).fingerprint,
        "datasets": [{"name": "d0", "n_train": 42, "n_val": 14}, {"name": "d1", "n_train": 42, "n_val": 14}],
    }  # fmt: skip
    assert told == [(7 * i, 112) for i in range(1, 17)]


def rebuilt(folder: Path, change: Callable[[int, Block], Block], **numbers: Any) -> None:
    """Write the train shards anew from changed blocks; sizes and sums fit, what the manifest says of them stays."""
    corpus = Corpus(folder)
    reader = BlockReader(corpus, "train")
    blocks = [change(number, reader.read(number)) for number in range(len(reader))]
    schema: BlockSchema = corpus.schema
    shards = write_shards(folder, "train", blocks, schema, 4)
    manifest = parse_manifest((folder / mf.MANIFEST).read_bytes(), "here")
    if not numbers.get("fresh"):
        shards = tuple(
            replace(
                new,
                blocks=tuple(
                    b._replace(datasets=o.datasets, batches=o.batches)
                    for b, o in zip(new.blocks, old.blocks, strict=True)
                ),
            )
            for new, old in zip(shards, manifest.splits["train"], strict=True)
        )
    reseal(folder, splits={**manifest.splits, "train": shards})


def in_block_5(**changes: Callable[[Block], Any]) -> Callable[[int, Block], Block]:
    return lambda number, block: replace(block, **{k: f(block) for k, f in changes.items()}) if number == 5 else block


def changed(values: np.ndarray, row: int, value: int | np.integer[Any]) -> np.ndarray:
    out = values.copy()
    out[row] = value
    return out


def odd_gene(block: Block) -> Any:
    """The samples of a block, with gene 1 added to the first of dataset 1, which measured even genes only."""
    ragged = block.samples()
    row = int(np.flatnonzero(block.dataset == 1)[0])
    at = int(ragged.indptr[row])
    indptr = ragged.indptr + (np.arange(len(ragged.indptr)) > row)
    assert not len(ragged.gene_ids[at:]) or ragged.gene_ids[at] > 1
    return pack(Ragged(indptr, np.insert(ragged.gene_ids, at, 1), np.insert(ragged.counts, at, 1)))


def relabelled(block: Block) -> pa.RecordBatch:
    names = block.obs["batch"].to_pylist()
    names[0] = "b0" if names[0] != "b0" else "b1"
    return pa.record_batch({"batch": pa.array(names).dictionary_encode()})


CASES = {
    "sample twice": (in_block_5(sample_id=lambda b: changed(b.sample_id, 0, b.sample_id[1])), True, "train-samples.arrow says"),
    "foreign panel": (in_block_5(panel_id=lambda b: 1 - b.panel_id), False, "has panel [01], its dataset 'd[01]' panel [01]"),
    "gene outside": (in_block_5(packed=odd_gene), False, "has counts of genes outside panel 1"),
    "another batch": (in_block_5(obs=relabelled), True, "batches of dataset 'd[01]' have other samples"),
    "batches miscounted": (
        in_block_5(obs=lambda b: pa.record_batch({"batch": pa.array(["b0"] * 7).dictionary_encode()})), False,
        "2 datasets and 2 batches",
    ),
    "another dataset": (
        in_block_5(dataset=lambda b: changed(b.dataset, 0, 1 - b.dataset[0]),
                   panel_id=lambda b: changed(b.panel_id, 0, 1 - b.dataset[0]),
                   packed=lambda b: pack(Ragged(np.zeros(8, np.int64), np.empty(0, np.uint16), np.empty(0, np.uint32)))),
        True, "train-samples.arrow says",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_what_only_a_whole_reading_finds(folder: Path, case: str) -> None:
    change, fresh, message = CASES[case]
    rebuilt(folder, change, fresh=fresh)
    corpus = Corpus(folder)
    assert len(BlockReader(corpus, "train").read(5)) == 7
    with pytest.raises(ValueError, match=message) as caught:
        verify(corpus)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize(
    ("case", "message"),
    [("sample twice", "sample .* is there more than once"), ("another dataset", "dataset 'd0' has")],
)
def test_the_same_without_a_table_of_samples(tmp_path: Path, case: str, message: str) -> None:
    folder = make_corpus(tmp_path / "c")
    rebuilt(folder, CASES[case][0], fresh=True)
    with pytest.raises(ValueError, match=message):
        verify(Corpus(folder))


def test_batches_that_are_in_the_wrong_split(folder: Path) -> None:
    manifest = parse_manifest((folder / mf.MANIFEST).read_bytes(), "here")
    first = replace(manifest.datasets[0], val_batches=("b7",))
    reseal(folder, datasets=(first, manifest.datasets[1]))
    with pytest.raises(
        ValueError, match=r"manifest\.json: dataset 'd0' has 1 batches in the val shards, not the 1 that"
    ):
        verify(Corpus(folder))


def test_a_wrong_sha256_in_the_manifest(folder: Path) -> None:
    manifest = parse_manifest((folder / mf.MANIFEST).read_bytes(), "here")
    [val] = manifest.splits["val"]
    text = replace(manifest, splits={**manifest.splits, "val": (replace(val, sha256="0" * 64),)}).to_json()
    (folder / mf.MANIFEST).write_text(text)
    with pytest.raises(ValueError, match=f"val-000000.tar: sha256 is {val.sha256}, the manifest says 0000"):
        verify(Corpus(folder))


def test_the_verbs(good: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify_verb.main([str(good)]) == 0
    shown = capsys.readouterr().out
    assert f"sound: shards {good} (n genes 400, n train 84, n val 28, shards 4, blocks 16," in shown
    assert "  d1: 42 train + 14 validation samples" in shown
    assert info.main([str(good)]) == 0
    shown = capsys.readouterr().out
    for part in (
        "train: 84 samples in 12 blocks of 7 to 7, 3 shards, 61,440 bytes", "val: 28 samples in 4 blocks",
        "order: 4 lanes, 2 blocks mixed; for 1 or 2 or 4 processes and global batches that are multiples of 4; 63 samples an epoch",
        "mixing: a block holds 2.00 of 2 datasets on average, at least 2; drawn at random it would be 1.9",
        "d1: 42 train + 14 validation samples x 200 genes, single-cell, weight 0.5, held out: batches b3",
    ):  # fmt: skip
        assert part in shown
    assert info.main([str(good), "--json"]) == 0
    tree = json.loads(capsys.readouterr().out)
    assert (tree["kind"], tree["lanes"], tree["n_train"], tree["order"]["world_sizes"]) == ("shards", 4, 84, [1, 2, 4])
    data = bytearray((folder / "val-000000.tar").read_bytes())
    data[700] ^= 2
    (folder / "val-000000.tar").write_bytes(bytes(data))
    assert verify_verb.main([str(folder)]) == 1
    assert "val-000000.tar: block at byte 0: its CRC-32" in capsys.readouterr().err


def test_what_a_corpus_holds(tmp_path: Path) -> None:
    plan = Plan(datasets=3, batches=5, batch_rows=30, block_rows=16, lanes=2, blocks_per_shard=5)
    corpus = Corpus(make_corpus(tmp_path / "c", plan))
    found = describe(corpus)
    assert found["splits"]["train"] | {"bytes": 0} == {
        "shards": 5, "blocks": 24, "samples": 360, "bytes": 0, "smallest_block": 15, "largest_block": 15,
    }  # fmt: skip
    assert found["order"]["largest_global_batch"] == 360 and found["order"]["samples_per_epoch"] == 360
    assert batches_in_epoch(corpus.layout, 360, seed=0, epoch=0) == 1
    with pytest.raises(ValueError, match="360"):
        batches_in_epoch(corpus.layout, 362, seed=0, epoch=0)
    assert [d["n_genes"] for d in found["datasets"]] == [400, 200, 134]
    blocks = [block for _, block in corpus.blocks("train")]
    batches = found["mixing"]["batches"]
    assert batches["there"] == 12 and batches["minimum"] == min(b.batches for b in blocks)
    assert batches["mean"] == pytest.approx(np.mean([b.batches for b in blocks]))
    # 24 blocks were drawn at random, so their mean is near what is expected: 12 (1 - C(330, 15) / C(360, 15))
    assert batches["expected"] == pytest.approx(12 * (1 - math.comb(330, 15) / math.comb(360, 15)), rel=1e-12)
    assert abs(batches["mean"] - batches["expected"]) < 1


@given(groups=st.lists(st.integers(1, 4), min_size=1, max_size=4), n=st.integers(1, 16))
def test_the_expectation_is_that_of_all_draws(groups: list[int], n: int) -> None:
    labels = [group for group, size in enumerate(groups) for _ in range(size)]
    n = min(n, len(labels))
    if math.comb(len(labels), n) > 2_000:
        n = min(n, 3)
    draws = [len(set(draw)) for draw in itertools.combinations(labels, n)]
    assert expected_distinct(groups, n) == pytest.approx(sum(draws) / len(draws), rel=1e-9)


MEMORY = """
import resource, sys
from shards.manifest import Corpus
from shards.verify import verify
verify(Corpus(sys.argv[1]))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
verify(Corpus(sys.argv[2]))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_corpus(tmp_path: Path) -> None:
    small = make_corpus(tmp_path / "small", Plan(batch_rows=500, block_rows=256, blocks_per_shard=8))
    large = make_corpus(tmp_path / "large", Plan(batch_rows=25_000, block_rows=256, blocks_per_shard=8))
    command = [sys.executable, "-c", MEMORY, str(small), str(large)]
    grown_kib = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert grown_kib < 40_000, resource.getrusage(resource.RUSAGE_SELF)
