"""Which samples of a Census release an ingest takes: checked, counted and estimated before any count is read."""

import logging
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from txfm_data.obs_filter import (
    MULTIVALUE_SEPARATOR,
    MULTIVALUED,
    Filter,
    Value,
    check,
    equals,
    expand_multivalued,
    is_in,
    nearest,
    parse,
)  # fmt: skip
from txfm_data.sources.census import ROWS_A_READ, CensusSource
from txfm_data.sources.census_release import NEEDED_OBS, CensusRelease

_log = logging.getLogger(__name__)

PRIMARY = "is_primary_data"
PLAN_ROWS = 2**21
"""Rows of obs of one query of the plan: at most 100 MB of the four columns it needs and the filter's."""
PANELS_A_READ = 64
"""Rows of the presence matrix of one query: about 40 MB where a panel has 30,000 genes."""
BYTES_PER_VALUE = 2.0
"""Of X on disk, coordinates included: 100,000 simulated samples of 2,383 non-zeros each took 4,581 bytes a sample, 1.92 a
value, with TileDB-SOMA's own filters, which the Census's and our store's resemble. Bulk counts take more."""
SCAN_BYTES = 321 * 1024**2
"""Peak of a process that scans X in blocks of 2,048 rows with small buffers, interpreter and libraries included."""


@dataclass(frozen=True, eq=False)
class CensusSlice:
    """Samples of one dataset.

    joinids : (n,) int64 ascending.  n_panel : genes measured that pass the filter.  nnz : counts above zero, of all genes.
    row : of the table of datasets.
    """

    dataset_id: str
    title: str
    joinids: np.ndarray
    n_panel: int
    nnz: int
    row: Mapping[str, Any]

    @property
    def n_obs(self) -> int:
        """Samples."""
        return len(self.joinids)

    @property
    def n_spanned(self) -> int:
        """Rows that a block's first and last sample enclose, summed: those between scattered samples are read too."""
        firsts, lasts = self.joinids[::ROWS_A_READ], self.joinids[ROWS_A_READ - 1 :: ROWS_A_READ]
        lasts = lasts if len(lasts) == len(firsts) else np.append(lasts, self.joinids[-1])
        return int((lasts - firsts + 1).sum())


@dataclass(frozen=True, eq=False)
class CensusPlan:
    """What to ingest from a release.

    organism : as the release spells it.  obs_filter : as applied, without the choice of datasets.  datasets : those
    with samples, by dataset_id.  empty_datasets : asked for by name, but no sample passes.  n_genes : union of
    the panels.  added_values : values of `MULTIVALUED` that the filter finds beyond those it names.
    """

    release: CensusRelease
    organism: str
    obs_filter: Filter | None
    var_filter: Filter | None
    datasets: tuple[CensusSlice, ...]
    empty_datasets: tuple[str, ...]
    n_genes: int
    added_values: tuple[str, ...]

    @property
    def n_obs(self) -> int:
        """Samples of all datasets."""
        return sum(part.n_obs for part in self.datasets)

    @property
    def nnz(self) -> int:
        """Counts above zero of all samples, over all genes."""
        return sum(part.nnz for part in self.datasets)

    def source(self, part: CensusSlice) -> CensusSource:
        """One dataset of the plan, to read; shares the open release."""
        return CensusSource(
            self.release, self.organism, part.dataset_id, part.joinids, var_filter=self.var_filter, row=part.row
        )

    def describe(self) -> dict[str, Any]:
        """What a dry run shows, ready for JSON: samples, datasets, genes, bytes to read, to store and in memory."""
        return {
            "uri": self.release.where,
            "build_date": self.release.build_date,
            "schema_version": self.release.schema_version,
            "organism": self.organism,
            "obs_filter": None if self.obs_filter is None else self.obs_filter.to_soma(),
            "var_filter": None if self.var_filter is None else self.var_filter.to_soma(),
            "n_obs": self.n_obs,
            "n_datasets": len(self.datasets),
            "n_genes": self.n_genes,
            "nnz": self.nnz,
            "bytes_to_read": round(sum(BYTES_PER_VALUE * p.nnz * p.n_spanned / p.n_obs for p in self.datasets)),
            "bytes_of_store": round(BYTES_PER_VALUE * self.nnz),
            "bytes_of_memory": SCAN_BYTES + 8 * self.n_obs,
            "added_values": list(self.added_values),
            "datasets_without_samples": list(self.empty_datasets),
            "datasets": [
                {"dataset_id": part.dataset_id, "title": part.title, "n_obs": part.n_obs, "n_panel": part.n_panel,
                 "nnz": part.nnz}
                for part in self.datasets
            ],
        }  # fmt: skip


