"""Where everything lies in a SOMA store, its schemas and filters, and how an empty one is made."""

import os
import secrets
import shutil
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import tiledbsoma as soma

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

_CATEGORY = pa.dictionary(pa.int32(), pa.large_string())
_LEDGER_ROWS = 2**31

OBS_SCHEMA = pa.schema(
    [
        ("soma_joinid", pa.int64()),
        ("dataset_id", _CATEGORY),
        ("observation_joinid", pa.large_string()),
        ("batch", _CATEGORY),
        ("cell_type", _CATEGORY),
        ("perturbation", _CATEGORY),
        ("is_control", pa.bool_()),
        ("modality", _CATEGORY),
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
_PACK: list[Any] = [{"_type": "ZstdFilter", "level": 5}, "ChecksumSHA256Filter"]
_PACK_INTEGERS: list[Any] = ["ByteShuffleFilter", *_PACK]
_PACK_OFFSETS: list[Any] = ["DoubleDeltaFilter", *_PACK]


def context() -> soma.SOMATileDBContext:
    """TileDB settings of every access: 64 MiB buffers, for reading in bounded memory, in place of 1 GiB."""
    buffer = 64 * 1024**2
    return soma.SOMATileDBContext(tiledb_config={"soma.init_buffer_bytes": buffer})


def _dataframe_config(schema: pa.Schema) -> dict[str, Any]:
    attributes = {name: {"filters": _PACK} for name in schema.names if name != "soma_joinid"}
    create = {"dims": {"soma_joinid": {"filters": _PACK_INTEGERS}}, "attrs": attributes}
    return {"tiledb": {"create": create | {"offsets_filters": _PACK_OFFSETS, "validity_filters": _PACK}}}


def _array_config(row_tile: int) -> dict[str, Any]:
    dims = {
        "soma_dim_0": {"tile": row_tile, "filters": _PACK_INTEGERS},
        "soma_dim_1": {"tile": 65_536, "filters": _PACK_INTEGERS},
    }
    create = {
        "capacity": 65_536, "dims": dims, "attrs": {"soma_data": {"filters": _PACK_INTEGERS}},
        "cell_order": "row-major", "tile_order": "row-major",
        "allows_duplicates": False,  # rows written again replace themselves; with duplicates they would double
    }  # fmt: skip
    return {"tiledb": {"create": create}}


def open_element(uri: str, mode: Literal["r", "w", "d"] = "r") -> Any:
    """Open one array, data frame or collection by its address, with the settings of `context`."""
    return soma.open(uri, mode, context=context())


def write_rows(uri: str, table: pa.Table) -> None:
    """Write rows of a data frame through a handle opened for this write alone.

    A child handle of tiledbsoma 2.3 keeps its parent's timestamp and writes categories that come back empty.
    """
    with open_element(uri, "w") as frame:
        frame.write(table)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


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


def _fill(uri: str) -> None:
    """Build an empty store at `uri`, which must not exist."""
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
        for parent, name, dtype, tile in (
            (x, "raw", pa.uint32(), 2_048),
            (rna, "feature_dataset_presence_matrix", pa.bool_(), 1),
            (rna, "txfm_dataset_gene_nnz", pa.int64(), 1),
        ):
            parent.add_new_sparse_ndarray(name, type=dtype, shape=(1, 1), platform_config=_array_config(tile)).close()
    labels = {"census_schema_version": CENSUS_SCHEMA_VERSION, "census_build_date": _now()[:10]}
    rows = {"soma_joinid": [0, 1], "label": list(labels), "value": list(labels.values())}
    write_rows(summary_uri, pa.table(rows, schema=_SUMMARY_SCHEMA))
    human = {
        "soma_joinid": [0], "organism_ontology_term_id": ["NCBITaxon:9606"], "organism_label": ["Homo sapiens"],
        "organism": [ORGANISM],
    }  # fmt: skip
    write_rows(organisms_uri, pa.table(human, schema=_ORGANISMS_SCHEMA))


def create(path: Path) -> None:
    """Make an empty store at `path`, whole or not at all.

    Raises
    ------
    FileExistsError
        If anything is there already.
    """
    if path.exists():
        raise FileExistsError(f"{path}: exists already; a new store needs a free path")
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        _fill(str(staging))
        os.rename(staging, path)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
