"""GCT files (version 1.2), as GTEx publishes gene counts: genes x samples with two columns of names."""

from pathlib import Path

import pandas as pd

from txfm_data.sources.base import SPOOL_BYTES, Opened, OpenedSource, spooled
from txfm_data.sources.grid import Layout, add_part, read_part
from txfm_data.sources.labels import check_unique, with_sample_table
from txfm_data.sources.spool import Spool
from txfm_data.sources.text import LineReader, decode, open_text

_LEADING = (["name", "description"], ["id", "name", "description"])  # GTEx numbers the rows of its files of one tissue
_HINT = (
    "the column Name holds the gene ids and Description the symbols; where Name holds symbols, give a table of symbols and "
    "Ensembl ids (--gene-map)"
)


class GctSource(OpenedSource):
    """Gene counts of a ``.gct`` or ``.gct.gz`` file, turned into samples x genes on local disk.

    path : the file.  sample_table : labels of the samples, see `read_sample_table`.

    Raises
    ------
    FileNotFoundError, ValueError
        If there is no such file; it is no GCT 1.2; it holds more or fewer rows or columns than it declares; a sample is
        named twice; a cell is missing or no number.
    """

    def __init__(
        self, path: str | Path, *, sample_table: str | Path | None = None, _spool_bytes: int = SPOOL_BYTES
    ) -> None:
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file; give the path of a .gct or .gct.gz file")
        with open_text(path) as handle:
            reader = LineReader(handle, str(path))
            n_genes, layout = _read_head(reader, path)
            names = [layout.columns[place] for place in layout.numbers]
            labels = with_sample_table(pd.DataFrame(index=pd.Index(names, dtype=object)), sample_table)
            spool = Spool(len(names), n_genes, max_bytes=_spool_bytes, where=str(path))
            try:
                super().__init__(_read_body(reader, path, layout, spool, labels))
            except BaseException:
                spool.close()
                raise


def _read_head(reader: LineReader, path: Path) -> tuple[int, Layout]:
    """Declared genes and the layout of the lines."""
    version = decode((reader.next_line() or b"").strip(), str(path))
    if version != "#1.2":
        what = "GCT 1.3 has other columns; convert it" if version.startswith("#1.") else "this is no GCT file"
        raise ValueError(
            f"{path}: the first line is {version[:40]!r}, expected '#1.2': {what}, or use --orientation with txfm ingest table"
        )
    sizes = (reader.next_line() or b"").split()
    if len(sizes) != 2 or not all(size.isdigit() for size in sizes):
        raise ValueError(f"{path}: line 2 must hold two whole numbers, rows and columns; found {sizes[:4]}")
    n_genes, n_samples = map(int, sizes)
    header = [decode(field, str(path)).strip() for field in (reader.next_line() or b"").split(b"\t")]
    n_leading = next((len(names) for names in _LEADING if [f.lower() for f in header[: len(names)]] == names), 0)
    if not n_leading:
        raise ValueError(f"{path}: line 3 begins with {header[:3]}, expected Name, Description and the samples")
    samples = header[n_leading:]
    if len(samples) != n_samples:
        raise ValueError(
            f"{path}: line 2 declares {n_samples} samples, the header names {len(samples)}; the file is damaged, get it again"
        )
    if not samples:
        raise ValueError(f"{path}: declares no samples; there is nothing to ingest")
    check_unique(samples, str(path), "sample")
    numbers = tuple(range(n_leading, len(header)))
    return n_genes, Layout(str(path), b"\t", tuple(header), (n_leading - 2, n_leading - 1), numbers)


def _read_body(reader: LineReader, path: Path, layout: Layout, spool: Spool, labels: pd.DataFrame) -> Opened:
    n_genes = spool.shape[1]
    genes: list[list[str]] = []
    for block in reader.blocks():
        part = read_part(block, layout)
        if len(genes) + len(part.labels) > n_genes:
            raise ValueError(f"{path}: line 2 declares {n_genes} genes, but more follow; the file is damaged")
        add_part(spool, part.values, len(genes), by_genes=True)
        genes += part.labels
    if len(genes) != n_genes:
        raise ValueError(
            f"{path}: line 2 declares {n_genes} genes, but {len(genes)} follow; the file is cut, get it again"
        )
    return spooled(
        spool, path=path, matrix_name="counts", labels=labels, files=(path,), hint=_HINT,
        gene_ids=tuple(name for name, _ in genes), symbols=tuple(symbol for _, symbol in genes),
    )  # fmt: skip
