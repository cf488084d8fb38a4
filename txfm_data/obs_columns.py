"""Labels of samples on their way from Arrow to AnnData: what each column is, learned from all parts before any is written."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

INDEX = "_index"
"""Column that holds the names of the samples."""


@dataclass
class ObsColumn:
    """One column of obs over all parts.

    kind : "category", "string", "bool", "integer", "float", or "" while every value was missing.
    categories : value to code, in order of appearance.  ordered : of a category.
    """

    name: str
    kind: str = ""
    dtype: Any = None
    has_null: bool = False
    ordered: bool = False
    categories: dict[Any, int] = field(default_factory=dict)

    @property
    def has_mask(self) -> bool:
        """Whether missing values need a mask beside the values."""
        return self.has_null and self.kind in ("string", "bool", "integer")

    def learn(self, column: pa.ChunkedArray) -> None:
        """Take note of one part."""
        for chunk in column.chunks:
            chunk = plain(chunk)
            self.has_null |= chunk.null_count > 0
            kind = kind_of(chunk.type)
            if kind and self.kind and kind != self.kind:
                kind = "float" if {kind, self.kind} == {"integer", "float"} else "string"
            if not kind:
                continue
            if kind == "category":
                self.ordered |= bool(chunk.type.ordered)
                for value in chunk.dictionary.to_pylist():
                    self.categories.setdefault(value, len(self.categories))
            elif kind != "string":
                found = np.dtype(bool) if kind == "bool" else np.dtype(chunk.type.to_pandas_dtype())
                self.dtype = found if self.dtype is None else np.promote_types(self.dtype, found)
            self.kind = kind

    def category_values(self) -> np.ndarray:
        """Categories in the order of their codes: numbers, or object for texts."""
        values = list(self.categories)
        if values and all(isinstance(value, int | float) for value in values):
            return np.array(values)
        return np.array([str(value) for value in values], object)

    def values(self, column: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
        """Values (or codes) of one part as they are written, and which are missing; (n,) and (n,) bool."""
        chunks = [self._values(plain(chunk)) for chunk in column.chunks]
        if not chunks:
            return np.empty(0, np.int32), np.empty(0, bool)
        return np.concatenate([c[0] for c in chunks]), np.concatenate([c[1] for c in chunks])

    def _values(self, chunk: pa.Array) -> tuple[np.ndarray, np.ndarray]:
        missing = chunk.is_null().to_numpy(zero_copy_only=False)
        if self.kind == "category":
            if pa.types.is_null(chunk.type):
                return np.full(len(chunk), -1, np.int32), missing
            codes = chunk.indices.fill_null(0).to_numpy(zero_copy_only=False)
            known = np.array([self.categories[value] for value in chunk.dictionary.to_pylist()] or [-1], np.int32)
            return np.where(missing, np.int32(-1), known[codes]), missing
        if self.kind == "string":
            texts = texts_of(chunk) if not pa.types.is_null(chunk.type) else [None] * len(chunk)
            return np.array(["" if text is None else text for text in texts], object), missing
        if pa.types.is_null(chunk.type):
            fill = np.nan if self.kind == "float" else 0
            return np.full(len(chunk), fill, self.dtype), missing
        if self.kind == "float":
            return chunk.to_numpy(zero_copy_only=False).astype(self.dtype), missing
        filled = chunk.fill_null(False if pa.types.is_boolean(chunk.type) else 0)
        return filled.to_numpy(zero_copy_only=False).astype(self.dtype), missing


def plan_columns(tables: Iterable[pa.Table]) -> dict[str, ObsColumn]:
    """Learn the columns of all parts; the first part's order stays."""
    columns: dict[str, ObsColumn] = {}
    for table in tables:
        for name in table.column_names:
            columns.setdefault(name, ObsColumn(name)).learn(table[name])
    for column in columns.values():
        if not column.kind:  # nothing is known of any sample
            column.kind, column.dtype = "float", np.dtype(np.float64)
    return columns


def plain(array: pa.Array) -> pa.Array:
    """Return an array of a type that AnnData can hold: category, text, boolean or number; any other as text."""
    if pa.types.is_dictionary(array.type):
        value = array.type.value_type
        if kind_of(value) in ("string", "integer", "float", "bool"):
            return array
        return plain(array.dictionary_decode())
    if pa.types.is_null(array.type) or kind_of(array.type):
        return array
    if pa.types.is_decimal(array.type):
        return array.cast(pa.float64())
    return pa.array(texts_of(array), pa.large_string())


def texts_of(array: pa.Array) -> list[str | None]:
    """Values as text, None where missing."""
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    try:
        found: list[str | None] = pc.cast(array, pa.large_string()).to_pylist()
    except (pa.ArrowNotImplementedError, pa.ArrowInvalid):
        found = [None if value is None else str(value) for value in array.to_pylist()]
    return found


def kind_of(dtype: pa.DataType) -> str:
    """Kind of a column of this type, as of `ObsColumn`; "" if it has none."""
    types = pa.types
    if types.is_dictionary(dtype):
        return "category"
    if types.is_string(dtype) or types.is_large_string(dtype):
        return "string"
    if types.is_boolean(dtype):
        return "bool"
    if types.is_integer(dtype):
        return "integer"
    return "float" if types.is_floating(dtype) else ""


def frame_table(frame: pd.DataFrame) -> pa.Table:
    """Rows of a data frame of labels as a table, its index as the column `INDEX`."""
    arrays = [pa.array(frame.index.astype(str), pa.large_string())]
    names = [INDEX]
    for name in frame.columns:
        try:
            array = pa.Array.from_pandas(frame[name])
        except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError):
            column = frame[name].astype(object)
            array = pa.array([None if gone else str(v) for v, gone in zip(column, column.isna(), strict=True)])
        arrays.append(array.combine_chunks() if isinstance(array, pa.ChunkedArray) else array)
        names.append(str(name).replace("/", "_"))
    return pa.table(arrays, names=names)
