"""AnnData in Zarr for tests, written by AnnData itself without what it and Zarr announce of later releases."""

import warnings
from pathlib import Path

import anndata as ad


def write_zarr(adata: ad.AnnData, path: Path, version: int = 3) -> Path:
    """Write in one version of the format and return the path."""
    with warnings.catch_warnings(), ad.settings.override(zarr_write_format=version):
        warnings.simplefilter("ignore", UserWarning)
        adata.write_zarr(path)
    return path
