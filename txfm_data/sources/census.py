"""One dataset's samples of a Census-shaped collection as a source: the CELLxGENE Census, a copy, or our own store."""

import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import pandas as pd
import pyarrow as pa
import scipy.sparse as sp

from txfm_data.obs_filter import Filter, parse
from txfm_data.retry import with_retries
from txfm_data.sources.census_release import LIBRARY_SIZE, READ_REMEDY, CensusRelease, Genes, open_at, open_census
from txfm_data.sources.protocol import CHUNK_BYTES, Source, cut_rows, tidy

__all__ = ["CensusRelease", "CensusSource", "blocks", "open_census"]

_T = TypeVar("_T")

ROWS_A_READ = 2_048
"""Rows of X of one TileDB read: the tile of the Census."""
OBS_ROWS_A_READ = 16_384
"""Rows of obs of one TileDB read."""
DENSE = 4
"""A slice is read, and the rest of it dropped, up to so many rows per row wanted; beyond, the rows are listed. Either
way whole tiles are unpacked, and a sorted list of 2,048 rows takes about as long as the slice around it."""


def blocks(joinids: np.ndarray, rows: int, dense: int) -> Iterator[tuple[int, int, Any]]:
    """How ascending joinids are read: (start, stop, coordinates) with at most `rows` of them at a time.

    The coordinates are a slice where it spans at most `dense` rows per row wanted, else the joinids: never a query per row.
    """
    for start in range(0, len(joinids), rows):
        part = joinids[start : start + rows]
        first, last = int(part[0]), int(part[-1])
        yield start, start + len(part), slice(first, last) if last - first < dense * len(part) else pa.array(part)


def dataset_row(release: CensusRelease, dataset_id: str) -> dict[str, Any]:
    """The row of a dataset in the table of datasets."""
    for row in release.datasets().to_pylist():
        if row["dataset_id"] == dataset_id:
            return dict(row)
    raise ValueError(f"{release.where}: has no dataset {dataset_id!r}; see --dataset-ids")


