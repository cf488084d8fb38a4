"""Perturbation consistency beside reading the embedding once and multiplying it by a (width x perturbations) matrix.

`TXFM_BENCH_CELLS=300000 pytest tests/bench/test_bench_consistency.py -s` prints the ratio at the size of the goal.
"""

import math
import os
import time

import numpy as np
import pytest

from txfm_data.curate.consistency import ConsistencyOptions, EmbeddingFile, perturbation_consistency

N = int(os.environ.get("TXFM_BENCH_CELLS", "3000"))
D, PERTURBATIONS, BATCHES, CONTROLS = 768, 2_392, 20, 0.05
MOST, FROM_CELLS, ROUNDS = 3.0, 100_000, 2


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """`N` random vectors in a file, written in parts."""
    path = tmp_path_factory.mktemp("bench") / "embedding.npy"
    rng = np.random.default_rng(0)
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": (N, D)})
        for start in range(0, N, 10_000):
            rng.standard_normal((min(10_000, N - start), D), np.float32).tofile(file)
    yield path
    path.unlink()


def read_and_multiply(path, weights) -> float:
    """Read the file in blocks and multiply each; the sum of one column, so that nothing is left out."""
    total = 0.0
    block_rows = 4_096
    buffer, out = np.empty((block_rows, D), np.float32), np.empty((block_rows, weights.shape[1]), np.float32)
    with path.open("rb", buffering=0) as file:
        file.seek(path.stat().st_size - 4 * N * D)
        for start in range(0, N, block_rows):
            n = min(block_rows, N - start)
            assert file.readinto(buffer[:n].data.cast("B")) == 4 * n * D
            total += float(np.matmul(buffer[:n], weights, out=out[:n])[:, 0].sum())
    return total


def test_consistency_against_reading_and_multiplying_once(path):
    rng = np.random.default_rng(1)
    is_control = rng.random(N) < CONTROLS
    perturbation = np.where(is_control, -1, rng.integers(0, PERTURBATIONS, N)).astype(np.int32)
    batch = rng.integers(0, BATCHES, N).astype(np.int32)
    weights = rng.standard_normal((D, PERTURBATIONS), np.float32)

    def ours() -> None:
        found = perturbation_consistency(
            EmbeddingFile(path), perturbation, is_control, batch, ConsistencyOptions(n_null=1_000),
            n_perturbations=PERTURBATIONS,
        )  # fmt: skip
        assert found.n_cells.sum() == N - is_control.sum()
        if N >= FROM_CELLS:  # or there are perturbations of two cells, for which the test is not conservative
            assert np.mean(found.p < 0.05) <= 0.001

    works = (ours, lambda: read_and_multiply(path, weights))
    best = [math.inf, math.inf]
    for _ in range(ROUNDS):
        for i, work in enumerate(works):
            since = time.perf_counter()
            work()
            best[i] = min(best[i], time.perf_counter() - since)
    print(
        f"\nconsistency of {N:,} cells: {best[0]:.2f} s, read and multiplied {best[1]:.2f} s, ratio {best[0] / best[1]:.2f}"
    )
    if N >= FROM_CELLS:  # of fewer, most is spent on the axes and the null
        assert best[0] <= MOST * best[1]
