"""Matrix Market files of coordinates: blocks of text to rows, columns and values."""

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv

from txfm_data.sources.text import Block, LineReader

_ENTRY = re.compile(rb"\s*[+-]?\d+\s+[+-]?\d+\s+[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*")


def read_head(reader: LineReader, path: Path) -> tuple[int, int, int]:
    """Rows, columns and entries that the head of the file declares.

    Raises
    ------
    ValueError
        If it is no Matrix Market file of general coordinates with integer or real values.
    """
    banner = (reader.next_line() or b"").decode("utf-8", "replace")
    words = banner.lower().split()
    if words[:2] != ["%%matrixmarket", "matrix"]:
        raise ValueError(
            f"{path}: begins with {banner[:60]!r}, expected '%%MatrixMarket matrix coordinate integer general'"
        )
    if len(words) != 5 or words[2] != "coordinate" or words[3] not in ("integer", "real") or words[4] != "general":
        raise ValueError(
            f"{path}: is a Matrix Market file of kind {' '.join(words[2:])!r}, expected 'coordinate integer general' (or "
            "real): counts of cells and genes, each entry with its value"
        )
    line = reader.next_line()
    while line is not None and (line.startswith(b"%") or not line.strip()):
        line = reader.next_line()
    sizes = (line or b"").split()
    if len(sizes) != 3 or not all(size.isdigit() and len(size) < 19 for size in sizes):
        raise ValueError(
            f"{path}: line {reader.line} must hold rows, columns and entries; found {(line or b'')[:60]!r}"
        )
    n_rows, n_columns, n_entries = map(int, sizes)
    return n_rows, n_columns, n_entries


def read_entries(
    reader: LineReader, path: Path, shape: tuple[int, int], n_entries: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Entries behind the head in the order of the file: rows and columns from 0 (int64), values (float64).

    Raises
    ------
    ValueError
        If a line is no entry, an index is outside `shape`, or there are not `n_entries` of them.
    """
    found = 0
    for block in reader.blocks():
        rows, columns, values = _parse(block, path)
        for index, size, what in ((rows, shape[0], "row"), (columns, shape[1], "column")):
            if len(index) and not (1 <= int(index.min()) and int(index.max()) <= size):
                place = int(np.argmax((index < 1) | (index > size)))
                line = [number for number, _ in block.lines()][place]
                raise ValueError(
                    f"{path}: line {line} names {what} {index[place]}, but there are {size} (counted from 1); the file is damaged "
                    "or belongs to other barcodes and features"
                )
        found += len(values)
        if found > n_entries:
            break
        yield rows - 1, columns - 1, values
    if found != n_entries:
        more = "more" if found > n_entries else f"only {found}"
        raise ValueError(
            f"{path}: declares {n_entries} entries, but {more} follow; the file is cut or damaged, get it again"
        )


def _parse(block: Block, path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows, columns (from 1) and values of a block of lines."""
    text = block.text
    if not text.strip():
        nothing = np.empty(0, np.int64)
        return nothing, nothing, np.empty(0)
    # Any blanks may stand between numbers and around them; mostly it is one space.
    if b"\t" in text or b"  " in text or b" \n" in text or b"\n " in text or b"\r" in text or text[:1] == b" ":
        text = re.sub(rb"[ \t]+", b" ", text.replace(b"\r", b"")).replace(b"\n ", b"\n").replace(b" \n", b"\n").strip()
    types = {"row": pa.int64(), "column": pa.int64(), "value": pa.float64()}
    try:
        table = pa_csv.read_csv(
            pa.BufferReader(text),
            read_options=pa_csv.ReadOptions(column_names=list(types), use_threads=False, block_size=len(text) + 1),
            parse_options=pa_csv.ParseOptions(delimiter=" ", quote_char=False),
            convert_options=pa_csv.ConvertOptions(column_types=types, null_values=[]),
        )
    except pa.ArrowInvalid as error:
        for number, line in block.lines():
            if not _ENTRY.fullmatch(line):
                raise ValueError(
                    f"{path}: line {number} is {line[:60].decode('utf-8', 'replace')!r}, expected row, column and value; the file "
                    "is cut or damaged, get it again"
                ) from error
        raise ValueError(f"{path}: lines from {block.first_line} are no entries: {error}") from error
    rows, columns, values = (table[name].to_numpy() for name in types)
    return rows, columns, values
