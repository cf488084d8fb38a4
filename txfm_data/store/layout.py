"""Where everything lies in a SOMA store, its schemas and filters, and how an empty one is made."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, Literal

import pyarrow as pa
import tiledbsoma as soma

from txfm_data.address import explain, redact, tiledb_config
from txfm_data.retry import is_transient

FORMAT = "txfm-store"
VERSION = 1
ORGANISM = "homo_sapiens"
CENSUS_SCHEMA_VERSION = "2.4.0"
"""The Census schema whose shape and column names this store follows."""

_INFO = "census_info"
_EXPERIMENT = f"census_data/{ORGANISM}"
DATASETS, LEDGER = f"{_INFO}/datasets", f"{_INFO}/txfm_ledger"
OBS, VAR = f"{_EXPERIMENT}/obs", f"{_EXPERIMENT}/ms/RNA/var"
RAW = f"{_EXPERIMENT}/ms/RNA/X/raw"
PRESENCE = f"{_EXPERIMENT}/ms/RNA/feature_dataset_presence_matrix"
GENE_NNZ = f"{_EXPERIMENT}/ms/RNA/txfm_dataset_gene_nnz"

CATEGORY = pa.dictionary(pa.int32(), pa.large_string())
"""How labels with few values are stored."""
_LEDGER_ROWS = 2**31

OBS_SCHEMA = pa.schema(
    [
        ("soma_joinid", pa.int64()),
        ("dataset_id", CATEGORY),
        ("observation_joinid", pa.large_string()),
        ("batch", CATEGORY),
        ("cell_type", CATEGORY),
        ("perturbation", CATEGORY),
        ("is_control", pa.bool_()),
        ("modality", CATEGORY),
        ("is_primary_data", pa.bool_()),
        ("raw_sum", pa.float64()),
        ("nnz", pa.int64()),
        ("raw_mean_nnz", pa.float64()),
        ("n_measured_vars", pa.int64()),
    ]
)
VAR_SCHEMA = pa.schema(
    [
        ("soma_joinid", pa.int64()),
        ("feature_id", pa.large_string()),
        ("feature_name", pa.large_string()),
        ("nnz", pa.int64()),
        ("n_measured_obs", pa.int64()),
    ]
)
DATASETS_SCHEMA = pa.schema(
    [
        ("soma_joinid", pa.int64()),
        ("dataset_id", pa.large_string()),
        ("dataset_title", pa.large_string()),
        ("dataset_h5ad_path", pa.large_string()),
        ("dataset_total_cell_count", pa.int64()),
        ("values", pa.large_string()),
        ("modality", pa.large_string()),
        ("content_sha256", pa.large_string()),
    ]
)
LEDGER_SCHEMA = pa.schema(
    [
        ("soma_joinid", pa.int64()),
        ("event", pa.large_string()),
        ("dataset", pa.large_string()),
        ("detail", pa.large_string()),
    ]
)
_SUMMARY_SCHEMA = pa.schema([("soma_joinid", pa.int64()), ("label", pa.large_string()), ("value", pa.large_string())])
_ORGANISMS_SCHEMA = pa.schema(
    [
        ("soma_joinid", pa.int64()),
        ("organism_ontology_term_id", pa.large_string()),
        ("organism_label", pa.large_string()),
        ("organism", pa.large_string()),
    ]
)

# Without a checksum filter TileDB returns flipped bits as data (11 of 24 in a test); SHA-256 catches them all.
_CHECKSUM = "ChecksumSHA256Filter"
_ZSTD: dict[str, Any] = {"_type": "ZstdFilter", "level": 1}
_PACK: list[Any] = [{"_type": "ZstdFilter", "level": 5}, _CHECKSUM]
_PACK_INTEGERS: list[Any] = ["ByteShuffleFilter", *_PACK]
_PACK_OFFSETS: list[Any] = ["DoubleDeltaFilter", *_PACK]
# Rows repeat once a gene, and genes ascend within a row: a third less than bytes shuffled alone, at the same speed.
_PACK_ROWS: list[Any] = ["RleFilter", _ZSTD, _CHECKSUM]
_PACK_GENES: list[Any] = ["DeltaFilter", "ByteShuffleFilter", _ZSTD, _CHECKSUM]
_PACK_VALUES: list[Any] = ["ByteShuffleFilter", _ZSTD, _CHECKSUM]
_ROW_TILE = 64
"""Rows of X in one space tile: runs of rows read twice as fast as with the 2,048 of the Census."""


STEADY: dict[str, str | float] = {"sm.query.sparse_global_order.preprocess_tile_merge": 0}
"""TileDB 2.30 merges tiles in threads before it reads, and such a thread has ended the process more than once (in the
destructor of its MergeUnit, by the core that a test left; and in a test that read without this). Reads are as fast so."""


def context(*, keeps_memory: bool = False) -> soma.SOMATileDBContext:
    """TileDB settings of every access: 64 MiB buffers, for reading in bounded memory, in place of 1 GiB.

    keeps_memory : for many small reads, one after the other. TileDB then does not hand all free memory of the process back
    after each, only to ask for it again page by page, which takes two fifths of the CPU time; between them the process
    holds some hundred MiB more. Buffers are of 16 MiB, since malloc maps larger ones anew each time.
    One context for a process and its settings: each has threads and caches of its own.
    """
    return _context(tuple(sorted(tiledb_config().items())), keeps_memory)


@lru_cache(maxsize=4)
def _context(settings: tuple[tuple[str, str | int], ...], keeps_memory: bool) -> soma.SOMATileDBContext:
    ours: dict[str, str | float] = {
        "soma.init_buffer_bytes": 64 * 1024**2,
        **STEADY,
    }
    if keeps_memory:
        ours |= {"soma.init_buffer_bytes": 16 * 1024**2, "sm.mem.malloc_trim": "false"}
    return soma.SOMATileDBContext(tiledb_config=ours | dict(settings))


def _dataframe_config(schema: pa.Schema) -> dict[str, Any]:
    attributes = {name: {"filters": _PACK} for name in schema.names if name != "soma_joinid"}
    create = {"dims": {"soma_joinid": {"filters": _PACK_INTEGERS}}, "attrs": attributes}
    return {"tiledb": {"create": create | {"offsets_filters": _PACK_OFFSETS, "validity_filters": _PACK}}}


def _array_config(row_tile: int) -> dict[str, Any]:
    dims = {
        "soma_dim_0": {"tile": row_tile, "filters": _PACK_ROWS},
        "soma_dim_1": {"tile": 65_536, "filters": _PACK_GENES},
    }
    create = {
        "capacity": 65_536, "dims": dims, "attrs": {"soma_data": {"filters": _PACK_VALUES}},
        "cell_order": "row-major", "tile_order": "row-major",
        "allows_duplicates": False,  # rows written again replace themselves; with duplicates they would double
    }  # fmt: skip
    return {"tiledb": {"create": create}}


def open_element(uri: str, mode: Literal["r", "w", "d"] = "r", *, keeps_memory: bool = False) -> Any:
    """Open one array, data frame or collection by its address, with the settings of `context`."""
    return soma.open(uri, mode, context=context(keeps_memory=keeps_memory))


@contextmanager
def reading(uri: str, *, keeps_memory: bool = False) -> Iterator[Any]:
    """`open_element` for reading, with TileDB's errors as Python's own.

    Raises
    ------
    ValueError
        If it cannot be opened or read within the block: names it and the remedy.
    OSError
        If that may go away by itself, or (PermissionError, ConnectionError, FileNotFoundError) object storage refuses it.
    """
    with clear_errors(uri, ValueError, "a part of the store cannot be read", "restore it from a copy or ingest again"):
        with open_element(uri, keeps_memory=keeps_memory) as element:
            yield element


@contextmanager
def writing(uri: str, mode: Literal["w", "d"] = "w") -> Iterator[Any]:
    """`open_element` for writing or deleting, with TileDB's errors as Python's own.

    Raises
    ------
    OSError
        If it cannot be written to within the block.
    """
    with clear_write_errors(uri):
        with open_element(uri, mode) as element:
            yield element


@contextmanager
def clear_write_errors(uri: str) -> Iterator[None]:
    """Turn TileDB's errors within the block, in which something is made or written, into OSError."""
    remedy = "the store is as it was; check free space and rights, then run again"
    with clear_errors(uri, OSError, "cannot be written", remedy):
        yield


