"""Small sources in their true formats: what is read back from each is what was drawn."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from txfm_data import ingest
from txfm_data.corpora.entries import CENSUS
from txfm_data.corpora.recipe import CorpusDataset, Source, read_corpus
from txfm_data.ingest.kinds import SOURCE_KINDS
from txfm_data.simulate.formats import draw_small, write_small_sources
from txfm_data.store.opening import open_store

N_OBS, N_GENES = 48, 60
SCREEN = {"batch": "lane", "perturbation": "guide", "control": "none", "cell_type": "kind"}
CASES = {
    "h5ad csr": {"kind": "h5ad", "path": "a.h5ad", **SCREEN},
    "h5ad dense, symbols in the index": {"kind": "h5ad", "path": "a.h5ad", "gene_ids": "ens", "symbols": "name", **SCREEN},
    "h5ad layer": {"kind": "h5ad", "path": "a.h5ad", "layer": "counts"},
    "h5ad raw": {"kind": "h5ad", "path": "a.h5ad", "raw": True, **SCREEN},
    "h5ad by symbols": {"kind": "h5ad", "path": "a.h5ad", "gene_map": "genes.tsv", **SCREEN},
    "10x folder": {"kind": "10x", "path": "deep/mtx", "sample_table": "cells.tsv", **SCREEN},
    "10x h5": {"kind": "10x", "path": "m.h5", "sample_table": "cells.csv", **SCREEN},
    "gct": {"kind": "gct", "path": "x.gct.gz", "sample_table": "t.txt", "batch": "SMGEBTCH", "cell_type": "SMTSD"},
    "star": {"kind": "star", "path": "files", "sample_sheet": "sheet.tsv", "batch": "project_id"},
    "star with labels": {
        "kind": "star", "path": "files", "sample_sheet": "sheet.tsv", "batch": "project_id", "cell_type": "organ",
        "sample_table": "more.tsv",
    },
    "table of genes": {"kind": "table", "path": "x.csv.gz", "orientation": "genes-by-samples", "sample_table": "t.csv", **SCREEN},
    "table with symbols": {"kind": "table", "path": "x.tsv", "orientation": "genes-by-samples", "symbol_column": "s"},
    "table of samples": {"kind": "table", "path": "x.tsv", "orientation": "samples-by-genes"},
}  # fmt: skip
DENSE = "h5ad dense, symbols in the index"


def dataset_of(case: str) -> CorpusDataset:
    """A dataset that reads one case."""
    symbols = case == "h5ad by symbols"
    return CorpusDataset(
        name="d", title="d", ingest=CASES[case] | {"values": "counts"}, gene_ids="symbol" if symbols else "ensembl_version",
        source=Source(matrix="dense" if case == DENSE else None),
    )  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_what_is_read_is_what_was_drawn(case: str, tmp_path: Path) -> None:
    dataset = dataset_of(case)
    corpus = SimpleNamespace(datasets=(dataset,))
    (written,) = write_small_sources(corpus, tmp_path, samples=N_OBS, genes=N_GENES, seed=5).values()
    n = N_OBS if dataset.modality == "sc" else 24
    small = draw_small(dataset, 0, n, N_GENES, 5)
    assert (written["n_obs"], written["n_vars"]) == small.counts.shape == (n, 42)
    entry = dict(dataset.ingest)
    for key in ("path", "sample_table", "sample_sheet", "gene_map"):
        if key in entry:
            entry[key] = str(tmp_path / entry[key])
    ingest.many([entry | {"dataset": "d"}], tmp_path / "s.soma")
    store = open_store(tmp_path / "s.soma")
    rows = store.read_rows(np.arange(n))
    order = np.argsort(store.vocabulary.index_of(list(small.gene_ids)))
    dense = np.zeros((n, len(store.vocabulary)), np.int64)
    dense[np.repeat(np.arange(n), np.diff(rows.indptr)), rows.gene_ids] = rows.counts
    obs = store.obs().to_pandas()
    there = obs["observation_joinid"].map({name: at for at, name in enumerate(small.labels.index)}).to_numpy()
    assert np.array_equal(dense, small.counts.toarray()[there][:, order]), "files of a folder may come in another order"
    if dataset.ingest.get("perturbation"):
        assert set(obs.loc[obs.is_control, "perturbation"]) == {"none"} and 0 < obs.is_control.mean() < 0.5
    if dataset.ingest.get("cell_type"):
        assert obs.cell_type.nunique() == 3
    assert obs.batch.nunique() == (6 if dataset.ingest.get("batch") else 1)


def test_every_kind_of_source_is_tried() -> None:
    assert {case["kind"] for case in CASES.values()} == set(SOURCE_KINDS)


def test_two_writes_are_the_same_bytes_and_seeds_differ(tmp_path: Path) -> None:
    corpus = SimpleNamespace(datasets=tuple(dataset_of(case) for case in ("10x folder", "gct", "star")))
    for folder, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_small_sources(corpus, tmp_path / folder, samples=N_OBS, genes=N_GENES, seed=seed)
    names = sorted(p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*") if p.is_file())
    same = [(tmp_path / "a" / n).read_bytes() == (tmp_path / "b" / n).read_bytes() for n in names]
    assert all(same) and len(names) > 20
    matrix = "deep/mtx/matrix.mtx.gz"
    assert (tmp_path / "a" / matrix).read_bytes() != (tmp_path / "c" / matrix).read_bytes()


def test_a_service_and_sizes_that_are_too_small_are_refused(tmp_path: Path) -> None:
    assert read_corpus("tf_sapiens").datasets[0].kind == CENSUS
    with pytest.raises(ValueError, match="kind census is read from a service"):
        write_small_sources(read_corpus("tf_sapiens"), tmp_path)
    with pytest.raises(ValueError, match="must be at least 40"):
        write_small_sources(read_corpus("tf_sapiens"), tmp_path, genes=10)
