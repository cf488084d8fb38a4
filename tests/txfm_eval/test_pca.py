"""Normalised counts and their principal components."""

import numpy as np
import pytest
import scipy.sparse as sp

from txfm_eval.baselines import log_normalize, pca_embedding
from txfm_eval.baselines import pca as module


def counts(n: int = 60, n_vars: int = 30, seed: int = 0) -> sp.csr_matrix:
    rng = np.random.default_rng(seed)
    return sp.csr_matrix(1 + rng.poisson(rng.gamma(1, 1, n_vars) * 2, (n, n_vars)))


def test_values_of_the_specification():
    values = log_normalize(sp.csr_matrix(np.array([[5, 0, 15, 80]]))).toarray()
    expected = [8.517393171418904, 0, 9.61587214452889, 11.289794413577894]
    np.testing.assert_allclose(values[0], expected, rtol=1e-6)


def test_given_library_size_is_used():
    part = log_normalize(sp.csr_matrix(np.array([[5, 15]])), np.array([100.0]))
    np.testing.assert_allclose(part.toarray()[0], [8.517393171418904, 9.61587214452889], rtol=1e-6)


@pytest.mark.parametrize("limit", [4000, 10])
def test_components_equal_a_singular_value_decomposition(monkeypatch, limit):
    """Both solvers; signs are free, so Gram matrices are compared."""
    monkeypatch.setattr(module, "_MAX_DENSE_VARS", limit)
    matrix = log_normalize(counts())
    scores = pca_embedding(matrix, 5, seed=1)
    assert scores.shape == (60, 5)
    assert scores.dtype == np.float32
    assert np.array_equal(scores, pca_embedding(matrix, 5, seed=1))
    dense = matrix.toarray().astype(np.float64)
    u, s, _ = np.linalg.svd(dense - dense.mean(axis=0), full_matrices=False)
    expected = u[:, :5] * s[:5]
    np.testing.assert_allclose(scores @ scores.T, expected @ expected.T, atol=2e-3)
    np.testing.assert_allclose(np.abs(pca_embedding(dense, 5)), np.abs(expected), atol=1e-3)


def test_bad_input_is_refused():
    matrix = counts()
    negative = matrix.copy()
    negative.data[0] = -1
    with pytest.raises(ValueError, match="negative, NaN or infinite"):
        log_normalize(negative)
    empty = matrix.tolil()
    empty[4] = 0
    with pytest.raises(ValueError, match=r"not above 0 in 1 samples, first in rows \[4\]"):
        log_normalize(empty.tocsr())
    with pytest.raises(ValueError, match="3 values, expected one for each of the 60"):
        log_normalize(matrix, np.ones(3))
    with pytest.raises(ValueError, match="30 components of a 60 x 30 matrix; expected 1 to 29"):
        pca_embedding(matrix, 30)
    broken = matrix.astype(float)
    broken.data[3] = np.nan
    with pytest.raises(ValueError, match="NaN or infinity"):
        pca_embedding(broken, 3)
