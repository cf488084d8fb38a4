"""AnnData files made in parts: labels and matrices of any size go to h5ad or Zarr without being held in memory.

Nothing here is whole until the caller renames it: `path` is a name beside the final one.
"""

import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
import pyarrow as pa

from txfm_data.address import is_remote, local_path, open_binary
from txfm_data.obs_columns import INDEX, plan_columns

ObsParts = Callable[[], Iterator[tuple[np.ndarray, pa.Table]]]
"""Gives the labels of all samples, each time anew: (rows (n,) int64, table of n rows with a column `INDEX` of names)."""
_CHUNK_BYTES = 1024**2
_CHUNK_ROWS = 65_536
_ARRAY = {"encoding-type": "array", "encoding-version": "0.2.0"}
_STRINGS = {"encoding-type": "string-array", "encoding-version": "0.2.0"}
_MATRIX_GROUPS = ("obsm", "varm", "obsp", "varp", "layers")


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """A dense matrix with a row for each sample, in parts.

    element : where it goes, such as ``obsm/X_txfm``.  width : columns.  dtype : of its values.
    parts : its rows in order, (n, width) arrays of any n.
    """

    element: str
    width: int
    dtype: np.dtype[Any]
    parts: Iterator[np.ndarray]


def output_format(path: str | Path) -> str:
    """Tell "h5ad" or "zarr" by the end of a name.

    Raises
    ------
    ValueError
        If it is another one, or an address on object storage.
    """
    if is_remote(path):
        raise ValueError(f"{path}: results are written to a local disk; name a path there and copy it")
    name = Path(path).name
    for suffix in ("h5ad", "zarr"):
        if name.endswith(f".{suffix}"):
            return suffix
    raise ValueError(f"{path}: the name of the output must end in .h5ad or .zarr, which says what is written")


def write_anndata(
    path: Path,
    *,
    n_obs: int,
    obs: ObsParts,
    var: pd.DataFrame | None,
    matrices: Sequence[Matrix],
    uns: Mapping[str, Any],
) -> None:
    """Write an AnnData object without X, and without genes if `var` is None; its format is told by the end of `path`.

    Memory is that of one part of the labels and of the matrices, and the distinct values of labels.
    """
    with _new_file(path) as root:
        for name, value in (("encoding-type", "anndata"), ("encoding-version", "0.1.0")):
            root.attrs[name] = value
        for group in _MATRIX_GROUPS:
            _write(root, group, {})
        _write(root, "var", pd.DataFrame(index=pd.Index([], dtype=str)) if var is None else var)
        _write(root, "uns", dict(uns))
        _write_obs(root, n_obs, obs)
        for matrix in matrices:
            _write_matrix(root, n_obs, matrix)
    sync(path)


def copy_with(
    source: str | Path, path: Path, *, n_obs: int, matrices: Sequence[Matrix], uns: Mapping[str, Any]
) -> None:
    """Copy an h5ad file byte by byte, then add matrices and entries of uns; what has their names is replaced."""
    if is_remote(source):
        with open_binary(source) as opened, path.open("wb") as target:
            shutil.copyfileobj(opened, target, 4 * 1024**2)
    else:
        shutil.copyfile(local_path(source), path)
    with h5py.File(path, "r+") as root:
        for group in {"uns", *(matrix.element.split("/")[0] for matrix in matrices)}:
            if group not in root:
                _write(root, group, {})
        for matrix in matrices:
            if matrix.element in root:
                del root[matrix.element]
            _write_matrix(root, n_obs, matrix)
        for name, value in uns.items():
            if name in root["uns"]:
                del root["uns"][name]
            _write(root["uns"], name, value)
    sync(path)


def sync(path: Path) -> None:
    """Have the disk keep a file, or every file of a folder."""
    files = [path] if path.is_file() else [found for found in path.rglob("*") if found.is_file()]
    for file in files:
        with file.open("rb+") as handle:
            os.fsync(handle.fileno())


def predicted_anndata(obs: pd.DataFrame, var: pd.DataFrame, layer: str, values: np.ndarray, uns: dict[str, Any]) -> Any:
    """Return an AnnData object in memory: labels of samples and genes, one layer, no X."""
    import anndata

    return anndata.AnnData(obs=obs, var=var, layers={layer: values}, uns=uns)


@contextmanager
def _new_file(path: Path) -> Iterator[Any]:
    if output_format(path) == "h5ad":
        with h5py.File(path, "w") as file:
            yield file
    else:
        import zarr

        yield zarr.open_group(path, mode="w", zarr_format=3)


def _write(group: Any, name: str, value: Any) -> None:
    """Write something small as AnnData does."""
    from anndata.io import write_elem

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # anndata announces its next release's default of sharding
        write_elem(group, name, value)


