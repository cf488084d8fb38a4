"""Columns of obs in a Zarr store, in AnnData's encodings: read by ranges, appended without rewriting older rows.

A column is a plain array (a group of codes and categories for a category) until a null comes into it; from then on it
is AnnData's nullable array, a mask beside the values. A null among floats is NaN, one among categories is code -1.
"""

import os
import secrets
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from txfm_data.store import zarr_layout as layout
from txfm_data.store.zarr_arrays import Appender, Reader

_NULLABLE = {"int64": "nullable-integer", "bool": "nullable-boolean", "string": "nullable-string-array"}
_TYPES = {
    "category": pa.dictionary(pa.int32(), pa.large_string()),
    "string": pa.large_string(),
    "int64": pa.int64(),
    "float64": pa.float64(),
    "bool": pa.bool_(),
}
_RESERVED = {"_index", "zarr.json", "", ".", ".."}


def check_names(where: str, names: Iterable[str]) -> None:
    """Refuse names of columns that cannot be names of folders within obs.

    Raises
    ------
    ValueError
        Names the column.
    """
    for name in names:
        if name in _RESERVED or "/" in name or "\0" in name or name.startswith("__") or len(name.encode()) > 200:
            raise ValueError(
                f"{where}: a Zarr store cannot hold a column named {name!r}, each is a folder within obs; "
                "rename it in the source, or write to a SOMA store"
            )


class Column:
    """One column of obs, open for reading. `type` is its Arrow type."""

    def __init__(self, root: Any, name: str, n_obs: int) -> None:
        self.path = f"{layout.OBS}/{name}"
        self._folder = str(root.store.root)
        shape = (n_obs,)
        try:
            encoding = root[self.path].attrs.get("encoding-type")
        except (KeyError, ValueError, TypeError, OSError) as error:
            raise layout.damaged(self._folder, self.path, f"no such column ({error})") from error
        self.is_nullable = encoding in _NULLABLE.values()
        self._mask = self._categories = None
        if encoding == "categorical":
            self.kind = "category"
            self._values = Reader(layout.get_array(root, f"{self.path}/codes", shape=shape, kind="i"))
            names = layout.get_array(root, f"{self.path}/categories", kind="T")
            texts = Reader(names).read(0, names.shape[0])
            self._categories = pa.array(texts.astype(object), pa.large_string())
        else:
            path = f"{self.path}/values" if self.is_nullable else self.path
            array = layout.get_array(root, path, shape=shape, kind="ifbT")
            self.kind = {"i": "int64", "f": "float64", "b": "bool", "T": "string"}[array.dtype.kind]
            self._values = Reader(array)
            if self.is_nullable:
                self._mask = Reader(layout.get_array(root, f"{self.path}/mask", shape=shape, kind="b"))
        self.type = _TYPES[self.kind]

    def categories(self) -> list[str]:
        """Categories in the order of their codes; of a category column alone."""
        return [] if self._categories is None else list(self._categories.to_pylist())

    def read(self, start: int, stop: int) -> pa.Array:
        """Rows [start, stop)."""
        values = self._values.read(start, stop)
        if self._categories is not None:
            if len(values) and not -1 <= int(values.min()) <= int(values.max()) < len(self._categories):
                raise layout.damaged(self._folder, self.path, "a code is outside the categories")
            return pa.DictionaryArray.from_arrays(pa.array(values, pa.int32(), mask=values < 0), self._categories)
        mask = None if self._mask is None else self._mask.read(start, stop)
        return pa.array(values.astype(object) if self.kind == "string" else values, self.type, mask=mask)