class CensusSource:
    """Samples of one dataset of a Census-shaped collection.

    joinids : (n,) ascending ``obs.soma_joinid`` of the samples, all of `dataset_id`.
    var_filter : takes only the genes that pass. The library size stays that of all genes.
    row : row of the table of datasets, if the caller has it.
    owns_release : close the release with the source.

    Attributes
    ----------
    library_size_column : column of obs with the counts of the whole library. Without `var_filter` the row sums equal it.
    n_measured : genes the dataset measured, before `var_filter`.
    """

    library_size_column = LIBRARY_SIZE
    matrix_name = "X/raw"
    matrix_hint = ""

    def __init__(
        self,
        release: CensusRelease,
        organism: str,
        dataset_id: str,
        joinids: np.ndarray,
        *,
        var_filter: Filter | None = None,
        row: Mapping[str, Any] | None = None,
        owns_release: bool = False,
    ) -> None:
        self._release, self._owns_release = release, owns_release
        self.organism, self.name = release.organism(organism), f"census {release.build_date}: {dataset_id}"
        self._dataset_id = dataset_id
        self.where = f"{release.where}: {self.organism}, dataset {dataset_id}"
        self._joinids = np.ascontiguousarray(joinids, np.int64)
        self.n_obs = len(self._joinids)
        if not self.n_obs or (np.diff(self._joinids) <= 0).any():
            raise ValueError(f"{self.where}: joinids must be ascending and at least one; got {self.n_obs}")
        self._var_filter = var_filter
        self._row = dict(row) if row is not None else dataset_row(release, dataset_id)
        experiment = release.experiment(organism)
        self._obs, rna = experiment.obs, experiment.ms["RNA"]
        if "raw" not in rna.X:
            raise ValueError(f"{self.where}: has no X/raw, it has {sorted(rna.X)}; raw counts are needed")
        self._raw = rna.X["raw"]
        self._nnz: np.ndarray | None = None
        self.obs_columns = tuple(name for name in self._obs.schema.names if name != "soma_joinid")
        self._set_panel(rna["feature_dataset_presence_matrix"], release.genes(organism))

    def _set_panel(self, presence: Any, genes: Genes) -> None:
        index = int(self._row["soma_joinid"])
        table = self._reading(lambda: presence.read((index,)).tables().concat(), "its row of the presence matrix")
        self._measured = np.zeros(len(genes.var), bool)
        self._measured[table["soma_dim_1"].to_numpy()[table["soma_data"].to_numpy().astype(bool)]] = True
        self.n_measured = int(self._measured.sum())
        wanted = self._measured if self._var_filter is None else self._measured & self._var_filter.mask(genes.var)
        panel = np.flatnonzero(wanted)
        if not len(panel):
            raise ValueError(f"{self.where}: measured {self.n_measured} genes, none passes --var-filter; widen it")
        self._column = np.full(len(genes.var), -1, np.int32)
        self._column[panel] = np.arange(len(panel), dtype=np.int32)
        self.gene_ids = tuple(genes.texts("feature_id")[panel])
        has_names = "feature_name" in genes.var.column_names
        self.symbols = tuple(genes.texts("feature_name")[panel]) if has_names else ("",) * len(panel)

    def _reading(self, work: Callable[[], _T], what: str) -> _T:
        return with_retries(work, what=f"{self.where}, {what}", remedy=READ_REMEDY)

    def _obs_rows(self, start: int, stop: int, columns: Sequence[str]) -> pa.Table:
        """Rows of obs in order, refused if one is missing."""
        tables = []
        for low, high, coordinates in blocks(self._joinids[start:stop], OBS_ROWS_A_READ, DENSE):
            ids = self._joinids[start + low : start + high]

            def read(coordinates: Any = coordinates, ids: np.ndarray = ids) -> list[pa.Table]:
                parts = self._obs.read((coordinates,), column_names=["soma_joinid", *columns])
                return [part.filter(pa.array(np.isin(part["soma_joinid"].to_numpy(), ids))) for part in parts]

            parts = self._reading(read, f"obs of joinids {ids[0]} to {ids[-1]}")
            plain = [_without_categories(part) for part in parts]
            table = pa.concat_tables(plain).sort_by("soma_joinid")
            if not np.array_equal(table["soma_joinid"].to_numpy(), ids):
                raise ValueError(
                    f"{self.where}: obs has {len(table)} of the {len(ids)} joinids {ids[0]} to {ids[-1]}; the "
                    "selection is of another release, or the copy is damaged"
                )
            tables.append(table)
        return pa.concat_tables(tables)

    def obs(self, start: int, stop: int) -> pd.DataFrame:
        """Labels of samples [start, stop), categories as text; the index is ``observation_joinid``, else the joinid.

        Raises
        ------
        ValueError
            If a sample is of another dataset, or claims another number of measured genes than the presence matrix.
        """
        if start == stop:
            return pd.DataFrame(columns=list(self.obs_columns), index=pd.Index([], dtype=object))
        table = self._obs_rows(start, stop, self.obs_columns)
        datasets = set(table["dataset_id"].unique().to_pylist())
        if datasets != {self._dataset_id}:
            raise ValueError(f"{self.where}: joinids of other datasets among its own: {sorted(map(str, datasets))[:3]}")
        claimed = table["n_measured_vars"].to_numpy()
        if (claimed != self.n_measured).any():
            other = int(claimed[claimed != self.n_measured][0])
            raise ValueError(
                f"{self.where}: the presence matrix has {self.n_measured} measured genes, but obs.n_measured_vars says "
                f"{other}; which genes were measured is unsure, so leave the dataset out with --dataset-ids"
            )
        name = "observation_joinid" if "observation_joinid" in self.obs_columns else "soma_joinid"
        frame = table.to_pandas()
        frame.index = pd.Index(frame[name].astype(str).to_numpy(), dtype=object)
        return frame[list(self.obs_columns)]

    def cuts(self, max_bytes: int = CHUNK_BYTES) -> list[tuple[int, int]]:
        """Consecutive row ranges that cover the matrix, each at most about `max_bytes` (one row at the least)."""
        if self._nnz is None:
            self._nnz = self._obs_rows(0, self.n_obs, ["nnz"])["nnz"].to_numpy().astype(np.int64)
        return cut_rows(np.concatenate([[0], np.cumsum(self._nnz)]), max_bytes)

    def read(self, start: int, stop: int) -> sp.csr_matrix:
        """Rows [start, stop) over the panel: columns sorted and unique, no stored zeros, values of the release's type.

        Raises
        ------
        ValueError
            If a gene that was not measured has a count, or a value is stored twice.
        OSError
            If a block cannot be read, named by dataset and joinids.
        """
        parts = [self._read_block(ids, coordinates) for ids, coordinates in self._blocks(start, stop)]
        if not parts:
            dtype = self._raw.schema.field("soma_data").type.to_pandas_dtype()
            return sp.csr_matrix((0, len(self.gene_ids)), dtype=dtype)
        return parts[0] if len(parts) == 1 else sp.vstack(parts, "csr")

    def _blocks(self, start: int, stop: int) -> Iterator[tuple[np.ndarray, Any]]:
        chosen = self._joinids[start:stop]
        for low, high, coordinates in blocks(chosen, ROWS_A_READ, DENSE):
            yield chosen[low:high], coordinates

    def _read_block(self, ids: np.ndarray, coordinates: Any) -> sp.csr_matrix:
        def read() -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
            # Table by table: of a slice with gaps only the wanted rows are kept.
            return [_wanted(part, ids) for part in self._raw.read((coordinates,)).tables()]

        what = f"X/raw of joinids {ids[0]} to {ids[-1]}"
        parts = self._reading(read, what)
        dtype = self._raw.schema.field("soma_data").type.to_pandas_dtype()
        rows = np.concatenate([np.empty(0, np.int64), *[part[0] for part in parts]])
        genes = np.concatenate([np.empty(0, np.int64), *[part[1] for part in parts]])
        values = np.concatenate([np.empty(0, dtype), *[part[2] for part in parts]])
        if len(genes) and (int(genes.max()) >= len(self._measured) or not self._measured[genes].all()):
            raise ValueError(
                f"{self.where}, {what}: a gene outside the dataset's panel has a count; the presence matrix and the "
                "counts disagree, so leave the dataset out with --dataset-ids"
            )
        columns = self._column[genes]
        kept = (columns >= 0) & (values != 0)
        shape = (len(ids), len(self.gene_ids))
        out = tidy(sp.coo_matrix((values[kept], (rows[kept], columns[kept])), shape=shape))
        if out.nnz != int(kept.sum()):
            raise ValueError(
                f"{self.where}, {what}: {int(kept.sum()) - out.nnz} values are stored twice; a write was repeated, so "
                "get the copy again"
            )
        return out

    def content_sha256(self) -> str:
        """Hash of the release, the dataset's row of the table of datasets, the genes and the joinids."""
        row = {key: value for key, value in sorted(self._row.items()) if key != "soma_joinid"}
        head = {
            "build_date": self._release.build_date,
            "schema_version": self._release.schema_version,
            "organism": self.organism,
            "dataset": row,
            "var_filter": None if self._var_filter is None else self._var_filter.to_soma(),
        }
        digest = hashlib.sha256(json.dumps(head, sort_keys=True, default=str).encode())
        digest.update(self._joinids.astype("<i8").tobytes())
        return digest.hexdigest()

    def gene_hint(self) -> str:
        """What to try when the gene ids do not match."""
        return (
            "gene ids are var's feature_id, Ensembl ids of the organism; choose another --organism "
            f"({', '.join(self._release.organisms)}), or genes with --var-filter"
        )

    def opener(self) -> Callable[[], Source]:
        """A function for another process that opens the same samples of the same release."""
        return functools.partial(
            _reopen,
            self._release.uri,
            self._release.build_date,
            self._release.is_public,
            dict(self._release.tiledb_config),
            self.organism,
            self._row,
            self._joinids,
            None if self._var_filter is None else self._var_filter.to_soma(),
        )

    def close(self) -> None:
        """Close the release, if it is this source's own."""
        if self._owns_release:
            self._release.close()

    def __enter__(self) -> "CensusSource":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _reopen(
    uri: str,
    build_date: str,
    is_public: bool,
    config: Mapping[str, Any],
    organism: str,
    row: Mapping[str, Any],
    joinids: np.ndarray,
    var_filter: str | None,
) -> CensusSource:
    release = open_at(uri, config, is_public=is_public)
    if release.build_date != build_date:
        release.close()
        raise ValueError(
            f"{release.where}: is the build of {release.build_date} now, it was {build_date} when the ingest began; "
            "start again from the new one"
        )
    chosen = None if var_filter is None else parse(var_filter, "--var-filter")
    name = str(row["dataset_id"])
    return CensusSource(release, organism, name, joinids, var_filter=chosen, row=row, owns_release=True)


def _without_categories(table: pa.Table) -> pa.Table:
    """Dictionary columns as plain text: a block of a big release would carry every label of all datasets."""
    for position, kind in enumerate(table.schema):
        if pa.types.is_dictionary(kind.type):
            table = table.set_column(position, kind.name, table[kind.name].cast(kind.type.value_type))
    return table


def _wanted(table: pa.Table, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Entries of the wanted samples: position of the sample in `ids`, gene, value."""
    samples = table["soma_dim_0"].to_numpy()
    rows = np.searchsorted(ids, samples)
    found = ids[np.minimum(rows, len(ids) - 1)] == samples
    return rows[found], table["soma_dim_1"].to_numpy()[found], table["soma_data"].to_numpy()[found]
