"""Packing and unpacking are exact inverses for whatever samples hold, and bytes that no packing gives are refused."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from shards import packing
from txfm_data.ragged import Ragged, concatenate

N_GENES = 65_535


def ragged_of(samples: list[tuple[list[int], list[float]]], dtype: type = np.uint32) -> Ragged:
    lengths = [len(genes) for genes, _ in samples]
    indptr = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    genes = np.array([g for genes, _ in samples for g in genes], np.uint16)
    return Ragged(indptr, genes, np.array([c for _, counts in samples for c in counts], dtype))


genes = st.lists(
    st.one_of(
        st.integers(0, 300), st.integers(0, N_GENES - 1), st.sampled_from([0, 254, 255, 256, 510, 511, N_GENES - 1])
    ),
    unique=True,
    max_size=30,
).map(sorted)
count = st.one_of(
    st.integers(1, 300), st.integers(1, 2**32 - 1), st.sampled_from([1, 255, 256, 257, 65_535, 65_536, 2**32 - 1])
)
value = st.one_of(count.map(float), st.floats(1e-300, 1e300))


@st.composite
def samples_of(draw, values):
    chosen = draw(st.lists(genes, max_size=8))
    return [(ids, draw(st.lists(values, min_size=len(ids), max_size=len(ids)))) for ids in chosen]


def assert_same(a: Ragged, b: Ragged) -> None:
    for name in ("indptr", "gene_ids", "counts"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))


@given(samples_of(count))
@settings(deadline=None)
@example([])
@example([([], []), ([0], [1]), ([], [])])
@example([(list(range(600)), [1] * 600), (list(range(0, 60_000, 256)), [65_536] * 235)])
def test_unpacking_is_the_inverse_of_packing(samples):
    ragged = ragged_of(samples)
    packed = packing.pack(ragged)
    packing.check(packed, N_GENES, "here")
    back = packing.unpack(packed)
    assert back.counts.dtype == np.uint32
    assert_same(back, ragged)


@given(samples_of(value), st.data())
@settings(deadline=None)
def test_fractions_are_exact_and_any_rows_can_be_had(samples, data):
    ragged = ragged_of(samples, np.float64)
    packed = packing.pack(ragged)
    packing.check(packed, N_GENES, "here")
    assert_same(packing.unpack(packed, dtype=np.float64), ragged)
    rows = np.array(
        data.draw(st.lists(st.integers(0, max(0, len(samples) - 1)), max_size=6)) if samples else [], np.int64
    )
    chosen = ragged_of([samples[r] for r in rows], np.float64)
    assert_same(packing.unpack(packed, rows, np.float64), chosen)
    assert_same(packing.unpack(packing.take(packed, rows), dtype=np.float64), chosen)
    joined = packing.join([packed, packing.take(packed, rows)])
    packing.check(joined, N_GENES, "here")
    assert_same(packing.unpack(joined, dtype=np.float64), concatenate([ragged, chosen]))


def test_bytes_are_as_documented():
    packed = packing.pack(ragged_of([([0, 1, 255, 511, 768], [1, 255, 256, 65_536, 2]), ([3], [1])]))
    assert packed.genes.tolist() == [0, 0, 253, 255, 255, 3] and packed.gene_escapes.tolist() == [255, 256]
    assert packed.counts.tolist() == [0, 254, 255, 255, 1, 0] and packed.count_escapes.tolist() == [256, 65_536]
    assert packed.gene_escape_indptr.tolist() == packed.count_escape_indptr.tolist() == [0, 2, 2]


def test_a_sample_takes_fractions_only_where_it_needs_them():
    packed = packing.pack(ragged_of([([1, 2], [3.0, 700.0]), ([1], [0.5]), ([4], [2.0**33])], np.float64))
    assert np.diff(packed.fraction_indptr).tolist() == [0, 1, 1]
    assert packing.unpack(packed, np.array([0])).counts.dtype == np.uint32
    assert packing.unpack(packed, np.array([0, 1])).counts.tolist() == [3.0, 700.0, 0.5]
    with pytest.raises(ValueError, match="not whole; take them as float64"):
        packing.unpack_into(packed, np.array([1]), np.empty(9, np.uint16), np.empty(9, np.uint32))


def test_panels_of_one_gene_and_of_all():
    whole = ragged_of([(list(range(N_GENES)), [7] * N_GENES), ([N_GENES - 1], [1])])
    packed = packing.pack(whole)
    assert packed.gene_escapes.tolist() == [N_GENES - 1] and not packed.count_escapes.size
    packing.check(packed, N_GENES, "here")
    assert_same(packing.unpack(packed), whole)
    alone = packing.pack(ragged_of([([0], [300])]))
    packing.check(alone, 1, "here")
    with pytest.raises(ValueError, match="sample 0 are no counts over 0 genes"):
        packing.check(alone, 0, "here")


def test_buffers_are_written_from_their_beginning_and_never_beyond():
    packed = packing.pack(ragged_of([([1, 5], [3, 4]), ([2], [9])]))
    ids, counts = np.full(5, 99, np.uint16), np.full(5, 99, np.uint32)
    assert packing.unpack_into(packed, np.array([1, 0]), ids, counts) == 3
    assert ids.tolist() == [2, 1, 5, 99, 99] and counts.tolist() == [9, 3, 4, 99, 99]
    with pytest.raises(ValueError, match="3 values do not fit buffers of 2"):
        packing.unpack_into(packed, np.array([1, 0]), ids[:2], counts)


def test_zeros_are_not_packed():
    with pytest.raises(ValueError, match="sample 1 of the batch stores a count of zero"):
        packing.pack(ragged_of([([1], [3]), ([1, 2], [1, 0])]))


def damaged(**change):
    packed = packing.pack(ragged_of([([1, 300], [3, 700]), ([2], [9])]))
    return replace(packed, **change)


FRACTION = {"counts": np.array([2, 255, 0], np.uint8), "fraction_indptr": np.array([0, 0, 1])}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"genes": np.array([1, 255, 255], np.uint8)}, "sample 1"),
        ({"genes": np.array([1, 254, 2], np.uint8)}, "sample 0"),
        ({"gene_escapes": np.array([254], np.uint16)}, "sample 0"),
        ({"gene_escapes": np.array([65_000], np.uint16)}, "sample 0"),
        ({"counts": np.array([255, 255, 8], np.uint8)}, "sample 0"),
        ({"count_escapes": np.array([255], np.uint32)}, "sample 0"),
        ({"count_escapes": np.array([], np.uint32)}, "count_escapes"),
        ({"indptr": np.array([0, 3, 2])}, "genes"),
        ({"indptr": np.array([1, 2, 3])}, "genes"),
        ({"gene_escape_indptr": np.array([0, 1])}, "gene_escapes"),
        ({"fractions": np.array([1.5]), "fraction_indptr": np.array([0, 0, 1])}, "sample 1"),
        (FRACTION | {"fractions": np.array([np.inf])}, "sample 1"),
        (FRACTION | {"fractions": np.array([-1.0])}, "sample 1"),
    ],
)  # fmt: skip
def test_bytes_that_no_packing_gives_are_refused(change, message):
    packing.check(damaged(), 1_000, "here")
    packing.check(damaged(**FRACTION, fractions=np.array([0.5])), 1_000, "here")
    with pytest.raises(ValueError, match=f"here: .*{message}.*damaged"):
        packing.check(damaged(**change), 1_000, "here")
