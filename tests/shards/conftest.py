"""Stores that the tests of shard building share."""

from pathlib import Path

import pytest

from tests.shards.builds import make_store


@pytest.fixture(scope="session")
def known_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SOMA store of the datasets of `tests.txfm_data.stores`. Read it only."""
    return make_store(tmp_path_factory.mktemp("known"), "soma")


@pytest.fixture(scope="session")
def known_zarr(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Zarr store of the same. Read it only."""
    return make_store(tmp_path_factory.mktemp("known"), "zarr")
