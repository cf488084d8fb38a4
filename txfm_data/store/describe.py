"""What a store holds, without reading its counts."""

from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from txfm_data.address import list_files
from txfm_data.store import opening


def describe(address: str | Path) -> dict[str, Any]:
    """Datasets, samples, panels and their overlaps, modalities, values and size of a store.

    Returns
    -------
    dict
        kind, path, backend, n_obs, n_vars, values, dtype, bytes, bytes_per_sample, samples_by_modality, datasets (records, with
        n_obs), genes_in_common (for each pair of datasets, genes that both measured; a dataset's own panel on the diagonal).

    Raises
    ------
    FileNotFoundError, ValueError
        If there is no store, or it is damaged or not ours.
    """
    store = opening.open_store(address)
    size = sum(list_files(str(address)).values())
    modalities: Counter[str] = Counter()
    measured = np.zeros((len(store.datasets), len(store.vocabulary)), np.int32)
    for row, record in enumerate(store.datasets):
        modalities[record.modality] += record.n_obs
        measured[row, store.panel(record)] = 1
    common = measured @ measured.T
    names = [record.name for record in store.datasets]
    return {
        "kind": "store", "path": store.path, "backend": store.backend, "n_obs": store.n_obs, "n_vars": len(store.vocabulary),
        "values": store.values, "dtype": str(store.dtype), "bytes": size,
        "bytes_per_sample": size / store.n_obs if store.n_obs else None, "samples_by_modality": dict(modalities),
        "datasets": [asdict(record) | {"n_obs": record.n_obs} for record in store.datasets],
        "genes_in_common": {a: dict(zip(names, map(int, row), strict=True)) for a, row in zip(names, common, strict=True)},
    }  # fmt: skip
