"""Where everything lies in a Zarr store, its codecs, how an empty one is made, and the seal that ends a commit.

The root's metadata file is written last. It holds the ledger, a copy of the metadata of every array (Zarr's inline
consolidated form) and a checksum over both: what readers believe about shapes comes from this one file.
"""

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import zarr
from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec, VLenUTF8Codec, ZstdCodec
from zarr.storage import LocalStore

from txfm_data.store.layout import OBS_SCHEMA
from txfm_data.vocabulary import MAX_GENES

FORMAT = "txfm-store-zarr"
VERSION = 1

CHUNK = 65_536
"""Elements that are decoded together: at an eighth of this, scans are several times slower."""
SHARD = 64 * CHUNK
"""Elements of X in one file: 16 MiB of uint32, 32 MiB of float64, before compression."""
GENES = MAX_GENES + 1
"""Genes of one chunk of the gene x dataset matrices: a column stays one file however the vocabulary grows."""
BLOCKS = ".blocks"
"""Folder of the rows that an append has written and not yet committed, one folder a dataset."""

DATA, INDICES, INDPTR = "X/data", "X/indices", "X/indptr"
OBS, OBS_INDEX, VAR = "obs", "obs/_index", "var"
MEASURED, NNZ = "varm/measured_in", "varm/nnz_in"
DATASET_NAMES = "uns/txfm_datasets"
VALUE_DTYPES = (np.dtype(np.uint32), np.dtype(np.float64))

_LEVEL = 1
_MAX_CHUNK, _MAX_SHARD = 2**24, 2**28
"""Elements; a metadata file that claims more is refused before anything of that size is allocated."""
_SEAL = "txfm_sha256"
_ROOT_FILE = "zarr.json"
_STRING = np.dtypes.StringDType()

ARRAY = {"encoding-type": "array", "encoding-version": "0.2.0"}
STRINGS = {"encoding-type": "string-array", "encoding-version": "0.2.0"}
CATEGORICAL = {"encoding-type": "categorical", "encoding-version": "0.2.0", "ordered": False}
_DICT = {"encoding-type": "dict", "encoding-version": "0.1.0"}
_FRAME = {"encoding-type": "dataframe", "encoding-version": "0.2.0"}
_CSR = {"encoding-type": "csr_matrix", "encoding-version": "0.1.0"}


def blocks_folder(store: str, start: int) -> Path:
    """Where the blocks of the dataset lie whose first row is `start`."""
    return Path(store) / BLOCKS / f"{start:015d}"


def open_for_writing(folder: str) -> Any:
    """Root group whose arrays write their own metadata files. Zarr writes every file anew and renames it."""
    return zarr.open_group(LocalStore(folder), mode="r+", use_consolidated=False)


def add_array(
    root: Any,
    path: str,
    dtype: np.dtype[Any] | str,
    *,
    shape: tuple[int, ...] = (0,),
    chunk: tuple[int, ...] | None = None,
    shard: int | None = None,
) -> Any:
    """Make an array, replacing what is at `path`; "str" makes one of strings.

    Every chunk ends with a CRC-32C, and chunks of zeros are written too: a chunk that is absent is always damage.
    """
    is_text = dtype == "str"
    pack = ZstdCodec(level=_LEVEL) if is_text else BloscCodec(cname="zstd", clevel=_LEVEL, shuffle="shuffle")
    return root.create_array(
        path,
        shape=shape,
        dtype=_STRING if is_text else dtype,
        chunks=chunk or (CHUNK,),
        shards=None if shard is None else (shard,),
        serializer=VLenUTF8Codec() if is_text else BytesCodec(endian="little"),
        compressors=[pack, Crc32cCodec()],
        fill_value="" if is_text else np.dtype(dtype).type(0),
        attributes=STRINGS if is_text else ARRAY,
        config={"write_empty_chunks": True},
        overwrite=True,
    )


def add_whole(root: Any, path: str, values: np.ndarray) -> None:
    """Make a small one-dimensional array of `values` (numbers, or str objects), replacing what is at `path`."""
    is_text = values.dtype.kind in "OUT"
    array = add_array(root, path, "str" if is_text else values.dtype, shape=values.shape, chunk=(max(1, len(values)),))
    if len(values):
        array[:] = values.astype(_STRING) if is_text else values


