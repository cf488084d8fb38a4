"""Gene maps: tables that translate symbols (or another kind of id) to Ensembl ids."""

import csv
import io
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

from txfm_data.sources.text import open_text
from txfm_data.vocabulary import is_ensembl_gene, strip_version

SYMBOL_HEADERS = ("symbol", "gene_symbol", "gene_name", "feature_name", "hgnc_symbol", "external_gene_name", "name")
"""Headers by which the column of symbols is found in a table of more than two columns, in this order."""
_FEATURE_TYPES = {
    "gene expression", "antibody capture", "crispr guide capture", "multiplexing capture", "custom", "peaks",
    "antigen capture",
}  # fmt: skip
_SAMPLED_ROWS = 10_000


class GeneMap(dict[str, str]):
    """Symbol (or other id) to Ensembl id without version.

    ambiguous : names that stand for several Ensembl ids, with those ids; they are not in the map.
    """

    def __init__(self, pairs: Iterable[tuple[str, str]]) -> None:
        ids: dict[str, dict[str, None]] = defaultdict(dict)
        for name, gene in pairs:
            if name and is_ensembl_gene(gene) and not is_ensembl_gene(name):
                ids[name][strip_version(gene)] = None
        super().__init__({name: next(iter(genes)) for name, genes in ids.items() if len(genes) == 1})
        self.ambiguous: dict[str, tuple[str, ...]] = {name: tuple(g) for name, g in ids.items() if len(g) > 1}


def read_gene_map(path: str | Path) -> GeneMap:
    """Read a gene map from a table, gzip or plain.

    Taken are the features file of 10x Genomics; tables separated by tabs or commas with two columns, or with more and a
    header that names the symbols (`SYMBOL_HEADERS`); and parquet with the columns ``gene_id`` and ``symbol``. Which
    column holds the Ensembl ids is told by what is in it: most rows must be such ids. Rows without one are left out.

    Raises
    ------
    FileNotFoundError, ValueError
        If there is no such file, it is no such table, or it maps nothing.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; --gene-map takes a table of symbols and Ensembl ids")
    with open(path, "rb") as handle:
        is_parquet = handle.read(4) == b"PAR1"
    genes = GeneMap(_parquet_pairs(path) if is_parquet else _text_pairs(path))
    if not genes:
        raise ValueError(
            f"{path}: maps no symbol to one Ensembl id ({len(genes.ambiguous)} stand for several); --gene-map takes a table of "
            "symbols and Ensembl ids"
        )
    return genes


def _parquet_pairs(path: Path) -> Iterator[tuple[str, str]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            missing = {"gene_id", "symbol"} - set(file.schema_arrow.names)
            if missing:
                raise ValueError(
                    f"{path}: --gene-map needs columns 'gene_id' and 'symbol' in a parquet file, it has "
                    f"{file.schema_arrow.names[:8]}"
                )
            table = file.read(columns=["gene_id", "symbol"])
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path}: not a readable parquet file ({error}); get it again") from error
    for gene, symbol in zip(table["gene_id"].to_pylist(), table["symbol"].to_pylist(), strict=True):
        yield str(symbol or ""), str(gene or "")


def _text_pairs(path: Path) -> list[tuple[str, str]]:
    rows = _rows(path)
    n_columns = len(rows[0])
    if n_columns < 2:
        raise ValueError(
            f"{path}: has one column ({rows[0]}), expected symbols and Ensembl ids; check the file of --gene-map"
        )
    name = _symbol_column(path, rows)
    sample = rows[:_SAMPLED_ROWS]
    columns = range(n_columns) if n_columns > 2 and name is not None else range(2)
    held = {c: sum(is_ensembl_gene(row[c]) for row in sample) / len(sample) for c in columns if c != name}
    ids = [column for column, fraction in held.items() if fraction > 0.5]
    if len(ids) != 1:
        shares = ", ".join(f"column {column + 1}: {fraction:.0%}" for column, fraction in held.items())
        raise ValueError(
            f"{path}: exactly one column must hold Ensembl gene ids in most rows, found {len(ids)} ({shares}); its rows are "
            f"like {rows[min(1, len(rows) - 1)][:4]}; give --gene-map a table of symbols and Ensembl ids"
        )
    other = 1 - ids[0] if name is None else name
    return [(row[other], row[ids[0]]) for row in rows]


def _symbol_column(path: Path, rows: list[list[str]]) -> int | None:
    """Column of the symbols in a table of more than two columns; None if it is the other of the first two."""
    if len(rows[0]) == 2:
        return None
    header = [cell.lower().lstrip("#") for cell in rows[0]]
    for known in SYMBOL_HEADERS:
        if known in header:
            return header.index(known)
    if header[2] in _FEATURE_TYPES:
        return None
    raise ValueError(
        f"{path}: has {len(header)} columns, and none is named {', '.join(SYMBOL_HEADERS[:-1])} or {SYMBOL_HEADERS[-1]} (its "
        f"first line is {rows[0][:5]}); name the column of symbols in a header, or give --gene-map a table of two columns"
    )


def _rows(path: Path) -> list[list[str]]:
    """Fields of every line that is not blank, without spaces around them; all of the same number."""
    with open_text(path) as handle, io.TextIOWrapper(handle, "utf-8-sig", newline="") as text:
        try:
            first = text.readline()
            separator = "\t" if "\t" in first else ","
            reader = csv.reader(_again(first, text), delimiter=separator)
            rows = []
            for row in reader:
                if not any(row):
                    continue
                rows.append([cell.strip() for cell in row])
                if len(row) != len(rows[0]):
                    raise ValueError(
                        f"{path}: line {reader.line_num} has {len(row)} fields, the first line {len(rows[0])}; the table is ragged"
                    )
        except (UnicodeDecodeError, csv.Error) as error:
            raise ValueError(f"{path}: not a table of text ({error}); --gene-map takes TSV, CSV or parquet") from error
    if not rows:
        raise ValueError(f"{path}: is empty; --gene-map takes a table of symbols and Ensembl ids")
    return rows


def _again(first: str, rest: Iterable[str]) -> Iterator[str]:
    yield first
    yield from rest