def plan(
    release: CensusRelease,
    *,
    organism: str = "homo_sapiens",
    obs_filter: str | None = None,
    dataset_ids: Sequence[str] | None = None,
    max_samples: int | None = None,
    var_filter: str | None = None,
    include_non_primary: bool = False,
    seed: int = 0,
) -> CensusPlan:
    """Choose the samples and estimate what it takes to read them.

    Only the joinids of the chosen samples are held: 8 bytes each, so 57 million cost 456 MB, and less than twice that
    while a dataset's are sorted. Labels are not held.

    obs_filter, var_filter : in the language of `txfm_data.obs_filter`.  dataset_ids : only these.
    max_samples : at most so many, drawn at random from the whole selection by a hash of `seed` and the joinid, so that
        the draw does not depend on the order of reading.
    include_non_primary : also take samples that are copies of others. By default ``is_primary_data == True`` is added
        to the filter, unless it names that column itself.

    Raises
    ------
    ValueError
        On an unknown organism, column, value or dataset (lists the near ones), or a selection without samples.
    OSError
        If the release cannot be read.
    """
    key = release.organism(organism)
    if max_samples is not None and max_samples < 1:
        raise ValueError(f"--max-samples {max_samples}: at least one sample is needed; leave it out to take all")
    obs = release.experiment(key).obs
    _check_columns(release, obs)
    rows = {str(row["dataset_id"]): row for row in release.datasets().to_pylist()}
    wanted = None if dataset_ids is None else _checked_datasets(release, rows, dataset_ids)
    chosen_obs, added = _obs_filter(obs, obs_filter, rows, include_non_primary)
    chosen_var = _var_filter(release, key, var_filter)
    query = chosen_obs
    if wanted is not None:
        query = is_in("dataset_id", wanted) if query is None else query.both(is_in("dataset_id", wanted))
    found = _select(release, obs, query, max_samples, seed)
    if not found:
        shown = "all samples" if query is None else query.to_soma()[:500]
        raise ValueError(
            f"{release.where}: no sample of {key} passes: {shown}; widen --obs-filter"
            + ("" if include_non_primary else ", or take copies of samples too with --include-non-primary")
        )
    unknown = sorted(found.keys() - rows.keys())
    if unknown:
        raise ValueError(
            f"{release.where}: obs names datasets that census_info/datasets lacks: {unknown[:3]}; the copy is damaged"
        )
    genes = _panels(release, key, [rows[name] for name in sorted(found)], chosen_var)
    slices = tuple(
        CensusSlice(
            name, str(rows[name].get("dataset_title") or name), *found[name][:1], int(n), found[name][1], rows[name]
        )
        for name, n in zip(sorted(found), genes.per_dataset, strict=True)
    )
    empty = tuple(name for name in wanted or () if name not in found)
    if empty:
        _log.warning(
            "%s: %d of the datasets asked for have no sample that passes: %s", release.where, len(empty), empty[:3]
        )
    return CensusPlan(release, key, chosen_obs, chosen_var, slices, empty, genes.n_union, added)


def _check_columns(release: CensusRelease, obs: Any) -> None:
    missing = [name for name in NEEDED_OBS if name not in obs.schema.names]
    if missing:
        raise ValueError(
            f"{release.where}: obs lacks {missing} (schema {release.schema_version}); choose a newer release with --version"
        )


def _checked_datasets(
    release: CensusRelease, rows: Mapping[str, Mapping[str, Any]], dataset_ids: Iterable[str]
) -> list[str]:
    wanted = list(dict.fromkeys(dataset_ids))
    if not wanted:
        raise ValueError("--dataset-ids: names no dataset; leave it out to take all")
    unknown = [name for name in wanted if name not in rows]
    if unknown:
        told = "; ".join(f"{name!r} (near it: {nearest(name, rows.keys(), 3)})" for name in unknown[:3])
        raise ValueError(
            f"{release.where}: --dataset-ids names {len(unknown)} that the release does not have (it has {len(rows)}): {told}"
        )
    return wanted


