"""10x Genomics matrices: ``.h5`` files, read by cells as they are stored, and folders of Matrix Market text."""

import re
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
import scipy.sparse as sp

from txfm_data.sources.base import SPOOL_BYTES, Opened, OpenedSource, spooled
from txfm_data.sources.labels import with_sample_table
from txfm_data.sources.mtx import read_entries, read_head
from txfm_data.sources.protocol import cut_rows
from txfm_data.sources.spool import Spool
from txfm_data.sources.text import LineReader, decode, open_text

GENE_EXPRESSION = "Gene Expression"
_PREFIX = re.compile(r"(.+?)_+(?=ENS[A-Z]{0,6}G\d{11})")
_V2_PARTS = {"barcodes", "data", "genes", "gene_names", "indices", "indptr", "shape"}
_HINT = (
    "10x files carry Ensembl ids beside the symbols; where the ids are symbols, give a features.tsv of the same reference or "
    "another table of symbols and Ensembl ids (--gene-map)"
)


class TenxSource(OpenedSource):
    """Counts of one feature type of a 10x Genomics matrix.

    Parameters
    ----------
    path
        ``.h5`` file of CellRanger (since version 3, or 2 with a group per genome), or a folder with ``matrix.mtx``,
        ``barcodes.tsv`` and ``features.tsv`` (or ``genes.tsv``), each gzip or plain, all with one prefix or none.
        A folder is turned into rows on local disk, an h5 file is read in place.
    feature_type
        As the file names it; features of other types are left out. Files of version 2 hold gene expression only.
    genome
        Which genome's genes, where a file has several. Ids as of ``GRCh38_ENSG...`` lose their prefix then.
    sample_table
        Labels of the cells by barcode, see `read_sample_table`.

    Attributes
    ----------
    left_out : number of features by type that are not read.

    Raises
    ------
    FileNotFoundError, ValueError
        If files are missing, damaged or do not fit each other; there is no such feature type or genome, or a
        choice of genome is needed.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        sample_table: str | Path | None = None,
        feature_type: str = GENE_EXPRESSION,
        genome: str | None = None,
        _spool_bytes: int = SPOOL_BYTES,
    ) -> None:
        path = Path(path)
        if path.is_dir():
            opened, self.left_out = _open_folder(path, feature_type, genome, sample_table, _spool_bytes)
        elif not path.is_file():
            raise FileNotFoundError(
                f"{path}: no such file or folder; give a .h5 file of 10x or a folder with matrix.mtx"
            )
        elif path.name.removesuffix(".gz").endswith(".mtx"):
            raise ValueError(f"{path}: give the folder of matrix.mtx, which also holds barcodes and features")
        else:
            opened, self.left_out = _open_h5(path, feature_type, genome, sample_table)
        super().__init__(opened)


@dataclass(frozen=True)
class _Features:
    """Rows of a 10x matrix; types and genomes are "" where the file does not say them."""

    ids: list[str]
    symbols: list[str]
    types: list[str]
    genomes: list[str]


@dataclass(frozen=True)
class _Selection:
    """column : (n_features,) int64, column of each feature in the source, -1 where it is left out."""

    column: np.ndarray
    ids: tuple[str, ...]
    symbols: tuple[str, ...]
    left_out: dict[str, int]


def _select(features: _Features, feature_type: str, genome: str | None, where: str) -> _Selection:
    types = features.types
    if not any(types):  # version 2
        types = [GENE_EXPRESSION] * len(features.ids)
    chosen = [kind == feature_type for kind in types]
    if not any(chosen):
        raise ValueError(
            f"{where}: has no features of type {feature_type!r}; it has {dict(Counter(types))}: name one with --feature-type"
        )
    genomes = features.genomes
    prefixes = [_PREFIX.match(gene) if on else None for gene, on in zip(features.ids, chosen, strict=True)]
    if not any(genomes) and all(found for found, on in zip(prefixes, chosen, strict=True) if on):
        genomes = [found[1] if found else "" for found in prefixes]
    counts = Counter(name for name, on in zip(genomes, chosen, strict=True) if on)
    if genome is None and len(counts) > 1:
        raise ValueError(f"{where}: has genes of several genomes, {dict(counts)}; choose one with --genome")
    if genome is not None and genome not in counts:
        raise ValueError(
            f"{where}: --genome {genome}: the file has {sorted(name for name in counts if name) or 'no names of genomes'}"
        )
    left_out = dict(Counter(kind for kind in types if kind != feature_type))
    left_out |= {f"{feature_type} ({name})": n for name, n in counts.items() if genome is not None and name != genome}
    keep = [on and genome in (None, name) for on, name in zip(chosen, genomes, strict=True)]
    column = np.where(keep, np.cumsum(keep) - 1, -1)
    name = genome or next(iter(counts))
    prefix = re.compile(rf"{re.escape(name)}_+(?=.)" if name else "(?!)")
    ids, symbols = (
        tuple(text[found.end() :] if (found := prefix.match(text)) else text for text in _kept(texts, keep))
        for texts in (features.ids, features.symbols)
    )
    return _Selection(column, ids, symbols, left_out)


def _kept(texts: list[str], keep: list[bool]) -> list[str]:
    return [text for text, on in zip(texts, keep, strict=True) if on]


def _open_h5(
    path: Path, feature_type: str, genome: str | None, sample_table: str | Path | None
) -> tuple[Opened, dict[str, int]]:
    if not h5py.is_hdf5(path):
        raise ValueError(f"{path}: not an HDF5 file; give a .h5 matrix of 10x, or a folder with matrix.mtx")
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise ValueError(f"{path}: HDF5 cannot open it ({error}); the file is cut or damaged, get it again") from error
    try:
        name, group = _find_group(file, genome, path)
        barcodes, features = _read_h5_names(group, name, path)
        selection = _select(features, feature_type, genome, str(path))
        rows = _H5Rows(file, group, selection, (len(features.ids), len(barcodes)), path)
        labels = with_sample_table(pd.DataFrame(index=pd.Index(barcodes, dtype=object)), sample_table)
    except BaseException:
        file.close()
        raise
    opened = Opened(
        where=str(path), name=path.name, matrix_name=name, gene_ids=selection.ids, symbols=selection.symbols,
        labels=labels, rows=rows, files=(path,), root=path, hint=_HINT,
        reopen=partial(TenxSource, path, sample_table=sample_table, feature_type=feature_type, genome=genome),
    )  # fmt: skip
    return opened, selection.left_out


def _find_group(file: Any, genome: str | None, path: Path) -> tuple[str, Any]:
    if isinstance(file.get("matrix"), h5py.Group):
        return "matrix", file["matrix"]
    genomes = [name for name in file if isinstance(file[name], h5py.Group) and set(file[name]) >= _V2_PARTS]
    if not genomes:
        raise ValueError(
            f"{path}: holds {sorted(file)[:8]}, expected a group 'matrix' (CellRanger 3 and later) or one for each genome; "
            "give the feature-barcode matrix, such as filtered_feature_bc_matrix.h5"
        )
    if genome is None and len(genomes) > 1:
        raise ValueError(f"{path}: has matrices of several genomes, {genomes}; choose one with --genome")
    if genome is not None and genome not in genomes:
        raise ValueError(f"{path}: --genome {genome}: the file has {genomes}")
    name = genome or genomes[0]
    return name, file[name]


def _read_h5_names(group: Any, name: str, path: Path) -> tuple[list[str], _Features]:
    where = f"{path}: {name}"
    is_v2 = "genes" in group
    ids = _strings(group, "genes" if is_v2 else "features/id", where)
    symbols = _strings(group, "gene_names" if is_v2 else "features/name", where)
    types = [""] * len(ids) if is_v2 else _strings(group, "features/feature_type", where)
    genomes = [name if is_v2 else ""] * len(ids)
    if not is_v2 and "features/genome" in group:
        genomes = _strings(group, "features/genome", where)
    lengths = {len(ids), len(symbols), len(types), len(genomes)}
    if len(lengths) > 1:
        raise ValueError(
            f"{where}: features have {len(ids)} ids, {len(symbols)} names, {len(types)} types; the file is damaged"
        )
    return _strings(group, "barcodes", where), _Features(ids, symbols, types, genomes)


def _dataset(group: Any, name: str, where: str) -> Any:
    found = group.get(name)
    if not isinstance(found, h5py.Dataset) or found.ndim != 1:
        raise ValueError(
            f"{where} has no list {name}, so it is no matrix of 10x, or is damaged; it has {sorted(group)}"
        )
    return found


def _strings(group: Any, name: str, where: str) -> list[str]:
    dataset = _dataset(group, name, where)
    if h5py.check_string_dtype(dataset.dtype) is None:
        raise ValueError(f"{where}/{name} holds {dataset.dtype}, expected text; the file is damaged")
    return [decode(text, f"{where}/{name}") for text in dataset[:]]


class _H5Rows:
    """Cells of an h5 file: genes x cells by columns is cells x genes by rows."""

    def __init__(self, file: Any, group: Any, selection: _Selection, shape: tuple[int, int], path: Path) -> None:
        where = f"{path}: {group.name[1:]}"
        declared = tuple(int(size) for size in _dataset(group, "shape", where)[:])
        if declared != shape:
            raise ValueError(
                f"{where}: declares {' x '.join(map(str, declared))}, but has {shape[0]} features and {shape[1]} barcodes; "
                "the file is damaged, get it again"
            )
        self._file, self._where, self._selection, self._n_features = file, where, selection, shape[0]
        self._data, self._indices = _dataset(group, "data", where), _dataset(group, "indices", where)
        indptr = _dataset(group, "indptr", where)
        if len(indptr) != shape[1] + 1:
            raise ValueError(f"{where}: indptr has {len(indptr)} entries, expected {shape[1] + 1}; the file is damaged")
        self._indptr = indptr[:].astype(np.int64)
        n = len(self._data)
        if (
            self._indptr[0] != 0
            or self._indptr[-1] != n
            or len(self._indices) != n
            or (np.diff(self._indptr) < 0).any()
        ):
            raise ValueError(
                f"{where}: indptr runs from {self._indptr[0]} to {self._indptr[-1]}, with {n} values and {len(self._indices)} "
                "indices; it must rise from 0 to their number: the file is cut or damaged, get it again"
            )
        if self._data.dtype.kind not in "iuf" or {self._indices.dtype.kind, indptr.dtype.kind} - {"i", "u"}:
            raise ValueError(
                f"{where}: data holds {self._data.dtype}, indices {self._indices.dtype} and indptr {indptr.dtype}; expected "
                "numbers, whole numbers and whole numbers"
            )

    def cuts(self, max_bytes: int) -> list[tuple[int, int]]:
        return cut_rows(self._indptr, max_bytes)

    def read(self, start: int, stop: int) -> sp.csr_matrix:
        first, last = int(self._indptr[start]), int(self._indptr[stop])
        try:
            feature, values = self._indices[first:last].astype(np.int64), self._data[first:last]
        except OSError as error:
            raise ValueError(
                f"{self._where}: cells {start} to {stop} cannot be read ({error}); get the file again"
            ) from error
        wrong = (feature < 0) | (feature >= self._n_features)
        if wrong.any():
            raise ValueError(
                f"{self._where}: cells {start} to {stop} name feature {feature[int(np.argmax(wrong))]}, but there are "
                f"{self._n_features} (from 0); the file is damaged, get it again"
            )
        column = self._selection.column[feature]
        kept = column >= 0
        indptr = np.concatenate([[0], np.cumsum(kept)])[self._indptr[start : stop + 1] - first]
        shape = (stop - start, len(self._selection.ids))
        rows = sp.csr_matrix((values[kept], column[kept], indptr), shape=shape)
        n = rows.nnz
        rows.sum_duplicates()
        if rows.nnz != n:
            raise ValueError(
                f"{self._where}: cells {start} to {stop} name a feature twice in a cell; the file is damaged"
            )
        rows.eliminate_zeros()
        return rows

    def close(self) -> None:
        self._file.close()


def _open_folder(
    folder: Path, feature_type: str, genome: str | None, sample_table: str | Path | None, spool_bytes: int
) -> tuple[Opened, dict[str, int]]:
    matrix, barcode_file, feature_file = _find_files(folder)
    barcodes = [fields[0] for fields in _read_fields(barcode_file)]
    features = _read_features(feature_file)
    selection = _select(features, feature_type, genome, str(feature_file))
    labels = with_sample_table(pd.DataFrame(index=pd.Index(barcodes, dtype=object)), sample_table)
    with open_text(matrix) as handle:
        reader = LineReader(handle, str(matrix))
        n_rows, n_columns, n_entries = read_head(reader, matrix)
        _check_shape((n_rows, n_columns), (len(features.ids), len(barcodes)), matrix, feature_file, barcode_file)
        spool = Spool(len(barcodes), len(selection.ids), max_bytes=spool_bytes, where=str(matrix))
        try:
            for feature, cell, values in read_entries(reader, matrix, (n_rows, n_columns), n_entries):
                column = selection.column[feature]
                kept = column >= 0
                spool.add(cell[kept], column[kept], values[kept])
            opened = spooled(
                spool, path=folder, matrix_name=matrix.name, gene_ids=selection.ids, symbols=selection.symbols,
                labels=labels, files=(matrix, barcode_file, feature_file), hint=_HINT,
            )  # fmt: skip
        except BaseException:
            spool.close()
            raise
    return opened, selection.left_out


def _check_shape(
    declared: tuple[int, int], found: tuple[int, int], matrix: Path, feature_file: Path, barcode_file: Path
) -> None:
    if declared == found:
        return
    turned = "; the matrix seems to be cells x genes, expected genes x cells" if declared == found[::-1] else ""
    raise ValueError(
        f"{matrix}: declares {declared[0]} features x {declared[1]} barcodes, but {feature_file.name} names {found[0]} and "
        f"{barcode_file.name} {found[1]}{turned}. The three files must come from one run; get them again"
    )


def _find_files(folder: Path) -> tuple[Path, Path, Path]:
    """Matrix, barcodes and features of one prefix."""
    files = {path.name: path for path in sorted(folder.iterdir()) if path.is_file()}
    matrices = [name for name in files if name.removesuffix(".gz").endswith("matrix.mtx")]
    if len(matrices) != 1:
        below = sorted({str(path.parent.relative_to(folder)) for path in folder.glob("**/*matrix.mtx*")} - {"."})
        found = (
            f"holds several: {matrices}"
            if matrices
            else "holds none" + (f", but {below[:4]} below it do" if below else "")
        )
        raise (ValueError if matrices else FileNotFoundError)(
            f"{folder}: expected one matrix.mtx or matrix.mtx.gz, {found}; give the folder of one matrix"
        )
    prefix = matrices[0].removesuffix(".gz").removesuffix("matrix.mtx")
    others = []
    for kinds in (("barcodes",), ("features", "genes")):
        names = [f"{prefix}{kind}.tsv{end}" for kind in kinds for end in ("", ".gz")]
        present = [name for name in names if name in files]
        if len(present) != 1:
            found = f"has {present}" if present else f"it holds {list(files)[:8]}"
            raise (ValueError if present else FileNotFoundError)(
                f"{folder}: expected one of {names} beside {matrices[0]}, {found}; copy the three files of one run together"
            )
        others.append(files[present[0]])
    return files[matrices[0]], others[0], others[1]


def _read_fields(path: Path) -> list[list[str]]:
    with open_text(path) as handle:
        return [
            [decode(field, f"{path}: line {number}").strip() for field in line.split(b"\t")]
            for block in LineReader(handle, str(path)).blocks()
            for number, line in block.lines()
        ]


def _read_features(path: Path) -> _Features:
    rows = _read_fields(path)
    widths = sorted({min(len(row), 3) for row in rows})
    if not rows or len(widths) > 1:
        what = f"lines of {widths} fields" if rows else "no lines"
        raise ValueError(f"{path}: has {what}, expected id, name and feature type (or id and name) on every line")
    n = widths[0]
    ids = [row[0] for row in rows]
    return _Features(
        ids, [row[1] if n > 1 else "" for row in rows], [row[2] if n > 2 else "" for row in rows], [""] * len(ids)
    )