def kind_of(column_type: pa.DataType) -> str:
    """How a column of obs is kept: "category", "string", "int64", "float64" or "bool".

    Raises
    ------
    TypeError
        On any other type, dates and lists for example.
    """
    types = pa.types
    if types.is_dictionary(column_type) and _is_text(column_type.value_type):
        return "category"
    for is_kind, kind in (
        (_is_text, "string"), (types.is_boolean, "bool"), (types.is_integer, "int64"), (types.is_floating, "float64"),
    ):  # fmt: skip
        if is_kind(column_type):
            return kind
    raise TypeError(
        f"a column of obs holds categories, strings, integers, floats or booleans, not {column_type}; "
        "turn it into strings in the source, or leave it out"
    )


def _is_text(column_type: pa.DataType) -> bool:
    return bool(pa.types.is_string(column_type) or pa.types.is_large_string(column_type))


def add_column(root: Any, path: str, kind: str) -> None:
    """Make an empty column of obs without nulls."""
    if kind == "category":
        root.create_group(path, attributes=CATEGORICAL, overwrite=True)
        add_array(root, f"{path}/codes", np.dtype(np.int32))
        add_whole(root, f"{path}/categories", np.array([], object))
    else:
        add_array(root, path, "str" if kind == "string" else np.dtype(kind))


def create(folder: str, dtype: np.dtype[np.generic]) -> None:
    """Make an empty store in `folder`, which must not exist or be empty.

    Raises
    ------
    FileExistsError
        If anything is in the folder.
    TypeError
        If `dtype` is neither uint32 nor float64.
    """
    if np.dtype(dtype) not in VALUE_DTYPES:
        raise TypeError(f"{folder}: a store holds values of uint32 or float64, not {np.dtype(dtype)}")
    path = Path(folder)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(f"{folder}: exists already; a new store needs a free path")
    is_new = not path.exists()
    path.mkdir(parents=True, exist_ok=True)
    try:
        _fill(folder, np.dtype(dtype))
    except BaseException:
        shutil.rmtree(path)
        if not is_new:
            path.mkdir()
        raise


def _fill(folder: str, dtype: np.dtype[Any]) -> None:
    root = zarr.create_group(LocalStore(folder), attributes={"encoding-type": "anndata", "encoding-version": "0.1.0"})
    for name in ("layers", "obsm", "obsp", "varp", "varm", "uns"):
        root.create_group(name, attributes=_DICT)
    root.create_group("X", attributes=_CSR | {"shape": [0, 0]})
    add_array(root, DATA, dtype, shard=SHARD)
    add_array(root, INDICES, np.dtype(np.int32), shard=SHARD)
    add_array(root, INDPTR, np.dtype(np.int64), shape=(1,))[:] = 0
    columns = [name for name in OBS_SCHEMA.names if name != "soma_joinid"]
    root.create_group(OBS, attributes=_FRAME | {"_index": "_index", "column-order": []})
    add_array(root, OBS_INDEX, "str")
    for name in columns:
        add_column(root, f"{OBS}/{name}", kind_of(OBS_SCHEMA.field(name).type))
    root[OBS].attrs["column-order"] = columns
    attributes = {"_index": "feature_id", "column-order": ["feature_id", "feature_name", "nnz", "n_measured_obs"]}
    root.create_group(VAR, attributes=_FRAME | attributes)
    write_var(root, (), (), np.zeros(0, np.int64), np.zeros(0, np.int64))
    for name, of in ((MEASURED, np.dtype(np.bool_)), (NNZ, np.dtype(np.int64))):
        add_array(root, name, of, shape=(0, 0), chunk=(GENES, 1))
    add_whole(root, DATASET_NAMES, np.array([], object))
    created = datetime.now(UTC).isoformat(timespec="seconds")
    seal(folder, {"txfm_dtype": dtype.name, "created_on": created, "txfm_datasets": []})


def write_var(
    root: Any, gene_ids: tuple[str, ...], symbols: tuple[str, ...], nnz: np.ndarray, n_measured_obs: np.ndarray
) -> None:
    """Write var whole. All four are (G,); the last two int64."""
    add_whole(root, f"{VAR}/feature_id", np.array(gene_ids, object))
    add_whole(root, f"{VAR}/feature_name", np.array(symbols, object))
    add_whole(root, f"{VAR}/nnz", nnz)
    add_whole(root, f"{VAR}/n_measured_obs", n_measured_obs)


