"""Census slices into a store: equal to the collection they come from, continued after a stop, refused when they do not fit."""

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import cellxgene_census
import numpy as np
import pytest
import tiledbsoma

from tools import ingest as verb
from txfm_data import ingest
from txfm_data.ingest import kinds
from txfm_data.parallel import Workers
from txfm_data.store.opening import open_store
from txfm_data.store.verify import verify

# Test folders are no packages: the builder is loaded by its path.
_SPEC = importlib.util.spec_from_file_location("census_fixture", Path(__file__).with_name("census_fixture.py"))
fixture = importlib.util.module_from_spec(_SPEC)
sys.modules["census_fixture"] = fixture
_SPEC.loader.exec_module(fixture)


@pytest.fixture(autouse=True)
def no_network(request, monkeypatch):
    if "processes" in request.node.name:  # they find each other through the loopback device
        return

    def refuse(*args, **kwargs):
        raise OSError("the network is forbidden in this test")

    monkeypatch.setattr("socket.getaddrinfo", refuse)


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    return fixture.build_census(tmp_path_factory.mktemp("census") / "census")


def dense(store, record) -> np.ndarray:
    out = np.zeros((record.n_obs, len(store.vocabulary)))
    for low, part in store.scan(record.obs_start, record.obs_stop):
        out[np.repeat(np.arange(len(part)), np.diff(part.indptr)) + low - record.obs_start, part.gene_ids] = part.counts
    return out


@pytest.mark.parametrize("backend", ["soma", "zarr"])
def test_a_slice_equals_the_collection(tmp_path, made, backend):
    result = ingest.census(tmp_path / "store", uri=made.uri, obs_filter="tissue_general == 'lung'", backend=backend)
    store = open_store(tmp_path / "store")
    wanted = made.obs[(made.obs["tissue_general"] == "lung") & made.obs["is_primary_data"] & (made.obs["raw_sum"] > 0)]
    assert result["n_obs"] == len(wanted) == store.n_obs and store.backend == backend
    ids = made.var["feature_id"].to_numpy()
    for record in store.datasets:
        rows = wanted.index[wanted["dataset_id"] == record.name]
        row = fixture.DATASETS.index(record.name)
        assert {store.vocabulary.gene_ids[t] for t in store.panel(record)} == set(ids[made.presence[row]])
        expected = np.zeros((len(rows), len(store.vocabulary)))
        expected[:, store.vocabulary.index_of(ids[made.presence[row]])] = made.counts[rows][:, made.presence[row]]
        np.testing.assert_array_equal(dense(store, record), expected)
    obs = store.obs().to_pandas()
    for name in (
        "assay",
        "cell_type",
        "disease",
        "donor_id",
        "sex",
        "tissue_general",
        "dataset_id",
        "observation_joinid",
    ):
        assert obs[name].tolist() == wanted[name].tolist()
    np.testing.assert_array_equal(obs["raw_sum"], wanted["raw_sum"])
    np.testing.assert_array_equal(obs["nnz"], wanted["nnz"])
    assert sum(d["n_dropped_empty"] for d in result["datasets"]) == 1
    assert verify(tmp_path / "store")["n_obs"] == len(wanted)


def test_a_run_that_was_stopped_goes_on_where_it_was(tmp_path, made, monkeypatch):
    done = []

    def stop_at_the_second(jobs, *args, **kwargs):
        if done:
            raise KeyboardInterrupt
        done.extend(job.dataset for job in jobs)
        return original(jobs, *args, **kwargs)

    original = kinds.ingest_sources
    monkeypatch.setattr(kinds, "_GROUP_DATASETS", 2)
    with monkeypatch.context() as patch:
        patch.setattr(kinds, "ingest_sources", stop_at_the_second)
        with pytest.raises(KeyboardInterrupt):
            ingest.census(tmp_path / "store", uri=made.uri)
    assert [d.name for d in open_store(tmp_path / "store").datasets] == done == list(fixture.DATASETS[:2])
    result = ingest.census(tmp_path / "store", uri=made.uri)
    assert result["there_already"] == done and len(result["datasets"]) == 1
    again = ingest.census(tmp_path / "store", uri=made.uri)
    assert len(again["there_already"]) == 3 and again["n_obs"] == 0
    ingest.census(tmp_path / "whole", uri=made.uri)
    stopped, whole = open_store(tmp_path / "store"), open_store(tmp_path / "whole")
    assert stopped.obs().equals(whole.obs()) and stopped.datasets == whole.datasets
    with pytest.raises(ValueError, match=f"dataset '{done[0]}' is there already"):
        ingest.census(tmp_path / "store", uri=made.uri, obs_filter="sex == 'female'")


