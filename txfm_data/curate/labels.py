"""Labels of all samples of a store as arrays: codes of values, numbers, masks. Streamed from obs; reads no counts."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from txfm_data import obs_filter
from txfm_data.config_tree import did_you_mean
from txfm_data.curate.recipe import Label
from txfm_data.store.ledger import DatasetRecord
from txfm_data.store.protocol import Store

MOST_VALUES = 1_000_000
"""A column with more values than this holds identifiers, not labels."""
_PIECE = 1 << 20

Kind = Literal["text", "bool", "integer", "number", "other"]


@dataclass(frozen=True)
class Codes:
    """The labels of one column.

    codes : (store.n_obs,) int32, position of each sample's value in `values`, -1 where it is null.
    values : ascending; each occurs in at least one sample of the store.
    """

    codes: np.ndarray
    values: tuple[Label, ...]


def kind_of(store: Store, column: str) -> Kind:
    """What a column of obs holds; "number" has a fraction.

    Raises
    ------
    ValueError
        If there is no such column; names the near ones.
    """
    schema = store.obs_schema()
    if column not in schema.names:
        raise ValueError(f"{store.path}: obs has no column {column!r}; {did_you_mean(column, schema.names)}")
    types, found = pa.types, schema.field(column).type
    if types.is_dictionary(found):
        found = found.value_type
    if types.is_string(found) or types.is_large_string(found):
        return "text"
    if types.is_boolean(found):
        return "bool"
    if types.is_integer(found):
        return "integer"
    return "number" if types.is_floating(found) else "other"


def read_codes(store: Store, column: str, *, most: int = MOST_VALUES) -> Codes:
    """Labels of a column of text, booleans or integers, dictionary or not.

    Codes do not depend on the order in which parts of obs are read. Held are 4 bytes a sample and the values.

    most : values that a label may have.

    Raises
    ------
    ValueError
        If there is no such column, it holds something else, or more than `most` values; if obs lacks samples.
    """
    check_label(store, column)
    codes, known = np.full(store.n_obs, -1, np.int32), dict[Label, int]()
    for ids, part in _parts(store, [column]):
        first = 0
        for chunk in part[column].chunks:
            codes[ids[first : first + len(chunk)]] = _encode(chunk, known)
            first += len(chunk)
        if len(known) > most:
            raise ValueError(
                f"{store.path}: column {column!r} of obs has more than {most:,} values, so it holds identifiers and not labels; "
                "name another column"
            )
    values = tuple(sorted(known))
    place = np.full(len(values) + 1, -1, np.int32)  # the last entry is what -1 points at
    place[[known[value] for value in values]] = np.arange(len(values), dtype=np.int32)
    for low in range(0, len(codes), _PIECE):  # so that no second array of all samples is held
        codes[low : low + _PIECE] = place[codes[low : low + _PIECE]]
    return Codes(codes, values)


def check_label(store: Store, column: str) -> None:
    """Refuse a column that holds no labels.

    Raises
    ------
    ValueError
        If there is no such column, or it holds neither text nor booleans nor integers.
    """
    if kind_of(store, column) not in ("text", "bool", "integer"):
        raise ValueError(
            f"{store.path}: column {column!r} of obs holds {store.obs_schema().field(column).type}; labels are text, whole numbers "
            "or booleans, so name another column"
        )


def values_among(
    store: Store,
    column: str,
    records: Sequence[DatasetRecord],
    *,
    of: obs_filter.Filter | None = None,
    most: int = MOST_VALUES,
) -> set[Label] | None:
    """Labels that occur in the samples of some datasets, but for null; None if there are more than `most`.

    of : look only at the samples that pass this filter on the same column.

    Raises
    ------
    ValueError
        As of `check_label` and `read_mask`.
    """
    check_label(store, column)
    found: set[Label] = set()
    for ids, part in _parts(store, [column]):
        inside = np.zeros(len(ids), bool)
        for record in records:
            inside |= (ids >= record.obs_start) & (ids < record.obs_stop)
        values = part[column].filter(pa.array(inside if of is None else inside & of.mask(part)))
        found.update(value for value in pc.unique(values).to_pylist() if value is not None)
        if len(found) > most:
            return None
    return found


def read_nnz(store: Store) -> np.ndarray:
    """How many genes are above zero in each sample, by ``nnz``: (store.n_obs,) int32, -1 where null.

    Raises
    ------
    ValueError
        If obs lacks samples, or holds what is no number of genes.
    """
    nnz = np.full(store.n_obs, -1, np.int32)
    for ids, part in _parts(store, ["nnz"]):
        try:
            nnz[ids] = part["nnz"].cast(pa.int32()).fill_null(-1).to_numpy()
        except pa.ArrowInvalid as error:
            raise ValueError(
                f"{store.path}: nnz of obs is no number of genes ({error}); the store is damaged, restore it from a copy"
            ) from error
    return nnz


def read_mask(store: Store, filter_: obs_filter.Filter) -> np.ndarray:
    """Which samples pass a filter: (store.n_obs,) bool. A null does not pass.

    Raises
    ------
    ValueError
        If there is no such column, or a value does not fit the type of its column; if obs lacks samples.
    """
    passes = np.zeros(store.n_obs, bool)
    for ids, part in _parts(store, list(filter_.columns)):
        passes[ids] = filter_.mask(part)
    return passes


def read_controls(store: Store) -> np.ndarray:
    """Which samples are controls by ``is_control``: (store.n_obs,) bool."""
    return read_mask(store, obs_filter.equals("is_control", True))


def _parts(store: Store, columns: list[str]) -> Iterator[tuple[np.ndarray, pa.Table]]:
    """Parts of obs with their sample ids; raises after the last if there were not all samples."""
    n_found = 0
    for part in store.obs_parts(columns):
        n_found += len(part)
        yield part["soma_joinid"].to_numpy(), part
    if n_found != store.n_obs:
        raise ValueError(
            f"{store.path}: obs has {n_found} of {store.n_obs} samples; the store is damaged, restore it from a copy"
        )


def _encode(chunk: pa.Array, known: dict[Label, int]) -> np.ndarray:
    """Codes of a chunk in order of appearance, -1 where null: (n,) int32; new values are added to `known`."""
    if not pa.types.is_dictionary(chunk.type):
        chunk = chunk.dictionary_encode()
    codes = chunk.indices.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)
    of_entry = np.full(len(chunk.dictionary) + 1, -1, np.int32)  # the last entry is what -1 points at
    occurs = np.zeros(len(of_entry), bool)
    occurs[codes] = True
    there = np.flatnonzero(occurs[:-1])
    for at, value in zip(there.tolist(), chunk.dictionary.take(pa.array(there)).to_pylist(), strict=True):
        of_entry[at] = -1 if value is None else known.setdefault(value, len(known))
    encoded: np.ndarray = of_entry[codes]
    return encoded