def seal(folder: str, attributes: Mapping[str, Any]) -> None:
    """Write the root's metadata: `attributes` beside AnnData's, a copy of all other metadata, and a checksum of it all."""
    nodes = {}
    for path in sorted(Path(folder).rglob(_ROOT_FILE)):
        name = path.parent.relative_to(folder).as_posix()
        if name != ".":
            nodes[name] = json.loads(path.read_bytes())
    document: dict[str, Any] = {
        "zarr_format": 3,
        "node_type": "group",
        "attributes": {
            "encoding-type": "anndata", "encoding-version": "0.1.0", "txfm_format": FORMAT, "txfm_version": VERSION,
            **attributes,
        },
        "consolidated_metadata": {"kind": "inline", "must_understand": False, "metadata": nodes},
    }  # fmt: skip
    document["attributes"][_SEAL] = _digest(document)
    target = Path(folder) / _ROOT_FILE
    staging = target.with_name(f".{_ROOT_FILE}.{secrets.token_hex(4)}.tmp")
    try:
        staging.write_text(json.dumps(document, indent=1), encoding="utf-8")
        os.replace(staging, target)
    finally:
        staging.unlink(missing_ok=True)


def _digest(document: dict[str, Any]) -> str:
    attributes = {key: value for key, value in document["attributes"].items() if key != _SEAL}
    text = json.dumps(document | {"attributes": attributes}, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def unseal(folder: str) -> dict[str, Any]:
    """Attributes of the root, checked.

    Raises
    ------
    FileNotFoundError
        If there is nothing at `folder`.
    ValueError
        If it is not a Zarr store of ours, is of another version, or its metadata does not fit its checksum.
    """
    if not Path(folder).exists():
        raise FileNotFoundError(f"{folder}: no store there; make one with: txfm ingest h5ad FILE --store {folder} …")
    try:
        document = json.loads((Path(folder) / _ROOT_FILE).read_bytes())
        attributes = document["attributes"]
        found, version = attributes.get("txfm_format"), attributes.get("txfm_version")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{folder}: not a TxFM store (its {_ROOT_FILE} cannot be read: {error}); name another path"
        ) from error
    if found != FORMAT:
        raise ValueError(f"{folder}: a Zarr group, but not a TxFM store (format {found!r}, expected {FORMAT!r})")
    if version != VERSION:
        raise ValueError(f"{folder}: store format version {version}, this release reads {VERSION}; upgrade txfm")
    if attributes.get(_SEAL) != _digest(document):
        raise damaged(folder, _ROOT_FILE, "it does not fit its checksum")
    return dict(attributes)


def damaged(folder: str, path: str, why: object) -> ValueError:
    """Error for a part of a store that is not as it was written."""
    return ValueError(f"{folder}/{path}: {why}; the store is damaged, restore it from a copy or ingest again")


def open_root(folder: str) -> Any:
    """Root group for reading; the metadata of all arrays is the sealed copy."""
    try:
        return zarr.open_group(LocalStore(folder, read_only=True), mode="r", use_consolidated=True)
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise damaged(folder, _ROOT_FILE, error) from error


def get_array(root: Any, path: str, *, shape: tuple[int, ...] | None = None, kind: str | None = None) -> Any:
    """One array, its shape, kind of dtype (numpy's letters) and chunk sizes checked."""
    folder = str(root.store.root)
    try:
        array = root[path]
    except (KeyError, ValueError, TypeError, OSError) as error:
        raise damaged(folder, path, f"no such array ({error})") from error
    if not isinstance(array, zarr.Array):
        raise damaged(folder, path, "not an array")
    if shape is not None and array.shape != shape:
        raise damaged(folder, path, f"its shape is {array.shape}, expected {shape}")
    if kind is not None and array.dtype.kind not in kind:
        raise damaged(folder, path, f"it holds {array.dtype}, expected kind {kind!r}")
    if np.prod(array.chunks) > _MAX_CHUNK or np.prod(array.shards or (1,)) > _MAX_SHARD:
        raise damaged(
            folder, path, f"chunks of {array.chunks} in shards of {array.shards} elements are not this format's"
        )
    return array
