"""What an embedding is held against: normalised counts and their principal components."""

from txfm_eval.baselines.pca import log_normalize, pca_embedding

__all__ = ["log_normalize", "pca_embedding"]
