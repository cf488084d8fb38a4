"""A simulated droplet experiment as an h5ad file of any size, for benchmarks: integer counts 1 to 5 with a tail."""

from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
from anndata.io import write_elem

N_VARS, NONZERO = 20_000, 2_300


def write_droplets(path: Path, n_obs: int, *, seed: int = 0, part: int = 2_000) -> None:
    """Write `n_obs` samples x 20,000 genes, about 2,300 non-zeros a sample, uncompressed CSR, a part at a time."""
    rng = np.random.default_rng(seed)
    rate = np.exp(rng.normal(0, 2, N_VARS))
    chance = 1 - np.exp(-rate / rate.sum() * 3_400)
    chance *= NONZERO / chance.sum()
    obs = pd.DataFrame(
        {"batch": pd.Categorical([f"b{i * 40 // n_obs}" for i in range(n_obs)])},
        index=[f"cell{i}" for i in range(n_obs)],
    )
    var = pd.DataFrame({"symbol": [f"G{i}" for i in range(N_VARS)]}, index=[f"ENSG{i:011d}" for i in range(N_VARS)])
    ad.AnnData(obs=obs, var=var).write_h5ad(path)
    indptr = [np.zeros(1, np.int64)]
    with h5py.File(path, "r+") as file:
        if "X" in file:
            del file["X"]
        group = file.create_group("X")
        group.attrs.update({"encoding-type": "csr_matrix", "encoding-version": "0.1.0", "shape": (n_obs, N_VARS)})
        data = group.create_dataset("data", (0,), np.float32, maxshape=(None,), chunks=(1 << 20,))
        indices = group.create_dataset("indices", (0,), np.int32, maxshape=(None,), chunks=(1 << 20,))
        for start in range(0, n_obs, part):
            n = min(part, n_obs - start)
            rows, columns = np.nonzero(rng.random((n, N_VARS), np.float32) < chance)
            at = len(data)
            for dataset in (data, indices):
                dataset.resize((at + len(columns),))
            indices[at:] = columns
            data[at:] = np.minimum(rng.geometric(0.69, len(columns)), 3_000) * np.where(
                rng.random(len(columns)) < 0.005, 40, 1
            )
            indptr.append(at + np.searchsorted(rows, np.arange(n), side="right"))
        write_elem(group, "indptr", np.concatenate(indptr))