def _create(
    group: Any, name: str, shape: tuple[int, ...], dtype: Any, chunk_rows: int, attributes: dict[str, str]
) -> Any:
    """Make an array of zeros or empty texts; `dtype` str for texts."""
    chunks = (max(1, min(chunk_rows, shape[0])), *shape[1:])
    if isinstance(group, h5py.Group):
        kind = h5py.string_dtype() if dtype is str else dtype
        array = group.create_dataset(name, shape, kind, chunks=chunks if all(shape) else None)
        for key, value in attributes.items():
            array.attrs[key] = value
        return array
    return group.create_array(name, shape=shape, dtype=dtype, chunks=chunks, attributes=attributes)


def _write_matrix(root: Any, n_obs: int, matrix: Matrix) -> None:
    group, _, name = matrix.element.partition("/")
    rows = max(1, _CHUNK_BYTES // max(1, matrix.width * matrix.dtype.itemsize))
    array = _create(root[group], name, (n_obs, matrix.width), matrix.dtype, rows, _ARRAY)
    at = 0
    for part in _rechunked(matrix.parts, 16 * rows):  # whole chunks: none is written twice
        array[at : at + len(part)] = part
        at += len(part)
    if at != n_obs:
        raise ValueError(f"{matrix.element}: {at} rows were computed for {n_obs} samples; the input changed meanwhile")


def _rechunked(parts: Iterator[np.ndarray], rows: int) -> Iterator[np.ndarray]:
    """Give the same rows in arrays of `rows` each; the last may be shorter."""
    held: list[np.ndarray] = []
    n_held = 0
    for part in parts:
        held.append(part)
        n_held += len(part)
        if n_held >= rows:
            joined = np.concatenate(held)
            whole = n_held - n_held % rows
            for start in range(0, whole, rows):
                yield joined[start : start + rows]
            held, n_held = [joined[whole:]], n_held - whole
    if n_held:
        yield np.concatenate(held)


def _write_obs(root: Any, n_obs: int, obs: ObsParts) -> None:
    """Write labels in two passes: one to learn what columns hold, one to write them."""
    columns = plan_columns(table for _, table in obs())
    group = root.create_group("obs")
    order = [name for name in columns if name != INDEX]
    attributes = {"encoding-type": "dataframe", "encoding-version": "0.2.0", "_index": INDEX}
    for key, value in attributes.items():
        group.attrs[key] = value
    group.attrs["column-order"] = np.array(order, object) if isinstance(group, h5py.Group) and order else order
    arrays = {name: _open_column(group, column, n_obs) for name, column in columns.items()}
    for rows, table in obs():
        for name, column in columns.items():
            values, mask = column.values(table[name])
            array, mask_array = arrays[name]
            _put(array, rows, values)
            if mask_array is not None:
                _put(mask_array, rows, mask)


def _open_column(group: Any, column: Any, n_obs: int) -> tuple[Any, Any]:
    """Array of a column's values or codes, and of its mask if it has one."""
    if column.kind == "category":
        inner = group.create_group(column.name)
        inner.attrs["encoding-type"], inner.attrs["encoding-version"] = "categorical", "0.2.0"
        inner.attrs["ordered"] = column.ordered
        texts = column.category_values()
        is_text = texts.dtype == object
        known = _create(
            inner,
            "categories",
            texts.shape,
            str if is_text else texts.dtype,
            _CHUNK_ROWS,
            _STRINGS if is_text else _ARRAY,
        )
        if len(texts):
            known[:] = texts
        return _create(inner, "codes", (n_obs,), np.dtype(np.int32), _CHUNK_ROWS, _ARRAY), None
    dtype = str if column.kind == "string" else column.dtype
    attributes = _STRINGS if column.kind == "string" else _ARRAY
    if not column.has_mask:
        return _create(group, column.name, (n_obs,), dtype, _CHUNK_ROWS, attributes), None
    inner = group.create_group(column.name)
    kinds = {"string": "nullable-string-array", "bool": "nullable-boolean", "integer": "nullable-integer"}
    inner.attrs["encoding-type"], inner.attrs["encoding-version"] = kinds[column.kind], "0.1.0"
    return (
        _create(inner, "values", (n_obs,), dtype, _CHUNK_ROWS, attributes),
        _create(inner, "mask", (n_obs,), np.dtype(bool), _CHUNK_ROWS, _ARRAY),
    )


def _put(array: Any, rows: np.ndarray, values: np.ndarray) -> None:
    """Write values at ascending rows, a run of neighbours at a time."""
    for run in np.split(np.arange(len(rows)), np.flatnonzero(np.diff(rows) != 1) + 1):
        if len(run):
            array[int(rows[run[0]]) : int(rows[run[-1]]) + 1] = values[run[0] : run[-1] + 1]
