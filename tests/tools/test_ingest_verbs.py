"""`txfm ingest KIND` and `txfm store KIND` run as a user runs them: exit codes, --json, --dry-run, errors, leftovers."""

import json
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import anndata as ad
import cellxgene_census
import numpy as np
import pytest

from tests import doc_files
from tools import info, ingest, store, verify
from txfm_data.ingest.options import IngestOptions
from txfm_data.parallel import Workers
from txfm_data.store.opening import open_store
from txfm_data.store.protocol import Store

ROOT = Path(__file__).resolve().parents[2]
H5AD = ["h5ad", "pbmc.h5ad", "--values", "counts"]
MTX = ["10x", "filtered_feature_bc_matrix", "--values", "counts"]
GCT = ["gct", "gene_reads.gct.gz", "--values", "counts"]
STAR = ["star", "star", "--values", "counts"]
TABLE = ["table", "featurecounts.txt", "--values", "counts", "--orientation", "genes-by-samples"]
COORDINATES = ["--skip-columns", "Chr", "Start", "End", "Strand", "Length"]
EXPECTED = [
    "table",
    "gene_counts.tsv",
    "--values",
    "counts",
    "--orientation",
    "genes-by-samples",
    "--symbol-column",
    "gene_name",
]
CENSUS = ["census", "--uri", "census"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for each page on sources and stores, with its files. Read them only."""
    folder = tmp_path_factory.mktemp("files")
    for name, make in doc_files.PAGES.items():
        if name == "shard":  # its store has the name of another page's
            continue
        (folder / name).mkdir()
        make(folder / name)
    return folder


@pytest.fixture
def work(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder, empty but for links to all of those files; and a place of its own for temporary files."""
    (tmp_path / "work").mkdir()
    (tmp_path / "scratch").mkdir()
    for path in made.glob("*/*"):
        target = tmp_path / "work" / path.name
        if not target.exists():
            target.symlink_to(path)
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    yield tmp_path / "work"
    assert not list((tmp_path / "scratch").iterdir()), "temporary files are left"


def whole(arguments: tuple[object, ...]) -> list[str]:
    """The words of a call. Stores get whole paths: TileDB takes its process' first folder for the current one."""
    words = [str(word) for word in arguments]
    after = ["", *words]
    is_store = [word.endswith((".soma", ".zarr")) or after[i] == "--store" for i, word in enumerate(words)]
    return [str(Path(word).absolute()) if here else word for word, here in zip(words, is_store, strict=True)]


def opened(name: str) -> Store:
    return open_store(Path(name).absolute())


def call(main: Callable[[list[str]], int], *arguments: object, capsys: pytest.CaptureFixture[str]) -> dict:
    capsys.readouterr()
    assert main([*whole(arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def fails(
    main: Callable[[list[str]], int], *arguments: object, capsys: pytest.CaptureFixture[str], code: int = 1
) -> str:
    """The error of a call that must fail, print nothing on stdout, and leave the folder as it was."""
    before = sorted(path.name for path in Path().iterdir())
    capsys.readouterr()
    assert main(whole(arguments)) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Traceback" not in captured.err
    assert sorted(path.name for path in Path().iterdir()) == before
    return captured.err


# --- every kind ------------------------------------------------------------------------------------------------------

KINDS = {
    "h5ad": ([*H5AD, "--batch", "donor", "--cell-type", "cell_type"], 24, 40, "donor0"),
    "10x h5": (
        ["10x", "filtered_feature_bc_matrix.h5", "--values", "counts", "--sample-table", "cells.csv", "--batch", "donor"],
        24, 40, "donor0",
    ),
    "10x folder": (MTX, 24, 36, "name"),
    "gct": ([*GCT, "--sample-table", "SampleAttributesDS.txt", "--batch", "SMGEBTCH"], 24, 40, "LCSET-0"),
    "star gdc": (
        ["star", "gdc", "--values", "counts", "--sample-sheet", "gdc_sample_sheet.tsv", "--batch", "project_id"],
        24, 40, "TCGA-BRCA",
    ),
    "star": ([*STAR, "--column", "stranded_second", "--sample-table", "patients.tsv", "--batch", "plate"], 6, 40, "plate0"),
    "table": ([*TABLE, *COORDINATES, "--sample-table", "samples.csv", "--batch", "plate"], 6, 40, "plate0"),
    "expected": ([*EXPECTED, "--non-integer", "ok"], 6, 40, "name"),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_dry_run_writes_nothing_and_says_what_the_run_then_does(kind, work, capsys):
    arguments, n_obs, n_genes, batch = KINDS[kind]
    arguments = [*arguments, "--store", "s.soma", "--dataset", "name"]
    before = set(work.iterdir())
    planned = call(ingest.main, *arguments, "--dry-run", capsys=capsys)
    assert planned["dry_run"] is True and planned["memory_bytes"] == 2 * 1024**3 and planned["blocks"] == 1
    assert set(work.iterdir()) == before
    done = call(ingest.main, *arguments, capsys=capsys)
    assert set(work.iterdir()) == before | {work / "s.soma"}
    for result in (planned, done):
        assert (result["dataset"], result["n_obs"], result["genes_matched"], result["genes_in_file"]) == (
            "name", n_obs, n_genes, n_genes,
        )  # fmt: skip
    assert planned["nnz_estimated"] == done["nnz"] and done["n_dropped_empty"] == 0
    made = opened("s.soma")
    assert (made.n_obs, made.datasets[0].total) == (n_obs, done["total"])
    assert made.obs(["batch"])["batch"].to_pylist()[0] == batch
    with cellxgene_census.open_soma(uri=str(work / "s.soma")) as census:
        obs = cellxgene_census.get_obs(census, "homo_sapiens")
    assert obs["raw_sum"].sum() == done["total"] and obs["nnz"].sum() == done["nnz"]


def test_what_it_prints(work, capsys):
    arguments = [*H5AD, "--store", "s.soma", "--dataset", "pbmc", "--batch", "donor"]
    assert ingest.main([*whole((*arguments, "--dry-run"))]) == 0
    assert re.search(r"pbmc \(dry run, nothing written\): 24 samples x 40 genes", capsys.readouterr().out)
    assert ingest.main(whole((*arguments,))) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("pbmc: 24 samples x 40 genes (matched 40 of 40 columns), ")
    assert captured.out.endswith(f"store: {work}/s.soma\n")
    assert "matched 40 of 40 genes" in captured.err and "24/24 samples (100%)" in captured.err


def test_features_that_are_no_genes_are_counted_and_left_out(work, capsys):
    result = call(ingest.main, *MTX, "--store", "s", "--dataset", "d", "--dry-run", capsys=capsys)
    assert result["features_left_out"] == {"Antibody Capture": 4}


def test_symbols_are_translated_by_a_gene_map_or_by_the_store(work, capsys):
    named = ["h5ad", "symbols.h5ad", "--layer", "counts", "--values", "counts", "--dataset", "named"]
    assert "--gene-map" in fails(ingest.main, *named, "--store", "s.soma", capsys=capsys)
    call(ingest.main, *H5AD, "--store", "s.soma", "--dataset", "pbmc", capsys=capsys)
    assert call(ingest.main, *named, "--store", "s.soma", "--dry-run", capsys=capsys)["genes_matched"] == 30
    few = [*named, "--store", "s.soma", "--min-matched", "0.8"]
    assert "30 of 40 columns match a gene, expected at least 80%" in fails(ingest.main, *few, capsys=capsys)
    mapped = [*named, "--store", "s.soma", "--gene-map", "genes.tsv", "--obs-columns", "donor"]
    assert call(ingest.main, *mapped, capsys=capsys)["genes_matched"] == 40
    names = opened("s.soma").obs_schema().names
    assert "donor" in names and opened("s.soma").vocabulary.symbols[0] == "gene0"


def test_samples_without_counts(work, capsys):
    adata = ad.read_h5ad("pbmc.h5ad")
    dense = adata.X.toarray()
    dense[[3, 9]] = 0
    ad.AnnData(dense, adata.obs, adata.var).write_h5ad("holes.h5ad")
    arguments = ["h5ad", "holes.h5ad", "--values", "counts", "--store", "s", "--dataset", "d"]
    error = fails(ingest.main, *arguments, capsys=capsys)
    assert "2 of 24 samples have no count at all (first: 'cell3')" in error and "--empty-samples drop" in error
    result = call(ingest.main, *arguments, "--empty-samples", "drop", capsys=capsys)
    assert (result["n_obs"], result["n_dropped_empty"]) == (22, 2)
    dense = dense[:, [*range(40), 0]]
    doubled = ad.AnnData(np.maximum(dense, 1), adata.obs)
    doubled.var_names = [*adata.var_names, adata.var_names[0].split(".")[0]]
    doubled.write_h5ad("doubled.h5ad")
    arguments = ["h5ad", "doubled.h5ad", "--values", "counts", "--store", "t", "--dataset", "d"]
    assert "--duplicates sum" in fails(ingest.main, *arguments, capsys=capsys)
    summed = call(ingest.main, *arguments, "--duplicates", "sum", "--dry-run", capsys=capsys)
    assert (summed["n_panel"], summed["genes_in_file"]) == (40, 41)


# --- wrong use and errors --------------------------------------------------------------------------------------------


def test_help_lists_kinds_and_says_units(capsys):
    for main, kinds in ((ingest.main, ingest.KINDS), (store.main, store.KINDS)):
        assert main(["--help"]) == 0
        text = capsys.readouterr().out
        assert all(re.search(rf"^  {kind} +\S", text, re.MULTILINE) for kind in kinds)
        for kind in kinds:
            assert main([kind, "--help"]) == 0
            assert "--json" in capsys.readouterr().out
    units = ("2GiB", "0 to 1", "tcp://host:8786", "s3://bucket/name", "Processes on this machine")
    for kind in ingest.KINDS:
        assert ingest.main([kind, "--help"]) == 0
        text = " ".join(capsys.readouterr().out.split())
        assert [unit for unit in units if unit not in text] == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["h5ad", "pbmc.h5ad", "--store", "s", "--dataset", "d"], "--values"),
        (["h5ad", "pbmc.h5ad", "--store", "s", "--values", "counts"], "--dataset"),
        ([*H5AD, "--store", "s", "--dataset", "d", "--gene-idz", "x"], "--gene-ids"),
        ([*H5AD, "--store", "s", "--dataset", "d", "--duplicates", "mean"], "error|sum|first"),
        (["table", "matrix.csv", "--store", "s", "--dataset", "d", "--values", "counts"], "--orientation"),
        ([*STAR, "--store", "s", "--dataset", "d", "--column", "tpm_unstranded"], "stranded_first"),
        ([*CENSUS], "--store"),
        (["h5da"], "h5ad"),
        ([], "kinds:"),
    ],
)
def test_wrong_use(arguments, message, work, capsys):
    assert message in fails(ingest.main, *arguments, capsys=capsys, code=2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*H5AD, "--batch", "donr"], "--batch names 'donr', but its samples have the columns ['cell_type', 'donor'"),
        ([*H5AD, "--obs-columns", "age"], "--obs-columns names 'age'"),
        ([*H5AD, "--gene-ids", "ensembl"], "--gene-ids: var has no column 'ensembl'"),
        ([*H5AD, "--perturbation", "guide", "--control", "ctrl"], "no sample has guide == 'ctrl'"),
        ([*H5AD, "--perturbation", "guide"], "--control"),
        ([*H5AD, "--library-size", "cell_type"], "--library-size"),
        ([*H5AD, "--memory-budget", "500MiB"], "give at least 704MiB"),
        ([*H5AD, "--memory-budget", "much"], "is not a size"),
        ([*H5AD, "--min-matched", "2"], "--min-matched"),
        ([*H5AD, "--workers", "2", "--dask-scheduler", "tcp://127.0.0.1:1"], "choose one of them"),
        ([*H5AD, "--gene-map", "no.tsv"], "no.tsv"),
        (["h5ad", "symbols.h5ad", "--values", "counts", "--gene-map", "genes.tsv"], "not a whole number"),
        (["h5ad", "no.h5ad", "--values", "counts"], "no such file"),
        (["h5ad", "cells.csv", "--values", "counts"], "not an HDF5 file"),
        ([*MTX[:1], "filtered_feature_bc_matrix/matrix.mtx.gz", *MTX[2:]], "give the folder"),
        ([*MTX, "--feature-type", "Antibody"], "name one with --feature-type"),
        ([*MTX, "--sample-table", "samples.csv"], "samples have no row"),
        (["gct", "SampleAttributesDS.txt", "--values", "counts"], "expected '#1.2'"),
        ([*STAR, "--sample-sheet", "gdc_sample_sheet.tsv"], "does not fit"),
        (["star", "census", "--values", "counts"], "holds no file named"),
        (TABLE, "--skip-columns"),
        (EXPECTED, "--non-integer ok"),
        (["table", "matrix.csv", "--values", "counts", "--orientation", "samples-by-genes"], "--gene-map"),
        (["table", "featurecounts.txt", "--values", "counts", "--orientation", "samples-by-genes"], "not a number"),
    ],
)
def test_errors_name_the_remedy_and_leave_nothing(arguments, message, work, capsys):
    assert message in fails(ingest.main, *arguments, "--store", "s", "--dataset", "d", capsys=capsys)


