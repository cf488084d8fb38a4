"""Rates of the hot path as ratios in one run: kernels against plain NumPy, block decoding against plain Arrow arrays.

`pytest tests/bench -s` prints them. Bounds are far below what was seen, so that a busy machine does not fail them; a
lost order of magnitude does.
"""

import math
import time
from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pytest

from shards import codec
from shards.packing import take_samples
from txfm_data import kernels
from txfm_data.panels import make_panels
from txfm_data.ragged import Ragged

PANEL, NONZERO, K, N = 20_000, 2_383, 2_048, 512
L = 1e5


@pytest.fixture(scope="module")
def samples() -> Ragged:
    """512 samples like those of a droplet experiment: 2,383 of 20,000 genes, most counts small."""
    rng = np.random.default_rng(0)
    rank = np.sort(rng.zipf(1.6, (N, NONZERO)).clip(max=3_000), axis=1)[:, ::-1]
    genes = np.stack([np.sort(rng.choice(PANEL, NONZERO, replace=False)) for _ in range(N)])
    indptr = np.arange(N + 1, dtype=np.int64) * NONZERO
    return Ragged(indptr, genes.astype(np.uint16).ravel(), rng.permuted(rank, axis=1).astype(np.uint32).ravel())


def rates(ours: Callable[[], object], theirs: Callable[[], object], rounds: int = 30) -> tuple[float, float]:
    """Samples per second of the best of a few runs of each; the runs alternate, so that a busy moment strikes both."""
    works = (ours, theirs)
    best = [math.inf, math.inf]
    for work in works:
        work()
    for _ in range(rounds):
        for i, work in enumerate(works):
            since = time.perf_counter()
            work()
            best[i] = min(best[i], time.perf_counter() - since)
    return N / best[0], N / best[1]


def test_normalising_and_masking_against_numpy(samples):
    panels = make_panels([np.arange(PANEL, dtype=np.uint16)], [np.zeros(PANEL)])
    size = np.add.reduceat(samples.counts, samples.indptr[:-1]).astype(float)
    dense, identity = np.zeros(PANEL, np.float32), np.arange(PANEL, dtype=np.int32)
    swaps, drawn = np.empty(K, np.int32), np.empty(K, np.int32)
    normalized = np.empty(samples.nnz, np.float32)
    out = np.empty((N, K), np.uint16), np.empty((N, K), np.float32), np.empty(N, np.int32)
    ids, panel_id = np.arange(N), np.zeros(N, np.int64)

    def ours() -> None:
        kernels.normalize(samples.indptr, samples.counts, size, L, normalized)
        kernels.mask_batch(
            samples.indptr, samples.gene_ids, normalized, panel_id, ids, panels.indptr, panels.gene_ids, 0, 0,
            dense, identity, swaps, drawn, *out,
        )  # fmt: skip

    def plain() -> None:
        rng = np.random.default_rng(0)
        for b in range(N):
            part = slice(samples.indptr[b], samples.indptr[b + 1])
            row = np.zeros(PANEL, np.float32)
            row[samples.gene_ids[part]] = samples.counts[part] * (L / size[b])
            shown = rng.choice(PANEL, K, replace=False)
            out[0][b], out[1][b] = shown, np.log1p(row[shown])

    mine, numpy = rates(ours, plain)
    print(f"\nmasking: {mine:,.0f} samples/s, NumPy {numpy:,.0f}, ratio {mine / numpy:.1f}")
    assert mine > 1.5 * numpy


def test_decoding_blocks_against_plain_arrow_arrays(samples):
    block = codec.Block(
        np.arange(N), np.zeros(N, np.int32), np.zeros(N, np.int32), np.array(["b"] * N, dtype=object), np.full(N, 5e3), samples
    )  # fmt: skip
    data = codec.encode(block)
    lists = {
        "genes": pa.LargeListArray.from_arrays(samples.indptr, pa.array(samples.gene_ids)),
        "counts": pa.LargeListArray.from_arrays(samples.indptr, pa.array(samples.counts)),
    }
    table, sink = pa.table(lists), pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
        writer.write_table(table)
    arrow = sink.getvalue().to_pybytes()

    def plain() -> None:
        read = pa.ipc.open_stream(arrow).read_all()
        for name in ("genes", "counts"):
            read[name].chunk(0).values.to_numpy().sum()

    ours, theirs = rates(lambda: codec.decode(data, n_samples=N, n_genes=PANEL, n_panels=1, where="bench"), plain)
    print(
        f"\ndecoding: {ours:,.0f} samples/s of {len(data) / N:,.0f} B, plain zstd arrays {theirs:,.0f} of {len(arrow) / N:,.0f} B"
    )
    assert len(data) < 0.75 * len(arrow)
    assert ours > 0.3 * theirs


def test_gathering_rows_against_scipy(samples):
    import scipy.sparse as sp

    rows = np.random.default_rng(1).permutation(N)
    matrix = sp.csr_matrix((samples.counts, samples.gene_ids.astype(np.int32), samples.indptr), shape=(N, PANEL))
    ours, theirs = rates(lambda: take_samples(samples, rows), lambda: matrix[rows])
    print(f"\ngathering: {ours:,.0f} samples/s, scipy {theirs:,.0f}, ratio {ours / theirs:.1f}")
    assert ours > 0.3 * theirs