class ColumnAppender:
    """Adds rows at the end of one column, making it if the store has none of that name. `kind` as of `layout.kind_of`."""

    def __init__(self, root: Any, name: str, kind: str, n_obs: int) -> None:
        self._root, self._name, self.kind = root, name, kind
        self._path = f"{layout.OBS}/{name}"
        self._n = n_obs
        self._codes: dict[str, int] = {}
        self._mask: Appender | None = None
        if self._path not in root:
            layout.add_column(root, self._path, kind)
            self._n = 0
            self._open(None)
            _fill_with_nulls(self, n_obs)
            return
        column = Column(root, name, n_obs)
        if column.kind != kind:
            self._change_kind(column)
            column = Column(root, name, n_obs)
        self._open(column)

    def _open(self, column: Column | None) -> None:
        is_nullable = column is not None and column.is_nullable
        if self.kind == "category":
            self._codes = {text: code for code, text in enumerate(column.categories() if column else [])}
            self._values = Appender(self._root[f"{self._path}/codes"])
        else:
            self._values = Appender(self._root[f"{self._path}/values" if is_nullable else self._path])
            if is_nullable:
                self._mask = Appender(self._root[f"{self._path}/mask"])
        self._n_known = len(self._codes)

    def _change_kind(self, column: Column) -> None:
        """Write the old rows again as another kind, beside the column, and put it in its place."""
        folder = Path(str(self._root.store.root)) / layout.OBS
        aside = f".{secrets.token_hex(4)}"
        other = ColumnAppender(self._root, aside, self.kind, 0)
        for low in range(0, self._n, layout.CHUNK):
            other.add(column.read(low, min(low + layout.CHUNK, self._n)))
        other.finish()
        shutil.rmtree(folder / self._name)
        os.rename(folder / aside, folder / self._name)

    def _make_nullable(self) -> None:
        """From a plain array to values beside a mask; the files of the values stay as they are."""
        self._values.finish()
        folder = Path(str(self._root.store.root)) / layout.OBS
        aside = folder / f".{secrets.token_hex(4)}"
        os.rename(folder / self._name, aside)
        attributes = {"encoding-type": _NULLABLE[self.kind], "encoding-version": "0.1.0"}
        self._root.create_group(self._path, attributes=attributes)
        os.rename(aside, folder / self._name / "values")
        mask = layout.add_array(self._root, f"{self._path}/mask", np.dtype(np.bool_))
        self._values = Appender(self._root[f"{self._path}/values"])
        self._mask = Appender(mask)
        for low in range(0, self._n, layout.CHUNK):
            self._mask.add(np.zeros(min(layout.CHUNK, self._n - low), np.bool_))

    def add(self, values: pa.Array) -> None:
        """Take rows; any Arrow type that casts to the column's without loss."""
        if self.kind == "category":
            self._values.add(self._encode(values))
            self._n += len(values)
            return
        values = values.cast(_TYPES[self.kind])
        nulls = values.is_null().to_numpy(zero_copy_only=False)
        if nulls.any() and self.kind != "float64":
            if self._mask is None:
                self._make_nullable()
            values = values.fill_null({"int64": 0, "bool": False, "string": ""}[self.kind])
        numbers = values.to_numpy(zero_copy_only=False)
        self._values.add(numbers.astype(np.dtypes.StringDType()) if self.kind == "string" else numbers)
        if self._mask is not None:
            self._mask.add(nulls)
        self._n += len(values)

    def _encode(self, values: pa.Array) -> np.ndarray:
        """Codes of categories; new ones follow those the column knows."""
        if not pa.types.is_dictionary(values.type):
            values = values.cast(pa.large_string()).dictionary_encode()
        known = np.empty(len(values.dictionary) + 1, np.int32)
        known[-1] = -1
        codes = values.indices.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)
        texts = values.dictionary.to_pylist()
        for at in np.unique(codes[codes >= 0]).tolist():
            text = texts[at]
            known[at] = -1 if text is None else self._codes.setdefault(text, len(self._codes))
        out: np.ndarray = known[codes]
        return out

    def finish(self) -> None:
        """Write what waits, and the categories if there are new ones."""
        self._values.finish()
        if self._mask is not None:
            self._mask.finish()
        if len(self._codes) > self._n_known:
            layout.add_whole(self._root, f"{self._path}/categories", np.array(list(self._codes), object))


def _fill_with_nulls(column: ColumnAppender, n: int) -> None:
    """Rows that were there before the column was."""
    for low in range(0, n, layout.CHUNK):
        column.add(pa.nulls(min(layout.CHUNK, n - low), _TYPES[column.kind]))


def append_obs(root: Any, where: str, schema: pa.Schema, pieces: Iterable[pa.Table], start: int, stop: int) -> None:
    """Append rows [start, stop) of obs, in pieces; columns that one side lacks are null there.

    Raises
    ------
    ValueError
        If the pieces do not hold that many rows, or a column cannot be kept.
    """
    names = [name for name in schema.names if name != "soma_joinid"]
    known = list(root[layout.OBS].attrs["column-order"])
    names = [*known, *(name for name in names if name not in known)]
    check_names(where, names)
    kinds = {name: layout.kind_of(schema.field(name).type) for name in names if name in schema.names}
    columns = {
        name: ColumnAppender(root, name, kinds[name] if name in kinds else Column(root, name, start).kind, start)
        for name in names
    }
    index = Appender(root[layout.OBS_INDEX])
    at = start
    for piece in pieces:
        for part in (piece.slice(low, layout.CHUNK) for low in range(0, len(piece), layout.CHUNK)):
            index.add(np.array([str(row) for row in range(at, at + len(part))], np.dtypes.StringDType()))
            for name, column in columns.items():
                nulls = pa.nulls(len(part), _TYPES[column.kind])
                column.add(_combined(part[name]) if name in part.column_names else nulls)
            at += len(part)
    if at != stop:
        raise ValueError(f"{where}: obs came with {at - start} rows, but the dataset has {stop - start} samples")
    index.finish()
    for column in columns.values():
        column.finish()
    root[layout.OBS].attrs["column-order"] = names


def _combined(column: pa.ChunkedArray) -> pa.Array:
    if pa.types.is_dictionary(column.type):
        column = column.unify_dictionaries()
    combined = column.combine_chunks()
    return combined.chunk(0) if isinstance(combined, pa.ChunkedArray) else combined
