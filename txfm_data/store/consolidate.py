"""Fewer, larger files: what an array of many appends needs to be opened fast."""

import os
from pathlib import Path
from typing import Any

import tiledbsoma as soma

from txfm_data.address import is_remote, local_path, tiledb_config
from txfm_data.progress import Progress, ignore
from txfm_data.store import layout, opening
from txfm_data.store.soma import SomaStore
from txfm_data.store.transaction import staged

_TABLES = (layout.OBS, layout.VAR, layout.DATASETS, layout.LEDGER, layout.PRESENCE, layout.GENE_NNZ)
_MODES = ("fragments", "fragment_meta", "commits")
_MEMORY = 1024**3
"""Bytes that TileDB may hold for one array; its own choice of ten times as much costs a second an array to fill with zeros."""


def consolidate(address: str | Path, *, progress: Progress = ignore) -> dict[str, Any]:
    """Merge the fragments of a SOMA store's tables, and the metadata of those of its counts; remove what is superseded.

    All or nothing, as an append. Fragments of the counts themselves stay: they are of the size of a block already.

    progress : called with arrays done of all.

    Returns
    -------
    dict
        store, files_before, files_after, bytes_before, bytes_after.

    Raises
    ------
    ValueError
        If the store is not SOMA, or not on a local disk.
    """
    store = opening.open_store(address)
    if not isinstance(store, SomaStore):
        raise ValueError(f"{store.path}: a Zarr store has nothing to consolidate")
    if is_remote(address):
        raise ValueError(
            f"{store.path}: only a store on a local disk can be consolidated all or nothing; copy it first"
        )
    path = local_path(address)
    before = _size(path)
    with staged(path, lambda folder: None) as copy:
        for done, name in enumerate((*_TABLES, layout.RAW), 1):
            with layout.clear_write_errors(str(copy / name)):
                _consolidate_array(copy / name, ("fragment_meta", "commits") if name == layout.RAW else _MODES)
            progress(done, len(_TABLES) + 1)
        opening.backend("soma").open(str(copy))
    after = _size(path)
    return {
        "store": store.path, "files_before": before[0], "files_after": after[0], "bytes_before": before[1], "bytes_after": after[1],
    }  # fmt: skip


def _consolidate_array(folder: Path, modes: tuple[str, ...]) -> None:
    if len(list((folder / "__commits").iterdir())) < 2:
        return  # one fragment, or nothing written since the last time
    for mode in modes:
        # tiledbsoma removes what is superseded by the mode of its settings, which by default is fragments whatever was merged.
        settings: dict[str, Any] = {**tiledb_config(), "sm.vacuum.mode": mode, "sm.mem.total_budget": _MEMORY}
        with soma.open(str(folder), "w", context=soma.SOMATileDBContext(tiledb_config=settings)) as element:
            element._handle.consolidate_and_vacuum([mode])


def _size(path: Path) -> tuple[int, int]:
    sizes = [os.path.getsize(os.path.join(folder, name)) for folder, _, names in os.walk(path) for name in names]
    return len(sizes), sum(sizes)
