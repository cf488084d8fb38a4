"""Row ranges of a data frame that AnnData stored in HDF5; what is not asked for stays on disk."""

from typing import Any

import h5py
import numpy as np
import pandas as pd
from anndata.io import read_elem

_CACHED_CATEGORIES = 65_536


class StoredFrame:
    """A data frame in an HDF5 group, read by rows.

    group : the group that holds the columns.  where : file and group, as messages name it.

    Attributes
    ----------
    columns : names of the columns, in order.
    n_rows : rows of the frame.

    Raises
    ------
    ValueError
        If the group is not a data frame as AnnData 0.7 or later stores it, or its columns differ in length.
    """

    def __init__(self, group: Any, where: str) -> None:
        if not isinstance(group, h5py.Group) or "_index" not in group.attrs:
            raise ValueError(
                f"{where} is not a data frame as AnnData 0.7 or later stores it; open the file with anndata and save it again"
            )
        self._group, self._where = group, where
        self._categories: dict[str, pd.Index] = {}
        self._index = str(group.attrs["_index"])
        self.columns = tuple(str(name) for name in group.attrs.get("column-order", ()))
        missing = [name for name in (self._index, *self.columns) if name not in group]
        if missing:
            raise ValueError(f"{where} names columns that it does not hold: {missing[:3]}; the file is damaged")
        self.n_rows = _length(group[self._index])
        for name in self.columns:
            if (n := _length(group[name])) != self.n_rows:
                raise ValueError(
                    f"{where}: column {name!r} has {n} rows, the index {self.n_rows}; the file is inconsistent, write it again"
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
        if isinstance(element, h5py.Dataset) and element.ndim == 1:
            if "categories" in element.attrs:  # as AnnData 0.7 stored them: codes that point to a data set
                categories = element.parent[element.attrs["categories"]]
                return self._categorical(name, element[start:stop], categories, categories.attrs)
            if _is_plain(element):
                return _slice(element, start, stop)
        elif encoding == "categorical":
            return self._categorical(name, element["codes"][start:stop], element["categories"], element.attrs)
        elif encoding in ("nullable-integer", "nullable-boolean"):
            array = pd.arrays.IntegerArray if encoding == "nullable-integer" else pd.arrays.BooleanArray
            return array(element["values"][start:stop], element["mask"][start:stop])
        elif encoding == "nullable-string-array":
            values = element["values"].asstr()[start:stop].astype(object)
            values[element["mask"][start:stop]] = pd.NA
            return pd.array(values, dtype=pd.StringDtype())
        return read_elem(element)[start:stop]  # a rare encoding: the column passes through memory whole

    def _categorical(self, name: str, codes: np.ndarray, categories: Any, attributes: Any) -> pd.Categorical:
        known = self._categories.get(name)
        if known is None:
            known = pd.Index(_slice(categories, 0, len(categories)) if _is_plain(categories) else read_elem(categories))
            if len(known) <= _CACHED_CATEGORIES:
                self._categories[name] = known
        return pd.Categorical.from_codes(codes, known, ordered=bool(attributes.get("ordered", False)))


def _is_plain(element: Any) -> bool:
    """Whether a data set holds text or numbers as they are."""
    return (
        isinstance(element, h5py.Dataset)
        and element.ndim == 1
        and element.attrs.get("encoding-type", "") in ("", "array", "string-array")
        and (element.dtype.kind in "biuf" or h5py.check_string_dtype(element.dtype) is not None)
    )


def _slice(element: Any, start: int, stop: int) -> np.ndarray:
    is_text = h5py.check_string_dtype(element.dtype) is not None
    out: np.ndarray = element.asstr()[start:stop] if is_text else element[start:stop]
    return out


def _length(element: Any) -> int:
    """Rows of a stored column, without reading it; -1 where it has none."""
    if isinstance(element, h5py.Dataset):
        return int(element.shape[0]) if element.ndim else -1
    for part in ("codes", "values"):
        if part in element:
            return _length(element[part])
    return len(read_elem(element))