def _obs_filter(
    obs: Any, text: str | None, rows: Mapping[str, Any], include_non_primary: bool
) -> tuple[Filter | None, tuple[str, ...]]:
    """The filter with what is added to it, and the values of `MULTIVALUED` that it finds beyond those named."""
    chosen: Filter | None = None
    added: tuple[str, ...] = ()
    if text is not None:
        named = parse(text)
        categories = _categories(obs, named)
        terms = {term for value in categories.get(MULTIVALUED, ()) for term in value.split(MULTIVALUE_SEPARATOR)}

        def values_of(column: str) -> Collection[Value] | None:
            if column == "dataset_id":
                return rows.keys()
            known = categories.get(column)
            return known | terms if known is not None and column == MULTIVALUED else known

        check(named, obs.schema, values_of)
        chosen = expand_multivalued(named, MULTIVALUED, categories.get(MULTIVALUED, ()))
        more = set(chosen.literals.get(MULTIVALUED, [])) - set(named.literals.get(MULTIVALUED, []))
        added = tuple(sorted(map(str, more)))
        if added:
            _log.info("--obs-filter: %d values of %s that join several terms are matched too", len(added), MULTIVALUED)
    names_primary = chosen is not None and PRIMARY in chosen.columns
    if not include_non_primary and not names_primary and PRIMARY in obs.schema.names:
        primary = equals(PRIMARY, True)
        chosen = primary if chosen is None else chosen.both(primary)
    return chosen, added


def _categories(obs: Any, filter_: Filter) -> dict[str, set[str]]:
    """Values of the category columns that a filter names."""
    schema = obs.schema
    columns = [
        name for name in filter_.columns if name in schema.names and pa.types.is_dictionary(schema.field(name).type)
    ]
    if not columns:
        return {}
    return {name: set(values.to_pylist()) for name, values in obs.get_enumeration_values(columns).items()}


def _var_filter(release: CensusRelease, organism: str, text: str | None) -> Filter | None:
    if text is None:
        return None
    var = release.genes(organism).var
    chosen = parse(text, "--var-filter")

    def values_of(column: str) -> Collection[Value] | None:
        kind = var.schema.field(column).type
        return set(var[column].to_pylist()) if pa.types.is_large_string(kind) or pa.types.is_dictionary(kind) else None

    check(chosen, var.schema, values_of, "--var-filter")
    return chosen


# --- choosing samples ------------------------------------------------------------------------------------------------


def priorities(seed: int, joinids: np.ndarray) -> np.ndarray:
    """Random order of samples, (n,) uint64: those with the smallest are drawn.

    The same hash as `txfm_data.kernels.stream_key(seed, 0, joinid)`, for arrays; one to one, so there are no ties.
    """
    golden = np.uint64(0x9E3779B97F4A7C15)
    with np.errstate(over="ignore"):
        key = _mix(_mix(np.asarray([seed % 2**64], np.uint64) + golden) + golden)
        return _mix((key ^ joinids.astype(np.uint64)) + golden)


def _mix(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(x ^ (x >> np.uint64(31)))


class _Chosen:
    """Samples per dataset as they come in; with `most`, only the `most` of lowest priority value are kept."""

    def __init__(self, most: int | None, seed: int) -> None:
        self._most, self._seed = most, seed
        self._limit = np.uint64(2**64 - 1)
        self._n = 0
        self._parts: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}

    def add(self, dataset: str, joinids: np.ndarray, nnz: np.ndarray) -> None:
        if self._most is not None:
            kept = priorities(self._seed, joinids) <= self._limit
            joinids, nnz = joinids[kept], nnz[kept]
        else:
            nnz = nnz.sum(keepdims=True)  # nothing will be dropped again: the sum is enough
        if len(joinids):
            self._parts.setdefault(dataset, []).append((joinids, nnz))
            self._n += len(joinids)
        if self._most is not None and self._n > 2 * self._most + PLAN_ROWS:
            self._prune(self._most)

    def _prune(self, most: int) -> None:
        if self._n <= most:
            return
        ranks = [priorities(self._seed, ids) for parts in self._parts.values() for ids, _ in parts]
        self._limit = np.partition(np.concatenate(ranks), most - 1)[most - 1]
        kept: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
        for dataset, parts in self._parts.items():
            for ids, nnz in parts:
                low = priorities(self._seed, ids) <= self._limit
                if low.any():
                    kept.setdefault(dataset, []).append((ids[low], nnz[low]))
        self._parts, self._n = kept, most

    def finish(self) -> dict[str, tuple[np.ndarray, int]]:
        """Per dataset: joinids ascending, and the sum of nnz. Hands its parts over one dataset at a time."""
        if self._most is not None:
            self._prune(self._most)
        out = {}
        for dataset in list(self._parts):
            parts = self._parts.pop(dataset)
            joinids = np.concatenate([ids for ids, _ in parts])
            joinids.sort()
            out[dataset] = joinids, sum(int(nnz.sum()) for _, nnz in parts)
        return out


