"""Tables of counts as TSV or CSV, gzip or plain: genes x samples or samples x genes, as the user says."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import pandas as pd

from txfm_data.sources.base import SPOOL_BYTES, Opened, OpenedSource, spooled
from txfm_data.sources.grid import Layout, add_part, read_labels, read_part
from txfm_data.sources.labels import check_unique, with_sample_table
from txfm_data.sources.spool import Spool
from txfm_data.sources.text import LineReader, decode, open_text, separator_of, split_fields
from txfm_data.vocabulary import is_ensembl_gene

Orientation = Literal["genes-by-samples", "samples-by-genes"]


class TableSource(OpenedSource):
    """Counts of a text table, turned into samples x genes on local disk; the file is read twice.

    The first column holds gene ids (or sample names), every other one that is not named below holds numbers. Lines that begin
    with ``#`` above the header are comments. A header with one field fewer than the lines has no name for the first column.

    Parameters
    ----------
    path
        The file; the separator follows from ``.tsv`` or ``.csv``, else from the header (tab or comma).
    orientation
        "genes-by-samples" or "samples-by-genes"; it is never guessed.
    symbol_column
        Column of gene symbols, of genes-by-samples only.
    skip_columns
        Columns that are neither counts nor wanted, such as featureCounts' Chr, Start, End, Strand and Length.
    sample_table
        Labels of the samples, see `read_sample_table`.

    Raises
    ------
    FileNotFoundError, ValueError
        If there is no such file; it is empty or ragged; a named column is not in it; a sample is named twice; a cell is
        missing (empty, NA) or no number.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        orientation: Orientation,
        sample_table: str | Path | None = None,
        symbol_column: str | None = None,
        skip_columns: Sequence[str] = (),
        _spool_bytes: int = SPOOL_BYTES,
    ) -> None:
        path = Path(path)
        if orientation not in get_args(Orientation):
            raise ValueError(f"--orientation {orientation}: choose one of {', '.join(get_args(Orientation))}")
        by_genes = orientation == "genes-by-samples"
        if symbol_column is not None and not by_genes:
            raise ValueError("--symbol-column names a column of a table of genes-by-samples; here genes are columns")
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file; give the path of a TSV or CSV file")
        names = _read_names(path, by_genes, symbol_column, tuple(skip_columns))
        labels = with_sample_table(pd.DataFrame(index=pd.Index(names.samples, dtype=object)), sample_table)
        spool = Spool(len(names.samples), len(names.genes), max_bytes=_spool_bytes, where=str(path))
        try:
            super().__init__(_read_values(path, names, spool, labels, by_genes))
        except BaseException:
            spool.close()
            raise


@dataclass(frozen=True)
class _Names:
    """What the first reading finds; `n_rows` lines of the layout."""

    layout: Layout
    n_rows: int
    samples: list[str]
    genes: list[str]
    symbols: list[str]


@contextmanager
def _open_body(path: Path) -> Iterator[tuple[LineReader, bytes]]:
    """Reader that stands behind the header, and the header."""
    with open_text(path) as handle:
        reader = LineReader(handle, str(path))
        line = reader.next_line()
        while line is not None and (line.startswith(b"#") or not line.strip()):
            line = reader.next_line()
        if line is None:
            raise ValueError(f"{path}: is empty, expected a header and a line for each gene or sample")
        yield reader, line


def _layout(path: Path, header: bytes, first: bytes, symbol: str | None, skip: tuple[str, ...]) -> Layout:
    separator = separator_of(path, header)
    columns = [decode(field, str(path)).strip() for field in split_fields(header, separator, str(path))]
    # R writes no name for the column of row names.
    if len(split_fields(first, separator, str(path))) == len(columns) + 1:
        columns = ["", *columns]
    option = {name: "--skip-columns" for name in skip} | ({symbol: "--symbol-column"} if symbol is not None else {})
    for name, flag in option.items():
        if name not in columns[1:]:
            raise ValueError(
                f"{path}: {flag} names {name!r}, but the columns are {columns[1:9]}{' ...' if len(columns) > 9 else ''}"
            )
    numbers = tuple(place for place, name in enumerate(columns) if place and name not in option)
    if not numbers:
        raise ValueError(f"{path}: no column is left that could hold counts; it has {columns[:9]}")
    labels = (0,) if symbol is None else (0, columns.index(symbol, 1))
    return Layout(str(path), separator, tuple(columns), labels, numbers)


def _read_names(path: Path, by_genes: bool, symbol: str | None, skip: tuple[str, ...]) -> _Names:
    """First reading: names of genes and samples, and that every line is whole."""
    layout: Layout | None = None
    rows: list[list[str]] = []
    with _open_body(path) as (reader, header):
        for block in reader.blocks():
            if layout is None:
                first = next(block.lines(), None)
                if first is None:
                    continue
                layout = _layout(path, header, first[1], symbol, skip)
            rows += read_labels(block, layout)
    if layout is None:
        raise ValueError(f"{path}: has a header but no lines below it; there is nothing to ingest")
    of_rows, of_columns = [row[0] for row in rows], [layout.columns[place] for place in layout.numbers]
    samples, genes = (of_columns, of_rows) if by_genes else (of_rows, of_columns)
    check_unique(samples, str(path), "sample")
    return _Names(layout, len(rows), samples, genes, [""] * len(genes) if symbol is None else [row[1] for row in rows])


def _read_values(path: Path, names: _Names, spool: Spool, labels: pd.DataFrame, by_genes: bool) -> Opened:
    """Second reading: the numbers."""
    done = 0
    with _open_body(path) as (reader, _):
        for block in reader.blocks():
            part = read_part(block, names.layout)
            if done + len(part.labels) > names.n_rows:
                break
            add_part(spool, part.values, done, by_genes=by_genes)
            done += len(part.labels)
    if done != names.n_rows:
        raise ValueError(f"{path}: changed while it was read; ingest it again when nothing writes to it")
    return spooled(
        spool, path=path, matrix_name="counts", labels=labels, files=(path,), hint=_hint(names, by_genes),
        gene_ids=tuple(names.genes), symbols=tuple(names.symbols),
    )  # fmt: skip


def _hint(names: _Names, by_genes: bool) -> str:
    swapped = sum(map(is_ensembl_gene, names.samples))
    if swapped:
        other = get_args(Orientation)[by_genes]
        return f"{swapped} of {len(names.samples)} sample names are Ensembl gene ids: try --orientation {other}"
    where = "the first column" if by_genes else "the header"
    return f"{where} names genes {names.genes[:3]}; for symbols give a table of symbols and Ensembl ids (--gene-map)"
