"""Memory of an ingest does not grow with the file: ten times the samples, nearly the same peak, and within the budget."""

import subprocess
import sys
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

_PEAK = """
import re, sys
from txfm_data import ingest
from txfm_data.parallel import Workers
ingest.h5ad(sys.argv[1], sys.argv[2], "d", backend=sys.argv[3], workers=Workers(memory=int(sys.argv[4])))
print(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
"""
BUDGET = 2 * 1024**3


def write_file(path: Path, n_obs: int) -> None:
    rng = np.random.default_rng(0)
    per_row, n_vars = 800, 4_000
    genes = np.sort(rng.integers(0, n_vars // per_row, (1_000, per_row)) + np.arange(per_row) * (n_vars // per_row))
    indices = np.tile(genes.ravel().astype(np.int32), n_obs // 1_000)
    counts = sp.csr_matrix(
        (np.ones(len(indices), np.float32), indices, np.arange(n_obs + 1) * per_row), shape=(n_obs, n_vars)
    )
    ad.AnnData(counts, var=pd.DataFrame(index=[f"ENSG{i:011d}" for i in range(n_vars)])).write_h5ad(path)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from /proc")
@pytest.mark.parametrize("backend", ["soma", "zarr"])
def test_peak_memory_is_flat_and_within_the_budget(tmp_path, backend):
    peaks = {}
    for n_obs in (20_000, 200_000):
        write_file(tmp_path / f"{n_obs}.h5ad", n_obs)
        arguments = [str(tmp_path / f"{n_obs}.h5ad"), str(tmp_path / f"store{n_obs}"), backend, str(BUDGET)]
        done = subprocess.run([sys.executable, "-c", _PEAK, *arguments], capture_output=True, text=True, check=True)
        peaks[n_obs] = int(done.stdout) / 1024
    print(f"\npeak of ingest into {backend} in MiB: {peaks}")
    assert peaks[200_000] < 1.1 * peaks[20_000]
    assert peaks[200_000] < BUDGET / 1024**2
