"""What the variants of the paper's corpus keep of the K562 screen, on a small file of its format."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from txfm_data.corpora.build import BuildOptions, ingest_corpus, select_corpus
from txfm_data.corpora.recipe import Corpus, read_corpus
from txfm_data.corpora.steps import Steps
from txfm_data.curate.recipe import CellsByGenes, EmbeddingSpec, GenesByCells, Phenoprints
from txfm_data.curate.run import CurateOptions
from txfm_data.progress import ignore
from txfm_data.selection import read_selection
from txfm_data.simulate.formats import write_small_sources
from txfm_data.store.opening import open_store

SMALL = {
    GenesByCells: {"min_cells": 10},
    CellsByGenes: {"min_genes": 20},
    Phenoprints: {
        "embedding": EmbeddingSpec(kind="pca", n_components=10),
        "calibrate_to": None,
        "tau": 0.1,
        "n_null": 100,
    },
}
KEPT = {
    "diverse_rna_1.4m": {"non-targeting", "SIM00001", "SIM00002", "SIM00003"},
    "diverse_rna_k562_controls": {"non-targeting"},
    "diverse_rna_k562_full": {"non-targeting", *(f"SIM{i:05d}" for i in range(1, 7))},
}


def screen_of(name: str) -> Corpus:
    """The K562 screen of a corpus with thresholds for a small file."""
    corpus = read_corpus(name).only(["k562_gwps"])
    rules = tuple(replace(rule, **SMALL.get(type(rule), {})) for rule in corpus.curation.rules)
    return corpus.with_curation(replace(corpus.curation, rules=rules))


@pytest.mark.parametrize("name", KEPT)
def test_perturbations_that_a_variant_keeps(name: str, tmp_path: Path) -> None:
    corpus = screen_of(name)
    write_small_sources(corpus, tmp_path / "sources", samples=240, genes=200)
    options = BuildOptions(sources=tmp_path / "sources", out=tmp_path / "out")
    steps = Steps(options.out, corpus.name)
    names = ingest_corpus(corpus, options, steps, other={}, progress=lambda label: ignore, say=lambda text: None)
    assert select_corpus(corpus, names, options, steps, CurateOptions())
    store = open_store(options.out / "store.soma")
    chosen = read_selection(options.out / "selection", store)
    labels = store.obs(["perturbation"])["perturbation"].to_pylist()
    assert set(np.array(labels, object)[chosen.sample_id]) == KEPT[name]
    controls = np.flatnonzero(np.array(labels, object) == "non-targeting")
    assert np.isin(controls, chosen.sample_id).mean() > 0.9, "controls stay, but for those of too few genes"
