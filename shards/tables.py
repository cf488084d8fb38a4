"""The tables of a shard corpus, each with the sha256 of the manifest, and of sound shape before it is believed."""

import hashlib
import os
import shutil
import tempfile
import weakref
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from shards.entries import PANELS, TRAIN_SAMPLES, VOCABULARY, FileEntry, Manifest
from shards.files import Files
from shards.ipc_sizes import decoded_bytes
from txfm_data.address import is_remote
from txfm_data.panels import Panels, read_panels
from txfm_data.vocabulary import GeneStatistics, Vocabulary, read_vocabulary

_PIECE_BYTES = 16 * 1024**2
_MAX_VOCABULARY_BYTES = 256 * 1024**2
_LONGEST_NAME = 1_000
_ARROW_FILE_MAGIC = 8
_STRINGS, _INTEGERS = ("gene_id", "symbol"), ("n_measured", "n_nonzero")
_UNREADABLE = (pa.ArrowException, OSError, ValueError, TypeError, KeyError, IndexError, OverflowError)
"""What Arrow and the readers of tables raise when a file is not what it should be."""
_REMEDY = "copy the corpus again or build it anew"


@dataclass
class Tables:
    """What the tables of a corpus say."""

    vocabulary: Vocabulary
    statistics: GeneStatistics
    panels: Panels
    _train_samples: Path | None
    _n_train: int
    _n_datasets: int
    _where: str
    _mapped: tuple[np.ndarray, np.ndarray] | None = field(default=None)

    def train_samples(self) -> tuple[np.ndarray, np.ndarray]:
        """Id (int64) and dataset (int32) of every train sample in order of storage, mapped from the file.

        Raises
        ------
        ValueError
            If the corpus has no such table, or it is not of train samples.
        """
        if self._train_samples is None:
            raise ValueError(f"{self._where}: no such table, since the corpus serves every sample in each epoch")
        if self._mapped is None:
            self._mapped = _read_train_samples(self._train_samples, self._n_train, self._n_datasets, self._where)
        return self._mapped


def read_tables(files: Files, manifest: Manifest) -> Tables:
    """Read the tables of a corpus.

    Raises
    ------
    ValueError
        Names the table that is not what the manifest says, or not of its form.
    """
    folder, is_temporary = _local_folder(files)
    for name, entry in manifest.files.items():
        if is_temporary:
            _download(files, name, entry.bytes, folder / name)
        _check_sha256(folder / name, entry, files.where(name))
    n_train = sum(entry.n_train for entry in manifest.datasets)
    vocabulary, statistics = _read_vocabulary(folder / VOCABULARY, manifest, n_train, files.where(VOCABULARY))
    panels = _read_panels(folder / PANELS, manifest.n_genes, files.where(PANELS))
    train_samples = folder / TRAIN_SAMPLES if TRAIN_SAMPLES in manifest.files else None
    where = files.where(TRAIN_SAMPLES)
    tables = Tables(vocabulary, statistics, panels, train_samples, n_train, len(manifest.datasets), where)
    if is_temporary:
        weakref.finalize(tables, _remove, folder, os.getpid())
    return tables


def _local_folder(files: Files) -> tuple[Path, bool]:
    """Where the tables are on this machine, and whether that is a new folder to be removed again."""
    if not is_remote(files.address):
        return files.path, False
    return Path(tempfile.mkdtemp(prefix="txfm-tables-")), True


def _remove(folder: Path, process: int) -> None:
    if os.getpid() == process:  # not a forked child, while its parent still reads
        shutil.rmtree(folder, ignore_errors=True)


def _download(files: Files, name: str, n_bytes: int, target: Path) -> None:
    with open(target, "wb") as sink:
        for offset in range(0, n_bytes, _PIECE_BYTES):
            sink.write(files.origin.read(name, offset, min(_PIECE_BYTES, n_bytes - offset)))


def _check_sha256(path: Path, entry: FileEntry, where: str) -> None:
    with open(path, "rb") as handle:
        digest = hashlib.file_digest(handle, "sha256").hexdigest()
    if digest != entry.sha256:
        raise ValueError(
            f"{where}: sha256 is {digest}, the manifest says {entry.sha256}; the file is damaged or of another corpus, {_REMEDY}"
        )


def _read_vocabulary(path: Path, manifest: Manifest, n_train: int, where: str) -> tuple[Vocabulary, GeneStatistics]:
    try:
        _check_vocabulary(path, manifest.n_genes)
        vocabulary, statistics = read_vocabulary(path)
    except _UNREADABLE as error:
        raise ValueError(
            f"{where}: no vocabulary of this corpus ({' '.join(str(error).split())}); {_REMEDY}"
        ) from error
    if vocabulary.fingerprint != manifest.vocabulary_sha256:
        raise ValueError(
            f"{where}: has fingerprint {vocabulary.fingerprint}, the manifest says {manifest.vocabulary_sha256}; it belongs to "
            f"another corpus, {_REMEDY}"
        )
    measured, nonzero, mean = statistics.n_measured, statistics.n_nonzero, statistics.mean_log1p
    if (nonzero < 0).any() or (nonzero > measured).any() or (measured > n_train).any():
        raise ValueError(
            f"{where}: counts of samples do not lie between 0 and the {n_train} of the train split; {_REMEDY}"
        )
    if not (np.isfinite(mean) & (mean >= 0)).all():
        raise ValueError(f"{where}: mean_log1p of a gene is negative or no number; {_REMEDY}")
    return vocabulary, statistics


