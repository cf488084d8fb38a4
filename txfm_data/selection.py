"""A selection: which samples of a store, and which genes of each dataset, a corpus takes (docs/format_selection.md).

It is written complete or not at all, and read only against the store that it was made from.
"""

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from txfm_data.store.ledger import DatasetRecord
from txfm_data.store.protocol import Store

FORMAT, VERSION = "txfm-selection", 1
SELECTION, SAMPLES, PANELS = "selection.json", "samples.parquet", "panels.parquet"
_SPLITS = ("train", "val")
_REMEDY = "make the selection again"
_PIECE = 2**20
"""Samples that are checked at a time."""
_PANELS_SCHEMA = pa.schema([("dataset", pa.string()), ("gene_id", pa.string())])


@dataclass(frozen=True)
class Selection:
    """Samples and genes of a store, checked against it.

    records : datasets that give samples, in the order of the store.
    genes : for each, ascending tokens of the store, int64.
    sample_id : (n,) int64, ascending.
    is_val : (n,) bool, which samples are held out; None leaves that to who builds a corpus.
    sha256 : of the selection as written.
    """

    records: tuple[DatasetRecord, ...]
    genes: tuple[np.ndarray, ...]
    sample_id: np.ndarray
    is_val: np.ndarray | None
    sha256: str


def write_selection(
    folder: str | Path,
    store: Store,
    sample_id: np.ndarray,
    genes: Mapping[str, np.ndarray],
    is_val: np.ndarray | None = None,
    *,
    also: Callable[[Path], None] | None = None,
) -> Selection:
    """Write a selection of a store's samples and genes.

    folder : must not exist yet, or be empty.
    sample_id : (n,) integers, ascending.  genes : for each dataset that gives samples, ascending tokens of the store.
    is_val : (n,) bool, to fix which samples are held out.
    also : writes further files into the folder that it is given, before the selection appears.

    Raises
    ------
    FileExistsError
        If there is something in `folder`.
    ValueError
        If the selection is empty, or names what the store, or a dataset of it, does not hold.
    """
    folder = Path(folder)
    check_new_selection(folder)
    where = f"{folder}: selection"
    names = {record.name for record in store.datasets}
    unknown = sorted(genes.keys() - names)
    if unknown:
        raise ValueError(f"{where}: {store.path} has no dataset {unknown[0]!r}; it has {sorted(names)}")
    records = tuple(record for record in store.datasets if record.name in genes)
    panels = tuple(np.asarray(genes[record.name]) for record in records)
    _check_samples(where, store, records, np.asarray(sample_id))
    _check_genes(where, store, records, panels)
    split = None if is_val is None else np.asarray(is_val)
    if split is not None and (split.dtype != np.bool_ or split.shape != np.shape(sample_id)):
        raise ValueError(f"{where}: is_val must be one bool a sample, found {split.dtype} of shape {split.shape}")
    ids = np.asarray(sample_id).astype(np.int64, copy=False)
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.tmp")
    part.mkdir()
    try:
        _write_samples(part / SAMPLES, ids, split)
        _write_panels(part / PANELS, store, records, panels)
        if also is not None:
            also(part)
        sha256 = _write_head(part, records, panels, ids)
        if folder.exists():
            folder.rmdir()
        os.rename(part, folder)
        _sync(folder.parent)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return Selection(records, tuple(panel.astype(np.int64) for panel in panels), ids, split, sha256)


def check_new_selection(folder: str | Path) -> None:
    """Refuse a folder that a selection cannot be written to: FileExistsError."""
    folder = Path(folder)
    if folder.is_symlink():
        raise FileExistsError(f"{folder}: is a link; name a folder that does not exist yet")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder}: exists and is not an empty folder; name another one, or remove it first")


def _write_samples(path: Path, sample_id: np.ndarray, is_val: np.ndarray | None) -> None:
    columns: dict[str, Any] = {"sample_id": sample_id}
    if is_val is not None:
        columns["split"] = pa.DictionaryArray.from_arrays(is_val.astype(np.int32), pa.array(_SPLITS))
    pq.write_table(pa.table(columns), path)


