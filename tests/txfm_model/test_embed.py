"""Embedding samples: the same numbers whatever the batch, and bad input refused by name."""

import numpy as np
import pytest
import scipy.sparse as sp
import torch

from txfm_model.embed import embed_samples

N_VARS = 30


@pytest.fixture
def samples():
    rng = np.random.default_rng(5)
    counts = sp.csr_matrix(rng.poisson(rng.gamma(0.4, 3.0, (23, N_VARS))).astype(np.float32))
    token_ids = rng.permutation(40)[:N_VARS].astype(np.int32)
    token_ids[[3, 17]] = -1
    library_size = np.asarray(counts.sum(1)).ravel() + 50.0
    return counts, token_ids, library_size


def plain(model, counts, token_ids, library_size):
    """One sample at a time, from the definition."""
    rows = []
    for row, size in zip(counts.toarray(), library_size, strict=True):
        shown = np.flatnonzero(token_ids >= 0)
        values = np.log1p(1e5 * row[shown] / size).astype(np.float32)
        with torch.no_grad():
            ids = torch.from_numpy(token_ids[shown].astype(np.int64))
            rows.append(model.encode(ids[None], torch.from_numpy(values)[None])[0].numpy())
    return np.stack(rows)


def test_it_equals_one_sample_at_a_time(tiny_model, samples):
    got = embed_samples(tiny_model, *samples, batch_size=7)
    assert got.dtype == np.float32
    assert got.shape == (23, 16)
    np.testing.assert_allclose(got, plain(tiny_model, *samples), atol=1e-5)


@pytest.mark.parametrize("n_unmasked", [None, 9, 28, 1000])
def test_it_does_not_depend_on_the_batch(tiny_model, samples, n_unmasked):
    whole = embed_samples(tiny_model, *samples, batch_size=64, n_unmasked=n_unmasked, seed=3)
    for batch_size in (1, 5, 23):
        part = embed_samples(tiny_model, *samples, batch_size=batch_size, n_unmasked=n_unmasked, seed=3)
        np.testing.assert_allclose(part, whole, atol=1e-5)
    if n_unmasked in (28, 1000):
        np.testing.assert_allclose(whole, embed_samples(tiny_model, *samples), atol=1e-5)


def test_parts_of_a_matrix_equal_the_whole(tiny_model, samples):
    counts, token_ids, size = samples
    whole = embed_samples(tiny_model, counts, token_ids, size, n_unmasked=9, seed=1)
    second = embed_samples(tiny_model, counts[10:], token_ids, size[10:], n_unmasked=9, seed=1, first_row=10)
    np.testing.assert_allclose(second, whole[10:], atol=1e-5)


def test_the_draw_depends_on_seed_and_row(tiny_model, samples):
    counts, token_ids, size = samples
    same = sp.csr_matrix(np.tile(counts[0].toarray(), (4, 1)))
    drawn = embed_samples(tiny_model, same, token_ids, np.full(4, size[0]), n_unmasked=6, seed=1)
    assert not np.allclose(drawn[0], drawn[1], atol=1e-4)
    other = embed_samples(tiny_model, same, token_ids, np.full(4, size[0]), n_unmasked=6, seed=2)
    assert not np.allclose(drawn, other, atol=1e-4)


def test_the_mode_of_the_model_is_kept_and_dropout_is_off(tiny_model, samples):
    evaluated = embed_samples(tiny_model, *samples)
    tiny_model.train()
    np.testing.assert_array_equal(embed_samples(tiny_model, *samples), evaluated)
    assert tiny_model.training


def test_order_of_columns_and_repeated_entries_do_not_matter(tiny_model, samples):
    counts, token_ids, size = samples
    order = np.random.default_rng(0).permutation(N_VARS)
    shuffled = embed_samples(tiny_model, counts[:, order].tocsr(), token_ids[order], size)
    np.testing.assert_allclose(shuffled, embed_samples(tiny_model, *samples), atol=1e-5)
    halves = sp.csr_matrix(
        (
            np.repeat(counts.data / 2, 2),
            np.repeat(counts.indices, 2),
            counts.indptr * 2,
        ),
        shape=counts.shape,
    )
    np.testing.assert_allclose(embed_samples(tiny_model, halves, token_ids, size), shuffled, atol=1e-5)


def test_progress_counts_samples(tiny_model, samples):
    seen = []
    embed_samples(tiny_model, *samples, batch_size=10, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(10, 23), (20, 23), (23, 23)]