@contextmanager
def clear_errors(uri: str, kind: type[Exception], what: str, remedy: str) -> Iterator[None]:
    """Turn errors of TileDB, which has one class for all, into `kind`, or OSError where they may go away by themselves."""
    try:
        yield
    except soma.SOMAError as error:
        clear = explain(error, uri)
        if clear is not None:
            raise clear from None
        cause = redact(" ".join(str(error).split()))
        kind = OSError if is_transient(error) else kind
        # A chained error would show its own text, with whatever was just taken out
        chained = error if redact(str(error)) == str(error) else None
        raise kind(f"{redact(uri)}: {what} ({cause}); {remedy}") from chained


def write_rows(uri: str, table: pa.Table) -> None:
    """Write rows of a data frame through a handle opened for this write alone.

    A child handle of tiledbsoma 2.3 keeps its parent's timestamp and writes categories that come back empty.
    """
    with writing(uri) as frame:
        frame.write(table)


def plain_schema(schema: pa.Schema) -> pa.Schema:
    """The schema of a data frame as tiledbsoma gives it, in the types that we write: long strings, categories of int32."""
    return pa.schema([(field.name, _plain_type(field.type)) for field in schema])


def plain(table: pa.Table) -> pa.Table:
    """A table as tiledbsoma gives it, in the types of `plain_schema`."""
    return table.cast(plain_schema(table.schema))


