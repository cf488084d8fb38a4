"""Row ranges of a data frame that AnnData stored in Zarr; what is not asked for stays on disk."""

from typing import Any

import numpy as np
import pandas as pd

_CACHED_CATEGORIES = 65_536


class ZarrFrame:
    """A data frame in a Zarr group, read by rows.

    group : the group that holds the columns.  where : folder and group, as messages name it.

    Attributes
    ----------
    columns : names of the columns, in order.
    n_rows : rows of the frame.

    Raises
    ------
    ValueError
        If the group is not a data frame as AnnData 0.8 or later stores it, or its columns differ in length.
    """

    def __init__(self, group: Any, where: str) -> None:
        attributes = dict(group.attrs)
        if "_index" not in attributes:
            raise ValueError(
                f"{where} is not a data frame as AnnData 0.8 or later stores it; open it with anndata and save it again"
            )
        self._group = group
        self._categories: dict[str, pd.Index] = {}
        self._index = str(attributes["_index"])
        self.columns = tuple(str(name) for name in attributes.get("column-order", ()))
        missing = [name for name in (self._index, *self.columns) if name not in group]
        if missing:
            raise ValueError(f"{where} names columns that it does not hold: {missing[:3]}; it is damaged")
        self.n_rows = _length(group[self._index])
        for name in self.columns:
            if (n := _length(group[name])) != self.n_rows:
                raise ValueError(
                    f"{where}: column {name!r} has {n} rows, the index {self.n_rows}; it is inconsistent, write it again"
                )

    def rows(self, start: int, stop: int) -> pd.DataFrame:
        """Rows [start, stop) with every column, as AnnData gives them; the index is of str."""
        columns = {name: self._column(name, start, stop) for name in self.columns}
        index = pd.Index(self._column(self._index, start, stop)).astype(str)
        frame = pd.DataFrame(columns, index=index, columns=list(self.columns) or None)
        frame.index.name = None if self._index == "_index" else self._index
        return frame

    def _column(self, name: str, start: int, stop: int) -> Any:
        element = self._group[name]
        encoding = str(element.attrs.get("encoding-type", ""))
        if encoding == "categorical":
            known = self._categories.get(name)
            if known is None:
                known = pd.Index(_slice(element["categories"], 0, element["categories"].shape[0]))
                if len(known) <= _CACHED_CATEGORIES:
                    self._categories[name] = known
            codes = np.asarray(element["codes"][start:stop])
            return pd.Categorical.from_codes(codes, known, ordered=bool(element.attrs.get("ordered", False)))
        if encoding in ("nullable-integer", "nullable-boolean"):
            array = pd.arrays.IntegerArray if encoding == "nullable-integer" else pd.arrays.BooleanArray
            return array(np.asarray(element["values"][start:stop]), np.asarray(element["mask"][start:stop]))
        if encoding == "nullable-string-array":
            values = _slice(element["values"], start, stop)
            values[np.asarray(element["mask"][start:stop])] = pd.NA
            return pd.array(values, dtype=pd.StringDtype())
        if hasattr(element, "dtype"):
            return _slice(element, start, stop)
        from anndata.io import read_elem

        return read_elem(element)[start:stop]  # a rare encoding: the column passes through memory whole


def _slice(array: Any, start: int, stop: int) -> np.ndarray:
    values = np.asarray(array[start:stop])
    return values if values.dtype.kind in "biufcmM" else values.astype(object)


def _length(element: Any) -> int:
    """Rows of a stored column, without reading it; -1 where it has none."""
    if hasattr(element, "dtype"):
        return int(element.shape[0]) if element.ndim else -1
    for part in ("codes", "values"):
        if part in element:
            return _length(element[part])
    return -1
