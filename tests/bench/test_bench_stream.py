"""Rates of the hot path as ratios in one run: kernels against their floors and plain NumPy, blocks against plain Arrow.

`pytest tests/bench -s` prints them. Bounds are below what was seen, so that a busy machine does not fail them; a lost
order of magnitude does. `txfm bench loader` has the whole table.
"""

import math
import time
from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pytest
import scipy.sparse as sp

from shards import codec
from shards.bench import floor
from shards.bench.corpus import simulate_pool
from shards.bench.plain_numpy import mask_in_numpy
from shards.packing import pack, unpack
from txfm_data.kernels import draw_rows
from txfm_data.masking import Masking
from txfm_data.panels import make_panels
from txfm_data.ragged import Ragged

PANEL, K, N = 20_000, 2_048, 512
L = 1e5
PANELS = make_panels([np.arange(PANEL, dtype=np.uint16)], [np.zeros(PANEL)])


@pytest.fixture(scope="module")
def samples() -> Ragged:
    """512 samples like those of a droplet experiment: about 2,380 of 20,000 genes, most counts small."""
    return simulate_pool(N, PANEL, 0)


def rates(ours: Callable[[], object], theirs: Callable[[], object], rounds: int = 30) -> tuple[float, float]:
    """Samples per second of CPU of the best of a few runs of each; the runs alternate, so that a busy moment strikes both."""
    works = (ours, theirs)
    best = [math.inf, math.inf]
    for work in works:
        work()
    for _ in range(rounds):
        for i, work in enumerate(works):
            since = time.thread_time()
            work()
            best[i] = min(best[i], time.thread_time() - since)
    return N / best[0], N / best[1]


class Masks:
    """Normalising and masking the samples in three ways, with a buffer for each result."""

    def __init__(self, samples: Ragged) -> None:
        self.samples = samples
        self.size = np.add.reduceat(samples.counts, samples.indptr[:-1]).astype(float)
        self.counts16 = samples.counts.astype(np.uint16)
        self.panel_id, self.ids = np.zeros(N, np.int64), np.arange(N)
        self.masking = Masking(PANELS, PANEL, L, K, 0)
        self.normalized, self.n_unmasked = np.empty(samples.nnz, np.float32), np.empty(N, np.int32)
        self.genes, self.values = np.empty((N, K), np.uint16), np.empty((N, K), np.float32)
        self.permutation, self.generator = np.arange(PANEL, dtype=np.uint16), np.array([floor.SEED])
        self.dense, self.logs = np.zeros(PANEL, np.float32), np.empty(floor.N_LOGS, np.float32)
        self.rng = np.random.default_rng(0)

    def ours(self) -> None:
        self.masking(
            self.samples,
            self.panel_id,
            self.ids,
            self.size,
            0,
            self.normalized,
            self.genes,
            self.values,
            self.n_unmasked,
        )

    def full_lut(self) -> None:
        floor.full_lut(
            self.samples.indptr, self.samples.gene_ids, self.counts16, L, self.permutation, self.generator, self.dense, self.logs,
            self.genes, self.values,
        )  # fmt: skip

    def numpy(self) -> None:
        mask_in_numpy(self.samples, PANELS, self.panel_id, self.size, L, self.rng, self.dense, self.genes, self.values)
        self.dense.fill(0)


@pytest.fixture(scope="module")
def masks(samples) -> Masks:
    return Masks(samples)


@pytest.mark.parametrize("how", ["ours", "full_lut", "numpy"])
def test_what_is_compared_does_the_same(masks, how):
    """K distinct genes of each sample, not the same for all, and of each the right value."""
    masks.genes.fill(0)
    masks.values.fill(-1)
    getattr(masks, how)()
    samples = masks.samples
    dense = sp.csr_matrix(
        (samples.counts, samples.gene_ids.astype(np.int32), samples.indptr), shape=(N, PANEL)
    ).toarray()
    ordered = np.sort(masks.genes, axis=1)
    assert (np.diff(ordered.astype(int), axis=1) > 0).all() and ordered.max() < PANEL
    assert len({row.tobytes() for row in ordered}) == N
    # Every gene is as likely: means of token ids are near the middle, and hardly a gene is never shown.
    assert abs(ordered.mean() - PANEL / 2) < 6 * PANEL / math.sqrt(12 * ordered.size)
    assert len(np.unique(ordered)) > 0.99 * PANEL
    expected = np.log1p(np.take_along_axis(dense, masks.genes.astype(int), 1) * (L / masks.size)[:, None])
    np.testing.assert_allclose(masks.values, expected, rtol=2e-6, atol=1e-7)


