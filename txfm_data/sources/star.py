"""Folders of STAR gene counts, a file a sample: TCGA as the GDC gives it, or STAR's own ReadsPerGene.out.tab."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.csv as pa_csv
import scipy.sparse as sp

from txfm_data.sources.base import Opened, OpenedSource
from txfm_data.sources.labels import check_unique, read_text_table, with_sample_table
from txfm_data.sources.text import open_text

COLUMNS = ("unstranded", "stranded_first", "stranded_second")
"""Columns of raw counts, in the order of STAR's own files."""
_GDC, _PLAIN = ".rna_seq.augmented_star_gene_counts.tsv", "ReadsPerGene.out.tab"
_SUMMARIES = {
    "N_unmapped": "n_unmapped",
    "N_multimapping": "n_multimapping",
    "N_noFeature": "n_no_feature",
    "N_ambiguous": "n_ambiguous",
}
_HEAD_LINES = 6  # a comment and a header, then four sums
_EXAMPLES = 3
_HINT = (
    "STAR lists genes as its annotation names them; Ensembl and GENCODE annotations match as they are, others need a "
    "table of gene names and Ensembl ids (--gene-map)"
)


class StarSource(OpenedSource):
    """STAR gene counts of many samples, read file by file.

    The genes of a file are compared with those of the first one whenever it is read, so that opening a folder of
    many thousand files reads only their heads.

    Parameters
    ----------
    folder
        Holds ``*.rna_seq.augmented_star_gene_counts.tsv`` (GDC) or ``*ReadsPerGene.out.tab`` (STAR), gzip or plain, in any
        subfolders.
    sample_sheet
        The GDC's sample sheet (TSV). Every count file it names must be in the folder and the reverse; its columns
        become labels (``Project ID`` becomes ``project_id``). Without a sheet a sample is named by what stands
        before the first dot of its file name (before the suffix, for STAR's own files).
    column
        "unstranded", "stranded_first" or "stranded_second"; the right one follows from the library's protocol.
    sample_name
        Label of the sheet that names the samples. Two files of one Sample ID (aliquots of one specimen) are an error, since
        only the user knows which to keep: remove one from folder and sheet, or keep both under ``file_id``.
    sample_table
        More labels, see `read_sample_table`.

    Labels are those of the sheet and the counts that STAR assigned to no gene: ``n_unmapped``, ``n_multimapping``,
    ``n_no_feature``, ``n_ambiguous``.

    Raises
    ------
    FileNotFoundError, ValueError
        If files are missing, are no STAR counts, differ in their gene model, or the sheet does not fit the folder.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        sample_sheet: str | Path | None = None,
        column: str = "unstranded",
        sample_name: str = "sample_id",
        sample_table: str | Path | None = None,
    ) -> None:
        folder = Path(folder)
        _check_column(column)
        files = _find(folder)
        sheet = None if sample_sheet is None else _read_sheet(Path(sample_sheet), files, folder)
        names, labels = _names(files, sheet, sample_name, sample_sheet)
        heads = pd.DataFrame([_read_head(path, column) for path in files])
        _check_models(files, heads.pop("model").tolist())
        labels = pd.concat([labels.reset_index(drop=True), heads], axis=1)
        labels.index = pd.Index(names, dtype=object)
        labels = with_sample_table(labels, sample_table)
        gene_ids, symbols = _read_genes(files[0])
        rows = _StarRows(tuple(files), column, gene_ids)
        super().__init__(_opened(folder, rows, symbols, labels))


def _opened(folder: Path, rows: "_StarRows", symbols: tuple[str, ...], labels: pd.DataFrame) -> Opened:
    return Opened(
        where=str(folder), name=folder.name, matrix_name=rows.column, gene_ids=rows.gene_ids, symbols=symbols,
        labels=labels, rows=rows, files=rows.files, root=folder, hint=_HINT,
        reopen=partial(_reopen, folder, rows.files, rows.column, labels),
    )  # fmt: skip


def _reopen(folder: Path, files: tuple[Path, ...], column: str, labels: pd.DataFrame) -> OpenedSource:
    gene_ids, symbols = _read_genes(files[0])
    return OpenedSource(_opened(folder, _StarRows(files, column, gene_ids), symbols, labels))


@dataclass(frozen=True)
class _StarRows:
    files: tuple[Path, ...]
    column: str
    gene_ids: tuple[str, ...]

    def cuts(self, max_bytes: int) -> list[tuple[int, int]]:
        step = max(1, max_bytes // (16 * max(1, len(self.gene_ids))))
        return [(start, min(start + step, len(self.files))) for start in range(0, len(self.files), step)]

    def read(self, start: int, stop: int) -> sp.csr_matrix:
        indptr, indices, counts = [0], [], []
        expected = pa.array(self.gene_ids, pa.string())
        for path in self.files[start:stop]:
            table = _read_table(path, ["gene_id", self.column])
            self._check_genes(path, table["gene_id"].combine_chunks(), expected)
            values = table[self.column].to_numpy()
            columns = np.flatnonzero(values)
            indices.append(columns.astype(np.int32))
            counts.append(values[columns])
            indptr.append(indptr[-1] + len(columns))
        shape = (stop - start, len(self.gene_ids))
        if not indices:
            return sp.csr_matrix(shape, dtype=np.int64)
        return sp.csr_matrix((np.concatenate(counts), np.concatenate(indices), np.array(indptr)), shape=shape)

    def _check_genes(self, path: Path, found: pa.Array, expected: pa.Array) -> None:
        if found.equals(expected):
            return
        n = min(len(found), len(expected))
        same = np.asarray(found[:n].to_numpy(zero_copy_only=False) == expected[:n].to_numpy(zero_copy_only=False))
        row = int(np.argmin(same)) if not same.all() else n
        here, there = (genes[row].as_py() if row < len(genes) else "the end" for genes in (found, expected))
        raise ValueError(
            f"{path}: lists {len(found)} genes, {self.files[0]} lists {len(expected)}; they first differ at gene "
            f"{row + 1}: {here} here, {there} there. All files of one folder must be counted against one annotation and "
            "be whole; get the file again, or ingest the annotations as separate datasets"
        )

    def close(self) -> None:
        """No file stays open."""


def _check_column(column: str) -> None:
    if column in COLUMNS:
        return
    if re.match(r"(tpm|fpkm)", column):
        raise ValueError(
            f"--column {column}: these values are normalised for gene length and library size, expected raw counts; "
            f"choose one of {', '.join(COLUMNS)}"
        )
    raise ValueError(f"--column {column}: no column of raw counts; choose one of {', '.join(COLUMNS)}")


def _stem(path: Path | str) -> str:
    """File name without ``.gz``."""
    return Path(path).name.removesuffix(".gz")


def _find(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; give the folder that holds the files of STAR counts")
    files = sorted(path for path in folder.rglob("*") if path.is_file() and _stem(path).endswith((_GDC, _PLAIN)))
    if not files:
        raise ValueError(f"{folder}: holds no file named *{_GDC} or *{_PLAIN}; give the folder of STAR counts")
    gdc = [path for path in files if _stem(path).endswith(_GDC)]
    if 0 < len(gdc) < len(files):
        raise ValueError(
            f"{folder}: holds {len(gdc)} files *{_GDC} and {len(files) - len(gdc)} files *{_PLAIN}; "
            "ingest the two kinds from folders of their own"
        )
    check_unique([_stem(path) for path in files], str(folder), "count file")
    return files


def _read_sheet(path: Path, files: Sequence[Path], folder: Path) -> pd.DataFrame:
    """Rows of the sheet in the order of `files`, columns in snake case."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; --sample-sheet takes the sample sheet (TSV) of the GDC")
    sheet = read_text_table(path)
    sheet.columns = pd.Index([re.sub(r"\W+", "_", name.strip()).lower() for name in sheet.columns])
    missing = sorted({"file_id", "file_name"} - set(sheet.columns))
    if missing:
        raise ValueError(
            f"{path}: a sample sheet of the GDC has columns 'File ID' and 'File Name', missing {missing}; "
            f"found {list(sheet.columns)}"
        )
    # A cart may hold other data than counts; those rows say nothing about this folder.
    sheet = sheet[[_stem(name).endswith((_GDC, _PLAIN)) for name in sheet["file_name"]]]
    listed = [_stem(name) for name in sheet["file_name"]]
    check_unique(listed, str(path), "count file")
    present = [_stem(file) for file in files]
    absent, extra = sorted(set(listed) - set(present)), sorted(set(present) - set(listed))
    if absent or extra:
        facts = []
        if absent:
            facts.append(f"{len(absent)} of {len(listed)} files of the sheet are not there: {absent[:_EXAMPLES]}")
        if extra:
            facts.append(f"{len(extra)} of {len(present)} files there are not in the sheet: {extra[:_EXAMPLES]}")
        raise ValueError(
            f"{path} does not fit {folder}: {'; '.join(facts)}. Complete the download, or cut the sheet of --sample-sheet "
            "to the files that are meant"
        )
    return sheet.iloc[pd.Index(listed).get_indexer(present)]


