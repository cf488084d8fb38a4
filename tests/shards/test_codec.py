"""Blocks as bytes and back, and every way in which hostile or damaged bytes are refused."""

import numpy as np
import pyarrow as pa
import pytest

from shards import codec, packing
from shards.ipc_sizes import decoded_bytes
from txfm_data.ragged import Ragged

SHA = "0123456789abcdef" * 4
SCHEMA = codec.BlockSchema(65_535, 2, 3, SHA)


def make_block(n: int = 4) -> codec.Block:
    counts = np.array([2**32 - 1, 1, 65_536, 255, 256], np.uint32)
    ragged = Ragged(np.array([0, 0, 2, 5, 5]), np.array([0, 65_534, 1, 300, 301], np.uint16), counts)
    cell_type = pa.array(["T cell", None, "B", "T cell"])
    obs = pa.record_batch(
        {"batch": pa.array(["a", "b", "a", ""]), "cell_type": cell_type, "age": pa.array([1, 2, None, 4])}
    )
    return codec.Block(
        np.array([7, 2**40, 0, 1]), np.array([0, 1, 2, 0], np.int32), np.array([0, 1, 0, 1], np.int32),
        np.array([1.0, 2.5, 1e9, 3.0]), packing.pack(ragged), obs,
    )  # fmt: skip


def decode(data, schema=SCHEMA, n_samples=4):
    return codec.decode(data, schema, n_samples=n_samples, where="here")


def test_blocks_of_extreme_samples_survive():
    block = make_block()
    data = codec.encode(block, SCHEMA)
    assert data == codec.encode(block, SCHEMA)
    back = decode(data)
    for name in ("sample_id", "dataset", "panel_id", "library_size"):
        np.testing.assert_array_equal(getattr(back, name), getattr(block, name))
    for ours, theirs in zip(back.packed.arrays, block.packed.arrays, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert back.samples().counts.tolist() == [2**32 - 1, 1, 65_536, 255, 256]
    assert back.obs.schema.names == ["batch"] and back.obs["batch"].to_pylist() == ["a", "b", "a", ""]


def test_columns_of_obs_travel_along_and_missing_ones_are_named():
    schema = codec.BlockSchema(65_535, 2, 3, SHA, obs_columns={"cell_type": "string", "age": "int64"})
    back = decode(codec.encode(make_block(), schema), schema)
    assert back.obs["cell_type"].to_pylist() == ["T cell", None, "B", "T cell"]
    assert back.obs["age"].to_pylist() == [1, 2, None, 4]
    with pytest.raises(ValueError, match="no column 'donor'"):
        codec.encode(make_block(), codec.BlockSchema(65_535, 2, 3, SHA, obs_columns={"donor": "string"}))
    with pytest.raises(ValueError, match="expected the columns .*age.*, found"):
        decode(codec.encode(make_block(), SCHEMA), schema)


def test_fractions_need_a_corpus_that_says_so():
    block = make_block()
    ragged = Ragged(block.packed.indptr, block.samples().gene_ids, np.array([0.5, 1, 2, 3, 4]))
    exact = codec.Block(
        block.sample_id, block.dataset, block.panel_id, block.library_size, packing.pack(ragged), block.obs
    )
    with pytest.raises(ValueError, match="not whole, and its corpus does not say so"):
        codec.encode(exact, SCHEMA)
    schema = codec.BlockSchema(65_535, 2, 3, SHA, has_fractions=True)
    back = decode(codec.encode(exact, schema), schema).samples()
    assert back.counts.dtype == np.float64 and back.counts.tolist() == [0.5, 1, 2, 3, 4]


def test_a_block_without_samples_or_counts_survives():
    empty = codec.Block(
        np.empty(0, np.int64), np.empty(0, np.int32), np.empty(0, np.int32), np.empty(0),
        packing.pack(Ragged(np.zeros(1, np.int64), np.empty(0, np.uint16), np.empty(0, np.uint32))),
        pa.record_batch({"batch": pa.array([], pa.string())}),
    )  # fmt: skip
    assert len(decode(codec.encode(empty, SCHEMA), n_samples=0)) == 0


@pytest.mark.parametrize(
    ("schema", "n_samples", "message"),
    [
        (SCHEMA, 5, "holds 4 samples, the manifest says 5"),
        (codec.BlockSchema(300, 2, 3, SHA), 4, "sample 1 are no counts over 300 genes"),
        (codec.BlockSchema(65_535, 1, 3, SHA), 4, "panel 1 of 1"),
        (codec.BlockSchema(65_535, 2, 2, SHA), 4, "dataset 2 of 2"),
        (
            codec.BlockSchema(65_535, 2, 3, "f" * 64),
            4,
            "vocabulary 0123456789abcdef, the manifest says ffffffffffffffff",
        ),
        (codec.BlockSchema(65_535, 2, 3, SHA, has_fractions=True), 4, "expected the columns"),
        (SCHEMA, 70_000, "at most 268435456 and 65536"),
    ],
)
def test_a_block_of_another_corpus_is_refused(schema, n_samples, message):
    with pytest.raises(ValueError, match=f"here: .*{message}"):
        decode(codec.encode(make_block(), SCHEMA), schema, n_samples)


def written(change, compression="zstd", metadata=None, batches=1):
    """A block whose record batch was changed after encoding, written as Arrow would."""
    block = codec.encode(make_block(), SCHEMA)
    table = pa.ipc.open_stream(block).read_next_batch()
    columns = {name: table[name] for name in table.schema.names} | change
    schema = pa.schema([(n, c.type) for n, c in columns.items()], metadata=metadata or table.schema.metadata)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, schema, options=pa.ipc.IpcWriteOptions(compression=compression)) as writer:
        for _ in range(batches):
            writer.write_batch(pa.RecordBatch.from_arrays(list(columns.values()), schema=schema))
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sample_id": pa.array([7, None, 0, 1])}, "sample_id has missing values"),
        ({"sample_id": pa.array([7, -2, 0, 1])}, "id -2"),
        ({"panel_id": pa.array([0, -1, 0, 1], pa.int32())}, "panel -1"),
        ({"library_size": pa.array([1, float("nan"), 2, 3])}, "library size"),
        ({"library_size": pa.array([1.0, 0, 2, 3])}, "library size"),
        ({"genes": pa.array([b"", b"\x00", b"\x01\x02\x03", b""])}, "genes and counts of a sample differ"),
        ({"gene_escapes": pa.array([b"", b"abc", b"", b""])}, "gene_escapes does not fit"),
        ({"counts": pa.array([b"", None, b"\x01\x02\x03", b""], pa.binary())}, "damaged"),
        ({"batch": pa.array(["a"] * 4)}, "expected the columns"),
        ({"extra": pa.array([1, 2, 3, 4])}, "expected the columns"),
    ],
)
def test_columns_that_no_encoder_writes_are_refused(change, message):
    assert len(decode(written({}))) == 4
    with pytest.raises(ValueError, match=f"here: .*{message}"):
        decode(written(change))