def test_the_floor_of_drawing_draws_distinct_genes_and_goes_on():
    permutation, generator = np.arange(300, dtype=np.uint16), np.array([floor.SEED])
    out = np.empty((2_000, 40), np.uint16)
    floor.draw(permutation, generator, out)
    assert all(len(np.unique(row)) == 40 for row in out)
    assert np.array_equal(np.sort(permutation), np.arange(300))
    assert generator.dtype == np.uint64 and generator[0] != floor.SEED
    times = np.bincount(out.ravel(), minlength=300)
    expected = 2_000 * 40 / 300
    # Chi-square of the inclusions: mean 299 x (1 - 40/300), six standard deviations of room.
    assert ((times - expected) ** 2 / expected).sum() < 259 + 6 * math.sqrt(2 * 259)


def test_drawing_against_its_floor():
    identity, swaps, out = np.arange(PANEL, dtype=np.uint16), np.empty(K + 1, np.uint32), np.empty((N, K), np.uint16)
    permutation, generator, items = identity.copy(), np.array([floor.SEED]), np.arange(N)
    ours, lowest = rates(
        lambda: draw_rows(0, 0, items, identity, swaps, out), lambda: floor.draw(permutation, generator, out)
    )
    print(f"\ndrawing: {ours:,.0f} samples/s, floor {lowest:,.0f}, ratio {ours / lowest:.2f}")
    assert ours >= 0.6 * lowest


def test_normalising_and_masking_against_its_floor(masks):
    ours, lowest = rates(masks.ours, masks.full_lut)
    print(f"\nmasking: {ours:,.0f} samples/s, floor {lowest:,.0f}, ratio {ours / lowest:.2f}")
    assert ours >= 0.45 * lowest


def test_normalising_and_masking_against_numpy(masks):
    ours, numpy = rates(masks.ours, masks.numpy)
    print(f"\nmasking: {ours:,.0f} samples/s, NumPy {numpy:,.0f}, ratio {ours / numpy:.1f}")
    assert ours > 1.5 * numpy


def test_decoding_blocks_against_plain_arrow_arrays(samples):
    obs = pa.record_batch({"batch": pa.array(["b"] * N).dictionary_encode()})
    zeros = np.zeros(N, np.int32)
    block = codec.Block(np.arange(N), zeros, zeros, np.full(N, 5e3), pack(samples), obs)
    schema = codec.BlockSchema(PANEL, 1, 1, "0" * 64)
    data = codec.encode(block, schema)
    lists = {
        "genes": pa.LargeListArray.from_arrays(samples.indptr, pa.array(samples.gene_ids)),
        "counts": pa.LargeListArray.from_arrays(samples.indptr, pa.array(samples.counts)),
    }
    table, sink = pa.table(lists), pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
        writer.write_table(table)
    arrow = sink.getvalue().to_pybytes()
    options = pa.ipc.IpcReadOptions(use_threads=False)  # whose time would not count here

    def plain() -> None:
        read = pa.ipc.open_stream(arrow, options=options).read_all()
        for name in ("genes", "counts"):
            read[name].chunk(0).values.to_numpy().sum()

    ours, theirs = rates(lambda: codec.decode(data, schema, n_samples=N, where="bench").samples(), plain)
    print(
        f"\ndecoding: {ours:,.0f} samples/s of {len(data) / N:,.0f} B, plain zstd arrays {theirs:,.0f} of {len(arrow) / N:,.0f} B"
    )
    assert len(data) < 0.75 * len(arrow)
    assert ours > 0.3 * theirs


def test_gathering_rows_against_scipy(samples):
    rows = np.random.default_rng(1).permutation(N)
    packed = pack(samples)
    matrix = sp.csr_matrix((samples.counts, samples.gene_ids.astype(np.int32), samples.indptr), shape=(N, PANEL))
    ours, theirs = rates(lambda: unpack(packed, rows), lambda: matrix[rows])
    print(f"\ngathering: {ours:,.0f} samples/s, scipy {theirs:,.0f}, ratio {ours / theirs:.1f}")
    assert ours > 0.3 * theirs
