"""A small collection shaped like the CELLxGENE Census, on local disk, and the arrays it was made from."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import tiledbsoma

BUILD, SCHEMA = "2026-11-02", "2.4.0"
N_GENES = 80
DATASETS = ("aaaa-lung", "bbbb-blood", "cccc-smartseq")
SIZES = (50, 30, 40)
PANELS = (range(0, 60), range(20, 80), range(10, 45))
EMPTY = 6
"""The sample without any count."""
_CATEGORIES = ("dataset_id", "assay", "cell_type", "tissue_general", "disease", "donor_id", "sex")


@dataclass(frozen=True)
class Expected:
    """What was written: counts (samples, genes), obs, var, presence (datasets, genes)."""

    uri: str
    counts: np.ndarray
    obs: pd.DataFrame
    var: pd.DataFrame
    presence: np.ndarray


def make(seed: int = 3) -> Expected:
    """Counts and labels, without writing them."""
    rng = np.random.default_rng(seed)
    dataset = np.repeat(np.arange(3), SIZES)
    n = len(dataset)
    presence = np.zeros((3, N_GENES), bool)
    for row, panel in enumerate(PANELS):
        presence[row, list(panel)] = True
    counts = rng.negative_binomial(0.6, 0.3, (n, N_GENES)) * presence[dataset]
    counts[dataset == 2] *= 37  # reads of a full-length assay are many per molecule
    counts[EMPTY] = 0
    nnz, total = (counts > 0).sum(axis=1), counts.sum(axis=1)
    diseases = np.array(["normal", "asthma", "asthma || influenza", "influenza || lung cancer"])
    obs = pd.DataFrame(
        {
            "soma_joinid": np.arange(n),
            "dataset_id": np.array(DATASETS)[dataset],
            "assay": np.where(dataset == 2, "Smart-seq2", "10x 3' v3"),
            "cell_type": rng.choice(["T cell", "B cell", "CD4-positive, alpha-beta T cell"], n),
            "tissue_general": np.array(["lung", "blood", "lung"])[dataset],
            "disease": diseases[rng.integers(0, 4, n)],
            "donor_id": [f"donor {i % 7}" for i in range(n)],
            "sex": rng.choice(["female", "male", "unknown"], n),
            "is_primary_data": np.arange(n) % 5 != 2,
            "observation_joinid": [f"obs-{i:04d}" for i in range(n)],
            "raw_sum": total.astype(np.float64),
            "nnz": nnz.astype(np.int64),
            "raw_mean_nnz": total / np.maximum(nnz, 1),
            "raw_variance_nnz": np.ones(n),
            "n_measured_vars": presence.sum(axis=1)[dataset].astype(np.int64),
        }
    )
    var = pd.DataFrame(
        {
            "soma_joinid": np.arange(N_GENES),
            "feature_id": [f"ENSG{70_000_000_000 + i}" for i in range(N_GENES)],
            "feature_name": ["TWIN" if i in (25, 30) else f"GENE{i}" for i in range(N_GENES)],
            "feature_type": np.where(np.arange(N_GENES) % 4 == 3, "lncRNA", "protein_coding"),
            "feature_length": rng.integers(300, 5_000, N_GENES),
            "nnz": (counts > 0).sum(axis=0),
            "n_measured_obs": presence[dataset].sum(axis=0),
        }
    )
    return Expected("", counts, obs, var, presence)


def _arrow(frame: pd.DataFrame) -> pa.Table:
    columns = {}
    for name in frame.columns:
        values = pa.array(frame[name])
        if pa.types.is_string(values.type) or pa.types.is_large_string(values.type):
            values = values.cast(pa.large_string())
        if name in _CATEGORIES and name != "dataset_id" or (name == "dataset_id" and len(frame) > 3):
            codes = values.dictionary_encode()
            values = pa.DictionaryArray.from_arrays(codes.indices.cast(pa.int32()), codes.dictionary)
        columns[name] = values
    return pa.table(columns)


def add_frame(parent: tiledbsoma.Collection, name: str, frame: pd.DataFrame) -> None:
    """Add a data frame; it is written through a handle of its own, since a child's writes lose their categories."""
    table = _arrow(frame)
    child = parent.add_new_dataframe(
        name, schema=table.schema, index_column_names=["soma_joinid"], domain=[(0, max(len(frame) - 1, 0))]
    )
    uri = child.uri
    child.close()
    with tiledbsoma.open(uri, "w") as writer:
        writer.write(table)


