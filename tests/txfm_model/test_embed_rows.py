"""Chosen samples of a store through a checkpoint: the numbers of `txfm embed STORE`, of the chosen genes alone."""

from functools import partial
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pytest
import scipy.sparse as sp
import torch

from tests.conftest import GENES_A, make_adata
from tests.txfm_data.curate.contexts import context_of
from txfm_data import ingest
from txfm_data.curate import blocks
from txfm_data.curate.embedding import check_embedding, fingerprint_of, make_embedding
from txfm_data.curate.recipe import EmbeddingSpec
from txfm_data.curate.state import State
from txfm_data.store.opening import open_store
from txfm_data.store.protocol import Store
from txfm_data.vocabulary import Vocabulary
from txfm_model.config import ModelConfig
from txfm_model.embed import embed_file, embed_samples
from txfm_model.embedding import rows as rows_module
from txfm_model.embedding.encoding import EncodeOptions, parse_layer
from txfm_model.embedding.rows import embed_rows
from txfm_model.model import TxFM


@pytest.fixture(scope="module")
def store(tiny_store: Path) -> Store:
    return open_store(tiny_store)


def save_model(folder: Path, vocabulary: Vocabulary) -> Path:
    torch.manual_seed(0)
    TxFM(ModelConfig(width=16, blocks=2, heads=2, layerscale_init=0.5), vocabulary).eval().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, store: Store) -> Path:
    """An untrained model whose vocabulary is that of the store in another order, less three genes."""
    own = store.vocabulary
    order = np.random.default_rng(0).permutation(len(own))[3:]
    vocabulary = Vocabulary(tuple(own.gene_ids[i] for i in order), tuple(own.symbols[i] for i in order))
    return save_model(tmp_path_factory.mktemp("model") / "checkpoint", vocabulary)


@pytest.fixture
def state(store: Store) -> State:
    """Two samples in three are left, and all genes."""
    state = State.of(store, store.datasets)
    state.alive &= np.arange(store.n_obs) % 3 != 1
    return state


on_cpu = partial(embed_rows, device="cpu", precision="no")


def embed(state: State, folder: Path, path: Path | str | None, number: int = 0, **fields: Any) -> np.ndarray:
    """Embed what is left of a dataset of the store."""
    spec = EmbeddingSpec(kind="checkpoint", path=None if path is None else str(path), **fields)
    return np.load(make_embedding(spec, state, state.records[number], context_of(folder, embed=on_cpu)))


@pytest.mark.parametrize(
    "fields", [{}, {"layer": "1"}, {"n_unmasked": 20}, {"n_unmasked": 20, "batch_size": 5}, {"n_unmasked": 1_000}]
)
def test_it_equals_the_verb(state: State, checkpoint: Path, tmp_path: Path, fields: dict[str, Any]) -> None:
    model = TxFM.from_pretrained(checkpoint)
    options = EncodeOptions(**(fields | {"layer": parse_layer(fields.get("layer", "final"))}))
    embed_file(model, state.store.path, tmp_path / "whole.h5ad", options=options)
    file = EmbeddingSpec(kind="file", path=str(tmp_path / "whole.h5ad"))
    check_embedding(file, state.store, state.records)
    expected = ad.read_h5ad(tmp_path / "whole.h5ad").obsm["X_txfm"]
    for number, record in enumerate(state.records):
        found = embed(state, tmp_path, checkpoint, number, **fields)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected[state.rows(record)], atol=1e-5)
        read = np.load(make_embedding(file, state, record, context_of(tmp_path)))
        np.testing.assert_array_equal(read, expected[state.rows(record)])