def _names(
    files: Sequence[Path], sheet: pd.DataFrame | None, sample_name: str, path: str | Path | None
) -> tuple[list[str], pd.DataFrame]:
    if sheet is None:
        names = [
            _stem(p).removesuffix(_PLAIN).rstrip("._-") if _stem(p).endswith(_PLAIN) else _stem(p).split(".")[0]
            for p in files
        ]
        # STAR without a prefix calls every file the same and leaves the name to the folder.
        names = [name or file.parent.name for name, file in zip(names, files, strict=True)]
        check_unique(names, str(files[0].parent), "sample")
        return names, pd.DataFrame(index=range(len(files)))
    if sample_name not in sheet.columns:
        raise ValueError(f"{path}: --sample-name {sample_name}: the sheet has {list(sheet.columns)}")
    if (sheet[sample_name] == "").any():
        unnamed = sheet.loc[sheet[sample_name] == "", "file_name"].tolist()
        raise ValueError(
            f"{path}: {len(unnamed)} files have no {sample_name}, for example {unnamed[:_EXAMPLES]}; fill it in"
        )
    counts = sheet[sample_name].value_counts()
    twice = counts[counts > 1]
    if len(twice):
        example = str(twice.index[0])
        of = sheet.loc[sheet[sample_name] == example, "file_name"].tolist()
        raise ValueError(
            f"{path}: {len(twice)} samples have more than one file by {sample_name}, for example {example}: {of[:_EXAMPLES]} "
            "(several aliquots of one specimen). Keep one file each in the sheet and the folder, or keep all as samples of "
            "their own with --sample-name file_id"
        )
    return sheet[sample_name].tolist(), sheet


