"""Library size and log1p, and PCA of that: the baselines that need no training."""

import numpy as np
import scipy.sparse as sp
from sklearn.decomposition import PCA

TARGET_SUM = 1e5
_MAX_DENSE_VARS = 4000


def log_normalize(
    counts: sp.csr_matrix, library_size: np.ndarray | None = None, *, target_sum: float = TARGET_SUM
) -> sp.csr_matrix:
    """ln(1 + target_sum x count / library size) as float32 CSR; zeros stay zeros.

    counts : (n, n_vars) raw counts.  library_size : (n,) counts over all profiled genes; the row sums if
    None.

    Raises
    ------
    ValueError
        On negative, NaN or infinite counts, or a sample without counts; the rows are named.
    """
    counts = sp.csr_matrix(counts)
    if counts.nnz and not (np.isfinite(counts.data).all() and counts.data.min() >= 0):
        raise ValueError("counts: negative, NaN or infinite values; expected raw counts")
    total = np.asarray(counts.sum(axis=1, dtype=np.float64)).reshape(-1) if library_size is None else library_size
    if len(total) != counts.shape[0]:
        raise ValueError(f"library_size: {len(total)} values, expected one for each of the {counts.shape[0]} samples")
    bad = np.flatnonzero(~(np.asarray(total) > 0))
    if len(bad):
        raise ValueError(
            f"library_size: not above 0 in {len(bad)} samples, first in rows {bad[:5].tolist()}; drop them"
        )
    scale = np.repeat(target_sum / np.asarray(total, np.float64), np.diff(counts.indptr))
    values = np.log1p(counts.data * scale).astype(np.float32)
    return sp.csr_matrix((values, counts.indices, counts.indptr), shape=counts.shape)


def pca_embedding(matrix: np.ndarray | sp.csr_matrix, n_components: int, *, seed: int = 0) -> np.ndarray:
    """Scores of the first principal components, (n, n_components) float32; centred, not whitened.

    matrix : (n, n_vars), usually of `log_normalize`.  A sparse one is never made dense: its covariance is up
    to 4,000 columns, an iterative solver started from `seed` is used above.

    Raises
    ------
    ValueError
        If there are not more samples and genes than components, or on NaN or infinity.
    """
    limit = min(matrix.shape) - 1
    if not 1 <= n_components <= limit:
        raise ValueError(
            f"PCA: {n_components} components of a {matrix.shape[0]} x {matrix.shape[1]} matrix; expected 1 to {limit}"
        )
    if not np.isfinite(matrix.data if sp.issparse(matrix) else matrix).all():
        raise ValueError("PCA: the matrix holds NaN or infinity")
    solver = "covariance_eigh" if matrix.shape[1] <= _MAX_DENSE_VARS else "arpack"
    scores = PCA(n_components, svd_solver=solver, random_state=seed).fit_transform(matrix)
    return np.asarray(scores, dtype=np.float32)