def _check_vocabulary(path: Path, n_genes: int) -> None:
    """Refuse a parquet file of other rows or columns, or one that would take much memory."""
    # Without its threads and read-ahead, which take 50 MB for a table of 2
    with pq.ParquetFile(path, read_dictionary=list(_STRINGS), pre_buffer=False) as file:
        meta = file.metadata
        declared = sum(meta.row_group(i).total_byte_size for i in range(meta.num_row_groups))
        if meta.num_rows != n_genes or not 0 <= declared <= _MAX_VOCABULARY_BYTES:
            raise ValueError(f"{meta.num_rows} genes in {declared} bytes, the manifest says {n_genes} genes")
        expected = {
            **dict.fromkeys(_STRINGS, pa.string()),
            **dict.fromkeys(_INTEGERS, pa.int64()),
            "mean_log1p": pa.float64(),
        }
        types = {
            name: kind.value_type if pa.types.is_dictionary(kind) else kind for name, kind in _types(file.schema_arrow)
        }
        if types != expected:
            raise ValueError(f"its columns are {types}")
        table = file.read(use_threads=False)
    table.validate(full=True)
    for name in expected:
        column = table[name]
        if column.null_count:
            raise ValueError(f"column {name} has missing values")
        # A short dictionary may stand for any number of long names, so it is looked at before names are made of it
        for chunk in column.chunks if name in _STRINGS else ():
            if (
                pa.types.is_dictionary(chunk.type)
                and max(map(len, chunk.dictionary.to_pylist()), default=0) > _LONGEST_NAME
            ):
                raise ValueError(f"column {name} has a name of more than {_LONGEST_NAME} letters")


def _types(schema: pa.Schema) -> list[tuple[str, pa.DataType]]:
    return [(name, schema.field(number).type) for number, name in enumerate(schema.names)]


def _open_arrow(path: Path, expected: dict[str, pa.DataType]) -> pa.Table:
    """A table of an Arrow IPC file, mapped and validated; compressed ones are refused, whatever they would grow to.

    Raises
    ------
    ValueError
        If it is no such file, or has other columns.
    """
    with pa.memory_map(str(path)) as source:
        whole = source.read_buffer()
        for message in pa.ipc.MessageReader.open_stream(whole.slice(_ARROW_FILE_MAGIC)):
            if decoded_bytes(message) > len(message.body or b""):
                raise ValueError("it is compressed")
        table = pa.ipc.open_file(whole).read_all()
    types = dict(_types(table.schema))
    if types != expected or len(types) != len(table.schema):
        raise ValueError(f"its columns are {types}, expected {expected}")
    table.validate(full=True)
    if any(column.null_count for column in table.columns):
        raise ValueError("a column has missing values")
    return table


def _read_panels(path: Path, n_genes: int, where: str) -> Panels:
    expected = {
        "panel_id": pa.int32(), "gene_ids": pa.large_list(pa.uint16()), "mean_normalized": pa.large_list(pa.float32()),
    }  # fmt: skip
    try:
        table = _open_arrow(path, expected).combine_chunks()
        if not np.array_equal(table["panel_id"].to_numpy(), np.arange(len(table))):
            raise ValueError("panels are not numbered from 0")
        for chunk in [*table["gene_ids"].chunks, *table["mean_normalized"].chunks]:
            if (
                chunk.offset
                or chunk.offsets[0].as_py()
                or len(chunk.values) != chunk.offsets[-1].as_py()
                or chunk.values.null_count
            ):
                raise ValueError("a list has missing or unused values")
        panels = read_panels(path, n_genes)
        if (
            len(panels.mean_normalized) != len(panels.gene_ids)
            or not (np.isfinite(panels.mean_normalized) & (panels.mean_normalized >= 0)).all()
        ):
            raise ValueError("means are fewer than genes, negative or no numbers")
    except _UNREADABLE as error:
        raise ValueError(f"{where}: no panels of this corpus ({' '.join(str(error).split())}); {_REMEDY}") from error
    return panels


def _read_train_samples(path: Path, n_train: int, n_datasets: int, where: str) -> tuple[np.ndarray, np.ndarray]:
    try:
        table = _open_arrow(path, {"sample_id": pa.int64(), "dataset": pa.int32()})
    except _UNREADABLE as error:
        raise ValueError(f"{where}: no table of train samples ({' '.join(str(error).split())}); {_REMEDY}") from error
    if len(table) != n_train:
        raise ValueError(f"{where}: {len(table)} samples, the manifest says {n_train}; {_REMEDY}")
    sample_id, dataset = (table[name].combine_chunks() for name in ("sample_id", "dataset"))
    ids, datasets = (
        (c.chunk(0) if isinstance(c, pa.ChunkedArray) else c).to_numpy(zero_copy_only=True)
        for c in (sample_id, dataset)
    )
    if n_train and (ids.min() < 0 or datasets.min() < 0 or datasets.max() >= n_datasets):
        raise ValueError(f"{where}: a sample has a negative id, or a dataset that does not exist; {_REMEDY}")
    return ids, datasets
