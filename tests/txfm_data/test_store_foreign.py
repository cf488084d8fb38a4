"""What other people's tools read from our stores: the Census package, tiledbsoma_ml and AnnData, without a network."""

from pathlib import Path

import anndata as ad
import cellxgene_census
import numpy as np
import pytest
import tiledbsoma

from tests.txfm_data.stores import append, dataset, expected, vocabulary, write_datasets
from txfm_data.store import layout
from txfm_data.store.consolidate import consolidate
from txfm_data.store.convert import copy_datasets

NAMES = ("first", "second", "third")


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("the network is forbidden in this test")

    monkeypatch.setattr("socket.getaddrinfo", refuse)


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> dict[str, Path]:
    """A SOMA store of three appends, the same consolidated, and the same in Zarr. Read them only."""
    folder = tmp_path_factory.mktemp("foreign")
    files = write_datasets(folder)
    for name in NAMES:
        append(files[name], folder / "soma", name)
    copy_datasets(folder / "soma", folder / "zarr")
    copy_datasets(folder / "zarr", folder / "consolidated")
    consolidate(folder / "consolidated")
    return {name: folder / name for name in ("soma", "consolidated", "zarr")}


@pytest.fixture(params=["soma", "consolidated"])
def soma(request, built) -> str:
    return str(built[request.param])


def check_labels(obs) -> None:
    """Labels as the sources have them, in the order of the samples."""
    sources = [dataset(name).obs for name in NAMES]
    assert obs["dataset_id"].tolist() == [
        name for name, labels in zip(NAMES, sources, strict=True) for _ in range(len(labels))
    ]
    assert obs["observation_joinid"].tolist() == [i for labels in sources for i in labels.index]
    for column in ("batch", "cell_type"):
        assert obs[column].tolist() == [v for labels in sources for v in labels[column]]
    assert obs["raw_sum"].tolist()[:40] == sources[0]["library"].tolist()
    assert obs["is_control"].tolist()[:40] == (sources[0]["guide"] == "none").tolist()
    assert obs["tissue"].tolist()[40:71] == sources[1]["tissue"].tolist() and obs["tissue"][:40].isna().all()
    assert obs["age"].tolist()[40:] == [*sources[1]["age"], *sources[2]["age"]]


def test_the_census_package_reads_the_whole_store(soma):
    with cellxgene_census.open_soma(uri=soma) as census:
        adata = cellxgene_census.get_anndata(census, "Homo sapiens")
        summary = census["census_info"]["summary"].read().concat().to_pandas().set_index("label")["value"]
        datasets = census["census_info"]["datasets"].read().concat().to_pandas().sort_values("soma_joinid")
    counts = expected(*NAMES)
    np.testing.assert_array_equal(adata.X.toarray(), counts)
    assert adata.var["feature_id"].tolist() == vocabulary(*NAMES)
    assert adata.var["feature_name"].tolist() == [f"G{int(g[4:]) - 90_000_000_000}" for g in vocabulary(*NAMES)]
    np.testing.assert_array_equal(adata.var["nnz"], (counts > 0).sum(axis=0))
    np.testing.assert_array_equal(adata.obs["nnz"], (counts > 0).sum(axis=1))
    check_labels(adata.obs)
    assert summary["census_schema_version"] == layout.CENSUS_SCHEMA_VERSION
    assert datasets["dataset_id"].tolist() == list(NAMES)
    assert datasets["dataset_total_cell_count"].tolist() == [40, 31, 22]


def test_the_census_package_reads_a_part(soma):
    with cellxgene_census.open_soma(uri=soma) as census:
        adata = cellxgene_census.get_anndata(
            census, "homo_sapiens", obs_value_filter="dataset_id == 'first' and cell_type in ['B cell', 'T cell']",
            var_value_filter=f"feature_id == '{vocabulary(*NAMES)[7]}'", obs_column_names=["observation_joinid", "batch"],
        )  # fmt: skip
    first = dataset("first")
    keep = first.obs["cell_type"].isin(["B cell", "T cell"]).to_numpy()
    np.testing.assert_array_equal(adata.X.toarray(), first.X.toarray()[keep][:, [7]])
    assert adata.obs["observation_joinid"].tolist() == first.obs_names[keep].tolist()


def test_the_presence_matrix_tells_zero_from_unknown(soma):
    with cellxgene_census.open_soma(uri=soma) as census:
        presence = cellxgene_census.get_presence_matrix(census, "homo_sapiens").toarray()
    genes = vocabulary(*NAMES)
    wanted = np.array([[gene in set(dataset(name).var_names) for gene in genes] for name in NAMES])
    np.testing.assert_array_equal(presence.astype(bool), wanted)


@pytest.mark.parametrize("text", ["dataset_id == 'second'", "cell_type != 'NK cell' and nnz > 0", "is_control == True"])
def test_tiledbsoma_ml_yields_the_same_counts(soma, text):
    ml = pytest.importorskip("tiledbsoma_ml", reason="a check of what it reads; txfm itself does without tiledbsoma_ml")
    with cellxgene_census.open_soma(uri=soma) as census:
        experiment = census["census_data"]["homo_sapiens"]
        with experiment.axis_query("RNA", obs_query=tiledbsoma.AxisQuery(value_filter=text)) as query:
            data = ml.ExperimentDataset(
                query, layer_name="raw", obs_column_names=["soma_joinid", "batch"], batch_size=7, shuffle=False,
                use_eager_fetch=False, io_batch_size=16,
            )  # fmt: skip
            batches = list(data)
        ids = (
            experiment["obs"].read(column_names=["soma_joinid"], value_filter=text).concat()["soma_joinid"].to_pylist()
        )
    assert np.concatenate([obs["soma_joinid"] for _, obs in batches]).tolist() == sorted(ids) and ids
    assert max(len(x) for x, _ in batches) == 7
    labels = [label for name in NAMES for label in dataset(name).obs["batch"]]
    assert [label for _, obs in batches for label in obs["batch"]] == [labels[i] for i in sorted(ids)]
    np.testing.assert_array_equal(np.concatenate([np.atleast_2d(x) for x, _ in batches]), expected(*NAMES)[sorted(ids)])


def test_anndata_reads_the_zarr_store(built):
    adata = ad.read_zarr(built["zarr"])
    counts = expected(*NAMES)
    assert adata.shape == (93, 62) and adata.X.dtype == np.uint32
    np.testing.assert_array_equal(adata.X.toarray(), counts)
    assert adata.var_names.tolist() == vocabulary(*NAMES)
    np.testing.assert_array_equal(adata.var["nnz"], (counts > 0).sum(axis=0))
    wanted = np.array([[gene in set(dataset(name).var_names) for name in NAMES] for gene in vocabulary(*NAMES)])
    np.testing.assert_array_equal(adata.varm["measured_in"], wanted)
    np.testing.assert_array_equal(adata.obs["nnz"], (counts > 0).sum(axis=1))
    check_labels(adata.obs)
    part = adata[adata.obs["dataset_id"] == "second"]
    np.testing.assert_array_equal(part.X.toarray(), counts[40:71])


def test_the_network_is_really_forbidden():
    import socket

    with pytest.raises(OSError, match="forbidden"):
        socket.create_connection(("localhost", 9))
