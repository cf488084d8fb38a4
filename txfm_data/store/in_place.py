"""An append to a store on object storage, where nothing can be renamed: in place, and undone if it fails.

What each step leaves for readers, who see the same store until the last:

1. The lock is taken (`txfm_data.store.objects`). A new store gets its mark, and is no store for readers while it has it.
2. The ledger notes that an append has begun. Rows of X, panels, var and obs are written beyond what is committed; readers
   never look there. Sums in var are of all datasets that are written, and of none that this package reads.
3. The ledger's commit, one object, makes the dataset part of the store. From here on the append has succeeded.
4. The list of objects is written, which covers the new dataset; then the mark of a new store is removed.

An exception before the commit deletes the rows beyond the committed ones and notes the abort; a new store is removed. A killed
process leaves what it wrote, and its lock: the next append removes both before it begins.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from txfm_data import address as addresses
from txfm_data.store import ledger, objects, opening
from txfm_data.store.protocol import Backend
from txfm_data.store.soma_backend import SomaBackend

_log = logging.getLogger(__name__)


@contextmanager
def changing_in_place(
    address: str, backend: Backend, dataset: str, source: str, dtype: np.dtype[np.generic]
) -> Iterator[None]:
    """Begin an append at `address`; whatever ends the block with an exception rolls it back.

    Raises
    ------
    ValueError
        If the store is not SOMA (a Zarr group cannot be changed safely on object storage), damaged, or being written to.
    FileNotFoundError, PermissionError, ConnectionError
        If the bucket does not exist or cannot be reached with the keys there are.
    """
    address = objects.plain_address(address)
    if not isinstance(backend, SomaBackend):
        raise ValueError(
            f"{addresses.redact(address)}: a Zarr store cannot be made or appended to on object storage; use a SOMA store there "
            "(--backend soma), or build the Zarr store on a local disk and copy it"
        )
    with _clear(address), objects.writing(address):
        is_new = not opening.exists(address)
        try:
            if is_new:
                _begin_new(address, backend, dtype)
            else:
                _tidy(address, backend)
            backend.begin(address, dataset, source)
            yield
            if is_new:
                _write_list(address)
                objects.unmark(address)
        except BaseException:
            _undo(address, backend, dataset, is_new)
            raise
        if not is_new:
            _list_or_warn(address)


@contextmanager
def _clear(address: str) -> Iterator[None]:
    """Explain TileDB's errors. Python's own, of a remote source for one, say already where they are from."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        clear = addresses.explain(error, address)
        if clear is None:
            raise
        raise clear from None


def _begin_new(address: str, backend: SomaBackend, dtype: np.dtype[np.generic]) -> None:
    if objects.children(address):
        _log.warning("%s: removing the beginning of a store that an append left", addresses.redact(address))
        objects.remove_unfinished(address)
    objects.mark(address)
    backend.create(address, dtype)


def _tidy(address: str, backend: SomaBackend) -> None:
    """Check a store, remove what a killed append has left, and see to it that the list covers all there is."""
    store = opening.open_store(address)
    objects.wait_for_clock(address)
    is_pending = backend.open(address).ledger.pending is not None
    if is_pending:
        _log.warning("%s: removing what an unfinished append left", addresses.redact(address))
        backend.roll_back(address)
    # A local store that was copied here has a list without a number of datasets, which would cover one to come
    if is_pending or objects.read_list(address).n_datasets != len(store.datasets):
        _write_list(address)


def _write_list(address: str) -> None:
    objects.write_list(address, len(ledger.read(address).committed))


def _undo(address: str, backend: SomaBackend, dataset: str, is_new: bool) -> None:
    """Roll back; if that fails too, the next append does it."""
    where = addresses.redact(address)
    try:
        if is_new:
            objects.remove_unfinished(address)
            return
        state = backend.open(address).ledger
        if state.pending is not None:
            backend.roll_back(address)
        elif any(record.name == dataset for record in state.committed):
            _log.warning("%s: dataset %r was committed before this error, and stays", where, dataset)
        _write_list(address)
    except Exception as error:  # noqa: BLE001 - the error that led here is the one to report
        _log.warning("%s: not rolled back (%s); the next append does it", where, addresses.redact(str(error)))


def _list_or_warn(address: str) -> None:
    try:
        _write_list(address)
    except Exception as error:  # noqa: BLE001 - the dataset is in, which an exception would deny
        _log.warning(
            "%s: the list of objects could not be written (%s); the next append does it", addresses.redact(address),
            addresses.redact(str(error)),
        )  # fmt: skip