def test_versions_codecs_and_further_batches_are_refused():
    with pytest.raises(ValueError, match="format version b'1', this release reads 2"):
        decode(written({}, metadata={"txfm_block": "1", "vocabulary": SHA[:16]}))
    with pytest.raises(ValueError, match="not compressed with zstd"):
        decode(written({}, compression="lz4"))
    with pytest.raises(ValueError, match="in 4 messages; a block has at most"):
        decode(written({}, batches=2))
    assert len(decode(written({}, compression=None))) == 4


def test_what_a_buffer_declares_is_read_before_it_is_decompressed():
    data = codec.encode(make_block(), SCHEMA)
    table = pa.ipc.open_stream(data).read_next_batch()
    messages = list(pa.ipc.MessageReader.open_stream(data))
    assert [m.type for m in messages] == ["schema", "dictionary", "record batch"]
    assert decoded_bytes(messages[0]) == 0
    used = sum(b.size for column in table.columns for b in column.buffers() if b is not None)
    assert used * 0.5 < decoded_bytes(messages[2]) <= used + 8 * 64


def test_a_decompression_bomb_allocates_nothing():
    bomb = written({"genes": pa.array([b"\0" * 2**26] * 4), "counts": pa.array([b"\0" * 2**26] * 4)})
    assert len(bomb) < 2**20
    before = pa.total_allocated_bytes()
    with pytest.raises(ValueError, match=r"declares 5\d{8} bytes"):
        decode(bomb)
    assert pa.total_allocated_bytes() - before < 2**20


def test_every_flipped_bit_is_refused_or_harmless():
    """Arrow alone lets flips through; what decodes must still be legal, and the CRC of the manifest catches the rest."""
    good = codec.encode(make_block(), SCHEMA)
    refused = 0
    for at in range(len(good)):
        data = bytearray(good)
        data[at] ^= 1 << (at % 8)
        try:
            block = decode(bytes(data))
        except ValueError as error:
            refused += 1
            assert str(error).startswith("here: ")
        else:
            block.samples().check(65_535, "after a flip")
    assert refused > len(good) / 4


@pytest.mark.parametrize("size", [0, 1, 7, 100, -1, -9])
def test_cut_bytes_are_refused(size):
    data = codec.encode(make_block(), SCHEMA)
    with pytest.raises(ValueError, match="here: not a readable block"):
        decode(data[:size] if size >= 0 else data[: len(data) // 2 + size])
