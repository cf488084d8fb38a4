"""The manifest: its text, what is refused of it, and opening a corpus by it."""

import copy
import hashlib
import json
import pickle
import re
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards import manifest as mf
from shards.manifest import Corpus, parse_manifest
from tests.shards.corpus_maker import Plan, file_entry, make_corpus, reseal, sealed


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("manifest") / "corpus", Plan(weights=(1.0, 0.25)))


@pytest.fixture
def tree(corpus: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((corpus / mf.MANIFEST).read_text())
    return found


def test_the_text_comes_back_and_its_checksum_is_of_the_zeroed_file(corpus: Path) -> None:
    data = (corpus / mf.MANIFEST).read_bytes()
    manifest = parse_manifest(data, "here")
    assert manifest.to_json().encode() == data
    zeroed = data.replace(manifest.checksum.encode(), b"0" * 64)
    assert manifest.checksum == hashlib.sha256(zeroed).hexdigest() == Corpus(corpus).fingerprint
    assert manifest.splits["train"][1].name == mf.file_name("train", 1) == "train-000001.tar"
    assert json.loads(data)["splits"]["train"][0]["blocks"][1] == list(manifest.splits["train"][0].blocks[1])


@pytest.mark.parametrize("names", [("β cell", 'a "b"\n\\', "\x00"), ("checksum", '"checksum": "' + "0" * 64 + '"')])
def test_any_name_survives(corpus: Path, names: tuple[str, ...]) -> None:
    manifest = parse_manifest((corpus / mf.MANIFEST).read_bytes(), "here")
    first = manifest.datasets[0]
    renamed = replace(first, name=names[0], batches={names[-1]: first.n_train})
    text = replace(manifest, datasets=(renamed, *manifest.datasets[1:])).to_json()
    assert parse_manifest(text.encode(), "here").datasets[0] == renamed


def test_every_changed_byte_is_refused(corpus: Path) -> None:
    data = (corpus / mf.MANIFEST).read_bytes()
    for place in range(0, len(data), 7):
        changed = bytearray(data)
        changed[place] ^= 1 << place % 8
        with pytest.raises(ValueError, match=r"^here: "):
            parse_manifest(bytes(changed), "here")


def put(tree: dict[str, Any], path: tuple[Any, ...], value: Any) -> bytes:
    """The manifest with one value changed, sealed again."""
    tree = copy.deepcopy(tree)
    node = tree
    for step in path[:-1]:
        node = node[step]
    node[path[-1]] = value
    return sealed(tree)


T, V, D = ("splits", "train"), ("splits", "val"), ("datasets", 0)
HUGE = 10**400
REFUSED = [
    (("format",), "mds", "not a manifest of txfm-shards"),
    (("version",), 1, "version 1, this release reads 2.*txfm shard"),
    (("version",), 2.0, "version 2.0"),
    (("version",), True, "version True"),
    (("values",), "log1p", "values is 'log1p'"),
    (("lanes",), 5, "12 blocks of train for 5 lanes"),
    (("lanes",), True, "lanes is True, expected an integer"),
    (("lanes",), HUGE, "lanes is an integer of 1329 bits"),
    (("seed",), 2**64, "seed"),
    (("target_sum",), 0, "target_sum is 0, expected a number above 0"),
    (("target_sum",), "1e5", "target_sum"),
    (("n_genes",), 65_536, "n_genes"),
    (("vocabulary_sha256",), "A" * 64, "64 digits"),
    (("selection",), "latest", "selection"),
    (("filter", "min_cell_fraction"), 1.5, "min_cell_fraction"),
    (("filter",), {"min_cells": 0}, r"lacks the keys \['min_cell_fraction'\]"),
    (("obs_columns",), {"cell_type": "object"}, "obs_columns: cell_type is 'object'"),
    (("obs_columns",), {"batch": "string"}, "names batch"),
    (("obs_columns",), {"\ud800": "string"}, "half a character"),
    (("has_fractions",), 1, "expected true or false"),
    (("extra",), 1, "'extra'"),
    (("files", "vocabulary.parquet", "bytes"), 0, "vocabulary.parquet: bytes"),
    (("files", "vocabulary.parquet", "bytes"), 2**28 + 1, "from 1 to 268435456"),
    (("files",), {}, r"files names \[\], expected"),
    (("files", "../../etc/passwd"), {"bytes": 1, "sha256": "0" * 64}, "a name in files"),
    ((*D, "n_train"), 43, "its batches have 42 train samples, n_train is 43"),
    ((*D, "n_val"), 13, "27 val samples, its shards 28"),
    ((*D, "weight"), 0, "weight is 0"),
    ((*D, "weight"), 1.0001, "weight"),
    ((*D, "weight"), "half", "weight"),
    ((*D, "panel_id"), -1, "panel_id"),
    ((*D, "name"), "d1", "no name twice"),
    ((*D, "name"), 3, "name is 3, expected a text"),
    ((*D, "held_out"), "some", "held_out"),
    ((*D, "held_out"), "none", "nothing was held out"),
    ((*D, "val_batches"), ["b3", "b3"], "twice"),
    ((*D, "val_batches"), ["b0"], "in both splits"),
    ((*D, "batches", "b0"), 0, "batches is 0"),
    (("datasets",), [], "0 datasets"),
    (("splits",), {"train": []}, "lacks the keys"),
    (T, [], "shards 0"),
    ((*T, 0, "name"), "../train-000000.tar", "the name of shard 0 of train"),
    ((*T, 0, "name"), "/train-000000.tar", "the name of shard 0 of train"),
    ((*T, 0, "name"), "train-000001.tar", r"expected one of \['train-000000.tar'\]"),
    ((*T, 0, "bytes"), 12_289, "its blocks end at byte 12288"),
    ((*T, 0, "bytes"), 2**70, "bytes"),
    ((*T, 0, "samples"), 29, "29 samples, its blocks hold 28"),
    ((*T, 0, "sha256"), None, "sha256 is None"),
    ((*T, 0, "blocks"), [], "at least one"),
    ((*T, 0, "blocks", 1), [3072, 2288, 0, 7, 2], "6 integers"),
    ((*T, 0, "blocks", 1), "012345", "6 integers"),
    ((*T, 0, "blocks", 1, 0), 3073, "block 1 does not begin where the one before ends"),
    ((*T, 0, "blocks", 1, 0), 0, "block 1 does not begin where the one before ends"),
    ((*T, 0, "blocks", 0, 0), 512, "block 0 does not begin"),
    ((*T, 0, "blocks", 1, 0), 3072.0, "no integer"),
    ((*T, 0, "blocks", 1, 1), 0, "block 1 has a payload"),
    ((*T, 0, "blocks", 1, 1), 2**40, "block 1 has a payload of other than 1 to 268435456 bytes"),
    ((*T, 0, "blocks", 1, 2), -1, "CRC-32"),
    ((*T, 0, "blocks", 1, 2), 2**64, "more than 64 bits"),
    ((*T, 0, "blocks", 1, 3), 65_537, "block 1 has other than 1 to 65536 samples"),
    ((*T, 0, "blocks", 1, 3), True, "no integer"),
    ((*T, 0, "blocks", 1, 4), 7, "more datasets than batches"),
    ((*T, 0, "blocks", 1, 5), 8, "more datasets than batches or samples"),
    (("block_rows",), 6, "blocks of train hold 7 to 7 samples.*at most 6"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "value", "message"), REFUSED, ids=[f"{p[-1]}={str(v)[:20]}" for p, v, _ in REFUSED])
def test_what_cannot_be_is_named(tree: dict[str, Any], path: tuple[Any, ...], value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        parse_manifest(put(tree, path, value), "here")
    assert str(caught.value).startswith("here: ") and len(str(caught.value)) < 400


def leaves(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of all values of a document, lists and objects too."""
    if path:
        yield path
    for key, value in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        yield from leaves(value, (*path, key))


WRONG = st.one_of(
    st.none(), st.booleans(), st.integers(), st.sampled_from([2**63, -1, HUGE, 1e308, 0.5, "\udfff", "", "../x", []]),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=5), st.lists(st.integers(), max_size=7), st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)  # fmt: skip


@given(data=st.data())
def test_a_wrong_value_anywhere_is_a_clear_error_or_harmless(corpus: Path, data: st.DataObject) -> None:
    tree = json.loads((corpus / mf.MANIFEST).read_text())
    path = data.draw(st.sampled_from(list(leaves(tree))))
    document = put(tree, path, data.draw(WRONG))
    try:
        manifest = parse_manifest(document, "here")
    except ValueError as error:
        assert str(error).startswith("here: ")
    else:  # such as another seed, or another CRC-32
        assert parse_manifest(manifest.to_json().encode(), "here") == replace(
            manifest, checksum=parse_manifest(manifest.to_json().encode(), "here").checksum
        )


@pytest.mark.parametrize(
    "data",
    [
        b"", b"{", b"[]", b"null", b"1" * 5_000, b"\xff\xfe{\x00}\x00", b"[" * 100_000, b'{"a":' * 100_000,
        b'{"format": "txfm-shards", "format": "txfm-shards"}', b'{"format": NaN}',
        b'{"format": "txfm-shards", "version": -Infinity}',
        b"\x80", b'{"version": 2}', b'{"format": "txfm-shards", "version": 2}',
        b'{"format": "txfm-shards", "version": 2, "checksum": 7}',
        b'{"format": "txfm-shards", "version": 2, "checksum": "' + b"0" * 64 + b'", "x": {"checksum": "' + b"0" * 64 + b'"}}',
        b'"\\ud800"',
    ],
)  # fmt: skip
def test_what_is_no_manifest_at_all(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"^here: "):
        parse_manifest(data, "here")


def test_a_manifest_too_large_is_neither_read_nor_written(
    corpus: Path, monkeypatch: pytest.MonkeyPatch, tree: dict[str, Any]
) -> None:
    size = (corpus / mf.MANIFEST).stat().st_size
    manifest = parse_manifest((corpus / mf.MANIFEST).read_bytes(), "here")
    for module in ("shards.manifest", "shards.entries"):
        monkeypatch.setattr(f"{module}.MAX_MANIFEST_BYTES", size - 1)
    with pytest.raises(ValueError, match=f"more than {size - 1} bytes"):
        Corpus(corpus)
    with pytest.raises(ValueError, match="use larger blocks"):
        manifest.to_json()


def test_opening_gives_what_the_folder_holds(corpus: Path) -> None:
    opened = Corpus(corpus)
    assert (opened.path, opened.address) == (corpus, str(corpus))
    assert (opened.n_samples("train"), opened.n_samples("val"), opened.lanes, opened.target_sum) == (84, 28, 4, 1e5)
    assert opened.layout.window == 14 and opened.layout.block_samples.tolist() == [7] * 12
    assert opened.weights.tolist() == [1.0, 0.25] and opened.is_weighted
    ids, datasets = opened.train_samples()
    assert (ids.dtype, datasets.dtype) == (np.int64, np.int32)
    assert np.array_equal(np.sort(ids), np.flatnonzero(np.arange(112) % 56 < 42))
    assert np.array_equal(datasets, ids // 56) and not ids.flags.writeable
    assert (opened.schema.n_genes, opened.schema.n_panels, opened.schema.n_datasets) == (400, 2, 2)
    assert Corpus(f"file://{corpus}").fingerprint == opened.fingerprint
    with pytest.raises(ValueError, match=r"split 'test' does not exist; use one of \['train', 'val'\]"):
        opened.shards("test")


def test_without_weights_there_is_no_table_of_samples(tmp_path: Path) -> None:
    opened = Corpus(make_corpus(tmp_path / "c"))
    assert not opened.is_weighted
    with pytest.raises(ValueError, match="serves every sample in each epoch"):
        opened.train_samples()


def test_a_corpus_travels_to_other_processes_unless_it_was_replaced(tmp_path: Path) -> None:
    opened = Corpus(make_corpus(tmp_path / "c"))
    carried = pickle.dumps(opened)
    assert pickle.loads(carried).fingerprint == opened.fingerprint
    reseal(tmp_path / "c", seed=77)
    with pytest.raises(ValueError, match=f"replaced while it was open: .*{opened.fingerprint}"):
        pickle.loads(carried)


def big_corpus(folder: Path, template: Path, n_shards: int, n_blocks: int) -> None:
    """A folder with as many shards as are asked for, all holes: opening a corpus reads no block."""
    manifest = parse_manifest((template / mf.MANIFEST).read_bytes(), "here")
    blocks = tuple(mf.BlockEntry(i * 2_000_384, 1_999_872, i, 1_000, 2, 2) for i in range(n_blocks))
    size = blocks[-1].offset + blocks[-1].padded + 1_024
    shards = []
    for number in range(n_shards):
        name = mf.file_name("train", number)
        with open(folder / name, "wb") as file:
            file.truncate(size)
        shards.append(mf.ShardEntry(name, size, "0" * 64, n_blocks * 1_000, blocks))
    for name in manifest.files:
        (folder / name).write_bytes((template / name).read_bytes())
    n_train = n_shards * n_blocks * 500
    datasets = tuple(
        replace(d, n_train=n_train, n_val=0, held_out="none", val_batches=(), weight=1.0, batches={"b": n_train})
        for d in manifest.datasets
    )
    files = {name: file_entry(folder / name) for name in (mf.VOCABULARY, mf.PANELS)}
    made = replace(
        manifest, splits={"train": tuple(shards), "val": ()}, datasets=datasets, files=files, block_rows=1_024, lanes=16
    )
    (folder / mf.MANIFEST).write_text(made.to_json())


def test_opening_a_thousand_shards_takes_a_few_times_what_json_does(corpus: Path, tmp_path: Path) -> None:
    big_corpus(tmp_path, corpus, 1_000, 128)
    text = (tmp_path / mf.MANIFEST).read_text()
    times, plain = [], []
    for _ in range(3):
        start = time.process_time()
        json.loads(text)
        plain.append(time.process_time() - start)
        start = time.process_time()
        opened = Corpus(tmp_path)
        times.append(time.process_time() - start)
    assert len(opened.blocks("train")) == 128_000 == len(opened.layout.block_samples)
    assert min(times) < 40 * min(plain), (times, plain)  # 10 times on the machine where this was written


def test_missing_cut_and_additional_files_are_named(tmp_path: Path, corpus: Path) -> None:
    folder = make_corpus(tmp_path / "c")
    shard = folder / "train-000001.tar"
    data = shard.read_bytes()
    shard.unlink()
    with pytest.raises(
        FileNotFoundError, match=r"train-000001\.tar: missing, though the manifest names it \(1 of 6 files"
    ):
        Corpus(folder)
    shard.symlink_to("nowhere")
    with pytest.raises(FileNotFoundError, match=r"train-000001\.tar: missing"):
        Corpus(folder)
    shard.unlink()
    shard.mkdir()
    with pytest.raises(FileNotFoundError, match=r"train-000001\.tar: missing"):
        Corpus(folder)
    shard.rmdir()
    shard.write_bytes(data[:-512])
    with pytest.raises(ValueError, match=re.escape(f"{shard}: 19968 bytes, the manifest says 20480")):
        Corpus(folder)
    shard.write_bytes(data)
    (folder / "notes.txt").write_text("may lie there")
    assert Corpus(folder).n_samples("train") == 84
    for extra in ("train-000003.tar", "val-7.tar"):
        (folder / extra).write_bytes(data)
        with pytest.raises(ValueError, match=f"{extra}: a shard that the manifest does not name"):
            Corpus(folder)
        (folder / extra).unlink()
    (folder / mf.MANIFEST).unlink()
    with pytest.raises(FileNotFoundError, match="no finished shard corpus; build one with txfm shard"):
        Corpus(folder)
    with pytest.raises(FileNotFoundError, match="no finished shard corpus"):
        Corpus(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "address", ["pipe:touch ran", "PIPE:touch ran", " pipe:touch ran", "simplecache::s3://b/c", "pipe::touch"]
)
def test_commands_are_refused_and_not_run(address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="commands and chained addresses are not run"):
        Corpus(address)
    assert not list(tmp_path.iterdir())


def test_an_unknown_scheme_is_refused() -> None:
    with pytest.raises(ValueError, match="no scheme ssh://; give a path, or an address with one of s3://"):
        Corpus("ssh://host/corpus")