def _write_panels(path: Path, store: Store, records: tuple[DatasetRecord, ...], panels: tuple[np.ndarray, ...]) -> None:
    ids = np.array(store.vocabulary.gene_ids, dtype=object)
    with pq.ParquetWriter(path, _PANELS_SCHEMA) as writer:
        for record, panel in zip(records, panels, strict=True):
            columns = {"dataset": [record.name] * len(panel), "gene_id": pa.array(ids[panel], pa.string())}
            writer.write_table(pa.table(columns, schema=_PANELS_SCHEMA))


def _write_head(
    part: Path, records: tuple[DatasetRecord, ...], panels: tuple[np.ndarray, ...], sample_id: np.ndarray
) -> str:
    counts = _samples_of(records, sample_id)
    head = {
        "format": FORMAT,
        "version": VERSION,
        "datasets": [
            {
                "name": record.name, "content_sha256": record.content_sha256, "obs_start": record.obs_start,
                "n_obs": record.n_obs, "n_samples": int(n), "n_genes": len(panel),
            }
            for record, panel, n in zip(records, panels, counts, strict=True)
        ],
        "files": {name: _file(part / name) for name in (SAMPLES, PANELS)},
        "also": {path.name: _file(path) for path in sorted(part.iterdir()) if path.name not in (SAMPLES, PANELS)},
    }  # fmt: skip
    text = json.dumps(head, indent=1) + "\n"
    (part / SELECTION).write_text(text, encoding="utf-8")
    for path in (*sorted(part.iterdir()), part):
        _sync(path)
    return hashlib.sha256(text.encode()).hexdigest()


def _file(path: Path) -> dict[str, Any]:
    with open(path, "rb") as handle:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(handle, "sha256").hexdigest()}


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_selection(folder: str | Path, store: Store) -> Selection:
    """Read a selection and check all of it against the store.

    Raises
    ------
    FileNotFoundError
        If there is no selection.
    ValueError
        If it is damaged, of another version or of another store, or names what the store does not hold.
    """
    folder = Path(folder)
    head, sha256 = _read_head(folder)
    file = folder / SELECTION
    records = _records(file, head, store)
    sample_id, is_val = _read_samples(folder / SAMPLES)
    _check_samples(str(folder / SAMPLES), store, records, sample_id)
    panels = _read_panels(folder / PANELS, store, records)
    _check_genes(str(folder / PANELS), store, records, panels)
    found = zip(head["datasets"], _samples_of(records, sample_id).tolist(), panels, strict=True)
    for entry, n, panel in found:
        if (entry["n_samples"], entry["n_genes"]) != (n, len(panel)):
            raise ValueError(
                f"{file}: dataset {entry['name']!r} has {n} samples and {len(panel)} genes, expected {entry['n_samples']} and "
                f"{entry['n_genes']}; the selection is damaged, {_REMEDY}"
            )
    return Selection(records, panels, sample_id, is_val, sha256)


def inspect_selection(folder: str | Path) -> dict[str, Any]:
    """What a selection holds, its checksums checked; without the store, so not whether it fits one.

    Returns
    -------
    dict
        sha256, n_samples, n_val (None where the selection leaves that open), datasets (as in ``selection.json``).

    Raises
    ------
    FileNotFoundError, ValueError
        If there is no selection, or it is damaged or of another version.
    """
    folder = Path(folder)
    head, sha256 = _read_head(folder)
    for name, entry in head.get("also", {}).items():
        path = folder / name
        if path.name != name or not path.is_file() or _file(path) != entry:
            raise ValueError(f"{path}: missing, or not as {SELECTION} says; the file is damaged, {_REMEDY}")
    ids, is_val = _read_samples(folder / SAMPLES)
    edges = [(entry["obs_start"], entry["obs_start"] + entry["n_obs"]) for entry in head["datasets"]]
    found = [int(np.searchsorted(ids, stop) - np.searchsorted(ids, start)) for start, stop in edges]
    stated = [entry["n_samples"] for entry in head["datasets"]]
    if found != stated or sum(found) != len(ids) or (np.diff(ids) <= 0).any():
        raise ValueError(
            f"{folder}: {SAMPLES} has {found} samples of the datasets, {SELECTION} says {stated}; {_REMEDY}"
        )
    return {
        "sha256": sha256, "n_samples": len(ids),
        "n_val": None if is_val is None else int(is_val.sum()), "datasets": head["datasets"],
    }  # fmt: skip