def test_genes_outside_the_panel_are_not_shown(state: State, checkpoint: Path, tmp_path: Path) -> None:
    record, store = state.records[0], state.store
    state.panels[record.name] = state.panels[record.name][::2]
    rows, panel = state.rows(record), state.panels[record.name]
    samples = store.read_rows(rows)
    counts = sp.csr_matrix((samples.counts, samples.gene_ids, samples.indptr), (len(rows), len(store.vocabulary)))
    model = TxFM.from_pretrained(checkpoint)
    tokens = model.vocabulary.index_of(tuple(store.vocabulary.gene_ids[g] for g in panel))
    sizes = store.obs(["raw_sum"])["raw_sum"].to_numpy()[rows]
    expected = embed_samples(model, counts[:, panel].tocsr(), tokens, sizes)
    found = embed(state, tmp_path, checkpoint)
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("part_rows", [1, 7, 1_024])
def test_parts_do_not_change_the_result(
    state: State, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part_rows: int
) -> None:
    whole = embed(state, tmp_path, checkpoint, n_unmasked=9)
    monkeypatch.setattr(blocks, "BLOCK_ROWS", 16)
    monkeypatch.setattr(blocks, "_READ_ROWS", 5)
    monkeypatch.setattr(rows_module, "PART_ROWS", part_rows)
    sizes = [len(ids) for ids, _ in rows_module._parts(state.store, state.records[0], state.rows(state.records[0]))]
    assert sum(sizes) == state.n_samples(state.records[0])
    assert all(part_rows <= size < part_rows + 5 for size in sizes[:-1])
    np.testing.assert_allclose(embed(state, tmp_path, checkpoint, n_unmasked=9), whole, atol=1e-5)


def test_a_checkpoint_is_told_from_another_by_its_files(checkpoint: Path, tmp_path: Path) -> None:
    def told(path: Path) -> dict[str, str]:
        return fingerprint_of(EmbeddingSpec(kind="checkpoint", path=str(path)))

    model = TxFM.from_pretrained(checkpoint)
    model.save_pretrained(tmp_path / "same")
    with torch.no_grad():
        model.head.weight[0, 0] += 1
    model.save_pretrained(tmp_path / "other")
    assert sorted(told(checkpoint)) == ["config.json", "model.safetensors"]
    assert told(tmp_path / "same")["model.safetensors"] == told(checkpoint)["model.safetensors"]
    assert told(tmp_path / "other")["model.safetensors"] != told(checkpoint)["model.safetensors"]


def test_progress_counts_samples(state: State, checkpoint: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    spec, record = EmbeddingSpec(kind="checkpoint", path=str(checkpoint), batch_size=10), state.records[0]
    rows = state.rows(record)

    def progress(done: int, total: int) -> None:
        seen.append((done, total))

    on_cpu(spec, state.store, record, rows, state.panels[record.name], tmp_path / "e.npy", progress)
    assert seen == [(min(done, len(rows)), len(rows)) for done in range(0, len(rows) + 10, 10)]


def test_what_cannot_be_embedded(state: State, checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="names no model; give path in the recipe, or --model"):
        embed(state, tmp_path, None)
    with pytest.raises(FileNotFoundError, match="no checkpoint at /nowhere"):
        embed(state, tmp_path, "/nowhere")
    with pytest.raises(ValueError, match="layer 99 is none of this model's"):
        embed(state, tmp_path, checkpoint, layer="99")
    strange = save_model(tmp_path / "strange", Vocabulary(("ENSG00000000001",), ("X",)))
    with pytest.raises(
        ValueError, match="none of the 60 genes that dataset 'first' measured is among the 1 of the model"
    ):
        embed(state, tmp_path, strange)
    assert list((tmp_path / "scratch").iterdir()) == []


def test_a_store_of_normalised_values(checkpoint: Path, tmp_path: Path) -> None:
    adata = make_adata(1, GENES_A, n_obs=8)
    adata.X = sp.csr_matrix(adata.X.toarray() / 3)
    adata.write_h5ad(tmp_path / "a.h5ad")
    ingest.h5ad(tmp_path / "a.h5ad", tmp_path / "store", "a", batch="batch", values="normalized")
    store = open_store(tmp_path / "store")
    with pytest.raises(ValueError, match="holds normalised values, and a model needs counts"):
        embed(State.of(store, store.datasets), tmp_path, checkpoint)
