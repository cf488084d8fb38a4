"""Many processes give the store that one gives; several sources go in together or not at all; without the flag, no Dask."""

import subprocess
import sys
from pathlib import Path

import anndata as ad
import numpy as np
import pytest
import scipy.sparse as sp

from txfm_data import ingest
from txfm_data.ingest import run
from txfm_data.ingest.options import IngestOptions
from txfm_data.parallel import Workers, pool
from txfm_data.sources import h5ad
from txfm_data.store.opening import open_store
from txfm_data.store.verify import verify


def same(first: Path, second: Path) -> None:
    """Two stores hold the same, row for row."""
    one, two = open_store(first), open_store(second)
    assert one.datasets == two.datasets and one.vocabulary == two.vocabulary
    assert one.obs().equals(two.obs())
    for record in one.datasets:
        np.testing.assert_array_equal(one.panel(record), two.panel(record))
        np.testing.assert_array_equal(one.gene_nnz(record), two.gene_nnz(record))
    for (low, part), (at, other) in zip(one.scan(0, one.n_obs), two.scan(0, two.n_obs), strict=True):
        assert low == at
        for name in ("indptr", "gene_ids", "counts"):
            np.testing.assert_array_equal(getattr(part, name), getattr(other, name))


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> list[Path]:
    """Two files with overlapping panels, one stored by columns, one with samples without counts."""
    folder, rng, paths = tmp_path_factory.mktemp("parallel"), np.random.default_rng(0), []
    for number, genes in enumerate((range(0, 300), range(200, 500))):
        counts = rng.integers(0, 90, (700, len(genes))) * (rng.random((700, len(genes))) < 0.2)
        if number:
            counts[[3, 500]] = 0
        adata = ad.AnnData((sp.csc_matrix if number else sp.csr_matrix)(counts.astype(np.float32)))
        adata.obs_names = [f"{number}-{i}" for i in range(700)]
        adata.obs["plate"] = [f"p{i % 5}" for i in range(700)]
        adata.var_names = [f"ENSG{i:011d}" for i in genes]
        adata.write_h5ad(folder / f"{number}.h5ad")
        paths.append(folder / f"{number}.h5ad")
    return paths


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of a few dozen samples, so that there are many."""
    monkeypatch.setattr(IngestOptions, "block_bytes", lambda self: 40_000)


def sources(files: list[Path]) -> list[dict]:
    return [
        {"kind": "h5ad", "dataset": f"d{i}", "path": path, "batch": "plate", "empty_samples": "drop"}
        for i, path in enumerate(files)
    ]


@pytest.mark.parametrize("backend", ["soma", "zarr"])
def test_two_processes_give_what_one_gives(tmp_path, files, small_blocks, backend):
    for i, path in enumerate(files):
        ingest.h5ad(path, tmp_path / "serial", f"d{i}", batch="plate", empty_samples="drop", backend=backend)
    result = ingest.many(sources(files), tmp_path / "parallel", backend=backend, workers=Workers(n=2))
    assert [d["n_dropped_empty"] for d in result["datasets"]] == [0, 2] and result["n_obs"] == 1_398
    same(tmp_path / "serial", tmp_path / "parallel")
    assert verify(tmp_path / "parallel")["n_obs"] == 1_398


def test_a_scheduler_of_its_own_does_the_same(tmp_path, files, small_blocks):
    from distributed import LocalCluster

    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address="127.0.0.1:0") as cluster:
        workers = Workers(scheduler=cluster.scheduler_address)
        ingest.h5ad(files[0], tmp_path / "cluster", "d0", batch="plate", workers=workers)
    ingest.h5ad(files[0], tmp_path / "serial", "d0", batch="plate")
    same(tmp_path / "serial", tmp_path / "cluster")


def test_an_error_in_a_worker_is_told_as_it_is_and_leaves_nothing(tmp_path, files, small_blocks):
    adata = ad.read_h5ad(files[0])
    adata.X.data[adata.X.indptr[650]] = 0.5
    adata.write_h5ad(tmp_path / "bad.h5ad")
    with pytest.raises(ValueError, match=r"holds 0\.5 for sample '0-650' \(row 650\)"):
        ingest.h5ad(tmp_path / "bad.h5ad", tmp_path / "store", "d", workers=Workers(n=2))
    assert [p.name for p in tmp_path.iterdir()] == ["bad.h5ad"]


@pytest.mark.parametrize("backend", ["soma", "zarr"])
def test_several_sources_go_in_together_or_not_at_all(tmp_path, files, backend):
    adata = ad.read_h5ad(files[1])
    adata.X = adata.X * 0.5
    adata.write_h5ad(tmp_path / "bad.h5ad")
    listed = [*sources(files[:1]), {"kind": "h5ad", "dataset": "bad", "path": tmp_path / "bad.h5ad"}]
    with pytest.raises(ValueError, match="not a whole number"):
        ingest.many(listed, tmp_path / "store", backend=backend)
    assert not (tmp_path / "store").exists()
    ingest.many(sources(files), tmp_path / "store", backend=backend)
    for i, path in enumerate(files):
        ingest.h5ad(path, tmp_path / "one by one", f"d{i}", batch="plate", empty_samples="drop", backend=backend)
    same(tmp_path / "one by one", tmp_path / "store")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "h5as"}, "no kind of source 'h5as'; did you mean h5ad"),
        ({"dataset": "d0"}, "two sources are named as dataset 'd0'"),
        ({"laier": "x"}, "no option 'laier'; did you mean layer"),
        ({"values": "normalized"}, "one source holds counts, another normalised values"),
        ({"path": None}, "the same contents as"),
        ({"path": "none.h5ad"}, "no such file"),
    ],
)
def test_a_list_that_cannot_be_is_refused(tmp_path, files, change, message):
    listed = sources(files)
    listed[1] |= {"path": files[0]} if change == {"path": None} else change
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        ingest.many(listed, tmp_path / "store")
    with pytest.raises(ValueError, match="has no 'path'"):
        ingest.many([{"kind": "h5ad", "dataset": "x"}], tmp_path / "store")
    with pytest.raises(ValueError, match="no source is named"):
        ingest.many([], tmp_path / "store")
    assert not list(tmp_path.iterdir())


def test_a_dry_run_of_a_list(tmp_path, files):
    found = ingest.many(sources(files), tmp_path / "store", dry_run=True)
    assert found["n_obs"] == 1_400 and [d["n_panel"] for d in found["datasets"]] == [300, 300]
    assert not list(tmp_path.iterdir())


def test_without_the_flag_dask_is_not_imported(tmp_path, files):
    code = (
        "import sys; from txfm_data import ingest; ingest.h5ad(sys.argv[1], sys.argv[2], 'd'); "
        "assert 'distributed' not in sys.modules, 'Dask was imported'"  # anndata itself imports dask.array where it is there
    )
    subprocess.run([sys.executable, "-c", code, str(files[0]), str(tmp_path / "store")], check=True)


def test_what_workers_may_be():
    with pytest.raises(ValueError, match="must not be negative"):
        Workers(n=-1)
    with pool(Workers()) as serial:
        assert list(serial.run(abs, [-1, 2])) == [1, 2]


def test_a_worker_that_sees_another_file_is_found(tmp_path, files, small_blocks, monkeypatch):
    """Workers open the path that they are given; what lies there must be what was looked at."""
    from distributed import LocalCluster

    (tmp_path / "here").mkdir()
    path = tmp_path / "here" / "atlas.h5ad"
    path.write_bytes(files[0].read_bytes())
    monkeypatch.chdir(path.parent)
    with LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address="127.0.0.1:0") as cluster:
        workers = Workers(scheduler=cluster.scheduler_address)
        monkeypatch.chdir(tmp_path)
        ingest.h5ad("here/atlas.h5ad", "store", "d", workers=workers)  # a worker's current folder is another
        assert open_store("store").n_obs == 700
        with h5ad.H5adSource(path) as source:
            job = run.Job(source=source, dataset="e", options=IngestOptions(workers=workers))
            monkeypatch.setattr(source, "content_sha256", lambda: "0" * 64)
            with pytest.raises(ValueError, match="other contents on a worker than where the ingest began"):
                run.ingest_sources([job], str(tmp_path / "other"))
    assert not (tmp_path / "other").exists()


def test_a_new_store_of_several_sources_holds_the_values_of_all(tmp_path, files):
    adata = ad.read_h5ad(files[1])
    adata.X = adata.X * 0.5
    adata.write_h5ad(tmp_path / "rsem.h5ad")
    rsem = {
        "kind": "h5ad",
        "dataset": "rsem",
        "path": tmp_path / "rsem.h5ad",
        "non_integer": "ok",
        "empty_samples": "drop",
    }
    ingest.many([*sources(files[:1]), rsem], tmp_path / "store")
    assert open_store(tmp_path / "store").dtype == np.float64