def _read_head(folder: Path) -> tuple[dict[str, Any], str]:
    """Head of a selection whose files are as it says, and the sha256 of the head."""
    file = folder / SELECTION
    if not file.is_file():
        raise FileNotFoundError(f"{folder}: no {SELECTION} there, so no finished selection; name the folder of one")
    data = file.read_bytes()
    head = _parse(file, data)
    for name, entry in head["files"].items():
        path = folder / name
        if not path.is_file():
            raise FileNotFoundError(f"{path}: missing, though {SELECTION} names it; copy the whole folder")
        if _file(path) != entry:
            raise ValueError(f"{path}: its size or sha256 is not as {SELECTION} says; the file is damaged, {_REMEDY}")
    return head, hashlib.sha256(data).hexdigest()


_KEYS = {"name": str, "content_sha256": str, "obs_start": int, "n_obs": int, "n_samples": int, "n_genes": int}


def _parse(file: Path, data: bytes) -> dict[str, Any]:
    """Head of a selection, every key of the right type."""
    try:
        head = json.loads(data)
        if not isinstance(head, dict) or head.get("format") != FORMAT:
            raise ValueError(f"its format is not {FORMAT}")
        if head.get("version") != VERSION:
            version = head.get("version")
            raise ValueError(f"its version is {version}, this release reads {VERSION}: upgrade txfm")
        for entry in head["datasets"]:
            wrong = [key for key, kind in _KEYS.items() if type(entry[key]) is not kind]
            if wrong:
                raise ValueError(f"{wrong[0]} of a dataset is {entry[wrong[0]]!r}")
        if set(head["files"]) != {SAMPLES, PANELS}:
            raise ValueError(f"it names the files {sorted(head['files'])}")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{file}: not a selection that can be read ({error}); {_REMEDY}") from error
    return head


def _records(file: Path, head: dict[str, Any], store: Store) -> tuple[DatasetRecord, ...]:
    """The store's datasets that a selection names, which must be the same as when it was made."""
    records = []
    for entry in head["datasets"]:
        try:
            record = store.dataset(entry["name"])
        except ValueError as error:
            raise ValueError(f"{file}: {error}; name the store that the selection was made from") from error
        for key in ("content_sha256", "obs_start", "n_obs"):
            if getattr(record, key) != entry[key]:
                raise ValueError(
                    f"{file}: dataset {record.name!r} of {store.path} has {key} {getattr(record, key)}, the selection was made "
                    f"from one with {entry[key]}; name the store that it was made from, or {_REMEDY}"
                )
        records.append(record)
    starts = [record.obs_start for record in records]
    if starts != sorted(set(starts)):
        raise ValueError(f"{file}: datasets are not in the order of the store, or named twice; {_REMEDY}")
    return tuple(records)


def _read_table(path: Path) -> pa.Table:
    try:
        return pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path}: not a readable parquet table ({error}); {_REMEDY}") from error


