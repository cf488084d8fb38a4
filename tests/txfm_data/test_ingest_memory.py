"""Memory of an ingest does not grow with the file: five times the samples, nearly the same peak."""

import subprocess
import sys
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

_PEAK = """
import resource, sys
from txfm_data import ingest
ingest.h5ad(sys.argv[1], sys.argv[2], "d")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def write_file(path: Path, n_obs: int) -> None:
    rng = np.random.default_rng(0)
    per_row, n_vars = 400, 2_000
    genes = np.sort(rng.integers(0, n_vars // per_row, (1_000, per_row)) + np.arange(per_row) * (n_vars // per_row))
    indices = np.tile(genes.ravel().astype(np.int32), n_obs // 1_000)
    counts = sp.csr_matrix(
        (np.ones(len(indices), np.float32), indices, np.arange(n_obs + 1) * per_row), shape=(n_obs, n_vars)
    )
    ad.AnnData(counts, var=pd.DataFrame(index=[f"ENSG{i:011d}" for i in range(n_vars)])).write_h5ad(path)


@pytest.mark.slow
def test_peak_memory_is_flat(tmp_path):
    peaks = {}
    for n_obs in (20_000, 100_000):
        write_file(tmp_path / f"{n_obs}.h5ad", n_obs)
        command = [sys.executable, "-c", _PEAK, str(tmp_path / f"{n_obs}.h5ad"), str(tmp_path / f"store{n_obs}")]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks[n_obs] = int(done.stdout) / 1024
    print(f"\npeak of ingest in MiB: {peaks}")
    grown = 80_000 * 400 * 8 / 1024**2  # of the added samples' values and indices, were they held at once
    assert peaks[100_000] - peaks[20_000] < 0.5 * grown
