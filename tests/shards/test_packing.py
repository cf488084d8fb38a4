"""The byte packing of gene ids and counts: exact inverses, and no read past the end of damaged bytes."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from shards import packing

G = 65_535


def pack(kind, indptr, values):
    width = {"genes": 3, "counts": 5}[kind]
    out, offsets = np.empty(width * len(values), np.uint8), np.empty(len(indptr), np.int32)
    {"genes": packing.pack_genes, "counts": packing.pack_counts}[kind](indptr, values, out, offsets)
    return out[: offsets[-1]], offsets


def ragged(seed: int, n_genes: int, n: int):
    rng = np.random.default_rng(seed)
    sizes = [0, n_genes, *rng.integers(0, min(n_genes, 400) + 1, n)]
    ids = [np.sort(rng.choice(n_genes, size, replace=False)) for size in sizes]
    counts = [rng.choice([1, 2, 254, 255, 256, 257, 65_535, 65_536, 2**32 - 1], size) for size in sizes]
    indptr = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    return indptr, np.concatenate(ids).astype(np.uint16), np.concatenate(counts).astype(np.uint32)


@given(seed=st.integers(0, 10_000), n_genes=st.sampled_from([1, 2, 255, 256, 257, 600, G]), n=st.integers(0, 6))
@settings(max_examples=60, deadline=None)
def test_unpacking_inverts_packing(seed, n_genes, n):
    indptr, gene_ids, counts = ragged(seed, n_genes, n)
    out_genes, out_counts = np.empty_like(gene_ids), np.empty_like(counts)
    assert packing.unpack_genes(*pack("genes", indptr, gene_ids), indptr, n_genes, out_genes) == -1
    assert packing.unpack_counts(*pack("counts", indptr, counts), indptr, out_counts) == -1
    np.testing.assert_array_equal(out_genes, gene_ids)
    np.testing.assert_array_equal(out_counts, counts)


def test_bytes_are_as_documented():
    indptr = np.array([0, 3, 5])
    data, offsets = pack("genes", indptr, np.array([0, 1, 257, 254, 510], np.uint16))
    assert data.tolist() == [0, 0, 255, 255, 0, 254, 255, 255, 0] and offsets.tolist() == [0, 5, 9]
    data, offsets = pack("counts", indptr, np.array([1, 255, 256, 2**32 - 1, 2], np.uint32))
    assert data.tolist() == [0, 254, 255, 0, 1, 0, 0, 255, 255, 255, 255, 255, 1] and offsets.tolist() == [
        0,
        7,
        13,
    ]


@given(seed=st.integers(0, 1_000), data=st.data())
@settings(max_examples=60, deadline=None)
def test_damaged_bytes_are_noticed_or_stay_in_bounds(seed, data):
    """Any byte changed or cut: either the sample is named, or the result is another valid one."""
    indptr, gene_ids, counts = ragged(seed, 300, 2)
    packed, offsets = pack("genes", indptr, gene_ids)
    at = data.draw(st.integers(0, len(packed) - 1))
    packed = packed.copy()
    packed[at] ^= data.draw(st.integers(1, 255))
    out = np.full(len(gene_ids), 7, np.uint16)
    if packing.unpack_genes(packed, offsets, indptr, 300, out) == -1:
        assert out.max() < 300 and not np.array_equal(out, gene_ids)
    shorter = np.minimum(offsets, offsets[-1] - 1)
    assert packing.unpack_genes(packed[:-1], shorter, indptr, 300, out) >= 0


def test_gather_copies_rows_in_the_order_asked():
    indptr, gene_ids, counts = ragged(3, 50, 5)
    rows = np.array([6, 0, 2, 2])
    lengths = np.diff(indptr)[rows]
    out_indptr = np.zeros(5, np.int64)
    out_genes, out_counts = np.empty(lengths.sum(), np.uint16), np.empty(lengths.sum(), np.uint32)
    packing.gather_rows(indptr, gene_ids, counts, rows, out_indptr, out_genes, out_counts)
    np.testing.assert_array_equal(np.diff(out_indptr), lengths)
    expected = np.concatenate([np.arange(indptr[r], indptr[r + 1]) for r in rows])
    np.testing.assert_array_equal(out_genes, gene_ids[expected])
    np.testing.assert_array_equal(out_counts, counts[expected])