def _select(
    release: CensusRelease, obs: Any, query: Filter | None, most: int | None, seed: int
) -> dict[str, tuple[np.ndarray, int]]:
    chosen = _Chosen(most, seed)
    for table in _scan_obs(release, obs, None if query is None else query.to_soma()):
        column = table["dataset_id"].combine_chunks()
        if not pa.types.is_dictionary(column.type):
            column = pc.dictionary_encode(column)
        if isinstance(column, pa.ChunkedArray):
            column = column.unify_dictionaries().combine_chunks()
        names = column.dictionary.to_pylist()
        codes = column.indices.to_numpy()
        joinids, nnz = table["soma_joinid"].to_numpy(), table["nnz"].to_numpy().astype(np.int64)
        order = np.argsort(codes, kind="stable")
        starts = np.flatnonzero(np.diff(codes[order], prepend=-1))
        for rows in np.split(order, starts[1:]):
            chosen.add(str(names[codes[rows[0]]]), joinids[rows], nnz[rows])
    return chosen.finish()


def _scan_obs(release: CensusRelease, obs: Any, query: str | None) -> Iterator[pa.Table]:
    """What the plan needs of obs, in pieces that can each be read again after a fault; only those with rows."""
    end = int(obs.domain[0][1]) + 1
    for start in range(0, end, PLAN_ROWS):
        stop = min(start + PLAN_ROWS, end)

        def read(start: int = start, stop: int = stop) -> pa.Table:
            columns = ["soma_joinid", "dataset_id", "nnz"]
            rows = obs.read((slice(start, stop - 1),), column_names=columns, value_filter=query)
            return rows.concat().select(columns)

        table = release.retrying(read, f"obs of joinids {start} to {stop - 1}")
        if len(table):
            yield table


@dataclass(frozen=True, eq=False)
class _Panels:
    per_dataset: np.ndarray
    n_union: int


def _panels(
    release: CensusRelease, organism: str, rows: Sequence[Mapping[str, Any]], var_filter: Filter | None
) -> _Panels:
    """Sizes of the panels, and of their union, after the filter."""
    var = release.genes(organism).var
    passes = np.ones(len(var), bool) if var_filter is None else var_filter.mask(var)
    presence = release.experiment(organism).ms["RNA"]["feature_dataset_presence_matrix"]
    sizes, union = np.zeros(len(rows), np.int64), np.zeros(len(var), bool)
    by_index = sorted((int(row["soma_joinid"]), number) for number, row in enumerate(rows))
    for start in range(0, len(rows), PANELS_A_READ):
        part = by_index[start : start + PANELS_A_READ]
        indices, numbers = np.array([i for i, _ in part], np.int64), np.array([n for _, n in part])

        def read(indices: np.ndarray = indices) -> pa.Table:
            return presence.read((pa.array(indices),)).tables().concat()

        table = release.retrying(read, f"the presence matrix, rows {indices[0]} to {indices[-1]}")
        genes = table["soma_dim_1"].to_numpy()
        kept = table["soma_data"].to_numpy().astype(bool) & passes[genes]
        places = np.searchsorted(indices, table["soma_dim_0"].to_numpy()[kept])
        sizes[numbers] = np.bincount(places, minlength=len(part))
        union[genes[kept]] = True
    if not sizes.all():
        row = rows[int(np.flatnonzero(sizes == 0)[0])]
        raise ValueError(
            f"{release.where}: dataset {row['dataset_id']} measured no gene"
            + (" that passes --var-filter; widen it" if var_filter is not None else "; leave it out with --dataset-ids")
        )
    return _Panels(sizes, int(union.sum()))
