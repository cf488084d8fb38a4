"""Text files of numbers, gzip or plain: blocks of whole lines, separators, cells to float64, in bounded memory."""

import csv
import gzip
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv

BLOCK_BYTES = 2 * 1024**2
"""Text that is parsed at a time; as arrays, cells of one digit take up to thirty times as much."""
LINE_LIMIT_BYTES = 256 * 1024**2
_MISSING = ("", "NA", "NaN", "nan", "NULL", "null", "None", "N/A", "#N/A", "<NA>")
_NUMBER = re.compile(rb"\s*[+-]?(\d+\.?\d*([eE][+-]?\d+)?|\.\d+([eE][+-]?\d+)?|inf(inity)?)\s*", re.IGNORECASE)
_BOM = b"\xef\xbb\xbf"


@contextmanager
def open_text(path: Path) -> Iterator[BinaryIO]:
    """Open a file for reading bytes, through gzip if it begins as gzip does.

    Raises
    ------
    ValueError
        Also in the body of the ``with``: if the gzip stream is cut or damaged.
    """
    with open(path, "rb") as probe:
        is_gzip = probe.read(2) == b"\x1f\x8b"
    try:
        with cast("BinaryIO", gzip.open(path, "rb")) if is_gzip else open(path, "rb") as handle:
            yield handle
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(
            f"{path}: the gzip stream is cut or damaged ({error}); compare its size with the origin's and get it again"
        ) from error


def decode(raw: bytes, where: str) -> str:
    """Text of a label; ValueError naming `where` if it is not UTF-8."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not UTF-8 text ({raw[:40]!r}); convert it, for example with iconv") from error


@dataclass(frozen=True)
class Block:
    r"""Whole lines of a file without their ends.

    first_line : number of the first line, from 1.  text : bytes with ``\n`` between lines.
    """

    first_line: int
    text: bytes

    def lines(self) -> Iterator[tuple[int, bytes]]:
        """Lines that are not blank, with their numbers."""
        for number, line in enumerate(self.text.split(b"\n"), self.first_line):
            line = line.removesuffix(b"\r")
            if line.strip():
                yield number, line


class LineReader:
    """Lines of an open file: single ones for the head, then blocks of at most about `block_bytes`."""

    def __init__(self, handle: BinaryIO, where: str, *, block_bytes: int = BLOCK_BYTES) -> None:
        self._handle, self._where, self._block_bytes = handle, where, block_bytes
        self.line = 0

    def next_line(self) -> bytes | None:
        """Next line without its end (nor a byte order mark); None at the end of the file."""
        raw = self._handle.readline(LINE_LIMIT_BYTES)
        if not raw:
            return None
        self.line += 1
        self._check_length(len(raw))
        return (raw.removeprefix(_BOM) if self.line == 1 else raw).rstrip(b"\r\n")

    def blocks(self) -> Iterator[Block]:
        """The rest of the file."""
        while raw := self._handle.read(self._block_bytes):
            if not raw.endswith(b"\n"):
                raw += self._handle.readline(LINE_LIMIT_BYTES)
                self._check_length(len(raw) - self._block_bytes)
            first = self.line + 1
            self.line += raw.count(b"\n") + (not raw.endswith(b"\n"))
            yield Block(first, raw.removesuffix(b"\n"))

    def _check_length(self, length: int) -> None:
        if length >= LINE_LIMIT_BYTES:
            raise ValueError(
                f"{self._where}: line {self.line} is longer than {LINE_LIMIT_BYTES // 1024**2} MiB, so this is no table "
                "of text that can be read by lines; check the file"
            )


def separator_of(path: Path, header: bytes) -> bytes:
    """Tab or comma: by the extension (.tsv, .tab, .csv), else by which of the two the header line has.

    Raises
    ------
    ValueError
        If the header has not the one, or has both or none where the extension does not say it.
    """
    suffix = Path(path.name.removesuffix(".gz")).suffix.lower()
    named = {".csv": b",", ".tsv": b"\t", ".tab": b"\t"}.get(suffix)
    tabs, commas = b"\t" in header, b"," in header
    shown = header[:60].decode("utf-8", "replace")
    if named is not None:
        has, other = (tabs, "tabs") if named == b"," else (commas, "commas")
        if named not in header and has:
            raise ValueError(
                f"{path}: the name ends in {suffix}, but its header line {shown!r} is separated by {other}; "
                "rename the file to match its contents"
            )
        return named
    if tabs != commas:
        return b"\t" if tabs else b","
    found = "both tabs and commas" if tabs else "neither a tab nor a comma"
    raise ValueError(
        f"{path}: the header line {shown!r} has {found}, so the separator is unknown; name the file .tsv or .csv"
    )


def split_fields(line: bytes, separator: bytes, where: str) -> list[bytes]:
    """Fields of one line; quotes are removed, and a separator within them does not split.

    Raises
    ------
    ValueError
        If a quote has no pair and the rest of the line is too long for one field.
    """
    if b'"' not in line:
        return line.split(separator)
    try:
        fields = next(csv.reader([line.decode("latin-1")], delimiter=separator.decode()))
    except csv.Error as error:
        raise ValueError(f"{where}: quotes do not pair up ({error}); repair the line") from error
    return [field.encode("latin-1") for field in fields]


class BadCellError(ValueError):
    """A cell that is no number.

    index : its place among the cells that were parsed.  text : as written.
    """

    def __init__(self, index: int, text: str) -> None:
        super().__init__(f"cell {index} is {text!r}, not a number")
        self.index, self.text = index, text

    @property
    def is_missing(self) -> bool:
        """Whether the cell is empty or says that the value is missing."""
        return self.text.strip() in _MISSING


def parse_cells(cells: bytes, n: int) -> np.ndarray:
    r"""Numbers of `n` cells with ``\n`` between them, (n,) float64.

    Raises
    ------
    BadCellError
        At the first cell that is empty, missing (NA, NaN) or no number. Nothing is ever read as zero.
    """
    text = cells + b"\n"
    try:
        table = pa_csv.read_csv(
            pa.BufferReader(text),
            read_options=pa_csv.ReadOptions(column_names=["value"], use_threads=False, block_size=len(text) + 1),
            parse_options=pa_csv.ParseOptions(delimiter="\t", quote_char=False, ignore_empty_lines=False),
            convert_options=pa_csv.ConvertOptions(column_types={"value": pa.float64()}, null_values=list(_MISSING)),
        )
    except pa.ArrowInvalid as error:
        raise _first_bad_cell(cells, str(error)) from error
    column = table.column("value")
    values: np.ndarray = column.to_numpy()
    if column.null_count or len(values) != n or bool(np.isnan(values).any()):
        raise _first_bad_cell(cells, f"{len(values)} cells instead of {n}")
    return values


def _first_bad_cell(cells: bytes, otherwise: str) -> BadCellError:
    for index, cell in enumerate(cells.split(b"\n")):
        if not _NUMBER.fullmatch(cell):
            return BadCellError(index, cell.decode("utf-8", "replace"))
    return BadCellError(0, otherwise)