def _read_samples(path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    table = _read_table(path)
    if table.column_names not in (["sample_id"], ["sample_id", "split"]) or table["sample_id"].type != pa.int64():
        raise ValueError(f"{path}: expected sample_id (int64) and perhaps split, found {table.schema}; {_REMEDY}")
    if any(column.null_count for column in table.columns):
        raise ValueError(f"{path}: a value is missing; {_REMEDY}")
    sample_id = table["sample_id"].to_numpy()
    if "split" not in table.column_names:
        return sample_id, None
    split = table["split"].cast(pa.string())
    wrong = set(split.unique().to_pylist()) - set(_SPLITS)
    if wrong:
        raise ValueError(f"{path}: a split is {wrong.pop()!r}, expected one of {list(_SPLITS)}; {_REMEDY}")
    return sample_id, pc.equal(split, "val").to_numpy()


def _read_panels(path: Path, store: Store, records: tuple[DatasetRecord, ...]) -> tuple[np.ndarray, ...]:
    """Tokens of the genes of each dataset, ascending."""
    table = _read_table(path)
    if table.schema.remove_metadata() != _PANELS_SCHEMA or any(column.null_count for column in table.columns):
        raise ValueError(f"{path}: expected dataset and gene_id as text without gaps, found {table.schema}; {_REMEDY}")
    names, genes = (column.combine_chunks().dictionary_encode() for column in table.columns)
    names, genes = (a.combine_chunks() if isinstance(a, pa.ChunkedArray) else a for a in (names, genes))
    known = {record.name: number for number, record in enumerate(records)}
    number = np.array([known.get(name, -1) for name in names.dictionary.to_pylist()], np.int64)
    if (number < 0).any():
        stray = names.dictionary[int(np.argmin(number))].as_py()
        raise ValueError(f"{path}: dataset {stray!r} is not one of the selection's; {_REMEDY}")
    ids = genes.dictionary.to_pylist()
    token = store.vocabulary.index_of(ids).astype(np.int64)
    if (token < 0).any():
        raise ValueError(f"{path}: gene {ids[int(np.argmin(token))]!r} is not in {store.path}; {_REMEDY}")
    of_row, token_of_row = number[names.indices.to_numpy()], token[genes.indices.to_numpy()]
    return tuple(np.sort(token_of_row[of_row == i]) for i in range(len(records)))


def _samples_of(records: tuple[DatasetRecord, ...], sample_id: np.ndarray) -> np.ndarray:
    """Samples of each dataset, (n_datasets,) int64; ids ascend."""
    starts = np.searchsorted(sample_id, [record.obs_start for record in records])
    counts: np.ndarray = np.searchsorted(sample_id, [record.obs_stop for record in records]) - starts
    return counts


def _check_samples(where: str, store: Store, records: tuple[DatasetRecord, ...], sample_id: np.ndarray) -> None:
    if sample_id.ndim != 1 or sample_id.dtype.kind not in "iu" or not len(sample_id) or not records:
        raise ValueError(f"{where}: no samples, or not a list of integers; select at least one sample of one dataset")
    starts = np.array([record.obs_start for record in records])
    stops = np.array([record.obs_stop for record in records])
    found, before = np.zeros(len(records), np.int64), int(sample_id[0]) - 1
    for low in range(0, len(sample_id), _PIECE):  # so that memory does not grow with the selection
        ids = sample_id[low : low + _PIECE].astype(np.int64)
        steps = np.diff(ids, prepend=before)
        if (steps <= 0).any():
            at = int(np.argmax(steps <= 0))
            first = before if at == 0 else ids[at - 1]
            what = "is there twice" if steps[at] == 0 else f"comes before sample {ids[at]}"
            raise ValueError(f"{where}: sample {first} {what}; sample ids must ascend, each once")
        number = np.searchsorted(starts, ids, side="right") - 1
        outside = (number < 0) | (ids >= stops[number])
        if outside.any():
            raise ValueError(
                f"{where}: sample {ids[outside][0]} belongs to none of the datasets {[r.name for r in records]} of {store.path}"
            )
        found += np.bincount(number, minlength=len(records))
        before = int(ids[-1])
    empty = np.flatnonzero(found == 0)
    if len(empty):
        raise ValueError(f"{where}: dataset {records[empty[0]].name!r} gives no sample; leave it out")


def _check_genes(where: str, store: Store, records: tuple[DatasetRecord, ...], panels: tuple[np.ndarray, ...]) -> None:
    for record, panel in zip(records, panels, strict=True):
        if panel.ndim != 1 or panel.dtype.kind not in "iu" or not len(panel):
            raise ValueError(f"{where}: dataset {record.name!r} has no genes; select at least one, or leave it out")
        if (np.diff(panel.astype(np.int64)) <= 0).any():
            raise ValueError(f"{where}: a gene of dataset {record.name!r} is there twice, or genes do not ascend")
        stray = np.setdiff1d(panel, store.panel(record))
        if len(stray):
            ids = store.vocabulary.gene_ids
            name = ids[int(stray[0])] if 0 <= stray[0] < len(ids) else f"number {stray[0]}"
            raise ValueError(
                f"{where}: dataset {record.name!r} did not measure gene {name} ({len(stray)} such); a gene that was not measured "
                "is unknown, not zero: leave it out"
            )
