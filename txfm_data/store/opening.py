"""Opening a store of either backend by looking at what is there."""

import time
from pathlib import Path

from txfm_data import address as addresses
from txfm_data.store import files, layout, objects, transaction
from txfm_data.store.protocol import Backend, Store, Values
from txfm_data.store.soma import SomaStore
from txfm_data.store.soma_backend import SomaBackend

OBS_SCHEMA = layout.OBS_SCHEMA
ORGANISM = layout.ORGANISM

_TRIES, _WAIT_S = 5, 0.05
"""How often a store is opened while appends take its place, and the wait between."""


def _settled(address: str | Path) -> Path:
    """The path of a store on this machine, which is back at its place should an append have been stopped in between."""
    path = addresses.local_path(address)
    transaction.settle(path)
    return path


def exists(address: str | Path) -> bool:
    """Whether anything is at `address`; on object storage, the beginning of a store that an append left is nothing.

    Raises
    ------
    ValueError
        If an address of object storage is not that of a store.
    FileNotFoundError, PermissionError, ConnectionError
        If its bucket does not exist or cannot be reached.
    """
    if not addresses.is_remote(address):
        return _settled(address).exists()
    found = objects.children(objects.plain_address(address))
    return bool(found) and objects.MARK not in found


def backend_at(address: str | Path) -> Backend:
    """The backend of the store at `address`: a Zarr group has a ``zarr.json``, a SOMA collection has none."""
    if addresses.is_remote(address):
        is_zarr = "zarr.json" in objects.children(objects.plain_address(address))
    else:
        is_zarr = (_settled(address) / "zarr.json").exists()
    return backend("zarr" if is_zarr else "soma")


def backend(name: str) -> Backend:
    """A backend by name."""
    if name == "zarr":
        from txfm_data.store.zarr import ZarrBackend

        return ZarrBackend()
    return SomaBackend()


def open_store(address: str | Path) -> Store:
    """Open a store of either backend for reading.

    Raises
    ------
    FileNotFoundError, ValueError
        If there is none, or it is damaged or not ours.
    PermissionError, ConnectionError
        If object storage cannot be reached with the keys there are.
    """
    if addresses.is_remote(address):
        return _open(address)
    path = addresses.local_path(address)
    for _ in range(_TRIES - 1):
        transaction.settle(path)
        before = files.stamp(path)
        try:
            store = _open(path)
        except (ValueError, OSError):
            if not files.replaced(path, before):
                raise
        else:
            if not files.replaced(path, before):
                return store
        time.sleep(_WAIT_S)  # an append took the store's place meanwhile: what was seen is of two stores
    return _open(path)


def _open(address: str | Path) -> Store:
    if backend_at(address).name == "zarr":
        from txfm_data.store.zarr import ZarrStore

        return ZarrStore(address)
    store = SomaStore(address)
    if store.n_listed < len(store.datasets):
        from txfm_data.store.verify import check_datasets  # which opens stores

        # An append was killed before it wrote the list: what the list does not cover is counted
        check_datasets(store, store.datasets[store.n_listed :])
    return store


def check_new(store: Store, name: str, content_sha256: str | None, values: Values) -> None:
    """Refuse a name, a file, or a unit of values that does not go with what the store holds."""
    for record in store.datasets:
        if record.name == name:
            raise ValueError(
                f"{store.path}: dataset {name!r} is there already ({record.n_obs} samples from {record.source}); "
                "choose another --dataset name, or another store"
            )
        if record.content_sha256 == content_sha256:
            raise ValueError(
                f"{store.path}: the same file was ingested as dataset {record.name!r} (sha256 {content_sha256[:12]}…); "
                "its samples would be there twice"
            )
    if store.values is not None and store.values != values:
        raise ValueError(
            f"{store.path}: holds {store.values}, but {name!r} holds {values}; a store has one unit of values: name another --store"
        )
