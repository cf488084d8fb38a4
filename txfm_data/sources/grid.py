"""Text tables of labels and numbers: lines to arrays, every field accounted for."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from txfm_data.sources.spool import Spool
from txfm_data.sources.text import BadCellError, Block, decode, parse_cells, split_fields


@dataclass(frozen=True)
class Layout:
    """Which fields of a line are what.

    where : file, for messages.  separator : one byte.  columns : name of each field of a line.
    labels : fields that are text, in the order wanted.  numbers : fields that are numbers, ascending; others are skipped.
    """

    where: str
    separator: bytes
    columns: tuple[str, ...]
    labels: tuple[int, ...]
    numbers: tuple[int, ...]

    @cached_property
    def n_leading(self) -> int:
        """Fields before the numbers if those fill the rest of the line, else -1."""
        first = self.numbers[0]
        return first if self.numbers == tuple(range(first, len(self.columns))) else -1


@dataclass(frozen=True)
class Part:
    """Some rows of a table.

    labels : for each row as many texts as the layout has labels.  values : (rows, numbers) float64.
    """

    labels: list[list[str]]
    values: np.ndarray


def read_labels(block: Block, layout: Layout) -> list[list[str]]:
    """Labels of the lines of a block; every line is checked to have as many fields as the layout.

    Raises
    ------
    ValueError
        Naming the line.
    """
    return [_labels(number, _fields(number, line, layout)[0], layout) for number, line in block.lines()]


def read_part(block: Block, layout: Layout) -> Part:
    """Labels and numbers of the lines of a block.

    Raises
    ------
    ValueError
        If a line has more or fewer fields than the layout, or a field is empty or no number, naming line and column.
    """
    labels, cells, lines = [], [], []
    for number, line in block.lines():
        fields, numbers = _fields(number, line, layout)
        labels.append(_labels(number, fields, layout))
        cells.append(numbers)
        lines.append(number)
    n = len(layout.numbers)
    if not cells:
        return Part([], np.empty((0, n)))
    try:
        values = parse_cells(b"\n".join(cells), n * len(cells))
    except BadCellError as error:
        row, column = divmod(error.index, n)
        fault = "holds no value" if error.is_missing else f"holds {error.text[:40]!r}, not a number"
        raise ValueError(
            f"{layout.where}: line {lines[row]} ({labels[row][0]}), column {layout.columns[layout.numbers[column]]!r} {fault}; "
            "every count must be given, 0 where there is none; columns of text are left out with --skip-columns"
        ) from error
    return Part(labels, values.reshape(len(cells), n))


def _labels(number: int, fields: list[bytes], layout: Layout) -> list[str]:
    return [decode(fields[place], f"{layout.where}: line {number}").strip() for place in layout.labels]


def _fields(number: int, line: bytes, layout: Layout) -> tuple[list[bytes], bytes]:
    """Fields of a line as far as labels reach, and its numbers, one a line."""
    leading = layout.n_leading
    if leading >= 0:
        head = line.split(layout.separator, leading)
        rest = head.pop() if len(head) == leading + 1 else b""
        if b'"' not in rest and all(map(_is_whole, head)):
            _check_width(number, line.count(layout.separator) + 1, layout)
            return [_unquoted(field) for field in head], rest.replace(layout.separator, b"\n")
    fields = split_fields(line, layout.separator, f"{layout.where}: line {number}")
    _check_width(number, len(fields), layout)
    return fields, b"\n".join([fields[place] for place in layout.numbers])


def _check_width(number: int, found: int, layout: Layout) -> None:
    if found != len(layout.columns):
        raise ValueError(
            f"{layout.where}: line {number} has {found} fields, expected {len(layout.columns)} as in the header; "
            "the table is ragged or cut: repair it or get it again"
        )


def _is_whole(field: bytes) -> bool:
    """Whether a field stands for itself: no quotes, or one pair around it."""
    return b'"' not in field or (len(field) > 1 and field[:1] == field[-1:] == b'"' and field.count(b'"') == 2)


def _unquoted(field: bytes) -> bytes:
    return field[1:-1] if field[:1] == b'"' else field


def add_part(spool: Spool, values: np.ndarray, first: int, *, by_genes: bool) -> None:
    """Spool rows of a table that begin at gene (or sample) `first`; values : (rows, columns) float64."""
    row, column = np.nonzero(values)
    stored = values[row, column]
    if by_genes:
        spool.add(column, row + first, stored)
    else:
        spool.add(row + first, column, stored)
