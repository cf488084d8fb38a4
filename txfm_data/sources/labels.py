"""Labels of samples: tables with one row a sample, joined to a matrix by the sample's name."""

import io
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.csv as pa_csv

from txfm_data.sources.text import LineReader, decode, open_text, separator_of, split_fields

_MISSING = frozenset({"", "NA", "NaN", "nan"})
_WHOLE = re.compile(r"-?(0|[1-9]\d{0,17})")
_DECIMAL = re.compile(
    r"-?((0|[1-9]\d{0,14})(\.\d*)?|\.\d+)([eE][+-]\d+)?"
)  # 15 digits are exact; 1E2 is a well of a plate


def read_sample_table(path: str | Path, names: Sequence[str]) -> pd.DataFrame:
    """Labels of samples from a TSV or CSV file, gzip or plain, in the order of `names`.

    The first column holds sample names; rows for other samples are ignored. A column becomes int64 or float64 only if
    every value is written as a plain number (``007`` stays text); "", NA and NaN are missing: None in text, NaN in numbers.

    Returns
    -------
    pandas.DataFrame
        One row a name, the index `names`.

    Raises
    ------
    FileNotFoundError, ValueError
        If there is no such file, it is no table, a sample or column is named twice, or samples are not in it.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; --sample-table takes a TSV or CSV file with a row a sample")
    table = read_text_table(path)
    twice = [name for name, n in Counter(table.iloc[:, 0]).items() if n > 1]
    if twice:
        raise ValueError(
            f"{path}: {len(twice)} sample names of the first column ({table.columns[0]!r}) occur more than once, for "
            f"example {twice[:3]}; keep one row a sample"
        )
    if len(set(names)) != len(names):
        again = [name for name, n in Counter(names).items() if n > 1]
        raise ValueError(
            f"{path}: labels cannot be joined, since {len(again)} names of the matrix's samples occur more than once, "
            f"for example {again[:3]}; give the samples names of their own, or leave --sample-table out"
        )
    rows = pd.Index(table.iloc[:, 0]).get_indexer(pd.Index(list(names), dtype=object))
    missing = [name for name, row in zip(names, rows, strict=True) if row < 0]
    if missing:
        raise ValueError(
            f"{path}: {len(missing)} of {len(names)} samples have no row, for example {missing[:3]}; the first column "
            f"({table.columns[0]!r}) must hold sample names, and holds for example {table.iloc[:3, 0].tolist()}; "
            "give --sample-table a file with all of them"
        )
    out = table.iloc[rows, 1:]
    return pd.DataFrame(
        {name: _typed(out[name].tolist()) for name in out.columns}, index=pd.Index(list(names), dtype=object)
    )


def read_text_table(path: Path) -> pd.DataFrame:
    """All cells of a TSV or CSV file as text, as written.

    Raises
    ------
    ValueError
        If the file is empty, ragged, no text, or names a column twice.
    """
    with open_text(path) as handle:
        text = handle.read()
    reader = LineReader(io.BytesIO(text), str(path))
    header, first = reader.next_line(), reader.next_line()
    if not header:
        raise ValueError(f"{path}: the first line is empty, expected a header with the names of the columns")
    if first is None:
        raise ValueError(f"{path}: has a header but no lines below it; give a table with a row a sample")
    # A table may have one column, and then no separator.
    separator = separator_of(path, header) if re.search(rb"[\t,]", header) else b"\t"
    names = [decode(field, str(path)).strip() for field in split_fields(header, separator, str(path))]
    if len(split_fields(first, separator, str(path))) == len(names) + 1:  # R writes no name for the column of row names
        names = ["", *names]
    doubled = [name for name, n in Counter(names).items() if n > 1]
    if doubled:
        raise ValueError(f"{path}: the header names columns {doubled[:3]} more than once; rename them")
    try:
        table = pa_csv.read_csv(
            pa.BufferReader(text),
            read_options=pa_csv.ReadOptions(column_names=names, skip_rows=1, use_threads=False),
            parse_options=pa_csv.ParseOptions(delimiter=separator.decode(), newlines_in_values=True),
            convert_options=pa_csv.ConvertOptions(column_types=dict.fromkeys(names, pa.string())),
        )
    except pa.ArrowInvalid as error:
        raise ValueError(
            f"{path}: not a whole table of text: {error}; every line must have the {len(names)} fields of the header"
        ) from error
    return table.to_pandas()


def _typed(cells: list[str]) -> np.ndarray:
    """One column as int64, float64 or text (with None for what is missing)."""
    present = [cell for cell in cells if cell not in _MISSING]
    if present and len(present) == len(cells) and all(map(_WHOLE.fullmatch, present)):
        return np.array(cells, np.int64)
    if present and all(map(_DECIMAL.fullmatch, present)):
        return np.array([np.nan if cell in _MISSING else float(cell) for cell in cells])
    return np.array([None if cell in _MISSING else cell for cell in cells], object)


def with_sample_table(labels: pd.DataFrame, sample_table: str | Path | None) -> pd.DataFrame:
    """Labels of a source (the index holds its sample names) and, beside them, those of the user's table.

    Raises
    ------
    FileNotFoundError, ValueError
        As `read_sample_table`; also if the table has a column that the source has.
    """
    if sample_table is None:
        return labels
    more = read_sample_table(sample_table, labels.index.tolist())
    both = sorted(set(labels.columns) & set(more.columns))
    if both:
        raise ValueError(
            f"{sample_table}: columns {both} come with the source already; rename them in the file of --sample-table"
        )
    return pd.concat([labels, more], axis=1)


def check_unique(names: Sequence[str], where: str, what: str) -> None:
    """ValueError if a name is empty or occurs twice; `what` says what is named."""
    if "" in names:
        raise ValueError(f"{where}: {what} number {list(names).index('') + 1} has an empty name; give it one")
    if len(set(names)) != len(names):
        twice = [name for name, n in Counter(names).items() if n > 1]
        raise ValueError(f"{where}: {len(twice)} names of {what}s occur more than once, for example {twice[:3]}")