def _read_head(path: Path, column: str) -> dict[str, str | int]:
    """Gene model and counts without a gene, from the first lines of a file."""
    with open_text(path) as handle:
        lines = [handle.readline().decode("utf-8", "replace").rstrip("\r\n") for _ in range(_HEAD_LINES)]
    head: dict[str, str | int] = {"model": ""}
    if _stem(path).endswith(_GDC):
        if not lines[0].startswith("#"):
            raise ValueError(
                f"{path}: begins with {lines[0][:40]!r}, expected the comment '# gene-model: ...' of the GDC"
            )
        head["model"], header, sums = lines[0].lstrip("# ").strip(), lines[1].split("\t"), lines[2:]
        if header[:2] != ["gene_id", "gene_name"] or column not in header:
            raise ValueError(
                f"{path}: line 2 is {lines[1][:80]!r}, expected a header with gene_id, gene_name and {column}"
            )
        place = header.index(column)
    else:
        sums, place = lines[:4], 1 + COLUMNS.index(column)
    for (name, label), line in zip(_SUMMARIES.items(), sums, strict=True):
        fields = line.split("\t")
        if fields[0] != name or len(fields) <= place or not fields[place].strip().isdigit():
            raise ValueError(
                f"{path}: expected the line {name} with whole numbers, found {line[:60]!r}; these are no STAR counts, or "
                "the file is cut"
            )
        head[label] = int(fields[place])
    return head


def _check_models(files: Sequence[Path], models: Sequence[str]) -> None:
    for path, model in zip(files, models, strict=True):
        if model != models[0]:
            raise ValueError(
                f"{path}: counted against {model!r}, but {files[0]} against {models[0]!r}; ingest the two gene models from "
                "folders of their own, as separate datasets"
            )


def _read_genes(path: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    columns = ["gene_id", "gene_name"] if _stem(path).endswith(_GDC) else ["gene_id"]
    table = _read_table(path, columns)
    gene_ids = tuple(table["gene_id"].to_pylist())
    return gene_ids, tuple(table["gene_name"].to_pylist()) if len(columns) == 2 else ("",) * len(gene_ids)


def _read_table(path: Path, columns: list[str]) -> pa.Table:
    """Some columns of a count file, genes only; counts as int64."""
    is_gdc = _stem(path).endswith(_GDC)
    with open_text(path) as handle:
        text = handle.read()
    if not text.endswith(b"\n"):
        raise ValueError(f"{path}: ends in the middle of a line, so it is cut; get it again")
    skip = _HEAD_LINES if is_gdc else len(_SUMMARIES)
    names = text.split(b"\n", 2)[1].decode().rstrip("\r").split("\t") if is_gdc else ["gene_id", *COLUMNS]
    try:
        table = pa_csv.read_csv(
            pa.BufferReader(text),
            read_options=pa_csv.ReadOptions(column_names=names, skip_rows=skip, use_threads=False),
            parse_options=pa_csv.ParseOptions(delimiter="\t", quote_char=False),
            convert_options=pa_csv.ConvertOptions(
                include_columns=columns,
                column_types={n: pa.int64() if n in COLUMNS else pa.string() for n in columns},
                null_values=["", "NA", "NaN"],
            ),
        )
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path}: not a whole file of STAR counts: {error}") from error
    for name in columns:
        if table[name].null_count:
            row = table[name].is_null().to_pylist().index(True)
            raise ValueError(f"{path}: line {row + skip + 1} has no value in column {name}; the file is damaged")
    return table