def _plain_type(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_dictionary(kind):
        return CATEGORY
    return pa.large_string() if pa.types.is_string(kind) else kind


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def create_frame(uri: str, schema: pa.Schema, rows: int) -> None:
    """Make a data frame that belongs to no collection yet."""
    soma.DataFrame.create(
        uri, schema=schema, index_column_names=["soma_joinid"], domain=[(0, max(0, rows - 1))],
        platform_config=_dataframe_config(schema), context=context(),
    ).close()  # fmt: skip


def _add_frame(parent: Any, name: str, schema: pa.Schema, rows: int) -> str:
    frame = parent.add_new_dataframe(
        name,
        schema=schema,
        index_column_names=["soma_joinid"],
        domain=[(0, rows - 1)],
        platform_config=_dataframe_config(schema),
    )
    uri = str(frame.uri)
    frame.close()
    return uri


def create(uri: str, dtype: pa.DataType) -> None:
    """Build an empty store at `uri`, which must not exist; `dtype` is that of its counts, uint32 or float64."""
    top: Any
    with soma.Collection.create(uri, context=context()) as top:
        top.metadata["txfm_format"] = FORMAT
        top.metadata["txfm_version"] = VERSION
        top.metadata["created_on"] = _now()
        info = top.add_new_collection(_INFO)
        summary_uri = _add_frame(info, "summary", _SUMMARY_SCHEMA, 2)
        organisms_uri = _add_frame(info, "organisms", _ORGANISMS_SCHEMA, 1)
        _add_frame(info, "datasets", DATASETS_SCHEMA, 1)
        _add_frame(info, "txfm_ledger", LEDGER_SCHEMA, _LEDGER_ROWS)
        experiment = top.add_new_collection("census_data").add_new_collection(ORGANISM, soma.Experiment)
        _add_frame(experiment, "obs", OBS_SCHEMA, 1)
        rna = experiment.add_new_collection("ms").add_new_collection("RNA", soma.Measurement)
        _add_frame(rna, "var", VAR_SCHEMA, 1)
        x = rna.add_new_collection("X", soma.Collection)
        for parent, name, kind, tile in (
            (x, "raw", dtype, _ROW_TILE),
            (rna, "feature_dataset_presence_matrix", pa.bool_(), 1),
            (rna, "txfm_dataset_gene_nnz", pa.int64(), 1),
        ):
            parent.add_new_sparse_ndarray(name, type=kind, shape=(1, 1), platform_config=_array_config(tile)).close()
    labels = {"census_schema_version": CENSUS_SCHEMA_VERSION, "census_build_date": _now()[:10]}
    rows = {"soma_joinid": [0, 1], "label": list(labels), "value": list(labels.values())}
    write_rows(summary_uri, pa.table(rows, schema=_SUMMARY_SCHEMA))
    human = {
        "soma_joinid": [0], "organism_ontology_term_id": ["NCBITaxon:9606"], "organism_label": ["Homo sapiens"],
        "organism": [ORGANISM],
    }  # fmt: skip
    write_rows(organisms_uri, pa.table(human, schema=_ORGANISMS_SCHEMA))