def test_no_samples(tiny_model, samples):
    counts, token_ids, size = samples
    assert embed_samples(tiny_model, counts[:0], token_ids, size[:0]).shape == (0, 16)


@pytest.mark.parametrize("value", [np.nan, np.inf, -1.0])
def test_bad_counts_name_their_row(tiny_model, samples, value):
    counts, token_ids, size = samples
    counts.data[counts.indptr[12]] = value
    with pytest.raises(ValueError, match="row 112: counts must be finite and not negative"):
        embed_samples(tiny_model, counts, token_ids, size, first_row=100)


@pytest.mark.parametrize("value", [0.0, -3.0, np.nan])
def test_bad_library_sizes_name_their_row(tiny_model, samples, value):
    counts, token_ids, size = samples
    size[4] = value
    with pytest.raises(ValueError, match="row 4: library size must be above 0"):
        embed_samples(tiny_model, counts, token_ids, size)


def test_genes_that_do_not_fit(tiny_model, samples):
    counts, token_ids, size = samples
    with pytest.raises(ValueError, match="none of the 30 genes is in the model's vocabulary of 40"):
        embed_samples(tiny_model, counts, np.full(N_VARS, -1), size)
    twice = token_ids.copy()
    twice[5] = twice[6]
    with pytest.raises(ValueError, match="more than one column, for example ENSG"):
        embed_samples(tiny_model, counts, twice, size)
    with pytest.raises(ValueError, match="one for each of the 30 columns"):
        embed_samples(tiny_model, counts, token_ids[:-1], size)
    token_ids[0] = 40
    with pytest.raises(ValueError, match="40 is not in the vocabulary"):
        embed_samples(tiny_model, counts, token_ids, size)


def test_other_misuse(tiny_model, samples):
    counts, token_ids, size = samples
    with pytest.raises(ValueError, match="library_size: expected one"):
        embed_samples(tiny_model, counts, token_ids, size[:-1])
    with pytest.raises(TypeError, match="CSR"):
        embed_samples(tiny_model, counts.tocsc(), token_ids, size)
    with pytest.raises(ValueError, match="batch_size"):
        embed_samples(tiny_model, counts, token_ids, size, batch_size=0)
    with pytest.raises(ValueError, match="n_unmasked"):
        embed_samples(tiny_model, counts, token_ids, size, n_unmasked=0)


def test_an_anndata_object_is_embedded_as_its_arrays_are(tiny_shards, tiny_files):
    import anndata as ad

    from shards.manifest import Corpus
    from txfm_model.config import ModelConfig
    from txfm_model.model import TxFM

    vocabulary = Corpus(tiny_shards).vocabulary
    model = TxFM(ModelConfig(width=16, blocks=1, heads=2, decoder_blocks=1), vocabulary)
    adata = ad.read_h5ad(tiny_files[0])
    sizes = np.asarray(adata.X.sum(axis=1), np.float64).ravel()
    tokens = vocabulary.index_of(list(adata.var_names))
    expected = embed_samples(model, adata.X, tokens, sizes)
    np.testing.assert_allclose(model.embed(adata), expected, atol=1e-6)
    named = adata.copy()
    named.layers["counts"], named.obs["size"] = named.X.copy(), sizes
    named.X = np.log1p(named.X.toarray())
    named.var_names = [f"{gene}.{i}" for i, gene in enumerate(named.var_names)]
    got = model.embed(named[:, ::-1].copy(), counts_layer="counts", symbols="symbol", library_size="size", batch_size=7)
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_values_that_are_not_whole_are_refused_unless_they_are_expected_counts(tiny_model):
    import anndata as ad
    import pandas as pd

    var = pd.DataFrame(index=list(tiny_model.vocabulary.gene_ids[:5]))
    adata = ad.AnnData(sp.csr_matrix(np.array([[1.5, 0, 2, 3, 0], [1, 0, 0, 0, 4]], np.float32)), var=var)
    for call in (tiny_model.embed, lambda adata, **options: tiny_model.impute(adata, var.index[:1], **options)):
        with pytest.raises(ValueError, match=r"not whole, such as 1.5.*non_integer='ok'"):
            call(adata)
    assert tiny_model.embed(adata, non_integer="ok").shape == (2, 16)
    adata.layers["counts"] = np.floor(adata.X.toarray())
    assert tiny_model.embed(adata, counts_layer="counts").shape == (2, 16)
