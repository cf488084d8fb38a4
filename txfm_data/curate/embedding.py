"""What represents the samples of a dataset when phenoprints are looked for: PCA, a checkpoint, columns of obs, or a file.

Each gives an .npy file with a row for each sample that is left, written in parts, so that no embedding is held in memory.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np
import pyarrow as pa

from txfm_data.curate.pca import check_components, streaming_pca
from txfm_data.curate.rows import RowFile, labels_of, positions_in
from txfm_data.obs_filter import nearest
from txfm_data.sources.hashing import file_sha256
from txfm_data.store.ledger import DatasetRecord
from txfm_data.store.protocol import Store

if TYPE_CHECKING:
    from txfm_data.curate.recipe import EmbeddingSpec
    from txfm_data.curate.state import Context, State

_FILE_BYTES = 16 * 1024**2
"""Of an embedding in a file, read at a time."""
_LABEL_ROWS = 65_536
_CHECKPOINT_FILES = ("config.json", "model.safetensors", "vocabulary.parquet")
_MODEL_FILES = _CHECKPOINT_FILES[:2]
"""Those that make a model what it is; config.json names the vocabulary by its sha256."""


def check_embedding(spec: "EmbeddingSpec", store: Store, records: tuple[DatasetRecord, ...]) -> None:
    """Refuse an embedding that these datasets cannot have, as far as can be told before any rule is applied.

    Raises
    ------
    ValueError, FileNotFoundError
        Names what is missing, and what is near it.
    """
    if spec.kind == "pca":
        for record in records:
            check_components(
                spec.n_components, record.n_panel, record.n_obs, f"embedding: PCA of dataset {record.name!r}"
            )
    elif spec.kind == "columns":
        numbered_columns(store, spec.prefix or "")
    elif spec.kind == "file":
        with _EmbeddedFile(spec) as file:
            for record in records:
                file.check(store, record, np.arange(record.obs_start, record.obs_stop), all_of_them=False)
    elif spec.path is not None:
        check_checkpoint(spec.path)


def make_embedding(spec: "EmbeddingSpec", state: "State", record: DatasetRecord, context: "Context") -> Path:
    """Embed the samples of a dataset that are left, over the genes of its panel that are left.

    Returns
    -------
    Path
        In `context.scratch`: an .npy file, (n, d) float32 in C order, rows as `state.rows(record)`, every value finite.

    Raises
    ------
    ValueError, OSError
        If there is no sample, or one of them cannot be embedded; it is named.
    """
    rows, out = state.rows(record), context.scratch / f"{record.name}.npy"
    if not len(rows):
        raise ValueError(f"{state.store.path}: dataset {record.name!r} has no samples left to embed")
    if spec.kind == "pca":
        streaming_pca(state.store, record, rows, state.panels[record.name], out, spec.n_components, context)
    elif spec.kind == "columns":
        _from_columns(spec.prefix or "", state.store, record, rows, out)
    elif spec.kind == "file":
        with _EmbeddedFile(spec) as file:
            file.check(state.store, record, rows)
            file.copy(record, rows, out)
    else:
        if context.embed is None:
            raise ValueError(
                "embedding: no model can be opened here, so kind 'checkpoint' does not do; take another kind"
            )
        progress = context.progress(f"embedding of dataset {record.name!r}")
        context.embed(spec, state.store, record, rows, state.panels[record.name], out, progress)
    return out


def fingerprint_of(spec: "EmbeddingSpec") -> dict[str, str]:
    """What tells one file or model from another at the same path: sha256 by name of file; empty for what the store gives.

    Of a model on the Hugging Face Hub the id, as "hub".

    Raises
    ------
    FileNotFoundError
        If the file or the checkpoint is gone.
    """
    if spec.kind not in ("file", "checkpoint") or spec.path is None:
        return {}
    path = Path(spec.path).expanduser()
    if spec.kind == "file":
        return {path.name: file_sha256(path)}
    if not path.is_dir():
        return {"hub": spec.path}
    return {name: file_sha256(_inside(path) / name) for name in _MODEL_FILES}


def numbered_columns(store: Store, prefix: str) -> list[str]:
    """Columns of obs named by `prefix` and a number (``PC1``, ``PC_2``), in the order of the number.

    Raises
    ------
    ValueError
        If there is none, one is not numeric, or two have the same number.
    """
    schema = store.obs_schema()
    found: dict[int, str] = {}
    for field in schema:
        match = re.fullmatch(re.escape(prefix) + r"[ _.-]?(\d+)", field.name)
        if match is None:
            continue
        if not (pa.types.is_floating(field.type) or pa.types.is_integer(field.type)):
            raise ValueError(
                f"{store.path}: embedding: column {field.name!r} of obs is of type {field.type}, expected numbers; "
                "give another prefix"
            )
        number = int(match[1])
        if number in found:
            raise ValueError(
                f"{store.path}: embedding: columns {found[number]!r} and {field.name!r} of obs are both number {number} of "
                f"prefix {prefix!r}; give the prefix with what stands before the number"
            )
        found[number] = field.name
    if not found:
        near = nearest(prefix, schema.names) or sorted(schema.names)
        raise ValueError(
            f"{store.path}: embedding: no column of obs is named {prefix!r} and a number, such as {prefix + '1'!r}; near it: {near}"
        )
    return [found[number] for number in sorted(found)]


def _from_columns(prefix: str, store: Store, record: DatasetRecord, rows: np.ndarray, out: Path) -> None:
    names = numbered_columns(store, prefix)
    with RowFile(out, rows, len(names), f"{store.path}: columns {names[0]} to {names[-1]} of obs") as file:
        for at, table in labels_of(store, record, rows, names):
            # A null becomes NaN, which the file refuses
            values = [table[name].cast(pa.float64(), safe=False).to_numpy() for name in names]
            file.put(at, np.stack(values, axis=1))


def check_checkpoint(path: str) -> None:
    """Refuse a folder that is no checkpoint; what may be the name of a model on the hub is left to who opens it."""
    folder = Path(path).expanduser()
    may_be_id = path.count("/") == 1 and not path.startswith((".", "~", "/")) and not folder.parent.is_dir()
    if not folder.is_dir():
        if may_be_id:
            return
        raise FileNotFoundError(f"embedding: no checkpoint at {path}: there is no such folder")
    missing = [name for name in _CHECKPOINT_FILES if not (_inside(folder) / name).is_file()]
    if missing:
        raise ValueError(
            f"embedding: {path} is no checkpoint, it lacks {', '.join(missing)}; name a folder that has them"
        )


def _inside(folder: Path) -> Path:
    """Folder with the files of a checkpoint: the one that is named, or that in the folder of a run."""
    return folder if (folder / _CHECKPOINT_FILES[0]).is_file() else folder / "checkpoint"


class _EmbeddedFile:
    """An h5ad that `txfm embed STORE` wrote, open for reading. ids : (m,) int64, the row of the store of each of its samples."""

    def __init__(self, spec: "EmbeddingSpec") -> None:
        self.path, self._key = str(spec.path), spec.key
        if not Path(self.path).is_file():
            raise FileNotFoundError(
                f"embedding: {self.path}: no such file; write it with txfm embed STORE --out {self.path}"
            )
        try:
            self._file = h5py.File(self.path, "r")
        except OSError as error:
            raise ValueError(
                f"embedding: {self.path}: not an h5ad file, or damaged ({error}); write it again with txfm embed"
            ) from error
        try:
            self._matrix = self._find_matrix()
            self._obs = self._find_obs()
            self._check_origin()
            self.ids = self._read_ids()
            self._order = np.argsort(self.ids, kind="stable")
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> "_EmbeddedFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def _refuse(self, problem: str) -> ValueError:
        return ValueError(f"embedding: {self.path}: {problem}")

    def _find_matrix(self) -> Any:
        known = list(self._file["obsm"]) if "obsm" in self._file else []
        if self._key not in known:
            raise self._refuse(f"obsm has no {self._key!r}; it has {sorted(known)}; name one of them by key")
        matrix = self._file["obsm"][self._key]
        if (
            not isinstance(matrix, h5py.Dataset)
            or len(matrix.shape) != 2
            or matrix.dtype.kind != "f"
            or not matrix.shape[1]
        ):
            raise self._refuse(f"obsm[{self._key!r}] is no dense matrix of floating-point numbers with columns")
        return matrix

    def _find_obs(self) -> Any:
        obs = self._file.get("obs")
        if not isinstance(obs, h5py.Group) or obs.attrs.get("_index") not in obs:
            raise self._refuse("has no obs with an index; write it with txfm embed STORE")
        return obs

    def _check_origin(self) -> None:
        """Refuse what is of another input than a store, or says nothing of the store that it could be told from others by."""
        about = self._file.get(f"uns/txfm_{self._key}/input")
        kind = None
        if isinstance(about, h5py.Dataset) and h5py.check_string_dtype(about.dtype) and about.shape == ():
            kind = about.asstr()[()]
        if kind not in (None, "store"):
            raise self._refuse(
                f"its samples are those of an input of kind {kind!r}, expected a store, whose rows they could be matched to; "
                "write it with txfm embed STORE"
            )
        if kind is None and self._numbers("raw_sum") is None and self._dataset_names() is None:
            raise self._refuse(
                f"nothing in it says that its samples are those of the store: it has neither uns[{'txfm_' + self._key!r}], nor "
                "raw_sum or dataset_id in obs, which txfm embed STORE writes; write it so, or add the column raw_sum of the store"
            )

    def _read_ids(self) -> np.ndarray:
        obs, index = self._obs, self._obs.attrs["_index"]
        column = self._numbers("soma_joinid")
        column = self._numbers(str(index)) if column is None else column
        if column is not None:
            ids = column[:]
        else:
            try:
                ids = obs[index].asstr()[:].astype(np.int64)
            except (ValueError, TypeError) as error:
                raise self._refuse(
                    f"its samples are not named by their row of a store ({error}); write it with txfm embed STORE"
                ) from error
        broken = np.flatnonzero(~np.isfinite(ids) | (ids != np.floor(ids)))
        if len(broken):
            raise self._refuse(
                f"sample {broken[0]} is named {ids[broken[0]]}, which is no row of a store; write it with txfm embed STORE"
            )
        ids = np.asarray(ids).astype(np.int64)
        if len(ids) != len(self._matrix):
            raise self._refuse(
                f"obs has {len(ids)} samples and obsm[{self._key!r}] {len(self._matrix)} rows; it is damaged"
            )
        ascending = np.sort(ids)
        twice = ascending[1:][ascending[1:] == ascending[:-1]]
        if len(twice):
            raise self._refuse(f"sample {twice[0]} is there more than once; write it again with txfm embed STORE")
        return ids

    def _numbers(self, name: str) -> Any:
        """A column of obs that holds plain numbers; None if there is none of that name."""
        column = self._obs.get(name)
        return column if isinstance(column, h5py.Dataset) and column.dtype.kind in "iuf" else None

    def _dataset_names(self) -> Any:
        """The column dataset_id of obs, as categories or as text; None if there is none of either form."""
        column = self._obs.get("dataset_id")
        if isinstance(column, h5py.Group):
            return column if {"categories", "codes"} <= set(column) else None
        return column if column is not None and h5py.check_string_dtype(column.dtype) else None

    def check(self, store: Store, record: DatasetRecord, rows: np.ndarray, *, all_of_them: bool = True) -> None:
        """Refuse a file that lacks samples of a dataset, or whose dataset names and library sizes are not the store's.

        rows : ascending sample ids that are wanted.  all_of_them : whether each must be there, or one of them at least.
        """
        at = positions_in(self.ids[self._order], rows)
        missing = rows[at < 0]
        if len(missing) == len(rows) or (all_of_them and len(missing)):
            raise self._refuse(
                f"{len(missing):,} of {len(rows):,} samples of dataset {record.name!r} are not in it, such as row {missing[0]} of "
                f"{store.path}; embed them too"
            )
        rows, places = rows[at >= 0], self._order[at[at >= 0]]
        column = self._dataset_names()
        if column is not None:
            for low in range(0, len(rows), _LABEL_ROWS):
                self._check_names(column, record, rows[low : low + _LABEL_ROWS], places[low : low + _LABEL_ROWS])
        sizes = self._numbers("raw_sum")
        if sizes is not None:
            own = sizes[:].astype(np.float64)[places]
            for positions, table in labels_of(store, record, rows, ["raw_sum"]):
                differs = np.flatnonzero(own[positions] != table["raw_sum"].to_numpy())
                if len(differs):
                    raise self._refuse(
                        f"sample {rows[positions[differs[0]]]} has the library size {own[positions[differs[0]]]}, but "
                        f"{table['raw_sum'][int(differs[0])]} in {store.path}; it was made of another store, embed this one"
                    )

    def _check_names(self, column: Any, record: DatasetRecord, rows: np.ndarray, places: np.ndarray) -> None:
        low, high = int(places.min()), int(places.max()) + 1
        if isinstance(column, h5py.Group):
            names = column["categories"].asstr()[:]
            codes = column["codes"][low:high][places - low]
            found = np.where(codes >= 0, names[np.maximum(codes, 0)], "")
        else:
            found = column.asstr()[low:high][places - low]
        differs = np.flatnonzero(found != record.name)
        if len(differs):
            raise self._refuse(
                f"sample {rows[differs[0]]} belongs to dataset {str(found[differs[0]])!r}, but to {record.name!r} in the store; "
                "it was made of another store, embed this one"
            )

    def _parts(self) -> Iterator[tuple[int, np.ndarray]]:
        n, d = self._matrix.shape
        step = max(1, _FILE_BYTES // (d * 4))
        for start in range(0, n, step):
            yield start, self._matrix[start : start + step].astype(np.float32)

    def copy(self, record: DatasetRecord, rows: np.ndarray, out: Path) -> None:
        """Write the rows of these samples, in their order."""
        with RowFile(out, rows, self._matrix.shape[1], f"embedding: {self.path}: dataset {record.name!r}") as file:
            for start, values in self._parts():
                at = positions_in(rows, self.ids[start : start + len(values)])
                wanted = np.flatnonzero(at >= 0)
                wanted = wanted[np.argsort(at[wanted], kind="stable")]
                file.put(at[wanted], values[wanted])