def test_two_processes_give_what_one_gives(tmp_path, made):
    ingest.census(tmp_path / "serial", uri=made.uri, max_samples=70)
    ingest.census(tmp_path / "parallel", uri=made.uri, max_samples=70, workers=Workers(n=2))
    serial, parallel = open_store(tmp_path / "serial"), open_store(tmp_path / "parallel")
    assert serial.obs().equals(parallel.obs()) and serial.datasets == parallel.datasets
    for record in serial.datasets:
        np.testing.assert_array_equal(dense(serial, record), dense(parallel, record))


def test_genes_by_a_filter_keep_the_library_of_all(tmp_path, made):
    gene = made.var["feature_id"][25]
    ingest.census(tmp_path / "store", uri=made.uri, var_filter=f"feature_id in ['{gene}']", max_samples=40, seed=3)
    store = open_store(tmp_path / "store")
    assert store.vocabulary.gene_ids == (gene,) and store.n_obs <= 40
    joined = {name: size for name, size in zip(made.obs["observation_joinid"], made.obs["raw_sum"], strict=True)}
    obs = store.obs(["observation_joinid", "raw_sum"])
    assert obs["raw_sum"].to_pylist() == [joined[name] for name in obs["observation_joinid"].to_pylist()]


def test_a_dry_run_says_what_it_would_read_and_writes_nothing(tmp_path, made, capsys):
    (tmp_path / "ids.txt").write_text(f"# lung\n{fixture.DATASETS[0]}\n")
    arguments = [
        "census",
        "--uri",
        made.uri,
        "--store",
        str(tmp_path / "store"),
        "--dataset-ids",
        str(tmp_path / "ids.txt"),
    ]
    assert verb.main([*arguments, "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)["plan"]
    chosen = made.obs[(made.obs["dataset_id"] == fixture.DATASETS[0]) & made.obs["is_primary_data"]]
    assert (plan["n_obs"], plan["n_datasets"], plan["n_genes"]) == (len(chosen), 1, 60)
    assert plan["build_date"] == fixture.BUILD and plan["bytes_of_store"] > 0 and plan["bytes_to_read"] > 0
    assert verb.main([*arguments, "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert f"n obs: {len(chosen)}" in shown and "bytes of store" in shown
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ids.txt"]
    assert verb.main(arguments) == 0
    assert "matched 60 of 60" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"obs_filter": "cell_type == 'T cel'"}, "T cell"),
        ({"obs_filter": "celltype == 'T cell'"}, "cell_type"),
        ({"obs_filter": "cell_type = 'T cell'"}, "=="),
        ({"organism": "mus_musculus"}, "homo_sapiens"),
        ({"dataset_ids": ["aaaa-lunk"]}, "aaaa-lung"),
        ({"dataset_ids": "none.txt"}, "no such file"),
        ({"batch": "plate"}, "--batch names 'plate'"),
        ({"max_samples": 0}, "--max-samples 0"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_is_written(tmp_path, made, options, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        ingest.census(tmp_path / "store", uri=made.uri, **options)
    assert not list(tmp_path.iterdir())


def test_library_sizes_that_are_not_the_sums_are_refused(tmp_path, made):
    copy = shutil.copytree(made.uri, tmp_path / "census")
    with tiledbsoma.open(str(copy / "census_data/homo_sapiens/obs")) as frame:
        row = frame.read((3,)).concat()
    wrong = row.set_column(row.schema.get_field_index("raw_sum"), "raw_sum", [[row["raw_sum"][0].as_py() + 5.0]])
    with tiledbsoma.open(str(copy / "census_data/homo_sapiens/obs"), "w") as frame:
        frame.write(wrong)
    with pytest.raises(ValueError, match=r"library size .* no more \(1 such samples\)"):
        ingest.census(tmp_path / "store", uri=str(copy))
    assert not (tmp_path / "store").exists()


def test_our_own_store_is_read_as_a_census(tmp_path, tiny_store):
    ingest.census(tmp_path / "copy", uri=str(tiny_store), obs_filter="dataset_id == 'second'")
    store, original = open_store(tmp_path / "copy"), open_store(tiny_store)
    record = original.dataset("second")
    ours = dense(store, store.datasets[0])
    tokens = [original.vocabulary.gene_ids.index(gene) for gene in store.vocabulary.gene_ids]
    np.testing.assert_array_equal(ours, dense(original, record)[:, tokens])
    with cellxgene_census.open_soma(uri=str(tmp_path / "copy")) as census:
        assert cellxgene_census.get_presence_matrix(census, "homo_sapiens").sum() == record.n_panel