def test_a_cut_file_leaves_nothing(work, capsys):
    whole = Path("gene_reads.gct.gz").read_bytes()
    Path("cut.gct.gz").write_bytes(whole[: len(whole) // 2])
    arguments = ["gct", "cut.gct.gz", "--values", "counts", "--store", "s", "--dataset", "d"]
    assert "cut or damaged" in fails(ingest.main, *arguments, capsys=capsys)


def test_nothing_is_ingested_twice_and_units_do_not_mix(work, capsys):
    call(ingest.main, *H5AD, "--store", "s.soma", "--dataset", "pbmc", capsys=capsys)
    size = call(info.main, "s.soma", capsys=capsys)["bytes"]
    assert "dataset 'pbmc' is there already" in fails(
        ingest.main, *GCT, "--store", "s.soma", "--dataset", "pbmc", capsys=capsys
    )
    assert "the same file was ingested as dataset 'pbmc'" in fails(
        ingest.main, *H5AD, "--store", "s.soma", "--dataset", "again", capsys=capsys
    )
    normalized = [*EXPECTED[:2], "--values", "normalized", *EXPECTED[4:], "--store", "s.soma", "--dataset", "tpm"]
    assert "a store has one unit of values" in fails(ingest.main, *normalized, capsys=capsys)
    expected = [*EXPECTED, "--non-integer", "ok", "--store", "s.soma", "--dataset", "rsem"]
    assert "--dtype float64" in fails(ingest.main, *expected, capsys=capsys)
    assert "letters, digits" in fails(ingest.main, *GCT, "--store", "s.soma", "--dataset", "a b", capsys=capsys)
    assert call(info.main, "s.soma", capsys=capsys)["bytes"] == size
    assert call(verify.main, "s.soma", capsys=capsys)["n_datasets"] == 1


# --- census ----------------------------------------------------------------------------------------------------------


def test_a_census_slice_is_planned_ingested_and_continued(work, capsys):
    lung = [*CENSUS, "--batch", "donor_id", "--dataset-ids", "datasets.txt", "--obs-columns", "assay"]
    planned = call(ingest.main, *lung, "--store", "c.soma", "--dry-run", capsys=capsys)
    assert planned["dry_run"] is True and not Path("c.soma").exists()
    plan = planned["plan"]
    assert plan["build_date"] == "2026-11-02" and plan["bytes_of_store"] == 2 * plan["nnz"]
    assert [part["dataset_id"] for part in plan["datasets"]] == ["aaaa-lung", "bbbb-blood"]
    first = call(ingest.main, *lung, "--store", "c.soma", capsys=capsys)
    n_empty = sum(found["n_dropped_empty"] for found in first["datasets"])
    assert first["n_obs"] + n_empty == plan["n_obs"] == sum(part["n_obs"] for part in plan["datasets"])
    again = call(ingest.main, *CENSUS, "--batch", "donor_id", "--store", "c.soma", capsys=capsys)
    assert again["there_already"] == ["aaaa-lung", "bbbb-blood"]
    assert [found["dataset"] for found in again["datasets"]] == ["cccc-smartseq"]
    other = [*CENSUS, "--store", "c.soma", "--obs-filter", "cell_type == 'T cell'"]
    assert "'aaaa-lung' is there already" in fails(ingest.main, *other, capsys=capsys)
    assert call(verify.main, "c.soma", capsys=capsys)["n_obs"] == first["n_obs"] + again["n_obs"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--uri", "census", "--obs-filter", "tissue_general == 'long'"], "near it: ['lung']"),
        (["--uri", "census", "--obs-filter", "tissue_general = 'lung'"], "write '=='"),
        (["--uri", "census", "--organism", "mus_musculus"], "it holds ['homo_sapiens']"),
        (["--uri", "census", "--dataset-ids", "no.txt"], "one Census dataset id a line"),
        (["--uri", "census", "--dataset-ids", "cells.csv"], "--dataset-ids names"),
        (["--uri", "census", "--max-samples", "0"], "--max-samples"),
        (["--uri", "census", "--batch", "donr"], "--batch names 'donr'"),
        (["--uri", "census", "--tiledb-config", "vfs.s3.region"], "KEY=VALUE"),
        (["--uri", "nowhere"], "census_info and census_data"),
        ([], "--version"),
    ],
)
def test_errors_of_a_census_slice(arguments, message, work, capsys):
    assert message in fails(ingest.main, "census", *arguments, "--store", "s", capsys=capsys)


# --- where it works --------------------------------------------------------------------------------------------------


def test_a_dask_scheduler_gives_the_same_store(work, tmp_path, capsys):
    dask, distributed = pytest.importorskip("dask"), pytest.importorskip("distributed")
    arguments = ["h5ad", "atlas.h5ad", "--values", "counts", "--dataset", "atlas"]
    alone = call(ingest.main, *arguments, "--store", "alone.soma", capsys=capsys)
    with (
        dask.config.set(temporary_directory=str(tmp_path / "dask")),
        distributed.LocalCluster(
            n_workers=1, threads_per_worker=1, processes=True, dashboard_address="127.0.0.1:0", memory_limit=0
        ) as cluster,
    ):
        address = cluster.scheduler_address
        shared = call(
            ingest.main, *arguments, "--store", work / "shared.soma", "--dask-scheduler", address, capsys=capsys
        )
    assert {k: v for k, v in shared.items() if k != "store"} == {k: v for k, v in alone.items() if k != "store"}
    assert call(verify.main, "shared.soma", capsys=capsys)["nnz"] == alone["nnz"]


def test_the_least_budgets_of_the_page_are_those_of_the_code():
    page = (ROOT / "docs" / "howto" / "parallel_ingest.md").read_text()
    rows = re.findall(r"^\| (\d+) \| ([\d,]+) MiB \|$", page, re.MULTILINE)
    assert len(rows) >= 4
    for workers, least in rows:
        n_bytes = int(least.replace(",", "")) * 1024**2
        IngestOptions(workers=Workers(n=int(workers), memory=n_bytes))
        with pytest.raises(ValueError, match=f"give at least {n_bytes // 1024**2}MiB"):
            IngestOptions(workers=Workers(n=int(workers), memory=n_bytes - 1))


# --- txfm store ------------------------------------------------------------------------------------------------------


@pytest.fixture
def copied(work: Path) -> Path:
    """Stores that a test may change: store.soma (pbmc, lung) and new.soma (liver)."""
    for name in ("store.soma", "new.soma"):
        origin = (work / name).resolve()
        (work / name).unlink()
        shutil.copytree(origin, work / name)
    return work


def test_convert_append_consolidate(copied, capsys):
    result = call(store.main, "convert", "store.soma", "store.zarr", capsys=capsys)
    assert (result["backend"], result["copied"], result["n_obs"]) == ("zarr", ["pbmc", "lung"], 48)
    assert ad.read_zarr("store.zarr").shape == (48, 45) and (opened("store.zarr").dtype == np.uint32)
    assert "txfm store append" in fails(store.main, "convert", "store.soma", "store.zarr", capsys=capsys)
    result = call(store.main, "append", "new.soma", "store.zarr", capsys=capsys)
    assert (result["copied"], result["there_already"], result["n_obs"], result["n_vars"]) == (["liver"], [], 72, 50)
    assert call(store.main, "append", "new.soma", "store.zarr", capsys=capsys)["there_already"] == ["liver"]
    result = call(
        store.main, "convert", "store.soma", "f.soma", "--dtype", "float64", "--datasets", "lung", capsys=capsys
    )
    assert (result["backend"], result["copied"]) == ("soma", ["lung"]) and opened("f.soma").dtype == np.float64
    result = call(store.main, "consolidate", "store.soma", capsys=capsys)
    assert result["files_after"] < result["files_before"]
    for path in ("store.soma", "store.zarr", "f.soma"):
        assert call(verify.main, path, capsys=capsys)["unfinished"] is False
    assert "nothing to consolidate" in fails(store.main, "consolidate", "store.zarr", capsys=capsys)


def test_store_verbs_print_what_they_did(copied, capsys):
    append = whole(("append", "new.soma", "store.soma"))
    assert store.main(append) == 0
    assert capsys.readouterr().out == f"copied liver\nstore: {copied}/store.soma (soma, 72 samples, 50 genes)\n"
    assert store.main(append) == 0
    assert capsys.readouterr().out.startswith("copied nothing; already there: liver\n")


@pytest.mark.parametrize(
    ("arguments", "message", "code"),
    [
        (["append", "new.soma", "nowhere.soma"], "no store there", 1),
        (["append", "nowhere.soma", "store.soma"], "no store there", 1),
        (["append", "new.soma", "store.soma", "--datasets", "livr"], "it has ['liver']", 1),
        (["convert", "nowhere.soma", "x.soma"], "no store there", 1),
        (["consolidate", "nowhere.soma"], "no store there", 1),
        (["convert", "store.soma", "x.soma", "--dtype", "uint8"], "uint32|float64", 2),
        (["convert", "store.soma", "x.soma", "--to", "h5ad"], "soma|zarr", 2),
        (["convert", "store.soma"], "TARGET", 2),
        (["convrt"], "convert", 2),
        ([], "kinds:", 2),
    ],
)
def test_errors_of_store_verbs(arguments, message, code, work, capsys):
    assert message in fails(store.main, *arguments, capsys=capsys, code=code)


def test_a_damaged_store_is_named_by_verify_and_not_opened(copied, capsys):
    (counts,) = [path for path in Path("new.soma").rglob("a0.tdb") if "X/raw" in str(path)][:1]
    data = bytearray(counts.read_bytes())
    data[len(data) // 2] ^= 1
    counts.write_bytes(bytes(data))
    assert f"{counts}: its sha256" in fails(verify.main, "new.soma", capsys=capsys)
    assert "its sha256" in fails(store.main, "append", "new.soma", "store.soma", capsys=capsys)
    Path("store.soma/.DS_Store").touch()
    error = fails(verify.main, "store.soma", capsys=capsys)
    assert ".DS_Store: not in the store's list of files" in error and "remove what it wrote" in error
    Path("store.soma/.DS_Store").unlink()
    assert call(verify.main, "store.soma", capsys=capsys)["n_obs"] == 48
    (gone,) = [path for path in Path("store.soma").rglob("__commits/*") if "X/raw" in str(path)][:1]
    gone.unlink()
    assert "missing, though the store's list has it" in fails(verify.main, "store.soma", capsys=capsys)


def test_a_list_of_sources(work, capsys):
    entries = [
        "- {kind: h5ad, path: pbmc.h5ad, dataset: pbmc, values: counts, batch: donor}",
        "- {kind: gct, path: gene_reads.gct.gz, dataset: gtex, values: counts}",
    ]
    (work / "list.yaml").write_text("\n".join(entries))
    (work / "wrong.yaml").write_text(entries[0].replace(", values: counts", ""))
    (work / "text.yaml").write_text("kind: h5ad")
    assert ingest.main(["list", "list.yaml", "--store", "s", "--dry-run", "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)["datasets"]
    assert not (work / "s").exists()
    assert ingest.main(["list", "list.yaml", "--store", "s", "--obs-columns", "none"]) == 0
    assert "pbmc: " in capsys.readouterr().out
    records = open_store("s").datasets
    assert [(d.name, d.n_obs, d.n_panel) for d in records] == [
        (d["dataset"], d["n_obs"], d["n_panel"]) for d in planned
    ]
    assert [d.modality for d in records] == ["sc", "bulk"]
    for name, message in (
        ("wrong.yaml", "entry 1 must say what its matrix holds"),
        ("text.yaml", "expected a list of entries"),
        ("none.yaml", "no such file"),
    ):
        assert ingest.main(["list", name, "--store", "t"]) == 1
        assert message in capsys.readouterr().err
    assert not (work / "t").exists()