def write_matrix(parent, name: str, values: np.ndarray, kind: pa.DataType, pieces: int = 1, **options) -> None:
    """Add a sparse array, written in pieces of rows: each becomes a fragment."""
    array = parent.add_new_sparse_ndarray(name, type=kind, shape=values.shape, **options)
    uri = array.uri
    array.close()
    rows, columns = np.nonzero(values)
    for part in np.array_split(np.arange(values.shape[0]), pieces):
        chosen = np.isin(rows, part)
        table = {
            "soma_dim_0": rows[chosen],
            "soma_dim_1": columns[chosen],
            "soma_data": pa.array(values[rows[chosen], columns[chosen]]).cast(kind),
        }
        with tiledbsoma.open(uri, "w") as writer:
            writer.write(pa.table(table))


def build_census(folder: Path, made: Expected | None = None) -> Expected:
    """Write the collection into `folder`, which must not exist, and return what it holds."""
    made = made or make()
    dims = {f"soma_dim_{i}": {"tile": 64, "filters": [{"_type": "ZstdFilter", "level": 3}]} for i in (0, 1)}
    like_census = {
        "tiledb": {
            "create": {
                "capacity": 256, "dims": dims, "cell_order": "row-major", "tile_order": "row-major",
                "allows_duplicates": True,
            }
        }
    }  # fmt: skip
    summary = {
        "census_schema_version": SCHEMA, "census_build_date": BUILD, "dataset_schema_version": "7.0.0",
        "total_cell_count": str(len(made.obs)),
    }  # fmt: skip
    datasets = pd.DataFrame(
        {
            "soma_joinid": np.arange(3),
            "collection_name": ["A collection"] * 3,
            "dataset_id": list(DATASETS),
            "dataset_version_id": [f"{name}-v1" for name in DATASETS],
            "dataset_title": [f"Title of {name}" for name in DATASETS],
            "dataset_h5ad_path": [f"{name}.h5ad" for name in DATASETS],
            "dataset_total_cell_count": np.array(SIZES),
        }
    )
    organisms = pd.DataFrame(
        {
            "soma_joinid": [0], "organism_ontology_term_id": ["NCBITaxon:9606"], "organism_label": ["Homo sapiens"],
            "organism": ["homo_sapiens"],
        }
    )  # fmt: skip
    counts_of = pd.DataFrame(
        {
            "soma_joinid": [0], "organism": ["Homo sapiens"], "category": ["all"], "ontology_term_id": ["na"],
            "unique_cell_count": [int(made.obs["is_primary_data"].sum())], "total_cell_count": [len(made.obs)],
            "label": ["na"],
        }
    )  # fmt: skip
    with tiledbsoma.Collection.create(str(folder)) as top:
        info = top.add_new_collection("census_info")
        rows = {"soma_joinid": np.arange(len(summary)), "label": list(summary), "value": list(summary.values())}
        add_frame(info, "summary", pd.DataFrame(rows))
        add_frame(info, "datasets", datasets)
        add_frame(info, "organisms", organisms)
        add_frame(info, "summary_cell_counts", counts_of)
        data = top.add_new_collection("census_data")
        experiment = data.add_new_collection("homo_sapiens", tiledbsoma.Experiment)
        add_frame(experiment, "obs", made.obs)
        rna = experiment.add_new_collection("ms").add_new_collection("RNA", tiledbsoma.Measurement)
        add_frame(rna, "var", made.var)
        x = rna.add_new_collection("X", tiledbsoma.Collection)
        write_matrix(x, "raw", made.counts.astype(np.float32), pa.float32(), 3, platform_config=like_census)
        full_length = (made.obs["assay"] == "Smart-seq2").to_numpy()
        scaled = made.counts / np.where(full_length[:, None], made.var["feature_length"].to_numpy(), 1)
        normalized = scaled / np.maximum(scaled.sum(axis=1, keepdims=True), 1e-12)
        write_matrix(x, "normalized", normalized.astype(np.float32), pa.float32(), 2, platform_config=like_census)
        write_matrix(rna, "feature_dataset_presence_matrix", made.presence, pa.bool_())
    return Expected(str(folder), made.counts, made.obs, made.var, made.presence)
