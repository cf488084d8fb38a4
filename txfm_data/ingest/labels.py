"""Labels of samples: the columns that every store has, and those of the source that are kept."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pandas as pd
import pyarrow as pa

from txfm_data.ingest.options import IngestOptions
from txfm_data.sources.protocol import Source
from txfm_data.store import layout

MISSING = "na"
UNKNOWN = "unknown"
_BASE = tuple(layout.OBS_SCHEMA.names)


def obs_column(source: Source, name: str, option: str) -> str:
    """`name`, if the source has such a column; `option` is what the user called it, for the error."""
    if name not in source.obs_columns:
        raise ValueError(
            f"{source.where}: {option} names {name!r}, but its samples have the columns {sorted(source.obs_columns)}"
        )
    return name


@dataclass(frozen=True)
class Labels:
    """Which columns of a source become which of the store.

    kept : name in the source to name in the store.  schema : of the store's obs with the new columns at its end.
    """

    source: Source
    options: IngestOptions
    dataset: str
    kept: dict[str, str]
    schema: pa.Schema

    def table(self, start: int, stop: int, sums: "Sums") -> pa.Table:
        """Rows [start, stop) of the source that are kept, with all columns of the schema but the sample ids."""
        frame = self.source.obs(start, stop)
        part = slice(start, stop)
        keep = sums.keep[part]
        nnz, size = sums.nnz[part], sums.library_size[part]
        with np.errstate(divide="ignore", invalid="ignore"):
            mean = np.where(nnz > 0, sums.row_sum[part] / nnz, 0.0)
        o, n = self.options, stop - start
        perturbation = self._text(frame, o.perturbation, MISSING)
        is_primary = frame["is_primary_data"].to_numpy(bool) if "is_primary_data" in frame else np.ones(n, bool)
        columns = {
            "dataset_id": _constant(self.dataset, n),
            "observation_joinid": pa.array(frame.index.astype(str).to_numpy(object), pa.large_string()),
            "batch": _category(self._text(frame, o.batch, MISSING if o.batch else self.dataset)),
            "cell_type": _category(self._text(frame, o.cell_type, UNKNOWN)),
            "perturbation": _category(perturbation),
            "is_control": pa.array(
                np.asarray(perturbation == o.control) if o.control is not None else np.zeros(n, bool)
            ),
            "modality": _constant(o.modality, n),
            "is_primary_data": pa.array(is_primary),
            "raw_sum": pa.array(size, pa.float64()),
            "nnz": pa.array(nnz, pa.int64()),
            "raw_mean_nnz": pa.array(mean, pa.float64()),
            "n_measured_vars": pa.array(np.full(n, sums.n_panel, np.int64)),
        }
        named = {new: _to_arrow(frame[old], self.schema.field(new).type) for old, new in self.kept.items()}
        arrays = [
            columns.get(field.name, named.get(field.name, None)) for field in self.schema if field.name != "soma_joinid"
        ]
        fields = [field for field in self.schema if field.name != "soma_joinid"]
        filled = [pa.nulls(n, f.type) if a is None else a for a, f in zip(arrays, fields, strict=True)]
        return pa.Table.from_arrays(filled, schema=pa.schema(fields)).filter(pa.array(keep))

    def _text(self, frame: pd.DataFrame, column: str | None, default: str) -> np.ndarray:
        if column is None:
            return np.full(len(frame), default, dtype=object)
        values = frame[column].astype(object)
        return np.asarray(values.where(~values.isna(), default).astype(str), dtype=object)


@dataclass(frozen=True)
class Sums:
    """What all blocks found, one entry a sample of the source.

    row_sum, library_size : (n,) float64.  nnz : (n,) int64.  keep : (n,) bool.
    """

    row_sum: np.ndarray
    library_size: np.ndarray
    nnz: np.ndarray
    keep: np.ndarray
    n_panel: int


def plan_labels(
    source: Source, options: IngestOptions, dataset: str, schema: pa.Schema, *, derived: Iterable[str] = ()
) -> Labels:
    """Choose the columns to keep and their names and types in the store.

    schema : of the store's obs as it is.
    derived : columns of the source that the store computes anew (a Census' own sums); they are not kept a second time, nor are
        those that the options name, which have columns of their own.

    A label with the name of one of the store's own columns is kept as ``source_NAME``; one whose type does not fit the store's
    column of that name as ``NAME_text``.

    Raises
    ------
    ValueError
        If a named column does not exist, or no sample has the control's label.
    """
    named = {
        "--batch": options.batch, "--perturbation": options.perturbation, "--cell-type": options.cell_type,
        "--library-size": options.library_size,
    }  # fmt: skip
    for option, name in named.items():
        if name is not None:
            obs_column(source, name, option)
    wanted = source.obs_columns if options.obs_columns is None else options.obs_columns
    first = source.obs(0, min(1, source.n_obs))
    kept, skip = {}, {*derived, *named.values()}
    fields = list(schema)
    for name in wanted:
        obs_column(source, name, "--obs-columns")
        if name in skip:
            continue
        new, kind = f"source_{name}" if name in _BASE else name, _arrow_type(first[name])
        if new in schema.names and not _fits(kind, schema.field(new).type):
            new, kind = f"{new}_text", layout.CATEGORY
        if new not in schema.names:
            fields.append(pa.field(new, kind))
        kept[name] = new
    return Labels(source, options, dataset, kept, pa.schema(fields))


def check_control(source: Source, options: IngestOptions, cuts: list[tuple[int, int]]) -> None:
    """Refuse a control label that no sample has."""
    if options.perturbation is None:
        return
    found: set[str] = set()
    for start, stop in cuts:
        found |= set(source.obs(start, stop)[options.perturbation].astype(str).unique())
    if options.control not in found:
        raise ValueError(
            f"{source.where}: no sample has {options.perturbation} == {options.control!r}; values are {sorted(found)[:8]} "
            f"({len(found)} in all)"
        )


def _arrow_type(column: pd.Series) -> pa.DataType:
    if isinstance(column.dtype, pd.CategoricalDtype):
        return layout.CATEGORY
    kind = column.dtype.kind
    if kind == "b" or str(column.dtype) == "boolean":
        return pa.bool_()
    if kind in "iu":
        return pa.int64()
    return pa.float64() if kind == "f" else pa.large_string()


def _fits(new: pa.DataType, old: pa.DataType) -> bool:
    """Whether values of one type are kept exactly in a column of another."""
    text = (layout.CATEGORY, pa.large_string())
    return new == old or old in text or (new == pa.int64() and old == pa.float64())


def _to_arrow(column: pd.Series, kind: pa.DataType) -> pa.Array:
    missing = column.isna().to_numpy(bool)
    if kind in (layout.CATEGORY, pa.large_string()):
        text = pa.array(column.astype(object).astype(str).to_numpy(object), pa.large_string(), mask=missing)
        return text.dictionary_encode().cast(layout.CATEGORY) if kind == layout.CATEGORY else text
    dtype = kind.to_pandas_dtype()
    values = column.astype(object).where(~column.isna(), 0).to_numpy().astype(dtype)
    return pa.array(values, kind, mask=missing)


def _category(values: np.ndarray) -> pa.Array:
    return pa.array(values, pa.large_string()).dictionary_encode().cast(layout.CATEGORY)


def _constant(value: str, n: int) -> pa.Array:
    return pa.DictionaryArray.from_arrays(pa.array(np.zeros(n, np.int32)), pa.array([value], pa.large_string()))
